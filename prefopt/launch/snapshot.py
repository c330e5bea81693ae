"""A copy of the package, named by its content, which the jobs of a sweep run."""

import hashlib
import itertools
import json
import os
import subprocess
from pathlib import Path

from prefopt.utils.files import PACKAGE, atomic_write


def snapshot(folder: Path) -> Path:
    """Copy this package, with commit and uncommitted changes, into `folder`/DIGEST, once; an absolute path."""
    from prefopt.tracking.provenance import ask_git, git

    files = [f for f in sorted(PACKAGE.rglob("*")) if f.is_file() and "__pycache__" not in f.parts]
    contents = {str(f.relative_to(PACKAGE.parent)): f.read_bytes() for f in files}
    contents["git.json"] = json.dumps(git()).encode()
    try:
        contents["changes.diff"] = ask_git("diff", "HEAD").encode()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        contents["changes.diff"] = b""
    digest = hashlib.sha256()
    for part in itertools.chain.from_iterable((name.encode(), content) for name, content in sorted(contents.items())):
        digest.update(len(part).to_bytes(8, "big") + part)
    target = (folder / digest.hexdigest()[:16]).resolve()
    if target.is_dir():
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
    """Variables with which `python -m prefopt.job` is that of `code`, and modules of the user's are found as before."""
    path = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path.cwd())]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}  # safe: the current folder does not come first
