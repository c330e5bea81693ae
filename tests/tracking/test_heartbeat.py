"""Hosts whose locks do not reach each other. Another host is a heartbeat of another machine's kernel."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.errors import UserError
from prefopt.tracking import heartbeat
from prefopt.tracking.heartbeat import Heartbeat
from prefopt.tracking.process import acquire_lock, owns_lock, release_lock
from prefopt.training.config import TrainConfig
from prefopt.training.setup import prepare_run
from tests.helpers.tiny import ENVIRONMENT, ROOT, run_program

OTHER = {"machine": "another kernel", "owner": "process 7 on elsewhere since 2026-01-01T00:00:00Z", "key": "1"}
SUSPENDED = """
import sys, time
from pathlib import Path
from prefopt.tracking import heartbeat, process
heartbeat.BEAT_S = 0.05
process.acquire_lock(Path(sys.argv[1]))
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.1)


def left_by_other(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "heartbeat"
    file.write_text(json.dumps(OTHER))
    os.utime(file, (1, 1))  # its clock is far behind
    return file


@pytest.fixture
def beating():
    """beating(folder): another host is at work there, until the test ends."""
    end, threads = threading.Event(), []

    def start(folder: Path) -> Path:
        file = left_by_other(folder)

        def beat() -> None:
            n = 1
            while not end.wait(0.02):
                n += 1
                os.utime(file, (n, n))

        threads.append(threading.Thread(target=beat))
        threads[-1].start()
        return file

    yield start
    end.set()
    for thread in threads:
        thread.join()


def test_a_heartbeat_that_goes_on_keeps_another_host_off(beating, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.1)  # a minute to see it in, however slow the machine
    file = beating(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=f"is held by {OTHER['owner']}, whose lock does not reach this machine"):
            acquire_lock(tmp_path)
        assert not owns_lock(tmp_path)
    assert json.loads(file.read_text()) == OTHER


def test_a_heartbeat_that_has_stopped_is_taken_over(quick, tmp_path):
    file = left_by_other(tmp_path)
    acquire_lock(tmp_path)
    told = json.loads(file.read_text())
    assert (told["machine"], f"process {os.getpid()} on " in told["owner"]) == (heartbeat.machine_id(), True)
    before = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == before:  # it is renewed
        pass
    release_lock(tmp_path)
    assert not file.exists()


def test_this_machines_dead_process_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: pytest.fail("it waits"))
    left_by_other(tmp_path).write_text(json.dumps(OTHER | {"machine": heartbeat.machine_id()}))
    acquire_lock(tmp_path)
    release_lock(tmp_path)


def test_of_two_hosts_that_begin_at_once_one_gets_the_run(quick, tmp_path, monkeypatch):
    """Both find nothing, or both find the file of a third one, which is dead."""
    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    mine = threading.local()
    monkeypatch.setattr(heartbeat, "machine_id", lambda: mine.name)
    for found in (False, True):
        folder = tmp_path / str(found)
        folder.mkdir()
        if found:
            left_by_other(folder)
        begun, refused = list[Heartbeat](), list[str]()

        def host(name: str, folder=folder, begun=begun, refused=refused) -> None:
            mine.name = name
            beats = Heartbeat(folder, name)
            beats._beat = lambda: None  # type: ignore[method-assign]
            try:
                beats.begin()
                begun.append(beats)
                while not refused:  # it is at work until the other has looked
                    os.utime(beats.file)
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=host, args=(name,)) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(begun), len(refused)) == (1, 1)


def test_a_process_whose_run_was_taken_over_ends(tmp_path):
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    other = tmp_path / "other"
    other.write_text(json.dumps(OTHER))
    other.replace(tmp_path / "heartbeat")
    _, said = process.communicate()
    assert process.returncode == 2
    assert f"{tmp_path} was taken over by {OTHER['owner']}" in said
    assert json.loads((tmp_path / "heartbeat").read_text()) == OTHER


def test_training_refuses_a_run_that_another_host_has(beating, overrides, tmp_path):
    register(TrainConfig)
    arguments = overrides(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        folder = prepare_run(parse(compose("train", arguments), TrainConfig)).run.folder
    beating(folder)
    process = run_program(*arguments)
    assert process.returncode == 2
    assert f"is held by {OTHER['owner']}" in process.stderr
    assert not (folder / "record.json").exists()
    assert not (folder / "metrics.jsonl").exists()
