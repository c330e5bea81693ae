"""What is kept on disk to be used again: whole, made once, and made anew where it is damaged."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from prefopt.utils import store
from prefopt.utils.files import atomic_write
from prefopt.utils.store import (
    SUMS,
    format_sealed_array,
    format_sealed_line,
    opened,
    read_sealed_lines,
    seal,
    unseal,
)
from tests.helpers.harm import HARMS

FORK = multiprocessing.get_context("fork")
ROWS = [{"text": "a\u2028b", "numbers": [1, 2.5, None]}, {"text": "ü\n", "nested": {"b": 1, "a": True}}, {"text": ""}]


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "data").write_bytes(bytes(range(256)) * 4)
    (folder / "inner" / "more").write_text("more")


def refuse(folder: Path) -> None:
    raise AssertionError("made again")


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_is_made_once_and_its_sums_are_the_systems(tmp_path):
    folder = opened(tmp_path / "new" / "key", "x", write)
    assert opened(folder, "x", refuse) == folder
    found = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert sorted(found.stdout.splitlines()) == ["data: OK", "inner/more: OK"]
    assert [p.name for p in folder.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["data", "inner/more", SUMS])
@pytest.mark.parametrize("harm", [*HARMS, Path.unlink])
def test_a_damaged_folder_is_named_and_made_anew(harm, name, tmp_path, capsys):
    folder = opened(tmp_path / "key", "x", write)
    whole = files(folder)
    harm(folder / name)
    opened(folder, "x", write)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder} is damaged: " in line
    assert name in line
    assert line.endswith("It is made anew.")
    assert files(folder) == whole
    opened(folder, "x", refuse)


def test_a_file_that_was_taken_out_of_folder_and_sums_alike_is_missed_by_neither(tmp_path):
    """A sum whose line is lost does not make its file one that need not be checked."""
    folder = opened(tmp_path / "key", "x", write)
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text(lines[0])
    calls = []
    opened(folder, "x", lambda aside: (calls.append(1), write(aside))[1])
    assert calls == [1]


def test_what_was_checked_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    folder = opened(tmp_path / "key", "x", write)
    read = []
    checksums = store.checksums
    monkeypatch.setattr(store, "checksums", lambda folder: (read.append(1), checksums(folder))[1])
    for _ in range(3):
        opened(folder, "x", refuse)
    assert len(read) == 1
    os.utime(folder / "data", ns=(0, 0))
    opened(folder, "x", refuse)
    assert len(read) == 2


def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    """As a cache that a site shares with its users."""
    folder = opened(tmp_path / "key", "x", write)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        opened(folder, "x", refuse)
        assert not (tmp_path / "key.lock").exists()
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        opened(tmp_path / "key", "x", fail)
    assert not list(tmp_path.iterdir())


def _die(folder: Path) -> None:
    def make(aside: Path) -> None:
        write(aside)
        os.kill(os.getpid(), signal.SIGKILL)

    opened(folder, "x", make)


def _work(folder: Path, begun, go_on) -> None:
    def make(aside: Path) -> None:
        write(aside)
        begun.set()
        assert go_on.wait(60)

    opened(folder, "x", make)


def test_leftovers_of_killed_makers_go_and_those_of_living_ones_stay(tmp_path):
    begun, go_on = FORK.Event(), FORK.Event()
    living = FORK.Process(target=_work, args=(tmp_path / "three", begun, go_on))
    living.start()
    assert begun.wait(60)
    for name in ("one", "one", "two", "one"):
        killed = FORK.Process(target=_die, args=(tmp_path / name,))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert {p.name for p in tmp_path.glob("*.tmp")} == {f"{name}.tmp", "three.tmp"}
    opened(tmp_path / "two", "x", write)
    assert {p.name for p in tmp_path.glob("*.tmp")} == {"three.tmp"}
    go_on.set()
    living.join()
    assert living.exitcode == 0
    opened(tmp_path / "three", "x", refuse)


def _count(folder: Path, calls) -> None:
    def make(aside: Path) -> None:
        calls.put(1)
        time.sleep(0.1)
        write(aside)

    opened(folder, "x", make)


def test_processes_that_need_it_at_once_make_it_once(tmp_path):
    """Also where they find it damaged."""
    calls = FORK.Queue()
    for _ in range(2):
        jobs = [FORK.Process(target=_count, args=(tmp_path / "key", calls)) for _ in range(4)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert [job.exitcode for job in jobs] == [0] * 4
        assert calls.get(timeout=10) == 1
        assert calls.empty()
        (tmp_path / "key" / "data").write_bytes(b"")


# Rows of JSON.


@pytest.mark.parametrize("salt", ["", "settings"])
def test_a_seal_holds_for_the_same_content_and_salt_alone(salt):
    for row in ROWS:
        assert unseal(json.loads(json.dumps(seal(row, salt))), salt) == row
        assert unseal(seal(row, salt), "another") is None
        assert unseal(row, salt) is None
        assert seal(seal(row, "old"), salt) == seal(row, salt)
        assert unseal(seal(row, salt) | {"text": "b"}, salt) is None
    assert unseal([1]) is None
    assert unseal(json.loads(json.dumps(seal({"numbers": {10: "a", 9: ("b",)}, "nan": float("nan")})))) is not None


@pytest.mark.parametrize("form", ["lines", "array"])
def test_every_bit_of_a_file_of_rows_is_guarded(form, tmp_path):
    """Whatever bit flips, no row that is read is another than was written, and at most two are lost."""
    file = tmp_path / "rows"
    text = format_sealed_array(ROWS) if form == "array" else "".join(map(format_sealed_line, ROWS))
    if form == "array":
        assert [unseal(row) for row in json.loads(text)] == ROWS
    data = text.encode()
    file.write_bytes(data)
    assert read_sealed_lines(file) == (ROWS, True)
    for at in range(len(data)):
        for bit in (0, 2, 5):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            rows, whole = read_sealed_lines(file)
            assert all(row in ROWS for row in rows)
            assert len(rows) >= len(ROWS) - 2
            assert rows == ROWS or not whole
    for length in range(len(data)):
        file.write_bytes(data[:length])
        rows, whole = read_sealed_lines(file)
        assert rows == ROWS[: len(rows)]
        assert not whole or (form == "lines" and rows)
    file.write_bytes(bytes(len(data)))
    assert read_sealed_lines(file) == ([], False)


# Single files.


def _write_and_die(file: Path) -> None:
    fsync = os.fsync
    os.fsync = lambda handle: (fsync(handle), os.kill(os.getpid(), signal.SIGKILL))[0]
    atomic_write(file, "half")


def _write_slowly(file: Path, begun, go_on) -> None:
    fsync, first = os.fsync, []

    def slow(handle: int) -> None:
        if not first:
            first.append(1)
            begun.set()
            assert go_on.wait(60)
        fsync(handle)

    os.fsync = slow
    atomic_write(file, "slow")


def test_what_killed_writers_leave_goes_with_the_next_writing(tmp_path):
    file = tmp_path / "out[1].json"
    killed = FORK.Process(target=_write_and_die, args=(file,))
    killed.start()
    killed.join()
    begun, go_on = FORK.Event(), FORK.Event()
    slow = FORK.Process(target=_write_slowly, args=(file, begun, go_on))
    assert len(list(tmp_path.iterdir())) == 1
    slow.start()
    assert begun.wait(60)
    atomic_write(file, "whole")
    assert file.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2  # the living writer's
    go_on.set()
    slow.join()
    assert slow.exitcode == 0
    assert file.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [file]
