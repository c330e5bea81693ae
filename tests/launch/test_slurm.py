"""A real Slurm of one node: a sweep with a job that is preempted and one that is killed, and every other end of a job.

`make slurm-test`. The cluster is brought up by ../shared/tools/slurm-one-node.sh, or the script that $SLURM_ONE_NODE
names (`up`, `down` and `env`), on loopback, without touching a Slurm that this machine may belong to.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefopt.config.parse import build
from prefopt.launch.base import Launcher
from prefopt.launch.slurm import Slurm, submit
from prefopt.tracking import process
from tests.helpers.tiny import ENVIRONMENT, ROOT, command, records, run_program
from tests.training.test_online import command as online
from tests.training.test_online import tiny  # noqa: F401 - a fixture

pytestmark = pytest.mark.slurm
SCRIPT = Path(os.environ.get("SLURM_ONE_NODE", ROOT.parent / "shared" / "tools" / "slurm-one-node.sh"))
PRESET = ["launcher=slurm", "launcher.gpus=0", "launcher.cpus=1", "launcher.partition=low"]
SOON_S = 240  # long enough for a busy machine; only a test that fails waits for it


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Its folder. Four CPUs (that are claimed, not there) and two stand-ins for GPUs; SLURM_CONF in the environment."""
    if not SCRIPT.is_file():
        pytest.skip(f"no script to bring up a one-node Slurm: {SCRIPT} is not there ($SLURM_ONE_NODE names another)")
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # a short path: there are sockets in it
    settings = {"SLURM_ONE_NODE_DIR": folder, "SLURM_ONE_NODE_CPUS": "4", "SLURM_ONE_NODE_GPUS": "2"}
    environment = os.environ | settings | {"SLURM_ONE_NODE_SACCT": "none"}
    up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True)
    if up.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"the one-node Slurm did not come up: {up.stderr.strip()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/etc/slurm.conf")
        patch.setitem(ENVIRONMENT, "SLURM_CONF", f"{folder}/etc/slurm.conf")
        yield Path(folder)
    subprocess.run([SCRIPT, "down"], env=environment, check=True, capture_output=True)


def until(what, process: subprocess.Popen | None = None):
    """The first true value of `what()`."""
    end = time.monotonic() + SOON_S
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "the sweep ended before"
        time.sleep(0.1)
    return value


def slurm_state(job: str) -> str:
    queue = process.slurm_queue()
    assert queue is not None
    return queue.get(job, "gone")


def test_a_sweep_with_a_preempted_and_a_killed_job(overrides, tmp_path):
    long = 600
    runs = tmp_path / "runs"
    more = ["eval_every=10000", "save_every=100"]
    sweep = ["-m", *overrides(runs), *more, *PRESET, f"steps=4,{long}", "seed=1,2"]
    driver = subprocess.Popen(command(*sweep), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    alone = [*overrides(tmp_path / "whole"), *more, f"steps={long}", "seed=2"]
    whole = subprocess.Popen(command(*alone), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)

    def record(steps: int, seed: int) -> dict:
        found = [r for r in records(runs) if (r["config"]["steps"], r["config"]["seed"]) == (steps, seed)]
        return found[0] if found else {"name": "none", "status": "none"}

    def stepping(seed: int) -> bool:
        file = runs / record(long, seed)["name"] / "metrics.jsonl"
        return file.is_file() and '"step": 5,' in file.read_text()

    until(lambda: stepping(1) and record(long, 1)["status"] == "running", driver)
    os.kill(record(long, 1)["pid"], signal.SIGKILL)
    until(lambda: stepping(2) and all(record(4, seed)["status"] == "finished" for seed in (1, 2)), driver)
    wrap = ["sbatch", "--partition=high", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"]
    subprocess.run(wrap, check=True, capture_output=True)
    until(lambda: record(long, 2)["status"] == "interrupted", driver)
    shown, _ = driver.communicate(timeout=SOON_S)
    print(shown)
    assert driver.returncode == 1
    assert {r["status"] for r in (record(4, 1), record(4, 2), record(long, 2))} == {"finished"}
    killed, preempted = record(long, 1), record(long, 2)
    assert f"│ {killed['name']} │ died" in shown
    assert slurm_state(killed["slurm_job"]) == "FAILED"
    assert preempted["attempt"] == 2
    # as if nothing had happened
    assert whole.wait() == 0
    assert records(tmp_path / "whole")[0]["final_weights"] == preempted["final_weights"]
    rows = [json.loads(line) for line in (runs / preempted["name"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, long + 1))

    again = run_program(*sweep)
    print(again.stdout)
    assert again.returncode == 0, again.stderr
    assert record(long, 1)["attempt"] == 2
    assert record(long, 2) == preempted


def test_no_end_of_a_job_is_silent(overrides, tmp_path):
    faults = ["none", "raise", "exit", "kill", f"{tmp_path}/never"]
    sweep = ["-m", *overrides(tmp_path / "runs"), *PRESET, "objective._target_=tests.helpers.faulty.Faulty"]
    sweep += [f"+objective.fault={','.join(faults)}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen(command(*sweep), cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)  # type: ignore[call-overload]

    def found() -> dict[str, dict]:
        return {r["config"]["objective"]["fault"].rpartition("/")[2]: r for r in records(tmp_path / "runs")}

    waiting = until(lambda: (r := found().get("never", {})).get("status") == "running" and r, driver)
    shown = subprocess.run(["squeue", "-h", "-o", "%j", "-j", waiting["slurm_job"]], capture_output=True, text=True)
    assert shown.stdout.strip() == waiting["name"]
    subprocess.run(["scancel", waiting["slurm_job"]], check=True)
    shown, errors = driver.communicate(timeout=SOON_S)
    print(shown, errors)
    assert driver.returncode == 1
    assert "4 of 5 jobs have not finished" in errors
    for fault, state, why, slurm in [
        ("raise", "failed", "RuntimeError: the fault in the objective", "FAILED"),
        ("exit", "failed", "SystemExit: no more of this", "FAILED"),
        ("kill", "died", "(Slurm: FAILED)", "FAILED"),
        ("never", "died", "(Slurm: CANCELLED)", "CANCELLED"),
    ]:
        record = found()[fault]
        (line,) = [x for x in errors.splitlines() if x.startswith(f"{state}: {record['name']}: ")]
        assert why in line
        assert slurm_state(record["slurm_job"]) == slurm
    assert found()["none"]["status"] == "finished"
    assert slurm_state(found()["none"]["slurm_job"]) == "COMPLETED"


def test_one_failing_rank_of_two_fails_the_job(tmp_path):
    """Also: what each rank is told about the others."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR" > $3/$RANK\nexit $RANK\n')
    python.chmod(0o755)
    preset = OmegaConf.load(ROOT / "conf" / "launcher" / "slurm.yaml")
    launcher = build(OmegaConf.merge(preset, {"gpus": 2, "cpus": 1, "python": str(python)}), Launcher, "launcher")
    assert isinstance(launcher, Slurm)
    listing, script = tmp_path / "jobs.txt", tmp_path / "jobs.sh"
    (tmp_path / "run").mkdir()
    listing.write_text(f"{tmp_path / 'run'}\tname\n")
    script.write_text(launcher.script("name", 1, (60, 1), listing, tmp_path))
    job = f"{submit(script, None)}_0"
    assert until(lambda: (state := slurm_state(job)) in process.TERMINAL_SLURM_STATES and state) == "FAILED"
    assert [(tmp_path / "run" / str(rank)).read_text().split() for rank in range(2)] == [
        ["2", "0", "localhost"],
        ["2", "1", "localhost"],
    ]


def test_evaluations_are_jobs_too(overrides, tmp_path):
    """prefopt.alpaca over two runs, in an array of Slurm's."""
    runs = tmp_path / "runs"
    process = run_program("-m", *overrides(runs), "seed=1,2")
    assert process.returncode == 0, process.stderr
    folders = [str(file.parent) for file in sorted(runs.glob("*/record.json"))]
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"instruction": "What is a kettle?"}\n{"instruction": "And a train?"}\n')
    sweep = ["-m", f"run={','.join(folders)}", "judge=reward_model", f"instructions={questions}", "precision=float32"]
    sweep += ["sampling.max_new_tokens=4", *PRESET, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    process = run_program(*sweep, program="alpaca", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    print(process.stdout)
    assert process.returncode == 0, process.stderr
    found = [json.loads((tmp_path / "sweep" / f"job_{n}" / "record.json").read_text()) for n in range(2)]
    assert [r["status"] for r in found] == ["finished"] * 2
    assert all(r["slurm_job"] for r in found)
    for folder in folders:
        assert len(list(Path(folder).glob("alpaca/*/record.json"))) == 1


def test_stages_are_a_job_that_goes_on_when_it_was_preempted(tiny, tmp_path):  # noqa: F811
    """prefopt.online in an array of Slurm's, asked to leave in its second stage."""
    settings = ["steps=400", "save_every=50", "eval_every=400", "stages=2"]
    sweep = ["-m", *online(tiny, tmp_path / "runs", *settings), *PRESET, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    environment = ENVIRONMENT | {"PREFOPT_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(command(*sweep, program="online"), cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]

    def job() -> dict:
        file = tmp_path / "sweep" / "job_0" / "record.json"
        return json.loads(file.read_text()) if file.is_file() else {"status": "none"}

    def stepping() -> bool:
        return any('"step": 5,' in f.read_text() for f in tmp_path.glob("runs/*/stage_2/*/metrics.jsonl"))

    until(stepping, driver)
    # A fast machine would be done before Slurm gets to preempt it. Slurm sends SIGCONT with SIGTERM.
    os.kill(job()["pid"], signal.SIGSTOP)
    wrap = ["sbatch", "--partition=high", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"]
    subprocess.run(wrap, check=True, capture_output=True)
    until(lambda: job()["status"] == "interrupted", driver)
    shown, _ = driver.communicate(timeout=SOON_S)
    print(shown)
    assert driver.returncode == 0
    assert job()["status"] == "finished"
    alone = run_program(*online(tiny, tmp_path / "whole", *settings), program="online", env=environment)
    assert alone.returncode == 0, alone.stderr
    (found,), (whole,) = records(tmp_path / "runs"), records(tmp_path / "whole")
    assert (found["attempt"], whole["attempt"]) == (2, 1)
    assert found["final_weights"] == whole["final_weights"]
