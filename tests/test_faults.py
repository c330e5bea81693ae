"""What a run promises when things break, each with the fault brought about for real: processes killed, disks full or
gone, files damaged, memory short, numbers not finite, ranks that hang."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt import UserError
from prefopt.checkpoint import KEPT, SUMS, check_space, complete_checkpoints, damage, latest_checkpoint, save_checkpoint
from prefopt.liveness import hold, let_go
from tests.forks import At, run, start
from tests.test_loop import TIMING
from tests.tiny import records

STEPS = ["steps=6", "eval_every=3", "save_every=1"]
FAULTY = "objective._target_=tests.faulty.Faulty"


@pytest.fixture
def env(tmp_path_factory) -> dict[str, str]:
    """One cache for all: what is in it is another matter (tests/test_cache.py, tests/test_reference.py)."""
    return {"PREFOPT_CACHE": str(tmp_path_factory.getbasetemp() / "faults_cache")}


@pytest.fixture
def whole(overrides, tmp_path, env) -> dict:
    """The result of the undisturbed run of `STEPS`."""
    code, said = run(tmp_path / "whole.log", *overrides(tmp_path / "whole"), *STEPS, env=env)
    assert code == 0, said
    return result(tmp_path / "whole")


def result(runs: Path) -> dict:
    """What a run ends with: weights, each row of metrics in its order, and the evaluations."""
    (record,) = records(runs)
    assert record["status"] == "finished", record["error"]
    folder = runs / record["name"]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": record["final_weights"],
        "tensors": {k: v.tolist() for k, v in load_file(folder / "policy" / "model.safetensors").items()},
        "rows": [{k: v for k, v in row.items() if k not in TIMING} for row in rows],
        "evaluations": record["evaluations"],
        "left": sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp"),
    }


def folder_of(runs: Path) -> Path:
    (record,) = records(runs)
    return runs / record["name"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


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


# Killed.

def test_wherever_it_is_killed_it_ends_bit_for_bit_the_same(overrides, whole, tmp_path, env):
    """One run, killed at each of these moments one after the other."""
    arguments = [*overrides(tmp_path / "killed"), *STEPS]
    moments = [
        At("prefopt.loop:train_step"),  # before its first step
        At("prefopt.checkpoint:checksums"),  # in its first checkpoint, with the tensors written
        At("prefopt.checkpoint:publish"),  # with all written, and it has not got its name yet
        At("prefopt.checkpoint:complete_checkpoints", 2),  # it has its name, and nothing else has happened
        At("prefopt.checkpoint:save_file", 6),  # a step and a half later, within a checkpoint
        At("prefopt.checkpoint:shutil.rmtree", 4),  # where older ones are removed
        At("prefopt.loop:Loggers.log", 2),
        At("prefopt.run:Run.finish"),  # with its policy written
        At("prefopt.train:shutil.rmtree"),  # finished, but for the removal of its checkpoints
    ]
    for n, moment in enumerate(moments):
        code, said = run(tmp_path / "log", *arguments, env=env, at=moment)
        assert code == -signal.SIGKILL, (n, said)
        for checkpoint in complete_checkpoints(folder_of(tmp_path / "killed") / "checkpoints"):
            assert damage(checkpoint) is None
    code, said = run(tmp_path / "log", *arguments, env=env)
    assert code == 0, said
    assert result(tmp_path / "killed") == whole
