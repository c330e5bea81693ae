"""Errors of the operating system in words: the file that they are about, the disk it is on, and what helps."""

import errno
import os
import re
import shutil
from pathlib import Path

from prefopt.utils.files import cache_dir

FULL = "Make room there"
GONE = "Bring the disk or the rights back"
LOCKS = (
    "The file system gives no locks: have it mounted with them (on NFS its lock service may be down), or put runs_dir "
    "and PREFOPT_CACHE on another disk"
)
WRONG_KIND = "What is there under this name is of another kind (a file, a folder or a link): move it away"
LIMIT = "This process may open no more files: raise the limit (ulimit -n), or close what else you run"

# What helps, by the error's number. Errors with other numbers may be a fault of ours.
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: "Your quota on this disk is used up: remove files of yours there, or ask for more",
    errno.EFBIG: "Files may be no larger than this: raise the limit (ulimit -f), or take another disk",
    errno.EROFS: "It can be read only: have it mounted for writing, or take another disk",
    errno.EACCES: "The rights to it are lacking: give them back (chmod, chown)",
    errno.EPERM: "The rights to it are lacking: give them back (chmod, chown, chattr)",
    errno.EIO: "The disk reports an error: look at the system's log (dmesg), or take another disk",
    errno.ESTALE: GONE,
    errno.ENOTCONN: GONE,
    errno.ENODEV: GONE,
    errno.ENOENT: GONE,
    errno.ETIMEDOUT: GONE,
    errno.EHOSTDOWN: GONE,
    errno.ENOLCK: LOCKS,
    errno.ENOSYS: LOCKS,
    errno.EOPNOTSUPP: "The file system cannot do that: take another disk",
    errno.EISDIR: WRONG_KIND,
    errno.ENOTDIR: WRONG_KIND,
    errno.EEXIST: WRONG_KIND,
    errno.ENOTEMPTY: "Something else writes into it: stop that, or move it away",
    errno.EBUSY: "Something else uses it: stop that, or wait for it",
    errno.ETXTBSY: "Something else uses it: stop that, or wait for it",
    errno.ELOOP: "Links there lead in a circle: remove them",
    errno.ENAMETOOLONG: "The name is too long for the file system: take a shorter runs_dir",
    errno.EMFILE: LIMIT,
    errno.ENFILE: LIMIT,
}
ROOM = (errno.ENOSPC, errno.EDQUOT)  # where the free space of the disk tells something


def explain(error: OSError, places: dict[str, Path] | None = None) -> str:
    """What happened, to which file on which disk, and what helps, as sentences.

    `places` are the folders that may be meant where the system names no file, by what they are (default: the cache).
    """
    advice = ADVICE.get(error.errno or 0, "See what the system says")
    if isinstance(error.filename, str | bytes | os.PathLike):
        disk = describe_disk(Path(os.fsdecode(error.filename)), error.errno)
        return f"{error}. {advice} ({disk})."
    disks = [
        f"{name}: {describe_disk(place, error.errno)}" for name, place in (places or {"cache": cache_dir()}).items()
    ]
    return f"{error}. {advice}. The system names no file; it may be of {'; or of '.join(disks)}."


def describe_disk(path: Path, number: int | None) -> str:
    """The disk that `path` is on, by where it is mounted; for the errors ROOM with what is free on it."""
    existing = path.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    mount = existing
    try:
        while not mount.is_mount() and mount != mount.parent:
            mount = mount.parent
        room = f", {shutil.disk_usage(existing).free / 2**20:,.0f} MiB free" if number in ROOM else ""
    except OSError:
        room = ""
    return f"the disk at {mount}{room}"


def from_text(text: str, path: Path | None = None) -> OSError:
    """The OSError that a library in another language tells as text, such as "I/O error: ... (os error 28)"; about
    `path`, where that is known. Its number is EIO where the text has none."""
    found = re.search(r"os error (\d+)", text)
    return OSError(int(found[1]) if found else errno.EIO, text, *([str(path)] if path else []))
