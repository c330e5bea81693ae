"""What an operator meets: damaged metrics and records, stray files, disks that fill up at the end, ranks and sweeps that
do not fit together."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from prefopt.errors import UserError
from prefopt.tracking.metrics import metrics_damage
from prefopt.training.checkpoint import complete_checkpoints, latest_checkpoint, save_checkpoint
from prefopt.utils.os_errors import explain, from_text
from tests.helpers.forks import At, run, start
from tests.helpers.tiny import ENVIRONMENT, ROOT, records, run_program
from tests.integration.test_faults import FAULTY, STEPS, env, fill, folder_of, mounted, result, whole  # noqa: F401


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
        full = At("prefopt.training.checkpoint:not_finite", 4, partial(fill, disk))
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
    at = At("prefopt.training.setup:remove", 1, interrupt)
    code, _ = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env, at=at)
    assert code == 130
    assert records(tmp_path / "runs")[0]["status"] == "finished"
    code, said = run(tmp_path / "log", *overrides(tmp_path / "runs"), *STEPS, env=env)
    assert (code, "finished, skipped" in said) == (0, True), said
    assert result(tmp_path / "runs") == whole
