"""What is kept on disk to be used again: written aside, flushed, renamed, and checked when it is opened.

It has two forms. A folder that is made at once holds SHA256SUMS, which `sha256sum -c` reads. A JSON object, in a file
of its own or as one of many lines, holds a digest of the rest of it under `sha256`. What is damaged is named in the log
and made anew; of lines, those that are whole are kept.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prefopt.utils.distributed import heartbeat
from prefopt.utils.files import follow_umask, sync
from prefopt.utils.locks import locked, remove_and_release, try_lock

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
SEAL = "sha256"  # the key of an object's digest
SEAL_DIGITS = 16

# The folders that this process has checked, with names, sizes and times of their files: they are not read again.
_checked: dict[Path, list[tuple[str, int, int]]] = {}


def opened(folder: Path, what: str, make: Callable[[Path], None]) -> Path:
    """`folder`, whole: as it is there, or as `make` writes its files into the empty folder that it is given.

    Other processes wait while one makes it; `what` names it to them. A damaged one is made anew, which the log says.
    What a killed process has left half made beside it is removed. Raises what `make` raises, and then leaves nothing.
    """
    if folder.is_dir() and _damage_once(folder) is None:
        return folder
    with locked(folder.with_name(f"{folder.name}.lock"), what):
        # Another process may have made it meanwhile.
        why = _damage_once(folder) if folder.is_dir() else None
        if folder.is_dir() and why is None:
            return folder
        if why:
            log.warning(f"  {folder} is damaged: {why}. It is made anew.")
        aside = folder.with_name(f"{folder.name}.tmp")
        remove_unfinished(folder)
        aside.mkdir()
        try:
            make(aside)
            (aside / SUMS).write_text(format_sums(aside))
            if folder.is_dir():
                shutil.rmtree(folder)
            publish(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of `folder`, whose lock this process has, and of other folders beside it
    whose lock nobody has."""
    for aside in folder.parent.glob("*.tmp"):
        name = aside.name.removesuffix(".tmp")
        file = aside.with_name(f"{name}.lock")
        lock = None if name == folder.name else try_lock(file)
        if lock is not None or name == folder.name:
            shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            remove_and_release(file, lock)


def publish(aside: Path, target: Path) -> None:
    """Flush the files of folder `aside` to the disk and give it its final name. Its files follow the umask."""
    follow_umask(aside)
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    aside.rename(target)
    sync(target.parent)


def damage(folder: Path) -> str | None:
    """How the files of a folder differ from its SHA256SUMS; None where they do not."""
    file = folder / SUMS
    expected = {}
    try:
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
            digest, _, name = line.partition("  ")
            expected[name] = digest
        actual = checksums(folder)
    except OSError as error:  # a bad block on the disk: another copy may lie elsewhere
        return str(error)
    wrong = [
        f"{name} has the checksum {actual.get(name, 'of no file')}, and {SUMS} says "
        f"{expected.get(name, 'nothing of it')}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    return "; ".join(wrong) or (None if expected else f"it has no {SUMS}")


def _damage_once(folder: Path) -> str | None:
    """`damage`, unless this process has found none, and the files have the same sizes and times as then."""
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder)]
    if _checked.get(folder) == state:
        return None
    why = damage(folder)
    if why is None:
        _checked[folder] = state
    return why


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but SHA256SUMS, by the file's name."""
    digests = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != SUMS:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
            heartbeat()
    return digests


def format_sums(folder: Path) -> str:
    """The content of SHA256SUMS for the files of `folder`."""
    return "".join(f"{digest}  {name}\n" for name, digest in checksums(folder).items())


def _files(folder: Path) -> list[Path]:
    # Python writes bytecode into a folder of code.
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def seal(content: dict[str, Any], salt: str = "") -> dict[str, Any]:
    """`content` as JSON gives it back, with the digest of itself; with a `salt`, for those alone who know that.

    A digest that it has already is replaced.
    """
    content = {key: value for key, value in json.loads(json.dumps(content)).items() if key != SEAL}
    return content | {SEAL: _digest(content, salt)}


def unseal(sealed: Any, salt: str = "") -> dict[str, Any] | None:
    """The content that `seal` was given; None for anything else."""
    if not isinstance(sealed, dict):
        return None
    content = {key: value for key, value in sealed.items() if key != SEAL}
    return content if sealed.get(SEAL) == _digest(content, salt) else None


def _digest(content: dict[str, Any], salt: str) -> str:
    text = salt + json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:SEAL_DIGITS]


def read_sealed_lines(file: Path, salt: str = "") -> tuple[list[dict[str, Any]], bool]:
    """(the rows of a file of sealed JSON lines that are whole, whether there is nothing else in it).

    The lines may be those of `format_sealed_array`. Without a file there are no rows, and nothing else.
    """
    if not file.is_file():
        return [], True
    lines = file.read_bytes().split(b"\n")
    is_array = lines[0] == b"["
    rows, whole = [], lines.pop() == b"" and lines != [] and (not is_array or lines[-1] == b"]")
    for line in lines[1:-1] if is_array and whole else lines:
        try:
            row = unseal(json.loads(line.rstrip(b",") if is_array else line), salt)
        except (ValueError, RecursionError):
            row = None
        if row is None:
            whole = False
        else:
            rows.append(row)
    return rows, whole


def format_sealed_line(content: dict[str, Any], salt: str = "") -> str:
    """One line of JSON with its end."""
    return json.dumps(seal(content, salt), ensure_ascii=False) + "\n"


def format_sealed_array(rows: Iterable[dict[str, Any]]) -> str:
    """A JSON array whose rows stand on lines of their own, for programs that read JSON."""
    return "[\n" + ",\n".join(format_sealed_line(row).rstrip("\n") for row in rows) + "\n]\n"
