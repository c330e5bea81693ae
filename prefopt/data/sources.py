"""Where rows come from: a file, a folder of files, or a data set on the hub."""

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, EntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

from prefopt.data import folders
from prefopt.data.readers import READABLE, SUFFIXES, Row, json_type, read_file
from prefopt.errors import MissingAssetError, UnsafePathError, UserError
from prefopt.utils.files import atomic_write, made_by, resolve_path


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
    elif folder := hub_folder(path, revision):
        rows = _from_folder(path, folder, split)
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
    return MissingAssetError(
        f"data file {path} does not exist.{made_by(path)} Give a file ({READABLE}), a folder or a hub name."
    )


def check_kind(path: str) -> None:
    """Raise UserError for a file of a kind that cannot be read."""
    if not path.endswith(SUFFIXES) and resolve_path(path).is_file():
        raise UserError(f"data file {path} is of no kind that can be read: give one that ends in {READABLE}.")


def digest(path: str, split: str = "train", revision: str | None = None) -> str:
    """A digest of the content: SHA-256 of the file; of a folder, over all its files; of a hub data set, the fingerprint
    that `datasets` gives this split, or as of a folder where its files are read as they are."""
    file = resolve_path(path)
    if not file.exists() and not path.endswith(SUFFIXES) and (folder := hub_folder(path, revision)):
        file = folder
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
    """The rows of a split of a folder, file by file. Files may have different fields, but a field has one type."""
    folders.check_folder(folder)
    if folders.needs_datasets(folder):
        yield from _from_datasets(path, split, None)
        return
    files, is_named = folders.files_of_split(path, folder, split)
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


def _load(path: str, split: str, revision: str | None) -> Any:
    """A split as `datasets` loads it. Raises UserError where it cannot, and UnsafePathError for data outside."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    datasets.disable_progress_bars()
    local = resolve_path(path)
    try:
        if local.is_dir():
            # By the content, because `datasets` may give the rows that it once read here, though a file has changed.
            cache = Path(datasets.config.HF_DATASETS_CACHE) / "prefopt" / digest(path, split)[:24]
            return datasets.load_dataset(str(local), split=split, cache_dir=str(cache))
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
        cause = error.__cause__ or error  # of a failure while it reads, `datasets` says what failed in the cause
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(
            f"the data set {path} (split {split}) cannot be loaded: {reason}\nGive a file, a folder, or a hub name; "
            "its splits are chosen by dataset.train_split and dataset.heldout_split."
        ) from None


def check_card(path: str, revision: str | None) -> None:
    """Fetch the card of a data set on the hub, and check it. Raises UnsafePathError for a card that names files
    elsewhere, and what the hub's clients raise."""
    for name in folders.CARDS:
        with contextlib.suppress(EntryNotFoundError):
            folders.check_card(Path(hf_hub_download(path, name, repo_type="dataset", revision=revision)))


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


@functools.cache
def hub_folder(path: str, revision: str | None) -> Path | None:
    """The folder with the files of a hub data set that `datasets` cannot prepare, such as shards of different columns.
    They are read as a local folder's. None for a data set that it can. With the hub on, it is fetched if need be."""
    import datasets

    if _is_prepared(path, revision):
        return None
    if folder := fetched_files(path, revision):
        return folder
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        fetch_data(path, None, revision)
    except Exception:  # `_load` comes to the same error, and explains it
        return None
    return fetched_files(path, revision) if not _is_prepared(path, revision) else None


def _is_prepared(path: str, revision: str | None) -> bool:
    try:
        return bool(prepared(path, revision))
    except MissingAssetError:
        return False


def fetch_data(path: str, config: str | None, revision: str | None) -> None:
    """Download a hub data set, and let `datasets` prepare it. Where that fails, its files are there as they are. Raises
    UnsafePathError as `check_card`, and what the hub's clients raise."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    check_card(path, revision)
    try:
        datasets.load_dataset(path, config, revision=revision)  # without `split`, all splits are prepared
    except DatasetGenerationError:  # one table of all shards cannot be made
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=[*patterns, *folders.CARDS])


def fetched_files(path: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache with all files of rows of a data set; None where one lacks. Uses no network."""
    commit = cached_commit(path, "dataset", revision)
    if commit is None:
        return None
    try:
        tree = get_cached_repo_tree(path, repo_type="dataset", revision=commit)
    except CachedRepoTreeNotFoundError:
        return None
    name = repo_folder_name(repo_id=path, repo_type="dataset")
    folder = Path(constants.HF_HUB_CACHE) / name / "snapshots" / commit
    files = [file.path for file in tree if file.path.endswith(SUFFIXES)]
    return folder if files and all((folder / file).is_file() for file in files) else None


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
