"""Runs that are killed again and again at random moments, and end as an undisturbed one does.

Small beside the other slow tests; `make test-kills KILLS=60` is the loop in full. Of each configuration, runs are begun
and killed until there were so many kills, each run is resumed until it ends, and then compared: weights and metrics bit
for bit, and the files that are left. The moments are spread evenly over the time of an undisturbed run, start-up and
export included, and a seed gives them: $KILLS_SEED, 0.
"""

import gzip
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from tests.helpers.forks import start
from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, records
from tests.integration.test_faults import result
from tests.training.test_online import command, tiny  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.kills]

KILLS = int(os.environ.get("KILLS", "5"))  # of each configuration
SEED = int(os.environ.get("KILLS_SEED", "0"))
STEPS = ["steps=12", "eval_every=4", "save_every=1"]
CONFIGURATIONS = {
    "dpo": ["objective=dpo"],
    "beta_dpo, with its state": ["objective=beta_dpo"],
    "lmpo": ["objective=lmpo"],
    "mmpo": ["objective=mmpo"],
    "lora": ["objective=dpo", "peft=lora_attention", "peft.dropout=0.1", "exports=2"],
}


class Attempt(Protocol):
    def wait_or_kill(self, seconds: float | None) -> int | None:
        """Its exit code, after so many seconds at most."""


def killed_until_compared(
    begin: Callable[[Path], Attempt], found: Callable[[Path], object], folder: Path, kills: int
) -> tuple[int, int, int]:
    """`begin(runs)` starts a run in that folder or goes on with it, and `found(runs)` is what it ended with.

    Returns kills, runs that were compared, and how many of these differ.
    """
    for runs in (folder / "whole", folder / "again"):  # the first one may also wait for what all have in common
        began = time.monotonic()
        assert begin(runs).wait_or_kill(None) == 0, (folder / "log").read_text()
        seconds = time.monotonic() - began
    expected = found(folder / "whole")
    assert found(folder / "again") == expected
    moments = random.Random(SEED)
    done = compared = differing = 0
    while done < kills or not compared:
        runs = folder / f"killed_{compared}"
        while True:
            began = time.monotonic()
            code = begin(runs).wait_or_kill(moments.uniform(0, seconds) if done < kills else None)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"after {done} kills: {(folder / 'log').read_text()}"
            done += 1
        seconds = max(time.monotonic() - began, 0.7 * seconds)  # the machine may be faster than it was
        compared += 1
        differing += found(runs) != expected
    return done, compared, differing


class Forked:
    """A program of one process."""

    def __init__(self, log: Path, *args: str, **how):
        self.process = start(log, *args, **how)

    def wait_or_kill(self, seconds: float | None) -> int | None:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join()
        return self.process.exitcode


class Ranks:
    """Two processes of one run, which are killed at once, as a node is."""

    def __init__(self, log: Path, *args: str, env: dict[str, str]):
        start_two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*start_two, "-m", "prefopt.train", *args, "engine=zero2"],
                cwd=ROOT,
                env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait_or_kill(self, seconds: float | None) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in children_of(self.process.pid):
                os.kill(pid, signal.SIGKILL)
        return self.process.wait()


def children_of(session: int) -> list[int]:
    """Processes of this session, ranks among them: torchrun gives each a group of its own."""
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split() if int(pid) != session]


def report(name: str, counts: tuple[int, int, int]) -> None:
    kills, compared, differing = counts
    print(f"\n{name}: {kills} kills (seed {SEED}), {compared} runs compared, {differing} differ")
    assert differing == 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training(name, overrides, tmp_path):
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    arguments = [*STEPS, *CONFIGURATIONS[name]]
    report(
        name,
        killed_until_compared(
            lambda runs: Forked(tmp_path / "log", *overrides(runs), *arguments, env=env), result, tmp_path, KILLS
        ),
    )


def test_the_making_of_shared_caches(overrides, tmp_path):
    """Each run has a cache of its own, which it fills: tokens, the reference's log-probs, the first samples."""

    def begin(runs: Path) -> Forked:
        env = {"PREFOPT_CACHE": str(runs.with_suffix(".cache"))}
        return Forked(tmp_path / "log", *overrides(runs), "steps=2", *SAMPLED, env=env)

    def found(runs: Path) -> object:
        cache = runs.with_suffix(".cache")
        return result(runs), sorted(f.name for f in cache.rglob("*") if f.is_file()), list(cache.rglob("*.tmp"))

    report("caches", killed_until_compared(begin, found, tmp_path, KILLS))


def test_online_stages(tiny, tmp_path):  # noqa: F811
    def found(runs: Path) -> object:
        (folder,) = runs.glob("online-*")
        (record,) = [r for r in records(runs) if r["name"] == folder.name]
        drawn = {str(f.relative_to(folder)): gzip.decompress(f.read_bytes()) for f in folder.rglob("*.jsonl.gz")}
        stages = {str(s.relative_to(folder)): result(s) for s in folder.glob("stage_*") if s.is_dir()}
        return record["status"], drawn, stages

    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    report(
        "online, two stages",
        killed_until_compared(
            lambda runs: Forked(tmp_path / "log", *command(tiny, runs, "stages=2"), program="online", env=env),
            found,
            tmp_path,
            KILLS,
        ),
    )


@pytest.mark.long
def test_two_ranks(overrides, tmp_path):
    pytest.importorskip("deepspeed")
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    report(
        "zero2, two ranks",
        killed_until_compared(
            lambda runs: Ranks(tmp_path / "log", *overrides(runs), *STEPS, env=env), result, tmp_path, -(-KILLS // 5)
        ),
    )


def test_a_difference_is_found(overrides, tmp_path):
    """The comparison can fail: a run that ends with other weights is counted."""
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    seeds = iter([0, 0, 1])

    def begin(runs: Path) -> Forked:
        return Forked(tmp_path / "log", *overrides(runs), f"seed={next(seeds)}", env=env)

    assert killed_until_compared(begin, result, tmp_path, 0) == (0, 1, 1)
