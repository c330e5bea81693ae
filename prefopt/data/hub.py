"""What a job reads from the hub, and which of it is missing on this machine."""

import json
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.dataset import sources
from prefopt.data.folders import files_of_split
from prefopt.data.sources import SUFFIXES, cached_commit, fetch_data, fetched_files, prepared
from prefopt.errors import MissingAssetError, UserError
from prefopt.utils.files import resolve_path

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
SHARD = re.compile(r"(?!consolidated)[^/]+-\d+-of-\d+\.safetensors")
TEXTS = (".json", ".txt", ".jinja", ".model", ".tiktoken")  # configurations, vocabularies, templates
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Item(ABC):
    """Something that a job reads: a repository on the hub, or a file or folder on this machine."""

    path: str
    revision: str | None = None

    @property
    @abstractmethod
    def local(self) -> bool:
        """Whether the path is a file or folder, not a repository."""

    @property
    @abstractmethod
    def command(self) -> str:
        """The command line that fetches it."""

    @abstractmethod
    def there(self) -> int:
        """Its size on this machine, in bytes. Uses no network. Raises MissingAssetError unless it is complete."""

    @abstractmethod
    def fetch(self) -> None:
        """Download it, or update the copy. Raises MissingAssetError, and what the hub's clients raise."""

    @abstractmethod
    def offline(self) -> bool:
        """Whether the library that reads it is set to use no network."""


@dataclass(frozen=True)
class Model(Item):
    """A causal language model: configuration, safetensors weights and tokenizer. Without `weights`: a tokenizer."""

    weights: bool = True

    def __str__(self) -> str:
        return f"{'model' if self.weights else 'tokenizer'} {_place(self.path, self.revision)}"

    @property
    def local(self) -> bool:
        return self.path.startswith("package://") or self.path.endswith(".gguf") or Path(self.path).is_dir()

    @property
    def command(self) -> str:
        if not self.weights:
            return f"python -m prefopt.prefetch model=hub model.path=MODEL model.tokenizer={shlex.quote(self.path)}"
        words = ["model=hub", f"model.path={self.path}"]
        if self.revision:
            words.append(f"model.revision={self.revision}")
        return f"python -m prefopt.prefetch {shlex.join(words)}"

    def offline(self) -> bool:
        return bool(constants.HF_HUB_OFFLINE)

    def there(self) -> int:
        cache = Path(constants.HF_HUB_CACHE)
        folder = cache / repo_folder_name(repo_id=self.path, repo_type="model")
        snapshot = folder / "snapshots" / (cached_commit(self.path, "model", self.revision) or "unknown")
        if not snapshot.is_dir():
            raise MissingAssetError(f"{cache} has no copy of it{_others(folder / 'snapshots')}")

        present = {f.relative_to(snapshot).as_posix(): f.stat().st_size for f in snapshot.rglob("*") if f.is_file()}
        try:
            listing = [f.path for f in get_cached_repo_tree(self.path, revision=snapshot.name)]
        except CachedRepoTreeNotFoundError:  # fetched file by file, by another program: no list of the repository
            listing = list(present)
        try:
            names = set(wanted(listing, self.weights))
        except MissingAssetError as error:
            raise MissingAssetError(f"its copy in {snapshot} is not complete: {error}") from None
        if INDEX in names and INDEX in present:  # the index names the shards, also those that were never listed
            names |= set(json.loads((snapshot / INDEX).read_text())["weight_map"].values())

        absent = sorted(names - set(present))
        if absent:
            listed = ", ".join(absent[:3]) + (" …" if len(absent) > 3 else "")
            raise MissingAssetError(f"its copy in {snapshot} is not complete: {listed}")
        return sum(present[name] for name in names)

    def fetch(self) -> None:
        names = wanted(HfApi().list_repo_files(self.path, revision=self.revision), self.weights)
        snapshot_download(self.path, revision=self.revision, allow_patterns=names)


@dataclass(frozen=True)
class Data(Item):
    """One configuration of a data set, with all its splits. `splits`: the ones that a job reads."""

    config: str | None = None  # None: the only one, or the default
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"data {_place(self.path, self.revision)}" + (f", configuration {self.config}" if self.config else "")

    @property
    def local(self) -> bool:
        return self.path.endswith(SUFFIXES) or resolve_path(self.path).is_dir()

    @property
    def command(self) -> str:
        name = self.path
        if self.revision:
            name += f"@{self.revision}"
        if self.config:
            name += f":{self.config}"
        return f"python -m prefopt.prefetch {shlex.quote(f'also=[{name}]')}"

    def offline(self) -> bool:
        import datasets

        return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)

    def there(self) -> int:
        try:
            folder = prepared(self.path, self.revision, self.config)
        except MissingAssetError:
            files = None if self.config else fetched_files(self.path, self.revision)
            if files is None:
                raise
            for split in self.splits:
                try:
                    files_of_split(self.path, files, split)
                except UserError as error:
                    raise MissingAssetError(str(error)) from None
            return sum(f.stat().st_size for f in files.rglob("*") if f.is_file())
        known = json.loads((folder / "dataset_info.json").read_text()).get("splits") or {}
        for split in self.splits:
            if split not in known:
                raise MissingAssetError(
                    f"it has no split {split!r}; dataset.train_split and heldout_split choose from: {', '.join(known)}"
                )
        return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())

    def fetch(self) -> None:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        fetch_data(self.path, self.config, self.revision)


def wanted(files: Iterable[str], with_weights: bool = True) -> list[str]:
    """Of the `files` of a model's repository, those that transformers reads: safetensors weights, configurations,
    tokenizer, templates. Pickles and other copies of the weights are left out.

    Raises MissingAssetError for a repository without configuration, safetensors weights or tokenizer.
    """
    names = set(files)
    if WEIGHTS in names:
        weights = {WEIGHTS}
    elif INDEX in names:
        weights = {name for name in names if SHARD.fullmatch(name)}
    else:
        weights = set()
    texts = {name for name in names if "/" not in name and name.endswith(TEXTS) and not name.endswith(".index.json")}
    templates = {name for name in names if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", name)}

    if "config.json" not in texts:
        raise MissingAssetError(
            "it has no config.json, so it is not a model that transformers loads (an adapter alone is none)"
        )
    if not with_weights:
        weights = set()
    elif not weights:
        raise MissingAssetError("it has no weights in safetensors format, and pickles are not fetched")
    # Some tokenizers have a file named after the model, known by its ending alone.
    if not texts & set(TOKENIZERS) and not any(name.endswith((".tiktoken", ".model")) for name in texts):
        raise MissingAssetError("it has no tokenizer")

    index = {INDEX} if weights and WEIGHTS not in names else set()
    return sorted(weights | texts | templates | index)


def items(model: ModelConfig, dataset: DatasetConfig, also: Iterable[str] = ()) -> list[Item]:
    """What a job with this model and data set reads, every repository once; then the data sets named in `also`, written
    NAME, NAME@REVISION or NAME@REVISION:CONFIGURATION.

    Raises UserError for a data set without rows to read.
    """
    data: dict[Data, tuple[str, ...]] = {}
    for source in sources(dataset).values():
        for path, split in ((source.train, source.train_split), (source.heldout, source.heldout_split)):
            if path:
                item = Data(path, source.revision)
                data[item] = (*data.get(item, ()), split)
    for text in also:
        rest, _, config = text.partition(":")
        name, _, revision = rest.partition("@")
        data.setdefault(Data(name, revision or None, config or None), ())
    models = [Model(model.path, model.revision)]
    if model.tokenizer:
        models.append(Model(model.tokenizer, weights=False))
    return [*models, *(replace(item, splits=splits) for item, splits in data.items())]


def missing(model: ModelConfig, dataset: DatasetConfig, oracle: ModelConfig | None = None) -> list[str]:
    """A message for every model that does not exist; and, if the hub is switched off, for everything on the hub that a
    job needs and this machine lacks. `oracle`: the model of the data set's oracle, where it has one.

    Uses no network. To stay fast, it loads no torch, and `datasets` only if the data set is on the hub. Raises
    UserError for a data set without rows to read (`prefopt.data.dataset.sources`).
    """
    messages = []
    named = [("model.path", item) for item in items(model, dataset)]
    if oracle:
        named.append(("dataset.oracle.path", Model(oracle.path, oracle.revision)))
    for key, item in named:
        model_itself = isinstance(item, Model) and item.weights
        what = f"no model can be loaded from {key}={item.path}" if model_itself else f"no {item}"
        # With a path that is no valid name on the hub, a network would not help either.
        if isinstance(item, Model) and not item.local and not is_on_hub(item):
            messages.append(f"{what}: it is neither a folder here nor a name on the hub (OWNER/NAME).")
            continue
        try:
            if is_on_hub(item) and item.offline():
                item.there()
        except MissingAssetError as error:
            messages.append(
                f"{what}: the hub is switched off, and {error}.\nFetch it on a machine with network: {item.command}"
            )
    return messages


def is_on_hub(item: Item) -> bool:
    try:
        validate_repo_id(item.path)
    except HFValidationError:
        return False
    return not item.local


def _others(snapshots: Path) -> str:
    commits = sorted(f.name for f in snapshots.iterdir()) if snapshots.is_dir() else []
    return f" at this revision (there is {', '.join(commits)})" if commits else ""


def _place(path: str, revision: str | None) -> str:
    return f"{path} at {revision}" if revision else path
