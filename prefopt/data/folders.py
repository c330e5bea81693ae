"""A folder of rows: which files belong to which split, and what must not be in it."""

import functools
import glob
import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants

from prefopt.data.readers import READABLE, kind_of
from prefopt.errors import UnsafePathError, UserError

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


def files_of_split(path: str, folder: Path, split: str | None) -> tuple[list[Path], bool]:
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

    A card in the folder comes first. A folder that `save_to_disk` wrote is the split of its name, and no split if it is
    `folder` itself. Other names mean what they mean to `datasets`: data/NAME-00000-of-00002 alone if there are such
    files, else words such as "test" in the names of files and folders. Raises UserError for a name that says two.
    """
    if by_card := _card_splits(folder):
        return by_card
    saved: dict[Path, list[str] | None] = {}
    sharded: dict[str | None, list[Path]] = {}
    splits: dict[str | None, list[Path]] = {}
    others: list[Path] = []
    for file in sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file()):
        is_hidden = any(part.startswith((".", "__")) for part in file.parts)
        if file.name in NO_ROWS or kind_of(file.name) is None or is_hidden:
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


def check_folder(folder: Path) -> None:
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
        check_card(folder / name)


def check_card(file: Path) -> None:
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


def needs_datasets(folder: Path) -> bool:
    """Whether a card says which files are data in a way that `datasets` alone understands: with several configurations,
    or with arguments of its readers."""
    is_named = any(name for card in CARDS for name in _data_files(_front_matter(folder / card)))
    return is_named and not _card_splits(folder)


def _card_splits(folder: Path) -> dict[str | None, list[Path]]:
    """The files of each split, as the only or default configuration of the folder's card names them; else none.

    Raises UserError for a pattern without a file.
    """
    card = next(filter(None, (_front_matter(folder / name) for name in CARDS)), None)
    configs = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return {}
    if len(configs) > 1:
        configs = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
    if len(configs) != 1 or not set(configs[0]) <= {"config_name", "data_files", "default"}:
        return {}
    patterns = configs[0].get("data_files")
    if not patterns:
        return {}
    if isinstance(patterns, list) and all(isinstance(item, dict) for item in patterns):
        patterns = {item.get("split"): item.get("path") for item in patterns}
    elif not isinstance(patterns, dict):
        patterns = {"train": patterns}
    splits: dict[str | None, list[Path]] = {}
    for split, names in patterns.items():
        files = set[Path]()
        for name in names if isinstance(names, list) else [names]:
            found = glob.glob(str(name), root_dir=folder, recursive=True)  # noqa: PTH207 (there, ** finds no files)
            matching = {Path(file) for file in found if kind_of(file) and (folder / file).is_file()}
            if not matching:
                raise UserError(f"the card of {folder} names data that are not there: {name} ({READABLE} are read).")
            files |= matching
        splits[str(split)] = sorted(files)
    return splits
