"""A run on two nodes of a real Slurm: the same weights, a node that is lost, a process that dies or hangs.

`make slurm-test`. Each node is a slurmd of its own on this machine. So they have one file system and no network between
them, and gloo connects the processes.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefopt.config.parse import build
from prefopt.generation.server import free_port
from prefopt.launch.base import Launcher
from prefopt.launch.slurm import Slurm, submit
from prefopt.tracking import process
from tests.helpers.tiny import ENVIRONMENT, ROOT, command, records, run_program
from tests.launch.test_slurm import PRESET, SOON_S, cluster, slurm_state, until  # noqa: F401 - a fixture
from tests.training.test_zero2 import TIMING, torchrun

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slurm

FIRST = socket.gethostname().partition(".")[0]  # a name that resolves: the processes meet there
SECOND = f"{FIRST}-second"
LOST_S = 15  # after which Slurm takes a silent node for lost
# A step is one call of the objective in each process.
STEPS = ["steps=6", "eval_every=3", "save_every=1", "micro_batch_tokens=1000"]
FAULTY = "objective._target_=tests.helpers.faulty.Faulty"
IN_STEP_5 = {"FAULT_AT": "1 5"}  # of the process on the second node


class Nodes:
    """Two nodes and their controller, with the configuration and munged of the one-node cluster in `folder`."""

    def __init__(self, folder: Path):
        home = folder / "nodes"
        home.mkdir()
        own = {
            "SlurmctldPort": free_port(),
            "SlurmdTimeout": LOST_S,
            "StateSaveLocation": home / "state",
            "SlurmdSpoolDir": home / "%n",
            "SlurmctldPidFile": home / "slurmctld.pid",
            "SlurmctldLogFile": home / "slurmctld.log",
            "SlurmdPidFile": home / "%n.pid",
            "SlurmdLogFile": home / "%n.log",
            "JobCompLoc": home / "jobs.txt",
        }
        lines = (folder / "etc" / "slurm.conf").read_text().splitlines()
        (node,) = [line.split() for line in lines if line.startswith("NodeName=")]
        lines = [line for line in lines if not line.startswith((*own, "NodeName=", "PartitionName="))]
        lines += [f"{key}={value}" for key, value in own.items()]
        # Debian's Slurm takes one slurmd for each NodeHostname, and any node for one that is named localhost.
        for name in (FIRST, SECOND):
            lines += [" ".join([f"NodeName={name} NodeHostname={name} Port={free_port()}", *node[2:]])]
        lines += ["PartitionName=low Nodes=ALL Default=YES"]
        self.conf = folder / "etc" / "nodes.conf"  # beside gres.conf
        self.conf.write_text("\n".join(lines) + "\n")
        self.environment = os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self.controller = self.start("slurmctld", "-i")
        self.slurmd = {name: self.start("slurmd", "-N", name) for name in (FIRST, SECOND)}

    def start(self, program: str, *arguments: str) -> subprocess.Popen:
        with self.conf.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                [program, "-D", *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def idle(self) -> bool:
        answer = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=self.environment, capture_output=True, text=True)
        return answer.stdout.split() == ["idle"] * 2

    def processes(self, variable: str, value: str) -> list[int]:
        """Those that were started with this in their environment, below this cluster."""
        wanted = {f"SLURM_CONF={self.conf}".encode(), f"{variable}={value}".encode()}
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(file.read_bytes().split(b"\0")):
                    found.append(int(file.parent.name))
            except OSError:  # it has ended
                continue
        return found

    def end(self) -> None:
        subprocess.run(["scancel", f"--user={os.getuid()}"], env=self.environment, capture_output=True)
        for pid in self.processes("SLURM_CONF", str(self.conf)):
            os.kill(pid, signal.SIGKILL)
        for daemon in (self.controller, *self.slurmd.values()):
            daemon.wait()


@pytest.fixture(scope="module", autouse=True)
def nodes(cluster) -> Iterator[Nodes]:  # noqa: F811
    found = Nodes(cluster)
    try:
        until(found.idle)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(found.conf))
            patch.setitem(ENVIRONMENT, "SLURM_CONF", str(found.conf))
            yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def arguments(overrides, tmp_path_factory):
    """arguments(runs_dir) -> those of a run; all runs share a cache."""
    os.environ["PREFOPT_CACHE"] = ENVIRONMENT["PREFOPT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield lambda runs: [*overrides(runs), *STEPS, FAULTY]
    del os.environ["PREFOPT_CACHE"], ENVIRONMENT["PREFOPT_CACHE"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """whole(engine) -> how two processes on one node end."""
    found = {}

    def ended(engine: str):
        if engine not in found:
            runs = tmp_path_factory.mktemp("whole")
            process = torchrun(2, *arguments(runs), f"engine={engine}")
            assert process.returncode == 0, process.stderr
            found[engine] = outcome(runs, *records(runs))
        return found[engine]

    return ended


def outcome(runs: Path, record: dict) -> tuple[str, list[dict]]:
    """Final weights and metrics, bit for bit."""
    assert record["status"] == "finished", record["error"]
    rows = [json.loads(line) for line in (runs / record["name"] / "metrics.jsonl").read_text().splitlines()]
    return record["final_weights"], [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def sweep(arguments: list[str]) -> list[str]:
    return ["-m", *arguments, *PRESET, "launcher.nodes=2", "launcher.at_once=1"]


def started(*arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=ENVIRONMENT | env, stdout=subprocess.PIPE, text=True)


def running(runs: Path) -> dict | None:
    return next((record for record in records(runs) if record["status"] == "running"), None)


def test_what_each_process_is_told(tmp_path):
    """Two on each of two nodes."""
    python = tmp_path / "python"
    told = "$RANK $WORLD_SIZE $SLURMD_NODENAME $LOCAL_RANK $CUDA_VISIBLE_DEVICES $MASTER_ADDR $MASTER_PORT"
    python.write_text(f'#!/bin/bash\necho {told} > "$3/$RANK"\n')
    python.chmod(0o755)
    preset = OmegaConf.load(ROOT / "conf" / "launcher" / "slurm.yaml")
    changes = {"nodes": 2, "gpus": 2, "cpus": 1, "python": str(python)}
    launcher = build(OmegaConf.merge(preset, changes), Launcher, "launcher")
    assert isinstance(launcher, Slurm)
    listing, script = tmp_path / "jobs.txt", tmp_path / "jobs.sh"
    (tmp_path / "run").mkdir()
    listing.write_text(f"{tmp_path / 'run'}\tname\n")
    script.write_text(launcher.script("name", 1, (60, 1), listing, tmp_path))
    job = f"{submit(script, None)}_0"
    assert until(lambda: (state := slurm_state(job)) in process.TERMINAL_SLURM_STATES and state) == "COMPLETED"
    lines = [(tmp_path / "run" / str(rank)).read_text().split() for rank in range(4)]
    port = lines[0][-1]
    assert lines == [
        ["0", "4", FIRST, "0", "0,1", FIRST, port],
        ["1", "4", FIRST, "1", "0,1", FIRST, port],
        ["2", "4", SECOND, "0", "0,1", FIRST, port],
        ["3", "4", SECOND, "1", "0,1", FIRST, port],
    ]


@pytest.mark.parametrize("engine", ["zero2", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_nodes_train_as_one(engine, arguments, whole, tmp_path):
    program = run_program(*sweep([*arguments(tmp_path), f"engine={engine}"]), env=IN_STEP_5)
    print(program.stdout)
    assert program.returncode == 0, program.stderr
    assert outcome(tmp_path, *records(tmp_path)) == whole(engine)


def test_a_run_that_is_asked_to_leave_goes_on_on_two_nodes(arguments, whole, tmp_path):
    """The signal comes while both processes are in the first step."""
    runs, go = tmp_path / "runs", tmp_path / "go"
    driver = started(*sweep([*arguments(runs), "engine=zero2", f"+objective.fault={go}"]))
    job = until(lambda: (record := running(runs)) and record.get("data") and record["slurm_job"], driver)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    go.touch()
    print(driver.communicate(timeout=SOON_S)[0])
    assert driver.returncode == 0
    (record,) = records(runs)
    assert record["attempt"] == 2
    assert "saved after step 1" in (runs / record["name"] / "log.txt").read_text()
    assert outcome(runs, record) == whole("zero2")


def test_a_run_that_loses_a_node_waits_for_another_and_goes_on(nodes, arguments, whole, tmp_path):
    """The node stops in the middle of a step, as one without power: nothing on it answers, and no connection ends."""
    driver = started(*sweep([*arguments(tmp_path), "engine=zero2", "+objective.fault=freeze"]), **IN_STEP_5)

    def stopped() -> list[int]:
        return [pid for pid in nodes.processes("SLURMD_NODENAME", SECOND) if stat(pid)[0] == "T"]

    (rank,) = until(stopped, driver)
    shell = int(stat(rank)[1])
    lost = [nodes.slurmd[SECOND].pid, int(stat(shell)[1]), shell, rank]  # the second is Slurm's slurmstepd
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: process.resolve_status(records(tmp_path)[0], process.slurm_queue()) == "requeued", driver)
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    nodes.slurmd[SECOND].wait()
    nodes.slurmd[SECOND] = nodes.start("slurmd", "-N", SECOND)
    print(driver.communicate(timeout=SOON_S)[0])
    assert driver.returncode == 0
    (record,) = records(tmp_path)
    assert record["attempt"] == 2
    assert "going on from step 4 of 6" in (tmp_path / record["name"] / "log.txt").read_text()
    assert outcome(tmp_path, record) == whole("zero2")


def stat(pid: int) -> list[str]:
    """State, parent and so on of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_a_process_that_dies_or_hangs_ends_the_job_and_the_same_command_goes_on(arguments, whole, tmp_path):
    """One that hangs writes where."""
    expected = whole("zero2")  # first: DeepSpeed may compile something for longer than hang_s
    words = sweep([*arguments(tmp_path), "engine=zero2", "engine.hang_s=60", "+objective.fault=die,hang"])
    program = run_program(*words, env=IN_STEP_5)
    print(program.stdout)
    assert program.returncode == 1
    assert program.stderr.count("(Slurm: FAILED)") == 2, program.stderr
    logs = {r["config"]["objective"]["fault"]: tmp_path / r["name"] / "log.txt" for r in records(tmp_path)}
    assert "Timeout (0:01:00)!" not in logs["die"].read_text()
    assert "Timeout (0:01:00)!" in logs["hang"].read_text()
    assert "in in_training" in logs["hang"].read_text()

    program = run_program(*words, env=IN_STEP_5 | {"MENDED": "1"})
    print(program.stdout)
    assert program.returncode == 0, program.stderr
    for record in records(tmp_path):
        assert record["attempt"] == 2
        assert outcome(tmp_path, record) == expected
