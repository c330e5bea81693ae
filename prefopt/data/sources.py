"""Where rows come from: a file, a folder of files, or a data set on the hub."""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

from prefopt.data.readers import READABLE, SUFFIXES, Row, json_type, kind_of, read_file
from prefopt.errors import MissingAssetError, UnsafePathError, UserError
from prefopt.utils.files import atomic_write, resolve_path

log = logging.getLogger(__name__)

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
CARDS = ("README.md", ".huggingface.yaml")  # where `datasets` reads which files are data
NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words in the names of files and folders, and the splits that they name: those of `datasets`, and our own.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("heldout", "holdout"), "heldout"),
}


def read_rows(path: str, split: str | None = "train", revision: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ("file, row n", row).

    `path` is a file (see `prefopt.data.readers`), a folder or a hub name. `split` chooses among the splits of a folder
    or a hub data set. A file is one split, unless its rows have a field `split`: such a row is yielded for that split
    alone, and one where it is null for every split. A folder in which no name says a split is read like a file. With
    `split=None` all rows of a file are yielded, or of a folder with one split.

    Raises UserError, naming file and row, for what is missing, empty or not readable.
    """
    file = resolve_path(path)
    check_kind(path)
    if file.is_dir():
        rows = _from_folder(path, file, split)
    elif path.endswith(SUFFIXES):
        if not file.is_file():
            raise _nowhere(path)
        rows = read_file(path, file)
    else:
        rows = _from_datasets(path, split, revision)

    splits = set()
    for where, row in rows:
        own = row.get("split")
        # A row without the field belongs to every split that is asked for.
        splits.add(str(split if own is None else own))
        if split is None or own is None or own == split:
            yield where, row
    if not splits:
        raise UserError(f"data file {path} is empty. It must hold at least one row.")
    if split is not None and split not in splits:
        raise UserError(f"no row of {path} has split {split!r}; there are: {', '.join(sorted(splits))}.")


def _nowhere(path: str) -> MissingAssetError:
    return MissingAssetError(f"data file {path} does not exist. Give a file ({READABLE}), a folder or a hub name.")


def check_kind(path: str) -> None:
    """Raise UserError for a file of a kind that cannot be read."""
    if not path.endswith(SUFFIXES) and resolve_path(path).is_file():
        raise UserError(f"data file {path} is of no kind that can be read: give one that ends in {READABLE}.")


def digest(path: str, split: str = "train", revision: str | None = None) -> str:
    """A digest of the content: SHA-256 of the file; of a folder, over all its files; of a hub data set, the fingerprint
    that `datasets` gives this split."""
    file = resolve_path(path)
    if file.is_file():
        return _sha256(file)
    if file.is_dir():
        # The split is part of the digest, because a folder may hold several.
        files = sorted(f for f in file.rglob("*") if f.is_file())
        text = "".join(f"{f.relative_to(file)} {_sha256(f)}\n" for f in files)
        return hashlib.sha256(f"{split}\n{text}".encode()).hexdigest()
    if path.endswith(SUFFIXES):
        raise _nowhere(path)
    return _fingerprint(path, split, revision)


@functools.cache
def _fingerprint(path: str, split: str, revision: str | None) -> str:
    """`datasets`' fingerprint of a hub data set. Cached, because every job of a sweep asks for it."""
    return str(_load(path, split, revision)._fingerprint)


def _sha256(file: Path) -> str:
    status = file.stat()
    return _sha256_of(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256_of(file: Path, size: int, changed_ns: int) -> str:
    """Cached, because a run's identity, the cache's key and every job of a sweep ask for it. `size` and `changed_ns`
    are part of the key, so a file that changes is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_datasets(path: str, split: str | None, revision: str | None) -> Iterator[tuple[str, Row]]:
    if split is None:
        raise UserError(f"{path} is no file ({READABLE}): say which of its splits is meant, by split=NAME")
    for n, row in enumerate(_load(path, split, revision), start=1):
        row.pop("split", None)  # the split is already chosen; a field of this name would filter rows in `read_rows`
        yield f"{path}, row {n}", row


def _from_folder(path: str, folder: Path, split: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a split of a folder, file by file. Files may have different fields, but a field has one type.

    Where a card says which files are data, `datasets` reads them.
    """
    _check_folder(folder)
    if any(name for card in CARDS for name in _data_files(_front_matter(folder / card))):
        yield from _from_datasets(path, split, None)
        return
    files, is_named = _files_of_split(path, folder, split)
    types: dict[str, dict[str, Path]] = {}  # of each field: its types so far, with the file that had it first
    for file in files:
        for where, row in read_file(f"{path.rstrip('/')}/{file.as_posix()}", folder / file):
            for field, value in row.items():
                if value is None:
                    continue
                known, type_ = types.setdefault(field, {}), json_type(value)
                for other, first in known.items() if type_ not in known else ():
                    if first != file:
                        raise UserError(
                            f"{where}: field {field!r} is {type_}, and in {first} of the same folder it is {other}. "
                            "Give it one type, or put the files into different folders."
                        )
                known.setdefault(type_, file)
            if is_named:
                row.pop("split", None)
            yield where, row


def _files_of_split(path: str, folder: Path, split: str | None) -> tuple[list[Path], bool]:
    """(the files of rows of a split, relative to the folder and sorted; whether their names say the split).

    Raises UserError where there are none, or where one seems to be a copy of another.
    """
    splits = folder_splits(path, folder)
    unnamed = splits.pop(None, [])
    if not splits and not unnamed:
        raise UserError(f"the folder {path} holds no file of rows ({READABLE}).")
    names = ", ".join(sorted(map(str, splits)))
    if split is None and len(splits) > 1:
        raise UserError(f"{path} is no file, but has the splits {names}: say which is meant, by split=NAME")
    if split is None:
        named = next(iter(splits.values()), [])
    else:
        # By its whole name, a split can also be asked for that `SPLITS` counts to another: train_prefs, dev.
        all_files = itertools.chain(unnamed, *splits.values())
        named = splits.get(split) or sorted(file for file in all_files if split in _whole_names(file))
    if splits and not named:
        raise UserError(
            f"the folder {path} has no split {split!r}; there are: {names}. Choose one by dataset.train_split and "
            "dataset.heldout_split, or give a file."
        )
    if splits and (unread := [file.as_posix() for file in unnamed if file not in named]):
        _note_unread(path, ", ".join(unread))
    files = named or unnamed
    stems: dict[str, Path] = {}
    for file in files:
        stem = file.as_posix().removesuffix(".gz").removesuffix(kind_of(file.name) or "")
        if stem in stems:
            raise UserError(
                f"the folder {path} holds {stems[stem]} and {file}, which may be copies of the same rows. Give one of "
                "them, or remove one."
            )
        stems[stem] = file
    return files, bool(named)


@functools.cache  # said once, although rows are read several times
def _note_unread(path: str, files: str) -> None:
    log.warning(f"{path}: other files there are named after splits, so these are not read: {files}")


def folder_splits(path: str, folder: Path) -> dict[str | None, list[Path]]:
    """The files of rows in a folder, relative to it and sorted, by the split that their names say; None: they say none.

    A folder that `save_to_disk` wrote is the split of its name, and no split if it is `folder` itself. Other names mean
    what they mean to `datasets`: data/NAME-00000-of-00002 alone if there are such files, else words such as "test" in
    the names of files and folders. Raises UserError for a name that says two splits.
    """
    saved: dict[Path, list[str] | None] = {}
    sharded: dict[str | None, list[Path]] = {}
    splits: dict[str | None, list[Path]] = {}
    others: list[Path] = []
    for file in sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file()):
        if file.name in NO_ROWS or kind_of(file.name) is None or any(part[0] in "._" for part in file.parts):
            continue
        if file.parent not in saved:
            saved[file.parent] = _saved_files(folder / file.parent)
        names = saved[file.parent]
        if names is not None:
            if file.name in names:  # any other is a cache that `datasets` left there
                splits.setdefault(file.parent.name or None, []).append(file)
        elif shard := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*", file.as_posix()):
            sharded.setdefault(shard[1], []).append(file)
        else:
            others.append(file)
    if sharded:
        return {**sharded, None: others} if others else sharded
    for file in others:
        words = re.split(r"[-._ 0-9/]+", re.sub(r"held[-_. ]out", "heldout", file.as_posix().lower()))
        said = sorted({SPLITS[word] for word in words if word in SPLITS})
        if len(said) > 1:
            raise UserError(
                f"{file} in the folder {path} may be of the split {' or '.join(said)}: its name says both. Rename it, "
                "or give the file itself."
            )
        splits.setdefault(said[0] if said else None, []).append(file)
    return splits


def _saved_files(folder: Path) -> list[str] | None:
    """The names of the files of a data set that `save_to_disk` wrote into this folder; None where it wrote none.

    Raises UserError where one is missing.
    """
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        names = [str(file["filename"]) for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'state.json'} is not as `save_to_disk` writes it: {error!r}. Save it again."
        ) from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} lacks the file {name}, which its state.json names. Copy the whole folder again.")
    return names


def _whole_names(file: Path) -> list[str]:
    """The names of a file and of its folders, without ending and without the number of a shard."""
    stem = file.name.removesuffix(".gz").removesuffix(kind_of(file.name) or "")
    return [re.sub(r"[-_.]?\d+(-of-\d+.*)?$", "", stem), stem, *file.parts[:-1]]


def _load(path: str, split: str, revision: str | None) -> Any:
    """A split as `datasets` loads it. Raises UserError where it cannot, and UnsafePathError for data outside."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    datasets.disable_progress_bars()
    local = resolve_path(path)
    try:
        if local.is_dir():
            return datasets.load_dataset(str(local), split=split)
        if not (constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE):
            check_card(path, revision)
            return datasets.load_dataset(path, split=split, revision=revision)
        # With the hub off, load_dataset would read the newest copy there is, whatever its revision.
        config, version, commit = prepared(path, revision).parts[-3:]
        name = path.rpartition("/")[2]
        cached = Cache(repo_id=path, dataset_name=name, config_name=config, version=version, hash=commit)
        return cached.as_dataset(split=split)
    except UnsafePathError:
        raise
    except MissingAssetError as error:
        raise UserError(
            f"the data set {path}: the hub is switched off, and {error}. Give a file or a folder, or fetch it on a "
            "machine with network: python -m prefopt.prefetch dataset=..."
        ) from None
    except Exception as error:  # `datasets` raises a dozen kinds for what is not there
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the data set {path} (split {split}) cannot be loaded: {reason}\nGive a file, a folder, or a hub name; "
            "its splits are chosen by dataset.train_split and dataset.heldout_split."
        ) from None


def _check_folder(folder: Path) -> None:
    """Raises UnsafePathError for a link that leads out of the folder, an archive, or a card that names files elsewhere.
    Links into the hub's cache are allowed: its snapshots consist of such links."""
    allowed = [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    for file in sorted(folder.rglob("*")):
        if not any(file.resolve().is_relative_to(root) for root in allowed):
            raise UnsafePathError(
                f"{file} is a link that leads out of its folder. Put the file itself there, or remove it."
            )
        if file.name.endswith(ARCHIVES):
            raise UnsafePathError(
                f"{file} is an archive, which is not unpacked: do it yourself, and leave out the archive."
            )
    for name in CARDS:
        if (folder / name).is_file():
            _check_card(folder / name)


def check_card(path: str, revision: str | None) -> None:
    """Fetch the card of a data set on the hub, and check it. Raises UnsafePathError for a card that names files
    elsewhere, and what the hub's clients raise."""
    for name in CARDS:
        with contextlib.suppress(EntryNotFoundError):
            _check_card(Path(hf_hub_download(path, name, repo_type="dataset", revision=revision)))


def _check_card(file: Path) -> None:
    """Raises UnsafePathError for a card that names data outside of its folder: `datasets` would read any file and any
    URL that a card names."""
    for name in _data_files(_front_matter(file)):
        if "://" in name or "::" in name or ".." in Path(name).parts or Path(name).is_absolute():
            raise UnsafePathError(
                f"{file} names data outside of its folder: {name}. They are not read; if you want them, fetch them "
                "yourself and give the file."
            )


def _front_matter(file: Path) -> Any:
    """What machines read of a card: YAML, in Markdown between the first two lines of ---. None without a card."""
    if not file.is_file():
        return None
    text = file.read_text(errors="replace")
    if file.suffix == ".md":
        front = re.match(r"\s*---\r?\n(.*?)\n---", text, re.DOTALL)
        text = front[1] if front else ""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}. Mend it, or remove it.") from None


def _data_files(node: Any, below: bool = False) -> Iterator[str]:
    """All texts in a card under a key data_files or data_dir. `below`: whether `node` is under such a key."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _data_files(value, below or key in ("data_files", "data_dir"))
    elif isinstance(node, list):
        for value in node:
            yield from _data_files(value, below)
    elif below and isinstance(node, str):
        yield node


def prepared(path: str, revision: str | None = None, config: str | None = None) -> Path:
    """The folder of a hub data set's prepared copy: CACHE/OWNER___NAME/CONFIGURATION/VERSION/COMMIT. Uses no network.

    Raises MissingAssetError where there is no copy of this revision and configuration.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = path.rpartition("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    folder = camelcase_to_snakecase(name)
    repository = cache / (f"{owner}___{folder}" if owner else folder)
    commit = cached_commit(path, "dataset", revision)
    # Only a finished copy has this file; a folder that is being prepared is called COMMIT.incomplete.
    copies = [f.parent for f in repository.glob("*/*/*/dataset_info.json") if not f.parent.name.endswith(".incomplete")]
    matches = [f for f in copies if config in (None, f.parts[-3]) and f.name == commit]
    if not matches:
        others = sorted({f"{f.parts[-3]} at {f.name}" for f in copies})
        hint = f" (there is {', '.join(others)})" if others else ""
        raise MissingAssetError(f"{cache} has no copy of it{hint}")
    if len(matches) > 1:
        configs = ", ".join(sorted(f.parts[-3] for f in matches))
        raise MissingAssetError(f"it has several configurations ({configs}): name one")
    return matches[0]


def cached_commit(path: str, repo_type: str, revision: str | None) -> str | None:
    """The commit of a revision (None: the default branch), as the hub's cache recorded it; None if it has no record."""
    revision = revision or constants.DEFAULT_REVISION
    if REGEX_COMMIT_HASH.fullmatch(revision):
        return revision
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type=repo_type) / "refs" / revision
    return ref.read_text() if ref.is_file() else None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, compressed where the name ends in .gz; whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # mtime=0, so that the same rows give the same file.
    atomic_write(path, gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
