"""Fetch from the hub what jobs will need, for a cluster whose machines cannot reach it.

    python -m prefopt.prefetch model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct dataset=ultrafeedback_binarized
    python -m prefopt.prefetch model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct check=true
    python -m prefopt.prefetch tasks=mmpo alpaca=true        # what LM-Harness and AlpacaEval read

Afterwards every job runs with the hub switched off (HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1). A model is the files of
its repository that transformers reads, in the hub's cache; a data set is what `datasets` prepared of it, in that of
`datasets`. `missing` tells a job what it lacks before it does anything expensive.
"""

import json
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import DatasetConfig, ModelConfig, PrefetchConfig, parse
from prefopt.data.dataset import sources
from prefopt.data.sources import SUFFIXES, Lacking, cached_commit, check_card, prepared
from prefopt.paths import resolve_path
from prefopt.program import program
from prefopt.progress import say

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
        """Whether the path means a file or folder rather than a repository."""

    @property
    @abstractmethod
    def command(self) -> str:
        """What fetches it."""

    @abstractmethod
    def there(self) -> int:
        """The bytes that it takes on this machine. Asks no network. Raises Lacking unless all of it is there."""

    @abstractmethod
    def fetch(self) -> None:
        """Bring it to this machine, or up to date. Raises Lacking, or what the hub's clients raise."""

    @abstractmethod
    def offline(self) -> bool:
        """Whether the hub is switched off for those who will read it."""


@dataclass(frozen=True)
class Model(Item):
    """Configuration, safetensors weights and tokenizer of a causal language model; or without its weights."""

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
        words = ["model=hub", f"model.path={self.path}"] + [f"model.revision={self.revision}"] * bool(self.revision)
        return f"python -m prefopt.prefetch {shlex.join(words)}"

    def offline(self) -> bool:
        return bool(constants.HF_HUB_OFFLINE)

    def there(self) -> int:
        cache = Path(constants.HF_HUB_CACHE)
        folder = cache / repo_folder_name(repo_id=self.path, repo_type="model")
        snapshot = folder / "snapshots" / (cached_commit(self.path, "model", self.revision) or "unknown")
        if not snapshot.is_dir():
            raise Lacking(f"{cache} has no copy of it{_others(folder / 'snapshots')}")
        present = {f.relative_to(snapshot).as_posix(): f.stat().st_size for f in snapshot.rglob("*") if f.is_file()}
        try:
            listing = [f.path for f in get_cached_repo_tree(self.path, revision=snapshot.name)]
        except CachedRepoTreeNotFoundError:  # fetched by something else, file by file
            listing = list(present)
        try:
            names = set(wanted(listing, self.weights))
        except Lacking as error:
            raise Lacking(f"its copy in {snapshot} is not complete: {error}") from None
        if INDEX in names and INDEX in present:
            names |= set(json.loads((snapshot / INDEX).read_text())["weight_map"].values())
        absent = sorted(names - set(present))
        if absent:
            raise Lacking(f"its copy in {snapshot} is not complete: {', '.join(absent[:3])}{' …' * (len(absent) > 3)}")
        return sum(present[name] for name in names)

    def fetch(self) -> None:
        names = wanted(HfApi().list_repo_files(self.path, revision=self.revision), self.weights)
        snapshot_download(self.path, revision=self.revision, allow_patterns=names)


@dataclass(frozen=True)
class Data(Item):
    """All splits of one configuration of a data set, of which a job will ask for `splits`."""

    config: str | None = None  # None: the only one, or the default
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"data {_place(self.path, self.revision)}" + (f", configuration {self.config}" if self.config else "")

    @property
    def local(self) -> bool:
        return self.path.endswith(SUFFIXES) or resolve_path(self.path).is_dir()

    @property
    def command(self) -> str:
        name = self.path + f"@{self.revision}" * bool(self.revision) + f":{self.config}" * bool(self.config)
        return f"python -m prefopt.prefetch {shlex.quote(f'also=[{name}]')}"

    def offline(self) -> bool:
        import datasets

        return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)

    def there(self) -> int:
        folder = prepared(self.path, self.revision, self.config)
        known = json.loads((folder / "dataset_info.json").read_text()).get("splits") or {}
        for split in self.splits:
            if split not in known:
                raise Lacking(
                    f"it has no split {split!r}; dataset.train_split and heldout_split choose from: {', '.join(known)}"
                )
        return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())

    def fetch(self) -> None:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        check_card(self.path, self.revision)
        # All splits are prepared, whichever is asked for.
        datasets.load_dataset(self.path, self.config, revision=self.revision)


def wanted(files: Iterable[str], with_weights: bool = True) -> list[str]:
    """The files of a model's repository that transformers reads: safetensors weights, configurations, tokenizer,
    templates; no second copy of the weights in another format, and no pickles.

    Raises Lacking for a repository without configuration, safetensors weights or tokenizer.
    """
    names = set(files)
    weights = {WEIGHTS} & names or {name for name in names if SHARD.fullmatch(name) and INDEX in names}
    texts = {name for name in names if "/" not in name and name.endswith(TEXTS) and not name.endswith(".index.json")}
    templates = {name for name in names if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", name)}
    if "config.json" not in texts:
        raise Lacking("it has no config.json, so it is not a model that transformers loads (an adapter alone is none)")
    if not with_weights:
        weights = set()
    elif not weights:
        raise Lacking("it has no weights in safetensors format, and pickles are not fetched")
    if not texts & set(TOKENIZERS) and not any(name.endswith((".tiktoken", ".model")) for name in texts):
        raise Lacking("it has no tokenizer")
    index = {INDEX} if weights and WEIGHTS not in names else set()
    return sorted(weights | texts | templates | index)


def items(model: ModelConfig, dataset: DatasetConfig, also: Iterable[str] = ()) -> list[Item]:
    """What a job with this model and data set reads, each repository once; then the data sets named in `also`.

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
    models += [Model(model.tokenizer, weights=False)] if model.tokenizer else []
    return [*models, *(replace(item, splits=splits) for item, splits in data.items())]


def missing(model: ModelConfig, dataset: DatasetConfig) -> list[str]:
    """A message for every model that is nowhere, and for everything on the hub that a job needs and that is not on this
    machine, if the hub is switched off.

    Asks no network, and loads neither torch nor, unless the data set is on the hub, `datasets`. Raises UserError for a
    data set without rows to read (`prefopt.data.dataset.sources`).
    """
    messages = []
    for item in items(model, dataset):
        model_itself = isinstance(item, Model) and item.weights
        what = f"no model can be loaded from model.path={item.path}" if model_itself else f"no {item}"
        if isinstance(item, Model) and not item.local and not _is_on_hub(item):
            messages.append(f"{what}: it is neither a folder here nor a name on the hub (OWNER/NAME).")
            continue
        try:
            if _is_on_hub(item) and item.offline():
                item.there()
        except Lacking as error:
            messages.append(
                f"{what}: the hub is switched off, and {error}.\nFetch it on a machine with network: {item.command}"
            )
    return messages


def prefetch(config: PrefetchConfig) -> None:
    """Print a line for each item, and fetch it unless `config.check`. Raises UserError that names all that failed."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    todo = items(config.model, config.dataset, config.also)
    off = any(_is_on_hub(item) and item.offline() for item in todo)
    if not config.check and (off or (constants.HF_HUB_OFFLINE and (config.alpaca or config.tasks))):
        raise UserError(
            "prefetch needs the hub, and it is switched off: unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or look "
            "only: check=true"
        )
    failed = {}
    for item in todo:
        try:
            state = _check(item) if config.check else _fetch(item)
        except UserError as error:
            failed[str(item)] = f"{error}" + f"\n    {item.command}" * (config.check and _is_on_hub(item))
            state = f"{'MISSING' if config.check else 'FAILED'}: {error}"
        say(f"{item}: {state}")
    for name, load in evaluations(config).items():
        try:
            load()
            say(f"{name}: already there" if config.check else f"{name}: there")
        except UserError as error:
            failed[name] = str(error)
            say(f"{name}: {'MISSING' if config.check else 'FAILED'}")
    if failed:
        raise UserError(
            f"{'missing' if config.check else 'not fetched'}: {'; '.join(failed)}"
            + "".join(f"\n  {name}: {why}" for name, why in failed.items())
        )
    if not config.check and (config.alpaca or config.tasks or any(_is_on_hub(item) for item in todo)):
        say(_how_to_copy())


def evaluations(config: PrefetchConfig) -> dict[str, Callable[[], object]]:
    """What prefopt.harness and prefopt.alpaca read, by name: functions that have lm-eval and alpaca-eval load it as
    they will, from the hub where it is not here yet and `check` is not set. They raise UserError."""
    found: dict[str, Callable[[], object]] = {}
    if (config.alpaca or config.tasks) and config.check:
        constants.HF_HUB_OFFLINE = True
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
    if config.alpaca:
        from prefopt.alpaca import SHA256, hub_file

        found |= {f"AlpacaEval's {name}": partial(hub_file, name) for name in SHA256}
    if config.tasks:
        from prefopt.harness import preflight, task_names

        names = task_names(config.tasks)
        found[f"tasks {', '.join(names)}"] = partial(preflight, names)
    return found


def _fetch(item: Item) -> str:
    """Fetch it; returns what became of it. Raises Lacking."""
    if item.local:
        return _check(item)
    _check_name(item)
    kind = "model" if isinstance(item, Model) else "dataset"
    try:
        commit = HfApi().repo_info(item.path, repo_type=kind, revision=item.revision).sha
        try:
            replace(item, revision=commit).there()
            state = "already there"
        except Lacking:
            state = "fetched"
        item.fetch()  # also where all is there: the caches learn what commit the revision is
    except Lacking:
        raise
    except GatedRepoError:
        raise Lacking("it is gated: accept its terms on the hub's page, and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Lacking("the hub has none of this name, or it is private: log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise Lacking(f"it has no revision {item.revision}") from None
    except Exception as error:  # the clients raise a dozen kinds: no network, no space, files of no known format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Lacking(f"{reason} (asked {constants.ENDPOINT})") from None
    return f"{state}, {_size(item.there())}, commit {commit}"


def _check(item: Item) -> str:
    if item.local:
        if not resolve_path(item.path).exists():
            raise Lacking("no such file")
        return "local, nothing to do"
    _check_name(item)
    return f"already there, {_size(item.there())}"


def _check_name(item: Item) -> None:
    if not _is_on_hub(item):
        raise Lacking("neither a folder here nor a name on the hub (OWNER/NAME)")


def _is_on_hub(item: Item) -> bool:
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


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _how_to_copy() -> str:
    """The two caches, not the whole of HF_HOME: that also holds the token."""
    import datasets

    caches = {"hub": Path(constants.HF_HUB_CACHE), "datasets": Path(datasets.config.HF_DATASETS_CACHE)}
    lines = [
        f"  rsync -a {shlex.quote(str(cache))}/ CLUSTER:FOLDER/{name}/"
        for name, cache in caches.items()
        if cache.is_dir()
    ]
    return "\n".join(
        [
            "Copy it to a folder of the cluster that is there and that jobs may write to:",
            *lines,
            "and in every job: export HF_HOME=FOLDER HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1",
            "Whether all is there tells, on the cluster, this command with check=true.",
        ]
    )


@program("prefetch", PrefetchConfig)
def main(cfg: DictConfig) -> None:
    prefetch(parse(cfg, PrefetchConfig))


if __name__ == "__main__":
    main()
