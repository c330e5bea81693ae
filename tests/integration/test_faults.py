"""What a run promises when things break, each with the fault brought about for real: processes killed, disks full or
gone, files damaged, memory short, numbers not finite, ranks that hang."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import UserError
from prefopt.tracking.process import acquire_lock, release_lock
from prefopt.training.checkpoint import (
    KEPT,
    SUMS,
    check_space,
    complete_checkpoints,
    damage,
    latest_checkpoint,
    save_checkpoint,
)
from tests.helpers.forks import At, run, start
from tests.helpers.harm import HARMS, cut
from tests.helpers.harm import flip as flip_a_bit
from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, records
from tests.training.test_loop import TIMING

STEPS = ["steps=6", "eval_every=3", "save_every=1"]
FAULTY = "objective._target_=tests.helpers.faulty.Faulty"


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """One cache for all: what is in it is another matter (tests/data/test_cache.py, tests/models/test_reference.py)."""
    return {"PREFOPT_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory, env) -> dict:
    """The result of the undisturbed run of `STEPS`."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = run(folder / "log", *overrides(folder), *STEPS, env=env)
    assert code == 0, said
    return result(folder)


def result(runs: Path) -> dict:
    """What a run ends with: weights, each row of metrics in its order, and the evaluations."""
    (record,) = records(runs)
    assert record["status"] == "finished", record["error"]
    folder = runs / record["name"]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": record["final_weights"],
        "tensors": {k: v.tolist() for k, v in load_file(next((folder / "policy").glob("*.safetensors"))).items()},
        "rows": [{k: v for k, v in row.items() if k not in TIMING} for row in rows],
        "evaluations": record["evaluations"],
        "left": sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp"),
        "checkpoints": [p.name for p in folder.glob("checkpoints/*")],
    }


def folder_of(runs: Path) -> Path:
    (record,) = records(runs)
    return runs / record["name"]


@contextlib.contextmanager
def mounted(folder: Path, *how: str):
    folder.mkdir()
    process = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"needs the right to mount: {process.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def await_file(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def await_text(process: BaseProcess, file: Path, *texts: str) -> None:
    while process.is_alive() and not (file.exists() and any(text in file.read_text() for text in texts)):
        time.sleep(0.001)


# Killed.


def test_wherever_it_is_killed_it_ends_bit_for_bit_the_same(overrides, whole, tmp_path, env):
    """One run, killed at each of these moments one after the other."""
    arguments = [*overrides(tmp_path / "killed"), *STEPS]
    moments = [
        At("prefopt.training.loop:train_step"),  # before its first step
        At("prefopt.training.checkpoint:format_sums"),  # in its first checkpoint, with the tensors written
        At("prefopt.training.checkpoint:publish"),  # with all written, and it has not got its name yet
        At("prefopt.training.checkpoint:complete_checkpoints", 2),  # it has its name, and nothing else has happened
        At("prefopt.training.checkpoint:save_file", 6),  # a step and a half later, within a checkpoint
        At("prefopt.training.checkpoint:remove", 3),  # where older ones are removed
        At("prefopt.training.loop:Loggers.log", 2),
        At("prefopt.tracking.run:Run.finish"),  # with its policy written
        At("prefopt.training.checkpoint:tidy_checkpoints"),  # finished, but for the removal of older checkpoints
    ]
    for n, moment in enumerate(moments):
        code, said = run(tmp_path / "log", *arguments, env=env, at=moment)
        assert code == -signal.SIGKILL, (n, said)
        for checkpoint in complete_checkpoints(folder_of(tmp_path / "killed") / "checkpoints"):
            assert damage(checkpoint) is None
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert result(tmp_path / "killed") == whole


def test_a_policy_that_is_exported_on_the_way_is_there_after_a_kill(overrides, tmp_path, env):
    """Killed as soon as the checkpoint of that step is complete, from which the step does not come again."""
    arguments = [*overrides(tmp_path), "steps=4", "exports=2", "save_every=2"]
    moment = At("prefopt.training.checkpoint:complete_checkpoints", 2)
    assert run(tmp_path / "log", *arguments, env=env, at=moment)[0] == -signal.SIGKILL
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert "going on from step 2" in said
    assert (folder_of(tmp_path) / "policies" / "step_0000002" / "model.safetensors").is_file()


# Damaged.


def checkpoints(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> list[Path]:
    for step in steps:
        tensors = {"weights": {"a": torch.full((5,), float(step))}, "moments": {"a/exp_avg": torch.zeros(3)}}
        save_checkpoint(folder, step, tensors, {"note": step})
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "meta.json", SUMS])
@pytest.mark.parametrize("harm", [flip_a_bit, cut, lambda file: file.unlink()], ids=["flipped", "cut", "lost"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(harm, name, tmp_path, capsys):
    before, last = checkpoints(tmp_path)
    assert latest_checkpoint(tmp_path) == last
    assert capsys.readouterr().err == ""
    harm(last / name)
    assert latest_checkpoint(tmp_path) == before
    said = capsys.readouterr().err
    assert f"{last} is damaged: " in said
    assert (name if name != SUMS else "checksum") in said or "it has no SHA256SUMS" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000002", "step_0000003.damaged"]
    checkpoints(tmp_path, (3,))  # the run comes to that step again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000002", "step_0000003"]


def test_sha256sum_reads_the_checksums(tmp_path):
    *_, last = checkpoints(tmp_path)
    flip_a_bit(last / "weights.safetensors")
    found = subprocess.run(["sha256sum", "-c", SUMS], cwd=last, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["meta.json: OK", "moments.safetensors: OK", "weights.safetensors: FAILED"]


def test_an_older_checkpoint_goes_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    there = checkpoints(tmp_path)
    assert len(there) == KEPT
    monkeypatch.setattr("prefopt.training.checkpoint.publish", lambda aside, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, 4, {"weights": {"a": torch.zeros(5)}}, {})
    assert sorted(complete_checkpoints(tmp_path)) == there
    assert [damage(checkpoint) for checkpoint in there] == [None, None]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(overrides, whole, tmp_path, env):
    arguments = [*overrides(tmp_path / "runs"), *STEPS]
    assert (
        run(tmp_path / "log", *arguments, env=env, at=At("prefopt.training.loop:train_step", 5))[0] == -signal.SIGKILL
    )
    _, last = sorted((folder_of(tmp_path / "runs") / "checkpoints").iterdir())
    flip_a_bit(last / "moments.safetensors")
    shutil.copytree(tmp_path / "runs", tmp_path / "both")
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert f"{last} is damaged: moments.safetensors has the checksum" in said
    assert "going on from step 3 of 6" in said
    assert result(tmp_path / "runs") == whole
    for checkpoint in (folder_of(tmp_path / "both") / "checkpoints").iterdir():
        cut(checkpoint / "weights.safetensors")
    code, said = run(tmp_path / "log", *overrides(tmp_path / "both"), *STEPS, env=env)
    assert code == 2
    assert said.count("is damaged: ") == 2
    assert said.count("weights.safetensors has the checksum") == 2
    assert "There is no other checkpoint" in said


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_is_damaged_in_the_cache_is_named_and_made_anew(harm, overrides, tmp_path):
    """Tokens, the reference's log-probs, the samples of the initial policy and the layout that was found right, all of
    them at once."""
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    found = []
    for n in (1, 2):
        runs = tmp_path / f"runs_{n}"
        code, said = run(tmp_path / "log", *overrides(runs), *STEPS, *SAMPLED, env=env)
        assert code == 0, said
        found.append(result(runs))
        kept = [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix not in (".lock", "")]
        kept = [f for f in kept if f.name != "lock"]
        assert {f.suffix for f in kept} == {".arrow", ".json", ".jsonl", ".safetensors"}
        if n == 1:
            assert "is damaged" not in said
            for file in kept:
                harm(file)
    for file in kept:
        if file.parent.name == "layout":  # one sealed file of JSON
            assert f"{file} is damaged: " in said or f"{file} cannot be read: " in said
            continue
        place = file if file.suffix == ".safetensors" else file.parent
        assert f"{place} is damaged: " in said
    assert said.count("It is made anew.") == 3 + 1
    assert found[0] == found[1]


def test_killed_makers_of_what_is_cached_leave_nothing(overrides, tmp_path):
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    arguments = [*overrides(tmp_path / "runs"), *STEPS, *SAMPLED]
    moments = [
        At("prefopt.data.cache:write_split", 2),
        At("prefopt.utils.store:publish"),  # with all written, and it has not got its name yet
        At("os:fsync"),  # in the writing of a single file
        At("prefopt.training.evaluate:sample_logratios"),
    ]
    for moment in moments:
        code, said = run(tmp_path / "log", *arguments, env=env, at=moment)
        assert code == -signal.SIGKILL, said
        assert len(list((tmp_path / "cache").rglob("*.tmp"))) <= 2
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert "is damaged" not in said
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert not list((tmp_path / "runs").rglob("*.tmp"))


# Disks.


def test_a_full_disk_stops_the_run_with_its_last_checkpoint_kept(overrides, whole, tmp_path, env):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        arguments = [*overrides(disk), *STEPS]
        full = At("prefopt.training.checkpoint:save_file", 5, partial(fill, disk))  # within the second checkpoint
        code, said = run(tmp_path / "log", *arguments, env=env, at=full)
        assert code == 2, said
        assert "Traceback" not in said
        assert "No space left on device" in said
        assert "goes on from its last checkpoint, step_0000001, which is kept" in said
        (kept,) = (folder_of(disk) / "checkpoints").iterdir()
        assert damage(kept) is None
        (record,) = records(disk)
        assert record["status"] in ("failed", "running")  # as far as there was room for it
        (disk / "full").unlink()
        # Full again, this time where the metrics are written.
        full = At("prefopt.training.loop:Loggers.log", 2, partial(fill, disk))
        code, said = run(tmp_path / "log", *arguments, env=env, at=full)
        assert code == 2, said
        assert "Traceback" not in said
        assert "No space left on device" in said
        (disk / "full").unlink()
        code, said = run(tmp_path / "log", *arguments, env=env)
        assert code == 0, said
        assert result(disk) == whole


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(overrides, tmp_path, env):
    """No file may be larger than 50 kB: the weights are."""
    code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env, file_size=50_000)
    assert code == 2, said
    assert "Traceback" not in said
    assert "File too large" in said
    assert "The same command then goes on from the first step" in said
    assert list((folder_of(tmp_path / "runs") / "checkpoints").iterdir()) == []
    assert records(tmp_path / "runs")[0]["status"] == "failed"


def test_too_little_room_is_said_before_the_first_step(overrides, tmp_path, env):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        code, said = run(tmp_path / "log", *overrides(disk), *STEPS, env=env)
        assert code == 2, said
        assert "more for checkpoints and policies" in said
        assert not (folder_of(disk) / "metrics.jsonl").exists()


def test_what_is_there_already_needs_no_more_room(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "there").write_bytes(bytes(2**20))
    check_space(tmp_path, 2**20)
    with pytest.raises(UserError, match="Make room, set runs_dir to another disk, or ask for fewer exports"):
        check_space(tmp_path, 2 * free + 2**21)


def test_a_folder_that_cannot_be_written_is_said(overrides, tmp_path, env):
    (tmp_path / "file").touch()
    code, said = run(tmp_path / "log", *overrides(tmp_path / "file" / "runs"), *STEPS, env=env)
    assert code == 2, said
    assert "Traceback" not in said
    assert "is a file, and no folder" in said
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        code, said = run(tmp_path / "log", *overrides(disk / "runs"), *STEPS, env=env)
        assert code == 2, said
        assert "Traceback" not in said
        assert "Read-only file system" in said


def unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_system_that_is_gone_stops_the_run_and_nothing_is_written_in_its_place(overrides, whole, tmp_path, env):
    (tmp_path / "server").mkdir()
    with mounted(tmp_path / "disk", "--bind", str(tmp_path / "server")) as disk:
        arguments = [*overrides(disk), *STEPS]
        gone = At("prefopt.training.loop:save_checkpoint", 3, partial(unmount, disk))
        code, said = run(tmp_path / "log", *arguments, env=env, at=gone)
        assert code == 2, said
        assert "Traceback" not in said
        assert f"No such file or directory: '{disk}" in said
        assert "Bring the disk or the rights back" in said
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "--bind", str(tmp_path / "server"), str(disk)], check=True)
        code, said = run(tmp_path / "log", *arguments, env=env)
        assert code == 0, said
        assert "going on from step 2 of 6" in said
        assert result(disk) == whole


# Two processes, one run.


def test_one_process_works_on_a_run_and_the_others_say_who(overrides, tmp_path, env):
    """By the record, and by the lock where the record says nothing: it names another machine, or was not there yet."""
    go, late = tmp_path / "go", tmp_path / "late"
    arguments = [*overrides(tmp_path / "runs"), "steps=2", FAULTY, f"+objective.fault={go}"]
    # This one has found nothing when it looked, and is held up before it begins.
    behind = start(
        tmp_path / "behind.log",
        *arguments,
        env=env,
        at=At("prefopt.models.load:weights_digest", 1, partial(await_file, late)),
    )
    await_text(behind, tmp_path / "behind.log", "objective:")
    first = start(tmp_path / "first.log", *arguments, env=env)
    while not list((tmp_path / "runs").glob("*/metrics.jsonl")):  # it has begun
        assert first.is_alive(), (tmp_path / "first.log").read_text()
        time.sleep(0.01)
    who = f"process {first.pid} on {socket.gethostname()} since 20"
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 2
    assert f"is running already, as {who}" in said
    late.touch()
    behind.join()
    assert behind.exitcode == 2
    assert f"is held by {who}" in (tmp_path / "behind.log").read_text()
    file = folder_of(tmp_path / "runs") / "record.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"host": "elsewhere"}))
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 2
    assert f"is held by {who}" in said
    assert json.loads(file.read_text())["status"] == "running"  # those who were refused have not touched it
    first.kill()
    first.join()
    go.touch()
    code, said = run(tmp_path / "log", *arguments, env=env)  # the dead one's lock is nobody's
    assert code == 0, said
    assert records(tmp_path / "runs")[0]["attempt"] == 2


def test_a_lock_is_let_go_of(tmp_path):
    acquire_lock(tmp_path / "run")
    acquire_lock(tmp_path / "run")
    release_lock(tmp_path / "run")
    release_lock(tmp_path / "run")
    acquire_lock(tmp_path / "run")
    release_lock(tmp_path / "run")


# Numbers.


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_refused_and_kept_for_later(fault, overrides, tmp_path, env):
    arguments = [*overrides(tmp_path), "steps=6", FAULTY, f"+objective.fault={fault}"]
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 2, said
    what = "loss and gradient_norm" if fault == "loss" else "gradient_norm"
    assert f": {what} not finite; the step was refused and the weights are unchanged" in said
    assert "with nonfinite=skip it passes over such a step" in said
    (file,) = (folder_of(tmp_path) / "nonfinite").iterdir()
    told = json.loads(file.read_text())
    assert told["not_finite"] == what.split(" and ")
    assert told["weights_not_finite"] == []
    assert told["metrics"]["gradient_norm"] in ("nan", "inf")
    assert len(told["pairs"]) == 4
    assert all(i in said for i in told["pairs"])
    if told["step"] > 1:
        assert told["metrics_before"][0]["step"] == told["step"] - 1
    # The same run, from its last checkpoint, without those steps.
    code, said = run(tmp_path / "log", *arguments, "nonfinite=skip", env=env)
    assert code == 0, said
    assert f"step {told['step']}: {what} not finite; the step was refused" in said
    rows = [row for row in result(tmp_path)["rows"] if row["split"] == "train"]
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert told["step"] in skipped
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert len(skipped) < 6
    assert sorted(int(f.stem.removeprefix("step_")) for f in file.parent.iterdir()) == skipped


def test_no_checkpoint_and_no_policy_are_made_of_weights_that_are_not_finite(overrides, tmp_path, env):
    """A learning rate beyond float32: the first step is finite, and what it makes of the weights is not."""
    for n, changes in enumerate((["save_every=1"], ["steps=1"])):
        arguments = [*overrides(tmp_path / f"runs{n}"), *changes, "optimizer.lr=1e39"]
        code, said = run(tmp_path / "log", *arguments, env=env)
        assert code == 2, said
        assert "NaN or Inf" in said
        folder = folder_of(tmp_path / f"runs{n}")
        assert not list(folder.glob("checkpoints/*")) + list(folder.glob("policy"))
        assert records(tmp_path / f"runs{n}")[0]["status"] == "failed"


# Memory.


def test_out_of_memory_names_the_batch_and_the_run_goes_on_with_smaller_ones(overrides, whole, tmp_path, env):
    """The allocator of PyTorch refuses what two pairs at a time ask for, from the first step on."""
    arguments = [*overrides(tmp_path / "runs"), *STEPS, FAULTY, "+objective.fault=memory", "micro_batch_tokens=200"]
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 2, said
    assert "step 1: out of memory on cpu. The largest of its" in said
    assert "pairs in 1 rows of" in said
    assert "a step stays one of 4 pairs" in said
    (record,) = records(tmp_path / "runs")
    assert record["status"] == "failed"
    wanted = said.partition("Give ")[2].partition(" or gradient_checkpointing=true")[0]
    assert wanted.startswith("micro_batch_tokens=")
    for tokens in (wanted, "micro_batch_tokens=1"):
        code, said = run(tmp_path / "log", *arguments, tokens, env=env)
        if code == 0:
            break
    assert code == 0, said
    (again,) = records(tmp_path / "runs")
    assert again["name"] == record["name"]
    assert again["config"]["micro_batch_tokens"] == int(tokens.partition("=")[2])
    found = result(tmp_path / "runs")["tensors"]
    for name, values in whole["tensors"].items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), atol=1e-5), name


# Ranks.


def torchrun(*args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    from tests.training.test_zero2 import torchrun

    return torchrun(2, *args, *STEPS, "engine=zero2", FAULTY, env=env)


@pytest.mark.slow
def test_ranks_killed_one_by_one(overrides, tmp_path, env):
    """Bit for bit what two undisturbed ranks end with."""
    pytest.importorskip("deepspeed")
    process = torchrun(*overrides(tmp_path / "whole"), "+objective.fault=die", env=env | {"MENDED": "1"})
    assert process.returncode == 0, process.stderr
    arguments = [*overrides(tmp_path / "killed"), "+objective.fault=die"]
    for moment in ("1 5", "0 4"):
        process = torchrun(*arguments, env=env | {"FAULT_AT": moment})
        assert process.returncode != 0
        assert "SIGKILL" in process.stderr
    process = torchrun(*arguments, env=env | {"MENDED": "1"})
    assert process.returncode == 0, process.stderr
    assert "going on from step" in process.stderr
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", pytest.param("freeze", marks=pytest.mark.long)])
def test_a_rank_that_hangs_ends_the_job_with_its_traceback(fault, overrides, tmp_path, env):
    """hang: it sleeps in the objective; freeze: it cannot even say so, and the other one does."""
    pytest.importorskip("deepspeed")
    arguments = [*overrides(tmp_path), f"+objective.fault={fault}"]
    process = torchrun(*arguments, "engine.hang_s=40", env=env | {"FAULT_AT": "1 5"})
    assert process.returncode != 0
    assert "Timeout (0:00:40)!" in process.stderr
    assert ("in in_training" if fault == "hang" else "in train_step") in process.stderr
    process = torchrun(*arguments, env=env | {"MENDED": "1"})
    assert process.returncode == 0, process.stderr
    assert "going on from step 2 of 6" in process.stderr


@pytest.mark.slow
def test_what_hangs_before_the_first_step_ends_the_job_too(overrides, tmp_path, env):
    """The first process reads the data, and the other one waits for it for as long as that gets on."""
    pytest.importorskip("deepspeed")
    arguments = [*overrides(tmp_path), "engine.hang_s=30"]
    process = torchrun(*arguments, "dataset.format._target_=tests.helpers.faulty.SlowPairs", env=env)
    assert process.returncode != 0
    assert process.stderr.count("Timeout (0:00:30)!") == 1
    assert "faulty.py" in process.stderr
    assert "in __call__" in process.stderr


def test_who_gets_on_is_not_taken_for_one_that_hangs(tmp_path):
    """Twelve pulses within three limits; and then none."""
    code = """if True:
        import time
        from prefopt.utils import distributed
        from prefopt.utils.console import progress
        distributed.start_watchdog(1)
        for _ in progress(range(12), "", show=False):
            time.sleep(0.25)
        print("got on", flush=True)
        time.sleep(60)
    """
    process = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | {"WORLD_SIZE": "2"}, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stdout == "got on\n"
    assert "Timeout (0:00:01)!" in process.stderr


@pytest.mark.slow
def test_zero2_refuses_the_same_steps(overrides, tmp_path, env):
    pytest.importorskip("deepspeed")
    found = []
    for engine in ("single", "zero2"):
        arguments = [*overrides(tmp_path / engine), *STEPS, FAULTY, "+objective.fault=loss", "nonfinite=skip"]
        code, said = run(tmp_path / "log", *arguments, f"engine={engine}", env=env)
        assert code == 0, said
        found.append(result(tmp_path / engine))
    single, zero2 = found
    skipped = [[row["step"] for row in each["rows"] if "skipped" in row] for each in found]
    assert skipped[0] == skipped[1] != []
    for name, values in single["tensors"].items():
        assert torch.allclose(torch.tensor(zero2["tensors"][name]), torch.tensor(values), atol=1e-5), name


# The other programs.


def test_sampling_that_is_killed_goes_on_and_ends_with_the_same_file(tiny_folder, tmp_path, env):
    arguments = [
        "model=hub", f"model.path={tiny_folder / 'model'}", f"prompts={tiny_folder / 'train.jsonl'}",
        "samples_per_prompt=2", "sampling.max_new_tokens=6", "sampling.batch_size=4", "device=cpu", "precision=float32",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole.jsonl.gz", tmp_path / "killed.jsonl.gz"
    code, said = run(tmp_path / "log", *arguments, f"output={whole}", program="sample", env=env)
    assert code == 0, said
    for moment in (
        At("prefopt.generation.sampler:sample", 3),
        At("prefopt.generation.sampler:sample", 2),
        At("prefopt.generation.sampled:write_rows"),
    ):
        code, said = run(tmp_path / "log", *arguments, f"output={killed}", program="sample", env=env, at=moment)
        assert code == -signal.SIGKILL, said
        assert not killed.exists()
    code, said = run(tmp_path / "log", *arguments, f"output={killed}", program="sample", env=env)
    assert code == 0, said
    assert "going on after 12 of 12 prompts" in said  # nothing was drawn twice
    assert killed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_one_process_works_on_an_output(tiny_folder, tmp_path, env):
    """Another is refused, and says who does; the output is that of one alone."""
    drawn, alone, scored = tmp_path / "drawn.jsonl", tmp_path / "alone.jsonl", tmp_path / "scored.jsonl"
    sampling = [
        "model=hub", f"model.path={tiny_folder / 'model'}", f"prompts={tiny_folder / 'train.jsonl'}",
        "samples_per_prompt=2", "sampling.max_new_tokens=6", "sampling.batch_size=4", "device=cpu", "precision=float32",
    ]  # fmt: skip
    scoring = [f"input={drawn}", "scorer=vader"]
    go_on = tmp_path / "go_on"
    wait = partial(await_file, go_on)
    for program, arguments, output, moment in (
        ("sample", sampling, drawn, At("prefopt.generation.sampler:sample", 3, wait)),
        ("score", scoring, scored, At("prefopt.rewards.scored:write_rows", 1, wait)),
    ):
        arguments = [*arguments, f"output={output}"]
        first = start(tmp_path / "first", *arguments, program=program, env=env, at=moment)
        await_file(tmp_path / f"{output.name}.lock")
        code, said = run(tmp_path / "second", *arguments, program=program, env=env)
        assert code == 2, said
        assert f"{output} is held by process {first.pid} on " in said
        go_on.touch()
        first.join()
        assert first.exitcode == 0
        go_on.unlink()
    code, said = run(tmp_path / "log", *sampling, f"output={alone}", program="sample", env=env)
    assert code == 0, said
    assert drawn.read_bytes() == alone.read_bytes()
    assert len(scored.read_text().splitlines()) == 12
    assert {f.name for f in tmp_path.glob("*.jsonl*")} == {"drawn.jsonl", "alone.jsonl", "scored.jsonl"}


def test_a_killed_writer_of_an_output_leaves_nothing_for_long(tiny_folder, tmp_path, env):
    scored = tmp_path / "scored.jsonl"
    rows = [{"prompt": "Hi", "responses": ["good"]}]
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"input={tmp_path / 'drawn.jsonl'}", "scorer=vader", f"output={scored}"]
    code, said = run(tmp_path / "log", *arguments, program="score", env=env, at=At("os:fsync"))
    assert code == -signal.SIGKILL, said
    assert not scored.exists()
    assert len(list(tmp_path.glob("scored.jsonl.*"))) == 2  # a half, and a lock that nobody has
    code, said = run(tmp_path / "log", *arguments, program="score", env=env)
    assert code == 0, said
    assert [f.name for f in tmp_path.glob("scored.jsonl*")] == ["scored.jsonl"]


@pytest.mark.slow
def test_a_disk_that_fills_up_under_sampling_and_scoring_costs_no_more_than_what_was_under_way(
    tiny_folder, tmp_path, env
):
    sampling = [
        "model=hub", f"model.path={tiny_folder / 'model'}", f"prompts={tiny_folder / 'train.jsonl'}",
        "samples_per_prompt=2", "sampling.max_new_tokens=6", "sampling.batch_size=4", "device=cpu", "precision=float32",
    ]  # fmt: skip
    log = tmp_path / "log"
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        drawn, scored = disk / "drawn.jsonl", disk / "scored.jsonl"
        for n, file in ((1, f"{drawn}.partial"), (3, drawn)):  # the third chunk fits into the page that is there
            full = At("prefopt.generation.sampler:sample", n, partial(fill, disk))
            code, said = run(log, *sampling, f"output={drawn}", program="sample", env=env, at=full)
            assert code == 2, said
            assert "Traceback" not in said
            assert f"No space left on device: '{file}'. Make room there" in said
            (disk / "full").unlink()
        code, said = run(log, *sampling, f"output={drawn}", program="sample", env=env)
        assert code == 0, said
        assert "going on after 12 of 12 prompts" in said
        scoring = [f"input={drawn}", f"output={scored}", "scorer=vader"]
        full = At("prefopt.rewards.scored:score_rows", 1, partial(fill, disk))
        code, said = run(log, *scoring, program="score", env=env, at=full)
        assert code == 2, said
        assert "Traceback" not in said
        assert f"No space left on device: '{scored}'. Make room there" in said
        (disk / "full").unlink()
        assert sorted(file.name for file in disk.iterdir()) == ["drawn.jsonl"]  # nothing is left half written
        code, said = run(log, *scoring, program="score", env=env)
        assert code == 0, said
        assert len(scored.read_text().splitlines()) == 12


@pytest.mark.slow
def test_a_disk_that_fills_up_under_judging_keeps_the_answers(overrides, tmp_path, env):
    pytest.importorskip("alpaca_eval")
    log = tmp_path / "log"
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        code, said = run(log, *overrides(disk), env=env)
        assert code == 0, said
        questions = tmp_path / "questions.jsonl"
        questions.write_text("".join(json.dumps({"instruction": f"What is number {i}?"}) + "\n" for i in range(4)))
        arguments = [
            f"run={folder_of(disk)}", f"instructions={questions}", "judge=reward_model", "precision=float32",
            "device=cpu", "sampling.max_new_tokens=6",
        ]  # fmt: skip
        full = At("prefopt.evaluation.alpaca:write_annotations", 1, partial(fill, disk))
        code, said = run(log, *arguments, program="alpaca", env=env, at=full)
        assert code == 2, said
        assert "Traceback" not in said
        assert "No space left on device" in said
        assert "What was done is kept" in said
        (disk / "full").unlink()
        drawn = At("prefopt.generation.sampler:sample")  # would kill
        code, said = run(log, *arguments, program="alpaca", env=env, at=drawn)
        assert code == 0, said
