"""A copy of the package for the jobs of a sweep, in a folder named by its content."""

import json
import os
import subprocess
from pathlib import Path

from prefopt.utils.files import PACKAGE
from prefopt.utils.store import opened


def snapshot(folder: Path) -> Path:
    """Copy this package into `folder`/DIGEST, unless it is there; the absolute path.

    git.json in it names the commit, and changes.diff holds what is not committed. A copy that has been edited is
    made anew, which the log says.
    """
    from prefopt.tracking.provenance import ask_git, code_digest, code_files, git

    contents = code_files(PACKAGE)
    contents["git.json"] = json.dumps(git()).encode()
    try:
        contents["changes.diff"] = ask_git("diff", "HEAD").encode()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        contents["changes.diff"] = b""
    target = (folder / code_digest(contents)).resolve()

    def write(aside: Path) -> None:
        for name, content in contents.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)

    return opened(target, "a copy of the code", write)


def python_environment(code: Path) -> dict[str, str]:
    """Environment variables with which Python finds prefopt in `code`, and the user's modules where it does now."""
    path = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path.cwd())]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}  # else the current folder came first
