"""Fetch from the hub what jobs will need, for a cluster whose machines cannot reach it.

    python -m prefopt.prefetch model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct dataset=ultrafeedback_binarized
    python -m prefopt.prefetch model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct check=true
    python -m prefopt.prefetch tasks=mmpo alpaca=true        # what LM-Harness and AlpacaEval read
    python -m prefopt.prefetch mtbench=true arena=v0.1       # what MT-Bench and Arena-Hard read

Afterwards every job runs with the hub switched off (HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1). A model is the files of
its repository that transformers reads, in the hub's cache; a data set is what `datasets` prepared of it, in that of
`datasets`. `missing` tells a job what it lacks before it does anything expensive.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars
from omegaconf import MISSING, DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.dataset_path import replace_path
from prefopt.data.hub import Item, Model, is_on_hub, items
from prefopt.errors import MissingAssetError, UserError
from prefopt.evaluation.benchmark_files import ARENA_HARD, MT_BENCH, BenchmarkFile
from prefopt.utils.console import echo
from prefopt.utils.files import cache_dir, resolve_path


@dataclass
class PrefetchConfig:
    """What `python -m prefopt.prefetch` reads (conf/prefetch.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    also: list[str] = field(default_factory=list)
    tasks: Any = None
    alpaca: bool = False
    mtbench: bool = False
    arena: str | None = None
    check: bool = MISSING


def prefetch(config: PrefetchConfig) -> None:
    """Print a line for each item, and fetch it unless `config.check`. Raises UserError that names all that failed."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    todo = items(config.model, config.dataset, config.also)
    is_offline = any(is_on_hub(item) and item.offline() for item in todo)
    if not config.check and (is_offline or (constants.HF_HUB_OFFLINE and (config.alpaca or config.tasks))):
        raise UserError(
            "prefetch needs the hub, and it is switched off: unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or look "
            "only: check=true"
        )
    failed = {}
    for item in todo:
        try:
            state = _check(item) if config.check else _fetch(item)
        except UserError as error:
            failed[str(item)] = str(error)
            if config.check and is_on_hub(item):
                failed[str(item)] += f"\n    {item.command}"
            state = f"{'MISSING' if config.check else 'FAILED'}: {error}"
        echo(f"{item}: {state}")
    for name, load in evaluations(config).items():
        try:
            load()
            echo(f"{name}: already there" if config.check else f"{name}: there")
        except UserError as error:
            failed[name] = str(error)
            echo(f"{name}: {'MISSING' if config.check else 'FAILED'}")
    if failed:
        raise UserError(
            f"{'missing' if config.check else 'not fetched'}: {'; '.join(failed)}"
            + "".join(f"\n  {name}: {why}" for name, why in failed.items())
        )
    if not config.check and (evaluations(config) or any(is_on_hub(item) for item in todo)):
        echo(_how_to_copy())


def evaluations(config: PrefetchConfig) -> dict[str, Callable[[], object]]:
    """What the programs that evaluate read: by name, functions that load it just as those programs will.

    The functions fetch what is not here yet, unless `config.check`. They raise UserError.
    """
    loaders: dict[str, Callable[[], object]] = {}
    if (config.alpaca or config.tasks) and config.check:
        # Both libraries have read HF_HUB_OFFLINE when they were imported: setting it now would be too late.
        constants.HF_HUB_OFFLINE = True
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
    if config.alpaca:
        from prefopt.evaluation.questions import SHA256, hub_file

        loaders |= {f"AlpacaEval's {name}": partial(hub_file, name) for name in SHA256}
    files: list[tuple[str, BenchmarkFile]] = []
    if config.mtbench:
        files += [("MT-Bench", file) for file in MT_BENCH]
    if config.arena is not None:
        if config.arena not in ARENA_HARD:
            raise UserError(f"arena must be {' or '.join(ARENA_HARD)}, is {config.arena!r}")
        files += [(f"Arena-Hard {config.arena}", file) for file in ARENA_HARD[config.arena].files]
    for benchmark, file in files:
        loaders[f"{benchmark}'s {file.name}"] = partial(file.find, None) if config.check else file.fetch
    if config.tasks:
        from prefopt.evaluation.results import task_names
        from prefopt.evaluation.tasks import preflight

        names = task_names(config.tasks)
        loaders[f"tasks {', '.join(names)}"] = partial(preflight, names)
    return loaders


def _fetch(item: Item) -> str:
    """Fetch an item; returns a line on what was done. Raises MissingAssetError."""
    if item.local:
        return _check(item)
    _check_name(item)
    kind = "model" if isinstance(item, Model) else "dataset"
    try:
        commit = HfApi().repo_info(item.path, repo_type=kind, revision=item.revision).sha
        try:
            replace(item, revision=commit).there()
            state = "already there"
        except MissingAssetError:
            state = "fetched"
        item.fetch()  # also where nothing is missing: the caches learn which commit the revision is
    except MissingAssetError:
        raise
    except GatedRepoError:
        raise MissingAssetError(
            "it is gated: accept its terms on the hub's page, and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise MissingAssetError(
            "the hub has none of this name, or it is private: log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise MissingAssetError(f"it has no revision {item.revision}") from None
    except Exception as error:  # the clients raise a dozen kinds: no network, no space, files of no known format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingAssetError(f"{reason} (asked {constants.ENDPOINT})") from None
    return f"{state}, {_size(item.there())}, commit {commit}"


def _check(item: Item) -> str:
    """Look for an item without fetching it; returns a line on it. Raises MissingAssetError."""
    if item.local:
        if not resolve_path(item.path).exists():
            raise MissingAssetError("no such file")
        return "local, nothing to do"
    _check_name(item)
    return f"already there, {_size(item.there())}"


def _check_name(item: Item) -> None:
    if not is_on_hub(item):
        raise MissingAssetError("neither a folder here nor a name on the hub (OWNER/NAME)")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _how_to_copy() -> str:
    """The commands that copy the caches to a cluster. Not the whole of HF_HOME, which also holds the user's token."""
    import datasets

    caches = {"hub": Path(constants.HF_HUB_CACHE), "datasets": Path(datasets.config.HF_DATASETS_CACHE)}
    lines = [
        f"  rsync -a {shlex.quote(str(cache))}/ CLUSTER:FOLDER/{name}/"
        for name, cache in caches.items()
        if cache.is_dir()
    ]
    benchmarks = cache_dir() / "benchmarks"
    also = []
    if benchmarks.is_dir():
        lines.append(f"  rsync -a {shlex.quote(str(benchmarks))}/ CLUSTER:FOLDER/benchmarks/")
        also = ["and for prefopt.mtbench and prefopt.arena: files=FOLDER/benchmarks"]
    return "\n".join(
        [
            "Copy it to a folder of the cluster that is there and that jobs may write to:",
            *lines,
            "and in every job: export HF_HOME=FOLDER HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1",
            *also,
            "Whether all is there tells, on the cluster, this command with check=true.",
        ]
    )


@program("prefetch", PrefetchConfig, rewrite=replace_path)
def main(cfg: DictConfig) -> None:
    prefetch(parse(cfg, PrefetchConfig))


if __name__ == "__main__":
    main()
