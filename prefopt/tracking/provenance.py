"""Where a number comes from: command, commit, versions, machine."""

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefopt.utils.files import INSTALLED, PACKAGE

PACKAGES = (
    "prefopt-lab",
    "torch",
    "transformers",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "numpy",
    "peft",
    "deepspeed",
    "vaderSentiment",
)


def provenance() -> dict[str, Any]:
    """Of this process: its command line, as a shell reads it, the commit of its code, and its machine."""
    return {"command": shlex.join(sys.orig_argv), "git": git(), "machine": machine()}


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, GPU names, and the number of threads.

    The threads count because the rounding of a matrix product depends on them. A sampled token may become another, and
    with it the result of a run that trains on its own samples.
    """
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@functools.cache
def git() -> dict[str, Any] | None:
    """The commit of the code that this process runs, and whether the package has changes that are not committed.

    None outside of a checkout.
    """
    frozen = PACKAGE.parent / "git.json"
    if frozen.is_file():  # a snapshot for the jobs of a sweep: the checkout around it may have moved on
        return json.loads(frozen.read_text())
    try:
        # "." is the package: new results elsewhere in the checkout do not change the code.
        return {"commit": ask_git("rev-parse", "HEAD").strip(), "dirty": bool(ask_git("status", "--porcelain", "."))}
    except (OSError, subprocess.CalledProcessError):
        return None


def ask_git(*args: str) -> str:
    """The output of a git command, run in the package. Raises OSError or CalledProcessError outside of a checkout."""
    if INSTALLED:  # the environment may lie in a checkout, but that is another project's
        raise OSError("prefopt is not run from a checkout")
    command = ["git", "-C", str(PACKAGE), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def version(package: str) -> str | None:
    """The installed version; None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
