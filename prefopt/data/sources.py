"""Reading rows: from JSON, JSONL, their gzips, Parquet, a local folder, or a data set on the hub."""

import contextlib
import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

from prefopt.errors import MissingAssetError, UnsafePathError, UserError
from prefopt.utils.files import atomic_write, resolve_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
CARDS = ("README.md", ".huggingface.yaml")  # where `datasets` reads which files are data
Row = dict[str, Any]


def read_rows(path: str, split: str | None = "train", revision: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ("file, row n", row).

    `path` is a file (see SUFFIXES; JSON holds one list), a folder or a hub name. `split` chooses among the splits of a
    folder or a hub data set. A file is one split, unless its rows have a field `split`: such a row is yielded for that
    split alone. With `split=None` all rows of a file are yielded.

    Raises UserError, naming file and row, for what is missing, empty or not readable.
    """
    file = resolve_path(path)
    check_kind(path)
    if not path.endswith(SUFFIXES):
        if split is None:
            raise UserError(
                f"{path} is no file ({', '.join(SUFFIXES)}): say which of its splits is meant, by split=NAME"
            )
        rows = _from_datasets(path, split, revision)
    elif not file.is_file():
        raise _nowhere(path)
    elif path.endswith(".parquet"):
        rows = _from_parquet(path, file)
    else:
        rows = _from_json(path, file)

    splits = set()
    for where, row in rows:
        # A row without the field belongs to every split that is asked for.
        splits.add(str(row.get("split", split)))
        if split is None or row.get("split", split) == split:
            yield where, row
    if not splits:
        raise UserError(f"data file {path} is empty. It must hold at least one row.")
    if split is not None and split not in splits:
        raise UserError(f"no row of {path} has split {split!r}; there are: {', '.join(sorted(splits))}.")


def _nowhere(path: str) -> MissingAssetError:
    return MissingAssetError(
        f"data file {path} does not exist. Give a file ({', '.join(SUFFIXES)}), a folder or a hub name."
    )


def check_kind(path: str) -> None:
    """Raise UserError for a file of a kind that cannot be read."""
    if not path.endswith(SUFFIXES) and resolve_path(path).is_file():
        raise UserError(
            f"data file {path} is of no kind that can be read: give one that ends in {', '.join(SUFFIXES)}."
        )


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


def _from_json(path: str, file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a JSON file (whole, a list) or a JSONL file (line by line), gzipped or not."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            if path.removesuffix(".gz").endswith(".json"):
                values = _parsed(path, stream.read(), "For one object a line, name the file .jsonl")
                if not isinstance(values, list):
                    raise UserError(f"{path} must hold a list of JSON objects, is a {type(values).__name__}.")
                yield from ((where, _object(where, v)) for where, v in _numbered(path, values))
                return
            for n, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{path}, row {n}"
                    yield where, _object(where, _parsed(where, line, "Each line must be one JSON object, in UTF-8."))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read: {error}. Get it again, or give another file.") from None


def _parsed(where: str, data: bytes, hint: str) -> Any:
    """The JSON value in `data`. Raises UserError for what is not JSON, not UTF-8, or not text at all."""
    try:
        value = json.loads(data.decode())
        # JSON can escape half of a surrogate pair. No file can hold that: encoding it raises ValueError.
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}. {hint}") from None
    return value


def _from_parquet(path: str, file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches()
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"data file {path} cannot be read: {reason}. Get it again, or give another file.") from None


def _from_datasets(path: str, split: str, revision: str | None) -> Iterator[tuple[str, Row]]:
    for where, row in _numbered(path, _load(path, split, revision)):
        row.pop("split", None)  # the split is already chosen; a field of this name would filter rows in `read_rows`
        yield where, row


def _load(path: str, split: str, revision: str | None) -> Any:
    """A split as `datasets` loads it. Raises UserError where it cannot, and UnsafePathError for data outside."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    datasets.disable_progress_bars()
    local = resolve_path(path)
    try:
        if local.is_dir():
            _check_folder(local)
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
    text = file.read_text(errors="replace")
    if file.suffix == ".md":
        # Only the YAML between the first two lines of --- is read by machines.
        front = re.match(r"\s*---\r?\n(.*?)\n---", text, re.DOTALL)
        text = front[1] if front else ""
    for name in _data_files(yaml.safe_load(text)):
        if "://" in name or "::" in name or ".." in Path(name).parts or Path(name).is_absolute():
            raise UnsafePathError(
                f"{file} names data outside of its folder: {name}. They are not read; if you want them, fetch them "
                "yourself and give the file."
            )


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


def _numbered(path: str, values: Any) -> Iterator[tuple[str, Row]]:
    return ((f"{path}, row {n}", cast(Row, value)) for n, value in enumerate(values, start=1))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, compressed where the name ends in .gz; whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # mtime=0, so that the same rows give the same file.
    atomic_write(path, gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, is a {type(value).__name__}.")
    return value
