"""What an operator meets: damaged metrics and records, stray files, disks that fill up at the end, ranks and sweeps
that do not fit together."""

import errno
import json
import os
import re
import signal
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prefopt.tracking.metrics import metrics_damage
from prefopt.tracking.process import process_info, process_start_time
from prefopt.tracking.record import give_up
from prefopt.training.checkpoint import complete_checkpoints, latest_checkpoint, save_checkpoint
from prefopt.utils.os_errors import explain, from_text
from tests.helpers.forks import At, run, start
from tests.helpers.tiny import SAMPLED, records, run_program, save_tiny
from tests.integration.test_faults import (  # noqa: F401
    FAULTY,
    STEPS,
    await_file,
    await_text,
    env,
    fill,
    folder_of,
    mounted,
    result,
    whole,
)


def cut_line(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero_ten_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20:30] = bytes(10)
    file.write_bytes(data)


def other_number(file: Path) -> None:
    file.write_text(re.sub(r'"loss": 0\.', '"loss": 7.', file.read_text(), count=1))


HARMS = [cut_line, empty, zero_ten_bytes, other_number, Path.unlink]


# Metrics.


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_metrics_are_refused_with_one_message_that_names_the_file(harm, overrides, tmp_path, env):  # noqa: F811
    arguments = [*overrides(tmp_path / "runs"), *STEPS]
    at = At("prefopt.training.loop:train_step", 5)
    assert run(tmp_path / "log", *arguments, env=env, at=at)[0] == -signal.SIGKILL
    file = folder_of(tmp_path / "runs") / "metrics.jsonl"
    harm(file)
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 2, said
    assert "Traceback" not in said
    assert str(file) in said
    assert "Bring the files back, or remove" in said
    assert len(list((folder_of(tmp_path / "runs") / "checkpoints").iterdir())) == 2  # nothing is lost by looking


def test_damage_behind_an_older_checkpoint_is_mended_from_there(overrides, whole, tmp_path, env):  # noqa: F811
    arguments = [*overrides(tmp_path / "runs"), *STEPS]
    at = At("prefopt.training.loop:train_step", 5)
    assert run(tmp_path / "log", *arguments, env=env, at=at)[0] == -signal.SIGKILL
    file = folder_of(tmp_path / "runs") / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b'"loss"', b'"loss_"')]))  # of step 4, the last one
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert str(file) in said
    assert "going on from step 3 of 6" in said
    assert result(tmp_path / "runs") == whole


def test_what_a_killed_run_wrote_behind_its_checkpoint_does_no_harm(overrides, whole, tmp_path, env):  # noqa: F811
    arguments = [*overrides(tmp_path / "runs"), *STEPS]
    at = At("prefopt.training.loop:train_step", 5)
    assert run(tmp_path / "log", *arguments, env=env, at=at)[0] == -signal.SIGKILL
    with (folder_of(tmp_path / "runs") / "metrics.jsonl").open("ab") as file:
        file.write(bytes(50) + b'\n{"step": 5, "spl')
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert result(tmp_path / "runs") == whole


def test_a_finished_run_vouches_for_its_metrics_and_reports_check_them(overrides, tmp_path, env):  # noqa: F811
    code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env)
    assert code == 0, said
    (record,) = records(tmp_path / "runs")
    file = folder_of(tmp_path / "runs") / "metrics.jsonl"
    assert metrics_damage(file, record["metrics"]) is None
    report = [f"runs_dir={tmp_path / 'runs'}", f"output={tmp_path / 'report'}"]
    code, said = run(tmp_path / "log", *report, program="report")
    assert code == 0, said
    zero_ten_bytes(file)
    for program, arguments in {"report": report, "papers": ["paper=mmpo", *report]}.items():
        code, said = run(tmp_path / "log", *arguments, program=program)
        assert code == 2, said
        assert "Traceback" not in said
        assert str(file) in said
        assert "another checksum" in said
    empty(file)
    code, said = run(tmp_path / "log", f"runs_dir={tmp_path / 'runs'}", program="runs")
    assert code == 0, said
    assert f"{record['evaluations'][-1]['accuracy']:.3f}" in said  # of the record: the file would give none


# Pruning.


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, step, {"weights": {"a": torch.full((5,), float(step))}}, {})


def test_a_stray_file_and_a_link_among_the_checkpoints_end_nothing(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    (folder / "notes.txt").write_text("mine")
    (folder / "step_0000009").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (folder / "step_0000000").symlink_to(tmp_path / "elsewhere")
    (folder / "step_0000003.tmp").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3, 4):
        save(folder, step)
    assert [path.name for path in sorted(complete_checkpoints(folder))] == ["step_0000003", "step_0000004"]
    assert latest_checkpoint(folder) == folder / "step_0000004"
    assert (folder / "notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "kept").is_file()  # links are removed, and never what they lead to


def test_a_busy_old_checkpoint_is_a_line_and_no_end(tmp_path, monkeypatch, capsys):
    def busy(path, *_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", busy)
    save(tmp_path, 3)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000003"
    said = capsys.readouterr().err
    assert f"{tmp_path / 'step_0000001'} cannot be removed, and stays" in said
    assert "busy" in said


# Disks.


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read only"),
        (errno.EACCES, "rights"),
        (errno.ENOLCK, "locks"),
        (errno.EISDIR, "another kind"),
        (errno.ENOTDIR, "another kind"),
        (errno.EIO, "dmesg"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ESTALE, "Bring the disk"),
    ],
)
def test_each_error_of_the_system_has_its_own_advice_file_and_disk(number, advice, tmp_path):
    said = explain(OSError(number, os.strerror(number), str(tmp_path / "not" / "there")))
    assert advice in said
    assert str(tmp_path / "not" / "there") in said
    assert "the disk at /" in said
    assert ("MiB free" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_number_of_an_error_is_found_in_the_text_of_safetensors():
    error = from_text("Error while serializing: I/O error: No space left on device (os error 28)", Path("/x/y"))
    assert (error.errno, error.filename) == (errno.ENOSPC, "/x/y")
    assert "Make room there" in explain(error)


def test_a_full_cache_disk_is_named_and_not_the_disk_of_the_run(overrides, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        fill(disk)
        code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env={"PREFOPT_CACHE": str(disk)})
        assert code == 2, said
        assert "Traceback" not in said
        assert f"the disk at {disk}" in said


def test_a_disk_that_is_full_at_the_export_costs_no_step(overrides, whole, tmp_path, env):  # noqa: F811
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        arguments = [*overrides(disk), *STEPS, "save_every=100"]
        full = At("prefopt.training.export:PolicyExporter.final", 1, partial(fill, disk))
        code, said = run(tmp_path / "log", *arguments, env=env, at=full)
        assert code == 2, said
        assert "Traceback" not in said
        assert "No space left on device" in said
        assert f"the disk at {disk}" in said
        assert "goes on from its last checkpoint, step_0000006, which is kept" in said
        assert not list(folder_of(disk).glob("policy*"))
        (disk / "full").unlink()
        code, said = run(tmp_path / "log", *arguments, env=env)
        assert code == 0, said
        assert "going on from step 6 of 6" in said
        assert result(disk) == whole


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def test_ctrl_c_while_a_finished_run_tidies_up_leaves_it_finished(overrides, whole, tmp_path, env):  # noqa: F811
    at = At("prefopt.training.checkpoint:tidy_checkpoints", 1, interrupt)
    code, _ = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env, at=at)
    assert code == 130
    assert records(tmp_path / "runs")[0]["status"] == "finished"
    code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env)
    assert (code, "finished, skipped" in said) == (0, True), said
    assert result(tmp_path / "runs") == whole


def test_ctrl_c_while_an_object_is_deleted_is_not_lost(overrides, tmp_path, env):  # noqa: F811
    """Python prints what a `__del__` raises, and goes on."""
    at = At("filelock:BaseFileLock.__del__", 1, interrupt)
    code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), "steps=1000", env=env, at=at)
    assert code == 130, said


# Records.


def mutations(node: dict, path: tuple = (), depth: int = 4):
    """The paths of all keys of a record down to `depth`, and in the first and last row of its evaluations."""
    for key, value in node.items() if isinstance(node, dict) else [(0, node[0]), (-1, node[-1])] if node else []:
        yield (*path, key)
        if depth > 1 and (isinstance(value, dict) or key == "evaluations"):
            yield from mutations(value, (*path, key), depth - 1)


def changed(record: dict, path: tuple, value) -> dict:
    record = json.loads(json.dumps(record))
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is LOST:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


LOST = object()


@pytest.mark.slow
def test_whatever_a_record_lacks_or_holds_ends_no_listing_and_no_report_in_a_traceback(grid, tmp_path, monkeypatch):
    from prefopt.report import main as report  # noqa: F401  # imported before the loop, which is long
    from prefopt.reporting.config import ReportConfig
    from prefopt.reporting.html import page
    from prefopt.reporting.labels import sort_by_label
    from prefopt.reporting.summary import by_column_table, main_table, over_seeds_table, table_rows
    from prefopt.tracking.archive import read_records
    from prefopt.tracking.status import RunsConfig, select, status_table
    from prefopt.utils.console import console

    runs, _ = grid
    records_of_grid = records(runs)
    good, other = records_of_grid[:2]
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "record.json").write_text(json.dumps(other))
    file = tmp_path / "bad" / "record.json"
    config = ReportConfig(str(tmp_path), str(tmp_path / "out"))
    texts = ["", " ", "null", "[]", "3", '"finished"', "{}", "{", "[" * 100_000, '{"status": "finished"}', "\0" * 9]
    wrong = [LOST, None, "text", -1, [1], {}]
    cases = [(text, text[:20]) for text in texts]
    cases += [(json.dumps(changed(good, path, value)), (path, value)) for path in mutations(good) for value in wrong]
    left_out = 0
    for text, what in cases:
        file.write_text(text)
        try:
            read = read_records(tmp_path)
            left_out += len(read) == 1
            ordered = sort_by_label(read)
            main_table(table_rows(ordered), ordered, config)
            over_seeds_table(ordered, config)
            by_column_table(ordered, "seed", "command")
            page("title", [], [], ordered, [])
            with (shown := console()).capture():
                shown.print(status_table(select(RunsConfig(str(tmp_path), "*"))))
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert left_out > len(texts)


@pytest.mark.parametrize("text", ["", "[]", '{"status": 7}', "\0\0\0"])
def test_an_empty_record_is_named_and_left_out_or_refused(text, grid, tmp_path, capsys):
    from prefopt.tracking.archive import read_records

    runs, _ = grid
    kept = records(runs)[0]
    for name in ("kept", "lost"):
        (tmp_path / name).mkdir()
    (tmp_path / "kept" / "record.json").write_text(json.dumps(kept))
    file = tmp_path / "lost" / "record.json"
    file.write_text(text)
    assert [record["name"] for record in read_records(tmp_path)] == [kept["name"]]
    assert f"left out: {file}" in capsys.readouterr().err
    shown = run_program(f"runs_dir={tmp_path}", program="runs")
    assert shown.returncode == 0, shown.stderr
    assert "damaged" in shown.stdout
    assert str(file) in shown.stdout.replace("\n", "")
    shown = run_program(f"run={file.parent}", "tasks=mmpo", program="harness")
    assert shown.returncode == 2
    assert str(file) in shown.stderr


def test_a_run_whose_record_is_lost_is_refused_and_goes_on_without_it_bit_for_bit(overrides, whole, tmp_path, env):  # noqa: F811
    arguments = [*overrides(tmp_path / "runs"), *STEPS]
    at = At("prefopt.training.loop:train_step", 5)
    assert run(tmp_path / "log", *arguments, env=env, at=at)[0] == -signal.SIGKILL
    file = folder_of(tmp_path / "runs") / "record.json"
    file.write_text("")
    for program in ([], ["-m"]):
        code, said = run(tmp_path / "log", *program, *arguments, env=env)
        assert code == 2, said
        assert "Traceback" not in said
        assert str(file) in said
        assert "remove this file alone" in said
    file.unlink()
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert "going on from step 4 of 6" in said
    assert result(tmp_path / "runs") == whole


# Ranks.


def two_ranks(tmp_path: Path, env: dict, *arguments: list[str], cwds=(None, None)) -> list[tuple[int, str]]:  # noqa: F811
    """Exit code and output of two processes of a group with arguments of their own, each in its folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    processes = [
        start(log, *own, "engine=zero2", env=env | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=cwds[rank])
        for rank, (log, own) in enumerate(zip(logs, arguments, strict=True))
    ]
    ends = []
    for process, log in zip(processes, logs, strict=True):
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"it hangs: {log.read_text()}")
        ends.append((process.exitcode, log.read_text()))
    return ends


def test_ranks_with_different_arguments_say_so_before_the_first_step(overrides, tiny_folder, tmp_path, env):  # noqa: F811
    pytest.importorskip("deepspeed")
    (tmp_path / "data.jsonl").write_text((tiny_folder / "train.jsonl").read_text() * 2)
    common = [*overrides(tmp_path / "runs"), *STEPS]
    cases = {
        "optimizer.lr": ("0.001", "0.002"),
        "seed": ("0", "5"),
        "steps": ("6", "7"),
        "batch_size": ("4", "6"),
        "objective.beta": ("0.1", "0.2"),
    }
    other = [f"{key}={theirs}" for key, (_, theirs) in cases.items()]
    other += ["peft=lora_attention", f"dataset.train={tmp_path / 'data.jsonl'}"]
    for code, said in two_ranks(tmp_path, env, common, [*common, *other]):
        assert code == 2, said
        assert "Traceback" not in said
        assert said.count("error:") == 1
        for key, (ours, theirs) in cases.items():
            assert f"{key} is {ours} in rank 0 and {theirs} in rank 1" in said
        assert "peft.target_modules is " in said
        assert "digest of train is " in said
    assert not list((tmp_path / "runs").glob("*/record.json"))


def test_ranks_with_different_weights_or_tokenizers_say_so(overrides, tmp_path, tiny_folder, env):  # noqa: F811
    """One path, as on two machines: the second process finds another model there."""
    pytest.importorskip("deepspeed")
    machines = tmp_path / "first", tmp_path / "second"
    for seed, machine in enumerate(machines):
        save_tiny(machine / "model", seed)
    common = [*overrides(tmp_path / "runs"), *STEPS, "model.path=model", "engine.hang_s=60"]
    for code, said in two_ranks(tmp_path, env, common, common, cwds=machines):
        assert code == 2, said
        assert "Traceback" not in said
        assert "its weights as loaded is " in said
        assert "in rank 1" in said


# Two sweeps.


@pytest.mark.slow
def test_a_second_equal_sweep_changes_nothing_of_the_first(overrides, tmp_path, env):  # noqa: F811
    """It has planned its jobs before the first one began, and is told to stop while the first is at work."""
    go = tmp_path / "go"
    arguments = ["-m", *overrides(tmp_path / "runs"), "steps=2", FAULTY, f"+objective.fault={go}", "seed=1,2"]
    held = tmp_path / "held"
    behind = start(
        tmp_path / "behind.log",
        *arguments,
        env=env,
        at=At("prefopt.launch.sweep:snapshot", 1, partial(await_file, held)),
    )
    await_text(behind, tmp_path / "behind.log", "from the start")
    first = start(tmp_path / "first.log", *arguments, env=env)
    while "running" not in [r["status"] for r in records(tmp_path / "runs")]:
        assert first.is_alive(), (tmp_path / "first.log").read_text()
        time.sleep(0.05)
    before = records(tmp_path / "runs")
    held.touch()
    await_text(behind, tmp_path / "behind.log", "meanwhile, by process")
    os.kill(behind.pid, signal.SIGINT)
    behind.join()
    assert records(tmp_path / "runs") == before
    go.touch()
    first.join()
    assert first.exitcode == 0, (tmp_path / "first.log").read_text()
    assert [r["attempt"] for r in records(tmp_path / "runs")] == [1, 1]


@pytest.mark.parametrize(
    ("facts", "changes"),
    [
        ({"status": "queued"}, True),  # by this process
        ({"status": "finished"}, False),
        ({"status": "running", "pid": 1}, False),  # another process, which is there
        ({"status": "running", "pid": 2**22 + 1, "pid_born": "5"}, True),  # one that is gone
        ({"status": "running", "host": "elsewhere"}, False),
    ],
)
def test_a_record_is_amended_only_for_its_owner_or_after_it(facts, changes, tmp_path):
    record = {**process_info(), "slurm_job": None, "name": "x"} | facts
    if record["pid"] == 1:
        record["pid_born"] = process_start_time(1)
    (tmp_path / "record.json").write_text(json.dumps(record))
    give_up(tmp_path, (os.getpid(),), status="failed")
    assert json.loads((tmp_path / "record.json").read_text())["status"] == ("failed" if changes else facts["status"])


# Sites.


def fake_sbatch(folder: Path, script: str) -> dict[str, str]:
    (folder / "bin").mkdir()
    file = folder / "bin" / "sbatch"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


SLURM = ["launcher=slurm", "launcher.gpus=0", "device=cpu", "seed=1,2"]


def test_a_sweep_without_sbatch_writes_nothing(overrides, tmp_path, env):  # noqa: F811
    code, said = run(tmp_path / "log", "-m", *overrides(tmp_path / "runs"), *SLURM, env=env | {"PATH": "/nowhere"})
    assert code == 2, said
    assert "there is no sbatch here" in said
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_jobs_that_sbatch_refuses_are_failed_with_its_words(overrides, tmp_path, env):  # noqa: F811
    path = fake_sbatch(tmp_path, "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    code, said = run(tmp_path / "log", "-m", *overrides(tmp_path / "runs"), *SLURM, env=env | path)
    assert code == 2, said
    assert "invalid partition specified: nope" in said
    found = records(tmp_path / "runs")
    assert [r["status"] for r in found] == ["failed", "failed"]
    assert all("invalid partition specified: nope" in r["error"] for r in found)


@pytest.mark.parametrize(
    ("changes", "lines", "absent"),
    [
        ({"memory_gib": None}, [], "--mem"),
        ({"memory_gib": 4, "memory_gib_per_billion": 0}, ["--mem=4G"], "null"),
        ({"gpus": 2, "gpu_type": "a100"}, ["--gres=gpu:a100:2"], "--gpus"),
        ({"gpus": 2, "gpu_option": "gpus-per-node"}, ["--gpus-per-node=2"], "--gres"),
        ({"gpus": 2, "nodes": 3, "gpu_option": "gpus", "gpu_type": "h100"}, ["--gpus=h100:6"], "--gres"),
        ({"gpus": 0, "gpu_type": "a100"}, [], "a100"),
    ],
)
def test_the_script_asks_for_memory_and_gpus_as_the_site_takes_them(changes, lines, absent, tmp_path, monkeypatch):
    import prefopt.launch.slurm
    from tests.launch.test_launch import slurm

    monkeypatch.setattr(prefopt.launch.slurm, "parameters", lambda _: 10**9)
    launcher = slurm(**changes)
    text = launcher.script("name", 1, launcher.limits(SimpleNamespace(model=None)), tmp_path / "jobs.txt", tmp_path)
    for line in lines:
        assert f"#SBATCH {line}\n" in text
    assert absent not in text
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name")


def test_watching_ends_when_all_is_done_also_without_a_terminal(tmp_path):
    folder = tmp_path / "runs" / "dpo-a"
    folder.mkdir(parents=True)
    record = {**process_info(), "slurm_job": None, "status": "running", "config": {"steps": 4}}
    (folder / "record.json").write_text(json.dumps(record))
    watching = start(tmp_path / "log", f"runs_dir={tmp_path / 'runs'}", "watch=true", program="runs")
    await_text(watching, tmp_path / "log", "running")
    assert watching.is_alive()
    (folder / "record.json").write_text(json.dumps(record | {"status": "finished"}))
    watching.join(30)
    assert watching.exitcode == 0
    assert "finished" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_local_rank_of_the_deepspeed_launcher_is_taken(overrides, tmp_path, env):  # noqa: F811
    pytest.importorskip("deepspeed")
    common = ["--local_rank=0", *overrides(tmp_path / "runs"), "steps=1"]
    for code, said in two_ranks(tmp_path, env, common, ["--local_rank=1", *common[1:]]):
        assert code == 0, said


# Memory.


def no_memory() -> None:
    raise MemoryError


def torch_has_none() -> None:
    torch.empty(2**60, dtype=torch.uint8)


MOMENTS = {
    "prefopt.training.build:load.load_tokenizer": "reading and tokenizing the data",
    "prefopt.training.build:cache.prepare_dataset": "reading and tokenizing the data",
    "prefopt.training.build:load.load_model": "loading",
    "prefopt.models.layout_check:completion_logps": "checking the layout",
    "prefopt.training.build:prefopt.models.reference.cached": "computing the reference",
    "prefopt.training.build:Engine": "making the optimizer",
    "prefopt.training.evaluate:step_metrics": "training",
    "prefopt.training.evaluate:sample": "sampling after step 0",
    "prefopt.training.loop:train_step": "training",
    "prefopt.training.loop:save_checkpoint": "saving step 1",
    "prefopt.training.export:PolicyExporter.__call__": "writing the policy after step 3",
    "prefopt.training.export:PolicyExporter.final": "writing the policy",
}


@pytest.mark.parametrize("action", [no_memory, pytest.param(torch_has_none, marks=pytest.mark.long)])
@pytest.mark.slow
def test_too_little_memory_is_one_message_whatever_was_being_done(action, overrides, tmp_path, env):  # noqa: F811
    for number, (place, doing) in enumerate(MOMENTS.items()):
        arguments = [*overrides(tmp_path / f"runs{number}"), *STEPS, "exports=2", *SAMPLED]
        own_cache = {"PREFOPT_CACHE": str(tmp_path / f"cache{number}")}  # so that nothing is answered from it
        code, said = run(tmp_path / "log", *arguments, env=own_cache, at=At(place, 1, action))
        assert code == 2, (place, said)
        assert "Traceback" not in said
        assert said.count("error: ") == 1, said
        assert f"out of memory while {doing}" in said or "out of memory on cpu" in said, (place, said)
        assert "What helps: " in said or "Give " in said


def test_too_little_memory_in_another_program_is_one_message(overrides, tiny_folder, tmp_path, env):  # noqa: F811
    arguments = [
        "model=hub",
        f"model.path={tiny_folder / 'model'}",
        f"prompts={tiny_folder / 'heldout.jsonl'}",
        f"output={tmp_path / 'out.jsonl'}",
        "device=cpu",
        "precision=float32",
    ]
    at = At("prefopt.generation.sampler:sample", 1, no_memory)
    code, said = run(tmp_path / "log", *arguments, program="sample", env=env, at=at)
    assert code == 2, said
    assert "Traceback" not in said
    assert "out of memory" in said
