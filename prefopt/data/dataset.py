"""A data set: one source or a mixture of them -> the pairs (or chats) of a split, every drop counted."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from prefopt.config.parse import build, parse
from prefopt.config.schema import DatasetConfig, PoliciesConfig
from prefopt.data.formats import Chat, Dropped, Format, Item, Message, Pair, content_id
from prefopt.data.sources import check_kind, digest, read_rows
from prefopt.errors import UserError

CANNOT_BE_KEPT = ("wrong_roles", "sides_part_early", "no_preference", "prompt_too_long", "identical_after_truncation")


@dataclass(frozen=True)
class Split:
    """A split that has been read to its end once: how many items came from each source, what was dropped (or kept in
    spite of it) and why, and what rewards there are.

    Its items, in the order of the sources, are read from the files again each time they are iterated: a file may be
    larger than the memory.
    """

    read: Callable[[], Iterator[Item]]
    kind: str  # pairs or chats
    drops: Counter[str]
    kept: Counter[str]
    sources: Counter[str]
    rewards: dict[str, Any]  # {"items", "lacking" a reward, "low": [reward, id], "high": the same}, both None of none

    def __iter__(self) -> Iterator[Item]:
        return self.read()

    def __len__(self) -> int:
        return self.sources.total()

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """All of them, held in memory from now on."""
        return [item for item in self if isinstance(item, Pair)]


def check_policies(policies: PoliciesConfig, where: str = "dataset") -> None:
    """Raise UserError for a policy that does not exist, or not for that defect."""
    for reason, policy in asdict(policies).items():
        allowed = ["drop", "fail"] + ["keep"] * (reason not in CANNOT_BE_KEPT) + ["cut"] * (reason == "prompt_too_long")
        if policy not in allowed:
            raise UserError(f"{where}.policies.{reason} must be one of {', '.join(allowed)}, is {policy!r}.")


def sources(config: DatasetConfig) -> dict[str, DatasetConfig]:
    """The sources of a mixture by name; a data set that is none is its own only source.

    Raises UserError for a source with an unknown key or without rows to read, and for a mixture with rows of its own.
    """
    if not config.sources:
        if not config.train:
            raise UserError("no value for dataset.train. Give it on the command line: dataset.train=VALUE")
        return {config.name: config}
    if config.train or config.heldout:
        raise UserError("a data set has either train (and heldout) or sources, not both.")
    if config.policies != PoliciesConfig():
        raise UserError("the policies of a mixture are those of its sources: dataset.sources.NAME.policies.REASON=...")
    found = {}
    for name, node in config.sources.items():
        source = parse(OmegaConf.create(node), DatasetConfig, f"dataset.sources.{name}.")
        if source.sources or not source.train:
            raise UserError(f"dataset.sources.{name} needs rows of its own: dataset.sources.{name}.train=VALUE")
        found[name] = source
    return found


def check_dataset(config: DatasetConfig) -> None:
    """Raise UserError for a data set that cannot be read as it is described, before any row is read."""
    for name, source in sources(config).items():
        where = config_key(config, name)
        for path in filter(None, (source.train, source.heldout)):
            check_kind(path)
        build(source.format, Format, f"{where}.format")
        check_policies(source.policies, where)
        if source.weight is not None and source.count is not None:
            raise UserError(f"{where}: give weight (a share of its rows) or count (a number of them), not both.")
        if source.weight is not None and source.weight <= 0:
            raise UserError(f"{where}.weight must be positive, is {source.weight}.")
        if source.count is not None and source.count < 1:
            raise UserError(f"{where}.count must be at least 1, is {source.count}.")
        scale = source.reward_scale
        if scale is not None and not (len(scale) == 2 and scale[0] < scale[1]):
            raise UserError(f"{where}.reward_scale must be [lowest, highest] reward, is {scale}.")
    if config.oracle and not has_heldout(config):
        raise UserError("dataset.oracle samples the held-out prompts, and dataset.heldout is null: give a file")


def has_heldout(config: DatasetConfig) -> bool:
    return any(source.heldout for source in sources(config).values())


def split_digest(config: DatasetConfig, split: str) -> str:
    """Of the files that the split is read from."""
    digests = [digest(*place) for source in sources(config).values() if (place := split_location(source, split))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_split(config: DatasetConfig, split: str, heldout_prompts: Iterable[list[Message]] = ()) -> Split:
    """Read split "train" or "heldout". Training items whose prompt is among `heldout_prompts` are `prompt_in_heldout`.

    A source's `weight` or `count` takes that many of its training items: whole passes over them, and for the rest those
    whose content hashes lowest, so that a subset is the same whatever else is in the mixture. Such a source alone is
    held in memory.

    Raises UserError for unreadable files, for bad rows (file and row number), for a reason whose policy is to fail, and
    where nothing is left.
    """
    held_out = frozenset(content_id(p) for p in heldout_prompts)
    drops, kept, counts = Counter[str](), Counter[str](), Counter(dict.fromkeys(sources(config), 0))
    kinds: set[str] = set()
    scored = 0
    ends: list[tuple[float, str]] = []  # the lowest reward, the highest
    for item, defects in read_items(config, split, held_out, drops):
        counts[item.source] += 1
        kept.update(defects)
        kinds.add("pairs" if isinstance(item, Pair) else "chats")
        if isinstance(item, Pair) and item.chosen_reward is not None and item.rejected_reward is not None:
            scored += 1
            ends += [(item.chosen_reward, item.id), (item.rejected_reward, item.id)]
            ends = [min(ends), max(ends)]
    if not kinds:
        said = ", ".join(f"{reason}: {n}" for reason, n in drops.items()) or "no row"
        raise UserError(
            f"nothing is left of the {split} split of data set {config.name} ({said}). Mend the rows; what is done "
            "about a defect is set by dataset.policies.DEFECT."
        )
    if len(kinds) > 1:
        raise UserError(f"data set {config.name} mixes pairs with chats; one objective cannot learn from both.")
    low, high = ends or (None, None)
    rewards = {"items": counts.total(), "lacking": counts.total() - scored, "low": low, "high": high}
    return Split(
        lambda: (item for item, _ in read_items(config, split, held_out, Counter())),
        kinds.pop(),
        drops,
        kept,
        counts,
        rewards,
    )


def read_items(
    config: DatasetConfig, split: str, held_out: frozenset[str], drops: Counter[str]
) -> Iterator[tuple[Item, list[str]]]:
    """The items that are used and the defects that each has in spite of it; counts the others in `drops`."""
    seen = set[str]()

    def stays(name: str, policies: PoliciesConfig, defects: list[str], where: str, detail: str = "") -> bool:
        """Whether a row with these defects is used; counts the first for which it is not."""
        for reason in defects:
            policy = getattr(policies, reason)
            if policy == "fail":
                raise UserError(
                    f"{where}: {reason.replace('_', ' ')}{f' ({detail})' if detail else ''}. Mend the row, or set "
                    f"{config_key(config, name)}.policies.{reason}=drop."
                )
            if policy == "drop":
                drops[reason] += 1
                return False
        return True

    def used(name: str, source: DatasetConfig) -> Iterator[tuple[Item, list[str]]]:
        place = split_location(source, split)
        for where, item in _items(source, *place) if place else ():
            if isinstance(item, Dropped):
                stays(name, source.policies, [item.reason], where, item.detail)
                continue
            item = replace(_scaled(item, source, where), source=name)
            prompt = content_id(prompt_of(item))
            defects = _defects(item)
            defects += ["duplicate_prompt"] * (prompt in seen) + ["prompt_in_heldout"] * (prompt in held_out)
            if stays(name, source.policies, defects, where):
                seen.add(prompt)
                yield item, defects

    for name, source in sources(config).items():
        if split == "train" and (source.weight is not None or source.count is not None):
            yield from subsample(list(used(name, source)), source)
        else:
            yield from used(name, source)


def prompt_of(item: Item) -> list[Message]:
    """What a pair answers; of a chat, what comes before the assistant's first turn."""
    if isinstance(item, Pair):
        return item.prompt
    first = next(i for i, m in enumerate(item.messages) if m["role"] == "assistant")
    return item.messages[:first]


def config_key(config: DatasetConfig, name: str) -> str:
    """Where the source's settings are on the command line."""
    return f"dataset.sources.{name}" if config.sources else "dataset"


def split_location(source: DatasetConfig, split: str) -> tuple[str, str, str | None] | None:
    """(path, name of the split there, revision), or None where the source has no such split."""
    path, there = (source.train, source.train_split) if split == "train" else (source.heldout, source.heldout_split)
    return (path, there, source.revision) if path else None


def _items(source: DatasetConfig, path: str, split: str, revision: str | None) -> Iterable[tuple[str, Item | Dropped]]:
    make = build(source.format, Format, "dataset.format")
    for where, row in read_rows(path, split, revision):
        try:
            made = make(_renamed(row, source.columns))
        except KeyError as error:
            fields = ", ".join(row) or "none"
            raise UserError(
                f"{where} has no field {error} (its fields: {fields}). {type(make).__name__} rows are: "
                f"{(type(make).__doc__ or '').splitlines()[0]} Other names are mapped by dataset.columns."
            ) from None
        except ValueError as error:
            raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None
        for item in [made] if isinstance(made, Pair | Chat | Dropped) else made:
            yield where, item


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with our names; theirs may lead into a nested object ("metadata.score")."""
    renamed = dict(row)
    for ours, theirs in columns.items():
        value: Any = row
        for key in theirs.split("."):
            if not isinstance(value, dict) or key not in value:
                raise KeyError(theirs)
            value = value[key]
        renamed[ours] = value
    return renamed


def _scaled(item: Item, source: DatasetConfig, where: str) -> Item:
    if not isinstance(item, Pair) or source.reward_scale is None:
        return item
    low, high = source.reward_scale
    rewards: dict[str, Any] = {}
    for side in ("chosen_reward", "rejected_reward"):
        value = getattr(item, side)
        if value is not None and not low <= value <= high:
            raise UserError(f"{where}: {side} {value:g} is outside dataset.reward_scale={source.reward_scale}.")
        rewards[side] = None if value is None else (value - low) / (high - low)
    return replace(item, **rewards)


def _defects(item: Item) -> list[str]:
    if isinstance(item, Chat):
        return ["empty_completion"] * any(m["role"] == "assistant" and not m["content"].strip() for m in item.messages)
    tied = item.chosen_reward is not None and item.chosen_reward == item.rejected_reward
    empty = not item.chosen.strip() or not item.rejected.strip()
    return ["empty_completion"] * empty + ["identical"] * (item.chosen == item.rejected) + ["tied_rewards"] * tied


def subsample(items: list[tuple[Item, list[str]]], source: DatasetConfig) -> list[tuple[Item, list[str]]]:
    wanted = round(source.weight * len(items)) if source.weight is not None else source.count
    assert wanted is not None
    passes, rest = divmod(wanted, max(1, len(items)))
    order = sorted(range(len(items)), key=lambda i: content_id("portion", items[i][0].id))
    chosen = sorted(order[:rest])
    return items * passes + [items[i] for i in chosen]


def dataset_fingerprint(config: DatasetConfig) -> dict[str, Any]:
    """What decides the items of a data set beside the files' content, for a `fingerprint`."""
    return {name: {k: v for k, v in vars(source).items() if k not in ("oracle", "train", "heldout")}
            for name, source in sources(config).items()}  # fmt: skip
