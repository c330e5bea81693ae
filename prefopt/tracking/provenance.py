"""Where a number comes from: command, commit, versions, machine."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.utils.files import INSTALLED, PACKAGE

log = logging.getLogger(__name__)

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
FROZEN_BESIDE = ("git.json", "changes.diff")  # files beside the package where a sweep has frozen it


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


def code_files(package: Path) -> dict[str, bytes]:
    """{path from the folder that a package is in: content} of the files of the package."""
    files = [f for f in sorted(package.rglob("*")) if f.is_file() and "__pycache__" not in f.parts]
    return {str(f.relative_to(package.parent)): f.read_bytes() for f in files}


def code_digest(contents: dict[str, bytes]) -> str:
    """The name of the folder that holds the files `contents`, where they are frozen for the jobs of a sweep."""
    digest = hashlib.sha256()
    # Each part after its length: else text could move from one file to the next under the same digest.
    for part in itertools.chain.from_iterable((name.encode(), content) for name, content in sorted(contents.items())):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def check_frozen_code(folder: Path) -> None:
    """Raise UserError where the code that a sweep has frozen in `folder` is not there as it was frozen."""
    contents = code_files(folder / PACKAGE.name)
    contents |= {name: (folder / name).read_bytes() for name in FROZEN_BESIDE if (folder / name).is_file()}
    if code_digest(contents) != folder.name:
        raise UserError(
            f"{folder}: the code has been edited since it was frozen here. Keep your changes in the checkout, and "
            "give the command of the sweep again: it freezes the code anew, and overwrites this folder."
        )


@functools.cache  # said once, however many runs of a sweep have it
def note_edited_code(folder: Path) -> None:
    """Log where the frozen code that a finished run names has been edited: it no longer shows what made the result."""
    if not (folder / PACKAGE.name).is_dir():  # removed, or of a run from elsewhere
        return
    try:
        check_frozen_code(folder)
    except UserError:
        log.warning(
            f"{folder}: edited since it was frozen, so it is not the code that finished runs name; git has that"
        )


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
