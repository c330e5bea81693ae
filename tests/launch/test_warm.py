"""Jobs that are forked: they are as fresh processes are, and however one ends, nothing else does."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefopt.launch.warm import JobStarter, why_not_fork
from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, command

# In the place of prefopt.job: it does what the file `act` in the job's folder says.
PROGRAM = """
import sys
from pathlib import Path
from prefopt.launch import warm
import os
os.environ["SET_BY_AN_IMPORT"] = "yes"
is_warm = warm.FLAG in sys.argv
if is_warm:
    warm.serve(lambda: {warm_up})
exec(Path(sys.argv[-1], "act").read_text())
if is_warm:
    warm.leave(0)
"""

FACTS = """
import atexit, json, os, signal, threading
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
atexit.register(lambda: print("the end"))
threading.Thread(target=lambda: print("a thread")).start()
print(json.dumps({
    "arguments": sys.argv[-1], "environment": dict(os.environ), "place": os.getcwd(),
    "leads its session": os.getsid(0) == os.getpid(), "files": sorted(os.listdir("/proc/self/fd")),
    "input": sys.stdin.read(), "signals": {k: status[k].strip() for k in ("SigBlk", "SigIgn", "SigCgt", "Umask")},
}))
"""


@pytest.fixture
def starter(tmp_path, monkeypatch):
    """starter(warm_up) -> a JobStarter that has warmed up by the expression `warm_up`."""
    made = []

    def make(warm_up: str = "None", **environment: str) -> JobStarter:
        (tmp_path / "program.py").write_text(PROGRAM.format(warm_up=warm_up))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/bash\nexec {sys.executable} {tmp_path}/program.py "$@"\n')
        python.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            job(tmp_path, "like", "")
            made.append(JobStarter(ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment, tmp_path / "like"))
        made[-1].wait()
        return made[-1]

    yield make
    for each in made:
        each.close()


def job(tmp_path: Path, name: str, act: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "act").write_text(act)
    (folder / "log.txt").write_text("before\n")
    return folder


def fresh(starter: JobStarter, folder: Path, environment: dict[str, str]) -> int:
    python = folder.parent / "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        process = JobStarter(starter.environment, None).start(folder, environment)
    assert isinstance(process, subprocess.Popen)
    return process.wait()


def test_a_fork_is_what_a_fresh_process_is(starter, tmp_path):
    warm, gpu = starter(), {"CUDA_VISIBLE_DEVICES": "3"}
    forked, other = job(tmp_path, "forked", FACTS), job(tmp_path, "fresh", FACTS)
    assert warm.start(forked, gpu).wait() == 0
    assert fresh(warm, other, gpu) == 0
    logs = [(folder / "log.txt").read_text().replace(str(folder), "FOLDER") for folder in (forked, other)]
    lines = [sorted(log.splitlines()) for log in logs]
    assert len(lines[0]) == 4  # with what was there before, a thread, and the end
    facts = [json.loads(line) for log in logs for line in log.splitlines() if line.startswith("{")]
    for each in facts:  # bash has set these
        for name in ("_", "SHLVL", "PWD", "OLDPWD"):
            each["environment"].pop(name, None)
    assert facts[0] == facts[1]
    assert facts[0]["environment"].items() >= (gpu | {"SET_BY_AN_IMPORT": "yes"}).items()
    assert [line for line in lines[0] if line[0] != "{"] == ["a thread", "before", "the end"]


def test_forks_share_no_random_numbers(starter, tmp_path):
    warm = starter("__import__('numpy').random.seed(0) or __import__('random').seed(0)")
    act = "import random, numpy; print(random.random(), numpy.random.rand())"
    folders = [job(tmp_path, name, act) for name in ("a", "b")]
    for folder in folders:
        assert warm.start(folder, {}).wait() == 0
    drawn = {number for folder in folders for number in (folder / "log.txt").read_text().split()[1:]}
    assert len(drawn) == 4


ENDS = {
    "pass": 0,
    "raise RuntimeError('of one alone')": 1,
    "sys.exit(3)": 3,
    "import os; os._exit(7)": 7,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "import ctypes; ctypes.string_at(0)": -signal.SIGSEGV,
    "import os, signal; os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT,
}


def test_however_a_fork_ends_the_launcher_knows_and_the_others_go_on(starter, tmp_path):
    warm = starter()
    waiting = warm.start(job(tmp_path, "waiting", "import signal; signal.pause()"), {})
    for number, (act, code) in enumerate(ENDS.items()):
        folder = job(tmp_path, f"job{number}", act)
        assert warm.start(folder, {}).wait() == code, act
        said = (folder / "log.txt").read_text()
        assert ("of one alone" in said) == ("RuntimeError" in act)
    assert waiting.poll() is None
    waiting.terminate()
    assert waiting.wait() == -signal.SIGTERM
    waiting.kill()  # of a process that has ended: nothing
    assert warm.warm.poll() is None


def test_jobs_outlive_the_warm_process_and_later_ones_are_fresh(starter, tmp_path, monkeypatch):
    warm = starter()
    running = warm.start(
        job(tmp_path, "running", f"import time\nwhile not Path('{tmp_path}/go').exists(): time.sleep(0.01)"), {}
    )
    os.kill(warm.warm.pid, signal.SIGKILL)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    later = warm.start(job(tmp_path, "later", "print('fresh')"), {})
    assert isinstance(later, subprocess.Popen)
    assert later.wait() == 0
    assert (tmp_path / "later" / "log.txt").read_text() == "before\nfresh\n"
    assert running.poll() is None
    (tmp_path / "go").touch()
    assert running.wait() == 0


def test_the_warm_process_ends_with_its_launcher_and_the_jobs_do_not(starter, tmp_path):
    warm = starter()
    running = warm.start(job(tmp_path, "running", "import signal; signal.pause()"), {})
    warm.warm.stdin.close()  # as when the launcher is killed
    assert warm.warm.wait(10) == 0
    assert running.poll() is None
    running.kill()
    assert running.wait() == -signal.SIGKILL


THREAD = "__import__('threading').Thread(target=__import__('time').sleep, args=(9,), daemon=True).start()"


@pytest.mark.parametrize(
    ("warm_up", "why"),
    [(THREAD, "1 threads run after the imports"), ("1 / 0", "has ended"), ("print('noise')", None)],
)
def test_what_cannot_be_forked_is_not(warm_up, why, starter, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("prefopt.launch.warm.log.info", said.append)
    assert (starter(warm_up).warm is None) == (why is not None)
    assert [line for line in said if why and why in line] == said


def test_a_thread_is_seen_before_anything_is_forked():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert "threads run after the imports" in why_not_fork()
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_job_of_a_sweep_is_the_run_that_its_config_makes_alone(grid, overrides, tmp_path):
    """By a fresh Python, bit for bit."""
    runs, sweep = grid
    assert "imports itself" not in sweep.stderr
    arguments = [*overrides(tmp_path), *SAMPLED, "objective=mmpo", "objective.beta=0.5"]
    environment = ENVIRONMENT | {"PREFOPT_CACHE": str(tmp_path / "cache")}
    subprocess.run(command(*arguments), cwd=ROOT, env=environment, check=True, capture_output=True)
    (alone,) = (file.parent for file in tmp_path.glob("*/record.json"))
    forked = runs / alone.name
    assert results(forked) == results(alone)
    machines = [json.loads((folder / "record.json").read_text())["machine"] for folder in (forked, alone)]
    assert machines[0] == machines[1]


def results(folder: Path) -> tuple[list[dict], bytes]:
    """What a run has computed: the rows of its metrics without those of speed and memory, and its weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("pairs_per_second", "tokens_per_second", "peak_memory_gib", "seconds", "time")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows], (
        folder / "policy" / "model.safetensors"
    ).read_bytes()
