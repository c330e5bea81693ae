"""Sweeps: what is started, from what, and what is said of jobs that end in any way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

import prefopt.launch.local
import prefopt.launch.slurm
import prefopt.launch.sweep
from prefopt.cli.multirun import Point
from prefopt.config.parse import build, parse, register
from prefopt.errors import UserError
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.estimate import parameters
from prefopt.launch.local import Local
from prefopt.launch.slurm import Slurm, slurm_name
from prefopt.launch.snapshot import python_environment, snapshot
from prefopt.launch.sweep import planned_action, write_job_file
from prefopt.tracking import process
from prefopt.tracking.run import Run
from prefopt.tracking.status import RunsConfig, inspect_runs, select, status_table
from prefopt.train import SWEEP
from prefopt.training.config import TrainConfig
from prefopt.utils import signals
from prefopt.utils.files import write_json
from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, command, records, run_program

FAULTY = ["objective._target_=tests.helpers.faulty.Faulty", "launcher.at_once=2", "steps=2"]


@pytest.fixture(autouse=True)
def handlers():
    """What is called here in this process takes signals as programs do; pytest gets them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def point(*overrides: str) -> Point:
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return Point(list(overrides), compose("train", list(overrides)))


def slurm(**changes) -> Slurm:
    node = OmegaConf.load(ROOT / "conf" / "launcher" / "slurm.yaml")
    return build(OmegaConf.merge(node, changes), Launcher, "launcher")  # type: ignore[return-value]


@pytest.mark.slow
def test_however_a_job_ends_it_is_reported_and_tried_again(overrides, tmp_path):
    arguments = [*overrides(tmp_path), *FAULTY]
    process = run_program("-m", *arguments, "+objective.fault=none,raise,exit,kill")
    assert process.returncode == 1
    found = {r["config"]["objective"]["fault"]: r for r in records(tmp_path)}
    expected = {"none": "finished", "raise": "failed", "exit": "failed", "kill": "failed"}
    assert {fault: r["status"] for fault, r in found.items()} == expected
    assert "3 of 4 jobs have not finished" in process.stderr
    for fault, why in {
        "raise": "RuntimeError: the fault in the objective",
        "exit": "SystemExit: no more of this",
        "kill": "killed by SIGKILL",
    }.items():
        assert why in found[fault]["error"]
        (line,) = [x for x in process.stderr.splitlines() if x.startswith(f"failed: {found[fault]['name']}: ")]
        assert why in line
    assert "the fault in the objective" in (tmp_path / found["raise"]["name"] / "log.txt").read_text()
    assert len({r["pid"] for r in found.values()}) == 4, "jobs shared a process"
    assert all(r["command"].startswith("python -m prefopt.train model=hub ") for r in found.values())
    _, jobs = SWEEP.plan_jobs([point(*arguments, f"+objective.fault={fault}") for fault in expected], Path())
    assert [planned_action(job) for job in jobs] == ["finished", *["failed: again from the start"] * 3]


def test_a_sweep_again_does_nothing_and_an_added_value_is_one_new_job(grid, overrides, monkeypatch):
    runs, _ = grid
    files = {file: file.stat().st_mtime_ns for file in runs.rglob("*")}

    def points(*objectives: str) -> list[Point]:
        same = [*overrides(runs), *SAMPLED, "objective.beta=0.05"]
        return [point(*same, f"objective={objective}") for objective in objectives]

    monkeypatch.setattr(Local, "run", lambda *_: pytest.fail("a job was started"))
    assert SWEEP(points("dpo", "mmpo"), runs, dry_run=False) == 0
    _, jobs = SWEEP.plan_jobs(points("dpo", "mmpo", "ipo"), Path())
    assert [(job.state, job.to_run) for job in jobs] == [("finished", False)] * 2 + [("new", True)]
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*")} == files
    curves = jobs[0].folder / "curves.png"
    curves.unlink()  # as after a job that was killed between its end and them
    assert SWEEP(points("dpo"), runs, dry_run=False) == 0
    assert curves.is_file()


def test_a_dry_run_lists_the_jobs_and_writes_nothing(overrides, tmp_path):
    process = run_program("-m", *overrides(tmp_path / "runs"), "objective=dpo,ipo", "--dry-run")
    assert process.returncode == 0, process.stderr
    assert [process.stdout.count(f"objective={name} ") for name in ("dpo", "ipo")] == [1, 1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_was_submitted_is_what_runs(overrides, tmp_path):
    """A YAML is edited and the code is broken while the second job waits for the first."""
    copy, go = tmp_path / "copy", tmp_path / "go"
    for folder in ("prefopt", "hydra_plugins", "conf", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ["-m", *overrides(tmp_path / "runs"), FAULTY[0], f"+objective.fault={go}", "steps=1", "seed=1,2"]
    environment = ENVIRONMENT | {"PYTHONPATH": ""}
    process = subprocess.Popen(command(*arguments), cwd=copy, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("runs/*/metrics.jsonl")):
        time.sleep(0.05)
    yaml = copy / "conf" / "optimizer" / "adamw.yaml"
    yaml.write_text(yaml.read_text().replace("weight_decay: 0.0", "weight_decay: 0.5"))
    for room in ("loop", "step"):
        edited = copy / "prefopt" / "training" / f"{room}.py"
        assert edited.is_file()
        edited.write_text("raise RuntimeError('edited')")
    assert [r["status"] for r in records(tmp_path / "runs")].count("queued") == 1
    go.touch()
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert [r["status"] for r in records(tmp_path / "runs")] == ["finished", "finished"]
    assert {r["config"]["optimizer"]["weight_decay"] for r in records(tmp_path / "runs")} == {0.0}


@pytest.mark.slow
def test_a_stopped_sweep_saves_and_goes_on_without_repeating_a_step(overrides, tmp_path):
    go, runs, steps = tmp_path / "go", tmp_path / "runs", 100
    arguments = ["-m", *overrides(runs), FAULTY[0], f"+objective.fault={go}", f"steps={steps}"]
    arguments += ["eval_every=100", "save_every=100", "seed=1,2"]
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(runs.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    while "stopping" not in (line := process.stderr.readline()):
        assert line
    go.touch()
    process.communicate()
    assert process.returncode == 130
    assert [r["status"] for r in records(runs)] == ["interrupted"] * 2
    (checkpoint,) = runs.glob("*/checkpoints/step_*")
    assert 1 <= int(checkpoint.name.removeprefix("step_")) < steps
    folder = checkpoint.parents[1]
    again = run_program(str(folder), program="job")
    assert again.returncode == 0, again.stderr
    assert f"going on from step {int(checkpoint.name.removeprefix('step_'))} of" in again.stderr
    (record,) = [r for r in records(runs) if r["status"] == "finished"]
    assert (record["attempt"], record["error"]) == (2, None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, steps + 1))


# Fake jobs: a shell script in the place of Python.


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(n, script) -> n queued jobs whose process is `script`, called with its run folder as $3."""

    def make(n: int, script: str) -> list[SweepJob]:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/bash\n[ "$3" != --warm ] || exit 1\n{script}\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        jobs = []
        for i in range(n):
            run = SimpleNamespace(folder=tmp_path / f"run{i}", id=f"id{i}", name=f"run{i}")
            run.folder.mkdir(exist_ok=True)
            record = {"status": "queued", "config": {"steps": 1}} | process.process_info() | {"slurm_job": None}
            (run.folder / "record.json").write_text(json.dumps(record))
            (run.folder / "job.json").write_text("{}")
            jobs.append(SweepJob([], f"job{i}", None, None, run.folder, run))  # type: ignore[arg-type]
        return jobs

    return make


FINISH = 'sed -i s/queued/finished/ "$3/record.json"'


def test_local_jobs_are_never_more_than_asked_for_and_share_no_gpu(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(prefopt.launch.local, "visible_gpus", lambda: ["3", "5"])
    lock = f"{tmp_path}/gpu$CUDA_VISIBLE_DEVICES"
    jobs = fake(6, f"mkdir {lock} || exit 9; echo $CUDA_VISIBLE_DEVICES > $3/gpu; sleep 0.1; rmdir {lock}; {FINISH}")
    Local(at_once=None).run(jobs, tmp_path, tmp_path)
    assert {each.state for each in inspect_runs([job.folder for job in jobs])} == {"finished"}
    assert {(job.folder / "gpu").read_text().strip() for job in jobs} == {"3", "5"}


def test_a_silent_end_is_a_failure(fake, tmp_path):
    jobs = fake(1, "exit 0")
    Local(at_once=1).run(jobs, tmp_path, tmp_path)
    (found,) = inspect_runs([jobs[0].folder])
    assert found.state == "failed"
    assert "exit code 0" in found.why


def test_arrays_stay_below_the_sites_limit(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(prefopt.launch.slurm, "parameters", lambda _: 10**9)
    submitted: list[tuple[str, str | None]] = []

    def submit(script: Path, after: str | None) -> str:
        submitted.append((script.read_text(), after))
        return str(100 + len(submitted))

    monkeypatch.setattr(prefopt.launch.slurm, "submit", submit)
    jobs = fake(25, "")
    sweep = tmp_path / "sweep"
    slurm(array_limit=10, at_once=4, log_folder=str(tmp_path / "logs")).run(jobs, tmp_path / "code", sweep)
    assert [text.split("--array=")[1].split()[0] for text, _ in submitted] == ["0-9%4", "0-9%4", "0-4%4"]
    assert [after for _, after in submitted] == [None, "101", "102"]  # so that the cap holds over all of them
    listed = [line for i in range(3) for line in (sweep / f"jobs_{i}.txt").read_text().splitlines()]
    assert listed == [f"{job.folder}\t{job.folder.name}" for job in jobs]
    assert all(f"--job-name={slurm_name(tmp_path.name)}\n" in text for text, _ in submitted)  # until they begin
    assert [f"--output={tmp_path}/logs/sweep_jobs_{i}_%a.out" in text for i, (text, _) in enumerate(submitted)] == [
        True
    ] * 3
    assert (tmp_path / "logs").is_dir()
    ids = [json.loads((job.folder / "job.json").read_text())["slurm_job"] for job in jobs]
    assert ids == [f"{101 + i // 10}_{i % 10}" for i in range(25)]


def test_resources_grow_with_the_model(monkeypatch):
    job = SimpleNamespace(model=None)
    found = []
    for billions in (0.1, 1, 8):
        monkeypatch.setattr(prefopt.launch.slurm, "parameters", lambda _, n=billions: int(n * 1e9))
        found.append(slurm(hours=1, hours_per_billion=2, memory_gib=8, memory_gib_per_billion=20).limits(job))
    assert found == [(72, 10), (180, 28), (1020, 168)]


def test_parameters_are_counted_without_weights(tiny_folder, tmp_path):
    from prefopt.config.schema import ModelConfig
    from prefopt.models.load import load_model

    config = ModelConfig("m", str(tiny_folder / "model"))
    expected = sum(p.numel() for p in load_model(config, "cpu").parameters())
    shutil.copytree(tiny_folder / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert parameters(ModelConfig("m", str(tmp_path / "bare"))) == expected


def script(tmp_path: Path, **changes) -> str:
    return slurm(**changes).script("name", 3, (61, 9), tmp_path / "jobs_0.txt", tmp_path / "code")


def test_the_job_script_asks_for_what_the_preset_says(tmp_path):
    text = script(
        tmp_path, partition="gpu", account="me", gpus=2, nodes=3, cpus=5, at_once=None, signal_s=90,
        options=["--qos=long"], setup=["module load cuda"], python="apptainer exec --nv x.sif python",
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "--array=0-2", "--time=61", "--mem=9G", "--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=5",
        "--gres=gpu:2", "--partition=gpu", "--account=me", "--signal=USR2@90", "--requeue", "--qos=long",
    }  # fmt: skip
    assert text.index("module load cuda") < text.index("export PYTHONPATH")  # a module may set it too
    assert 'apptainer exec --nv x.sif python -m prefopt.job "$folder"' in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_signal_before_python_has_started_kills_no_rank(tmp_path):
    """The command that srun gets, with a program that is sent both signals and then says who it is."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nkill -USR2 $$; kill -TERM $$; echo $RANK $WORLD_SIZE $LOCAL_RANK $3\n")
    python.chmod(0o755)
    call = script(tmp_path, python=str(python)).partition("\nsrun ")[2].partition("\ncode=")[0]
    text = f'srun() {{ shift 2; "$@"; }}\nfolder=/run\nsrun {call}'
    environment = os.environ | {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3 4 1 /run\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "state", "restarts", "requeued"),
    [
        (75, "RUNNING", "0", True),
        (75, "COMPLETING", "0", False),  # cancelled: it saved, and must not come back
        (75, "RUNNING", "20", False),
        (1, "RUNNING", "0", False),
        (0, "RUNNING", "0", False),
    ],
)
def test_the_job_script_requeues_what_saved_and_left_and_tells_slurm_of_failures(
    code, state, restarts, requeued, tmp_path
):
    """srun is not told of a process that saved and left: it would end the others in the middle of it."""
    write_json(tmp_path / "run" / "record.json", {"status": "interrupted" if code == 75 else "finished"})
    (tmp_path / "jobs_0.txt").write_text(f"-\t-\n{tmp_path / 'run'}\tdpo-tiny\n")
    for name, body in {
        "srun": f'echo "$@" > {tmp_path}/called; shift 2; "$@"; code=$?; echo $code > {tmp_path}/ended; exit $code',
        "python": f"exit {code}",
        "squeue": f"echo {state}",
        "scontrol": f"echo $@ >> {tmp_path}/scontrol",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "8",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_RESTART_COUNT": restarts,
    }
    text = script(tmp_path, python=str(tmp_path / "python"))
    done = subprocess.run(["bash"], input=text, env=environment, text=True)
    assert done.returncode == code
    assert (tmp_path / "ended").read_text() == f"{code % 75}\n"
    assert (tmp_path / "called").read_text().endswith(f"-m prefopt.job {tmp_path / 'run'}\n")
    said = (tmp_path / "scontrol").read_text()
    assert "\nupdate JobId=8 JobName=dpo-tiny\n" in said
    assert ("requeue 7_1" in said) == requeued


def test_a_job_without_a_run_is_named_by_what_tells_it_from_the_others():
    assert slurm_name("run=runs/A judge=gpt4o_mini") == "run=runs_A_judge=gpt4o_mini"
    assert slurm_name("") == "prefopt"


@pytest.mark.slow
def test_sampling_and_scoring_are_jobs_whose_outputs_are_left_as_they_are(tiny_folder, tmp_path):
    for split in ("a", "b"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": f"Review the {split}."}) + "\n")
    sample = ["-m", "model=hub", f"model.path={tiny_folder / 'model'}", "samples_per_prompt=2", "device=cpu"]
    sample += [f"prompts={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "output=${prompts}.samples.jsonl", "precision=float32"]
    sample += ["sampling.max_new_tokens=4", f"hydra.sweep.dir={tmp_path}/sweep"]
    score = ["-m", f"input={tmp_path}/a.jsonl.samples.jsonl,{tmp_path}/b.jsonl.samples.jsonl", "scorer=vader"]
    score += ["output=${input}.scored.jsonl", f"hydra.sweep.dir={tmp_path}/scores"]
    for program, words in (("sample", sample), ("score", score)):
        done = run_program(*words, program=program)
        assert done.returncode == 0, done.stderr
    outputs = sorted(tmp_path.glob("*.scored.jsonl"))
    rows = [json.loads(file.read_text()) for file in outputs]
    assert [(row["prompt"], len(row["responses"]), len(row["rewards"])) for row in rows] == [
        ("Review the a.", 2, 2),
        ("Review the b.", 2, 2),
    ]
    outputs[0].write_text("mine")
    done = run_program(*score, program="score")
    assert done.returncode == 0, done.stderr
    assert outputs[0].read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hours": 0.05}, "hours=0.05 is too short for signal_s=120"),
        ({"at_once": 0}, "at_once must be at least 1"),
        ({"array_limit": 0}, "array_limit must be at least 1"),
        ({"gpu": 1}, "unknown key launcher.gpu"),
    ],
)
def test_a_preset_is_checked(changes, message):
    with pytest.raises(UserError, match=message):
        slurm(**changes)


# What is refused, with nothing started.


def refused(*points: Point) -> str:
    with pytest.raises(UserError) as error:
        SWEEP.plan_jobs(list(points), Path())
    return str(error.value)


def test_a_sweep_has_one_launcher(overrides, tmp_path):
    assert "one launcher" in refused(*(point(*overrides(tmp_path), f"launcher={name}") for name in ("local", "slurm")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["launcher=slurm", "precision=auto"], "precision=auto asks the machine that trains"),
        (["launcher=slurm", "launcher.nodes=2"], "single trains in one: add engine=fsdp"),
        (["objective.beta=-1"], "objective.beta must be positive, got -1.0"),
    ],
)
def test_a_bad_job_refuses_the_sweep_and_is_named(changes, message, overrides, tmp_path):
    launcher = [change for change in changes if change.startswith("launcher")]
    text = refused(point(*overrides(tmp_path), *changes), point(*overrides(tmp_path), *launcher, "seed=4"))
    assert message in text
    assert all(change in text for change in changes if change not in launcher)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        prefopt.launch.slurm.submit(tmp_path / "x.sh", None)
    assert process.slurm_queue() is None


def test_device_and_precision_of_slurm_jobs_are_not_those_of_this_machine(overrides, tmp_path):
    gpu = [*overrides(tmp_path), "launcher=slurm", "device=auto", "precision=bfloat16"]
    for gpus, device in ((1, "cuda"), (0, "cpu")):
        _, (job,) = SWEEP.plan_jobs([point(*gpu, f"launcher.gpus={gpus}")], Path())
        assert (job.config.device, job.config.precision) == (device, "bfloat16")


def test_two_jobs_with_one_run_folder_run_once(overrides, tmp_path):
    _, jobs = SWEEP.plan_jobs(
        [point(*overrides(tmp_path), f"logger={name}", "seed=3") for name in ("quiet", "progress")], Path()
    )
    assert len(jobs) == 1


# The frozen job.


def test_a_snapshot_is_the_package_by_content(tmp_path, capsys):
    code = snapshot(tmp_path)
    assert snapshot(tmp_path) == code
    files = {f.relative_to(ROOT) for f in (ROOT / "prefopt").rglob("*") if f.is_file() and f.suffix != ".pyc"}
    assert {f.relative_to(code) for f in (code / "prefopt").rglob("*") if f.is_file()} == files
    assert not list(tmp_path.glob("*.tmp"))
    show = ["-c", "import prefopt.tracking.provenance; print(prefopt.__file__, prefopt.tracking.provenance.git())"]
    found = subprocess.run(
        [sys.executable, *show], env=os.environ | python_environment(code), cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert found.startswith(f"{code}/prefopt/__init__.py ")
    assert found.split(" ", 1)[1].strip() == str(json.loads((code / "git.json").read_text()))
    # The bytecode that Python has left there is no damage; another source is.
    edited = code / "prefopt" / "train.py"
    before = edited.read_bytes()
    edited.write_bytes(before + b"# edited")
    assert snapshot(tmp_path) == code
    assert edited.read_bytes() == before
    assert "prefopt/train.py has the checksum" in capsys.readouterr().err


@pytest.mark.slow
def test_frozen_code_that_was_edited_is_refused_and_said(overrides, tmp_path):
    """Refused where a job begins, made anew by the next sweep, and said of a finished run, whose result stays."""
    from prefopt.job import run

    arguments = overrides(tmp_path / "runs")
    _, (job,) = SWEEP.plan_jobs([point(*arguments)], Path())
    code = snapshot(job.folder.parent / "code")
    write_job_file(job, "train", code)
    edited = code / "prefopt" / "training" / "loop.py"
    before = edited.read_text()
    edited.write_text(before + "# edited\n")
    with pytest.raises(UserError, match="the code has been edited since it was frozen here"):
        run(job.folder)
    (found,) = inspect_runs([job.folder])
    assert (found.state, "the code has been edited" in found.why) == ("failed", True)
    assert not (job.folder / "metrics.jsonl").exists()
    ran = run_program("-m", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert f"{code} is damaged: prefopt/training/loop.py has the checksum" in ran.stderr
    assert edited.read_text() == before
    for change in (lambda: (code / "git.json").unlink(), lambda: edited.write_text("")):
        change()
        for words in (["-m", *arguments], arguments):
            skipped = run_program(*words)
            assert skipped.returncode == 0
            assert skipped.stderr.count(f"{code}: edited since it was frozen") == 1, skipped.stderr
    shutil.move(code, tmp_path / "aside")
    assert "edited since" not in run_program("-m", *arguments).stderr  # what is not there is not the code of anything


def test_data_that_changed_since_submission_are_refused(overrides, tiny_folder, tmp_path):
    from prefopt.job import run

    train = shutil.copy(tiny_folder / "train.jsonl", tmp_path / "train.jsonl")
    _, (job,) = SWEEP.plan_jobs([point(*overrides(tmp_path / "runs"), f"dataset.train={train}")], Path())
    write_job_file(job, "train", snapshot(tmp_path / "code"))
    with Path(train).open("a") as file:
        file.write(Path(train).read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="data files have changed since this was submitted"):
        run(job.folder)
    (found,) = inspect_runs([job.folder])
    assert found.state == "failed"
    assert found.record["config"]["dataset"]["train"] == str(train)


def test_a_job_that_is_started_again_after_it_finished_does_nothing(overrides, tmp_path):
    """As Slurm does when the node is lost at the wrong moment."""
    from prefopt.job import run

    _, (job,) = SWEEP.plan_jobs([point(*overrides(tmp_path))], Path())
    write_job_file(job, "train", tmp_path)
    job.run.finish()
    before = (job.folder / "record.json").read_text()
    run(job.folder)
    assert (job.folder / "record.json").read_text() == before


def test_a_run_that_is_under_way_is_left_alone(overrides, tmp_path):
    arguments = overrides(tmp_path)
    _, (job,) = SWEEP.plan_jobs([point(*arguments)], Path())
    write_job_file(job, "train", tmp_path)  # queued by this process, which is there
    _, (again,) = SWEEP.plan_jobs([point(*arguments)], Path())
    assert (again.state, again.to_run) == ("queued", False)
    process = run_program(*arguments)
    assert process.returncode == 2
    assert f"is queued already, as process {os.getpid()}" in process.stderr
    assert records(tmp_path)[0]["status"] == "queued"


# Who is still there.


def record(**facts) -> dict:
    return {"status": "running", "config": {"steps": 4}} | process.process_info() | {"slurm_job": None} | facts


GONE = {"pid": 2**22 + 1, "pid_born": "5"}
ELSEWHERE = {"host": "elsewhere", "slurm_job": "7_1"}


@pytest.mark.parametrize(
    ("facts", "queue", "state"),
    [
        ({}, None, "running"),
        (GONE, None, "died"),
        ({"pid_born": "another process with this pid"}, None, "died"),
        (GONE | {"status": "queued"}, None, "died"),
        (GONE | {"status": "finished"}, None, "finished"),
        (GONE | {"status": "interrupted"}, None, "interrupted"),
        ({"host": "elsewhere"}, None, "unknown"),
        (ELSEWHERE, {"7_1": "RUNNING"}, "running"),
        (ELSEWHERE, {"7_1": "PENDING"}, "requeued"),
        (ELSEWHERE, {"7_1": "CANCELLED"}, "died"),
        (ELSEWHERE, {}, "died"),
        (ELSEWHERE, None, "unknown"),  # Slurm does not answer: that says nothing about the job
        (ELSEWHERE | {"status": "queued"}, {"7_1": "PENDING"}, "queued"),
        (ELSEWHERE | {"status": "interrupted"}, {"7_1": "PENDING"}, "requeued"),
        (ELSEWHERE | {"status": "interrupted"}, {"7_1": "FAILED"}, "interrupted"),
        (GONE | {"slurm_job": "7_1"}, {"7_1": "RUNNING"}, "died"),  # an allocation outlives a process in it
    ],
)
def test_a_run_is_what_its_record_says_while_its_process_is_there(facts, queue, state):
    assert process.resolve_status(record(**facts), queue) == state


def test_runs_lists_filters_and_never_shows_a_dead_one_as_running(tmp_path):
    for name, facts in {"dpo-a": {}, "dpo-b": GONE, "ipo-c": {"status": "failed", "error": "x\nValueError: y"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record(**facts)))
    (tmp_path / "dpo-b" / "log.txt").write_text("last words\n")
    (tmp_path / "dpo-b" / "metrics.jsonl").write_text('{"step": 2, "split": "heldout", "accuracy": 0.75}\n{"ste')
    assert [each.state for each in select(RunsConfig(str(tmp_path), "*"))] == ["running", "died", "failed"]
    (dead,) = select(RunsConfig(str(tmp_path), "dpo-*", ["died"]))
    assert dead.metrics()["step"] == 2
    assert "last words" in dead.why
    with (shown := Console(width=240)).capture() as printed:
        shown.print(status_table([dead]))
    assert printed.get().count("│ dpo-b") == 1
    assert "dpo-b: ended without a word" in printed.get()
    shown = run_program(f"runs_dir={tmp_path}", "status=[failed]", program="runs")
    assert shown.returncode == 0, shown.stderr
    assert "ValueError: y" in shown.stdout
    assert "dpo-a" not in shown.stdout
    wrong = run_program("status=[dead]", program="runs")
    assert wrong.returncode == 2
    assert "there is no dead" in wrong.stderr


# Being asked to stop.


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    signals.install_handlers()
    before = signals.stop_requested()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    Path(folder, str(rank)).write_text(f"{before} {signals.stop_requested()}")
    torch.distributed.destroy_process_group()


def test_all_ranks_agree_to_stop_when_one_is_asked(tmp_path):
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["False True"] * 2


def test_all_sittings_of_a_run_are_one_wandb_run(overrides, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from prefopt.training.loggers import Loggers

    seen = []
    monkeypatch.setattr(wandb, "init", lambda **given: seen.append((given["id"], given["resume"])))
    config = parse(point(*overrides(tmp_path), "logger=wandb").cfg, TrainConfig)
    vouched = None
    for _ in range(2):
        run = Run(asdict(config), "dpo", {})
        run.folder.mkdir(exist_ok=True)
        logger = Loggers(run, config.logger, vouched)
        vouched = logger.vouch()
        logger.others.clear()
        logger.close()
    assert len(set(seen)) == 1
    assert seen[0][1] == "allow"


def test_the_runs_of_a_sweep_are_a_group_in_wandb(overrides, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)

    def groups(*changes: list[str]) -> list[str | None]:
        points = [point(*overrides(tmp_path), "logger=wandb", *of_point) for of_point in changes]
        _, jobs = SWEEP.plan_jobs(points, Path())
        return [job.config.logger.wandb.group for job in jobs]

    assert groups(["seed=1", "objective.beta=0.1"], ["seed=2", "objective.beta=0.1"]) == ["seed"] * 2
    assert groups(["seed=1", "objective=dpo"], ["seed=2", "objective=ipo"]) == ["seed, objective"] * 2
    assert groups(["seed=1"]) == [None]
    assert groups(["seed=1", "logger.wandb.group=mine"], ["seed=2", "logger.wandb.group=mine"]) == ["mine"] * 2
    named = Point(["+sweep=demo", "seed=1"], point(*overrides(tmp_path), "logger=wandb").cfg)
    assert prefopt.launch.sweep.sweep_name([named]) == "demo"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert groups(["seed=1"], ["seed=2"]) == ["mine"] * 2


@pytest.mark.slow
def test_the_exit_code_of_a_sweep_is_that_of_its_runs(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(Local, "run", lambda *_: None)  # nothing runs: as if every job had been lost
    monkeypatch.setattr(prefopt.launch.sweep, "POLL_S", 0.01)
    monkeypatch.setattr(prefopt.launch.sweep, "process_info", lambda: process.process_info() | GONE)
    assert SWEEP([point(*overrides(tmp_path))], tmp_path, dry_run=True) == 0
    assert not list(tmp_path.iterdir())
    assert SWEEP([point(*overrides(tmp_path))], tmp_path, dry_run=False) == 1
