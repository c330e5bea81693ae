"""A copy of the package for the jobs of a sweep, in a folder named by its content."""

import json
import os
import subprocess
from pathlib import Path

from prefopt.utils.files import PACKAGE, atomic_write


def snapshot(folder: Path) -> Path:
    """Copy this package into `folder`/DIGEST, unless it is there; the absolute path.

    git.json in it names the commit, and changes.diff holds what is not committed. Raises UserError where the copy
    that is there has been edited.
    """
    from prefopt.tracking.provenance import ask_git, check_frozen_code, code_digest, code_files, git

    contents = code_files(PACKAGE)
    contents["git.json"] = json.dumps(git()).encode()
    try:
        contents["changes.diff"] = ask_git("diff", "HEAD").encode()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        contents["changes.diff"] = b""
    target = (folder / code_digest(contents)).resolve()
    if target.is_dir():
        check_frozen_code(target)
        return target
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for name, content in contents.items():
        atomic_write(aside / name, content)
    try:
        aside.rename(target)
    except OSError:  # another submitter was faster
        if not target.is_dir():
            raise
    return target


def python_environment(code: Path) -> dict[str, str]:
    """Environment variables with which Python finds prefopt in `code`, and the user's modules where it does now."""
    path = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path.cwd())]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}  # else the current folder came first
