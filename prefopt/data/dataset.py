"""A data set: one source or a mixture of them -> the pairs (or chats) of a split, every drop counted."""

import difflib
import functools
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from prefopt.config.parse import build, parse
from prefopt.config.schema import DatasetConfig, PoliciesConfig
from prefopt.data.fields import content_id
from prefopt.data.formats import Format
from prefopt.data.items import Chat, Dropped, Item, Labelled, Message, Pair
from prefopt.data.layouts import find_layout
from prefopt.data.portions import heldout_prompts, subsample
from prefopt.data.read_row import read_row, scaled
from prefopt.data.sources import check_kind, digest, read_rows
from prefopt.errors import UserError
from prefopt.utils.files import resolve_path
from prefopt.utils.fingerprint import fingerprint

# Defects of rows that nothing can be trained on; see `PoliciesConfig` for all of them.
CANNOT_BE_KEPT = (
    "wrong_roles", "sides_part_early", "multi_turn_completion", "missing_text", "not_text", "no_preference",
    "unpaired_label", "prompt_too_long", "rewritten_by_template", "identical_after_truncation",
)  # fmt: skip


NO_HELDOUT = "no pairs are held out: give dataset.heldout=FILE, or a dataset.heldout_share above 0"


@dataclass(frozen=True)
class Split:
    """The items of one split, and counts from a first pass over them.

    Iterating reads the files again, source by source, because they may be larger than the memory.
    """

    read: Callable[[], Iterator[Item]]
    kind: str  # pairs, groups or chats
    drops: Counter[str]  # rows that are not used, by defect
    kept: Counter[str]  # defects of items that are used nevertheless
    sources: Counter[str]  # items of each source
    # {"items": their number, "lacking": how many have no rewards, "low": [lowest reward, id], "high": the highest};
    # low and high are None where no item has rewards.
    rewards: dict[str, Any]

    def __iter__(self) -> Iterator[Item]:
        return self.read()

    def __len__(self) -> int:
        return self.sources.total()

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """All pairs in a list, which stays in memory."""
        return [item for item in self if isinstance(item, Pair)]


def check_policies(policies: PoliciesConfig, where: str = "dataset") -> None:
    """Raise UserError for a policy that does not exist, or that a defect cannot have. `where`: the key for messages."""
    for reason, policy in asdict(policies).items():
        allowed = ["drop", "fail"]
        if reason not in CANNOT_BE_KEPT:
            allowed.append("keep")
        if reason == "prompt_too_long":
            allowed.append("cut")
        if policy not in allowed:
            raise UserError(f"{where}.policies.{reason} must be one of {', '.join(allowed)}, is {policy!r}.")


def check_columns(format_: Format, columns: dict[str, str], where: str) -> None:
    """Raise UserError for a name of ours in `columns` that the format does not read. `where`: the key for messages."""
    known = format_.fields()
    if known is None:
        return
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {where}.{near[0]}={columns[name]}?" if near else ""
            raise UserError(
                f"{where}.{name}={columns[name]}: {type(format_).__name__} does not read a field {name!r}.{hint} It "
                f"reads: {', '.join(known)}."
            )


def sources(config: DatasetConfig) -> dict[str, DatasetConfig]:
    """The sources of a mixture by name. A data set that is no mixture is its only source.

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
    parsed = {}
    for name, node in config.sources.items():
        source = parse(OmegaConf.create(node), DatasetConfig, f"dataset.sources.{name}.")
        if source.sources or not source.train:
            raise UserError(f"dataset.sources.{name} needs rows of its own: dataset.sources.{name}.train=VALUE")
        parsed[name] = replace(source, heldout_share=0.0)  # the mixture's own counts
    return parsed


def check_dataset(config: DatasetConfig) -> None:
    """Raise UserError for a data set that cannot be read as it is described, before any row is read."""
    for name, source in sources(config).items():
        where = config_key(config, name)
        for path in filter(None, (source.train, source.heldout)):
            check_kind(path)
        check_columns(build(source.format, Format, f"{where}.format"), source.columns, f"{where}.columns")
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
    if not 0 <= config.heldout_share < 1:
        raise UserError(f"dataset.heldout_share must be a share of the prompts in [0, 1), is {config.heldout_share:g}.")
    if config.oracle and not has_heldout(config):
        raise UserError(f"dataset.oracle samples the held-out prompts, and {NO_HELDOUT}")


def has_heldout(config: DatasetConfig) -> bool:
    """Whether any source has held-out rows, or a share of the training prompts is to be held out."""
    return made_share(config) > 0 or any(source.heldout for source in sources(config).values())


def made_share(config: DatasetConfig) -> float:
    """The share of the training prompts that is held out: `heldout_share` where no source names held-out rows, else
    0."""
    return 0.0 if any(source.heldout for source in sources(config).values()) else config.heldout_share


@dataclass(frozen=True)
class MadeSplit:
    """The held-out prompts (`content_id`) of a data set that names none, and how many prompts it has."""

    prompts: frozenset[str]
    of: int


_made: dict[str, MadeSplit] = {}  # what this process has read a whole data set for


def made_split(config: DatasetConfig) -> MadeSplit:
    """The held-out prompts, chosen by `made_share` from all prompts that are trained on without it. Raises UserError as
    `load_split`."""
    share = made_share(config)
    key = fingerprint([split_digest(config, "train"), dataset_fingerprint(config), share])
    if key not in _made:
        items = _used_items(config, "train", frozenset(), Counter(), {})
        prompts = {content_id(prompt_of(item)) for item, _ in items}
        _made[key] = MadeSplit(heldout_prompts(prompts, share), len(prompts))
    return _made[key]


def split_digest(config: DatasetConfig, split: str) -> str:
    """A digest (hexadecimal) of the content of the files that the split is read from; of a made one, of its share
    too."""
    if split == "heldout" and (share := made_share(config)):
        return fingerprint([split_digest(config, "train"), share])
    locations = [split_location(source, split) for source in sources(config).values()]
    digests = [digest(*location) for location in locations if location is not None]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_split(config: DatasetConfig, split: str, heldout_prompts: Iterable[list[Message]] = ()) -> Split:
    """Read split "train" or "heldout". Training items whose prompt is among `heldout_prompts` have the defect
    `prompt_in_heldout`. A source with `weight` or `count` gives that many of its training items (`subsample`).

    Raises UserError for unreadable files, for bad rows (file and row number), for a reason whose policy is to fail, and
    where nothing is left.
    """
    held_out = frozenset(content_id(p) for p in heldout_prompts)
    drops, kept = Counter[str](), Counter[str]()
    counts = Counter(dict.fromkeys(sources(config), 0))  # a source without items is counted, too
    kinds: set[str] = set()
    num_scored = 0
    extremes: list[tuple[float, str]] = []  # (reward, id) of the lowest and of the highest reward so far
    first: dict[str, str] = {}
    for item, defects in read_items(config, split, held_out, drops, first):
        counts[item.source] += 1
        kept.update(defects)
        kinds.add("chats" if isinstance(item, Chat) else "pairs" if item.others is None else "groups")
        if isinstance(item, Pair) and item.chosen_reward is not None and item.rejected_reward is not None:
            num_scored += 1
            extremes += [(item.chosen_reward, item.id), (item.rejected_reward, item.id)]
            extremes = [min(extremes), max(extremes)]

    if not kinds:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in drops.items()) or "no row"
        details = "".join(f"{detail}. " for detail in first.values())
        raise UserError(
            f"nothing is left of the {split} split of data set {config.name} ({reasons}). {details}Mend "
            "the rows; what is done about a defect is set by dataset.policies.DEFECT."
        )
    if len(kinds) > 1:
        mixed = " with ".join(sorted(kinds, reverse=True))
        raise UserError(f"data set {config.name} mixes {mixed}; one objective cannot learn from both.")

    low, high = extremes or (None, None)
    return Split(
        # Counted in the pass above; a later one counts into a Counter of its own.
        read=lambda: (item for item, _ in read_items(config, split, held_out, Counter(), {})),
        kind=kinds.pop(),
        drops=drops,
        kept=kept,
        sources=counts,
        rewards={"items": counts.total(), "lacking": counts.total() - num_scored, "low": low, "high": high},
    )


def read_items(
    config: DatasetConfig, split: str, held_out: frozenset[str], drops: Counter[str], first: dict[str, str]
) -> Iterator[tuple[Item, list[str]]]:
    """(item, its defects) for the items that are used. The others are counted in `drops`, and `first` gets what is
    wrong with the first row that is dropped for a reason.

    `held_out`: the `content_id` of every held-out prompt. Where the held-out items are made of the training rows, those
    of `made_split` count in its place, and what is dropped is counted with the training split. Raises UserError for a
    bad row, and for a defect whose policy is to fail.
    """
    if not made_share(config):
        yield from _used_items(config, split, held_out, drops, first)
        return
    prompts, is_heldout = made_split(config).prompts, split == "heldout"
    items = _used_items(config, "train", frozenset(), Counter() if is_heldout else drops, first, repeat=not is_heldout)
    yield from (used for used in items if (content_id(prompt_of(used[0])) in prompts) == is_heldout)


def _used_items(
    config: DatasetConfig,
    split: str,
    held_out: frozenset[str],
    drops: Counter[str],
    first: dict[str, str],
    repeat: bool = True,
) -> Iterator[tuple[Item, list[str]]]:
    """`read_items` of the rows that are named for `split`. `repeat`: as of `subsample`."""
    seen = set[str]()  # prompts of all sources so far: one that two sources have is a duplicate, too

    def is_used(name: str, policies: PoliciesConfig, defects: dict[str, str], where: str) -> bool:
        """Whether a row with these defects ({reason: detail}) is used. If not, the first that prevents it is
        counted."""
        for reason, detail in defects.items():
            policy = getattr(policies, reason)
            if policy == "fail":
                raise UserError(
                    f"{where}: {reason.replace('_', ' ')}{f' ({detail})' if detail else ''}. Mend the row, or set "
                    f"{config_key(config, name)}.policies.{reason}=drop."
                )
            if policy == "drop":
                drops[reason] += 1
                if detail:
                    first.setdefault(reason, f"{where}: {detail}")
                return False
        return True

    def used_items(name: str, source: DatasetConfig) -> Iterator[tuple[Item, list[str]]]:
        location = split_location(source, split)
        for where, item in _items(source, *location) if location else ():
            if isinstance(item, Dropped):
                # The format made no item of the row: the policy decides between counting it and failing.
                if is_used(name, source.policies, {item.reason: item.detail}, where):
                    drops[item.reason] += 1  # kept, if it could be
                continue
            item = replace(scaled(item, source, where), source=name, where=where)
            # Prompts are compared by digest, so that a large data set's prompts need not stay in memory.
            prompt = content_id(prompt_of(item))
            conditions = {"duplicate_prompt": prompt in seen, "prompt_in_heldout": prompt in held_out}
            defects = _defects(item) | {defect: "" for defect, holds in conditions.items() if holds}
            if is_used(name, source.policies, defects, where):
                seen.add(prompt)
                yield item, list(defects)

    for name, source in sources(config).items():
        if split == "train" and (source.weight is not None or source.count is not None):
            yield from subsample(list(used_items(name, source)), source, repeat)
        else:
            yield from used_items(name, source)


def prompt_of(item: Item) -> list[Message]:
    """The prompt of a pair; of a chat, the messages before the assistant's first turn."""
    if isinstance(item, Pair):
        return item.prompt
    first = next(i for i, m in enumerate(item.messages) if m["role"] == "assistant")
    return item.messages[:first]


def config_key(config: DatasetConfig, name: str) -> str:
    """The key of a source's settings on the command line."""
    return f"dataset.sources.{name}" if config.sources else "dataset"


def split_location(source: DatasetConfig, split: str) -> tuple[str, str, str | None] | None:
    """(path, name of the split in those files, revision), or None where the source has no such split."""
    if split == "train":
        path, name = source.train, source.train_split
    else:
        path, name = source.heldout, source.heldout_split
    return (path, name, source.revision) if path else None


def _items(source: DatasetConfig, path: str, split: str, revision: str | None) -> Iterable[tuple[str, Item | Dropped]]:
    """("file, row n", what the source's format makes of the row), where one row may give several items.

    Raises UserError for a row that the format cannot read.
    """
    read = build(source.format, Format, "dataset.format")

    def by_row() -> Iterator[tuple[str, Item | Dropped | Labelled]]:
        for where, row in read_rows(path, split, revision):
            try:
                result = read_row(read, row, source, where)
            except UserError as error:
                raise UserError(f"{error}{_what_reads(path, split, source)}") from None
            for item in [result] if isinstance(result, Pair | Chat | Dropped | Labelled) else result:
                yield where, item

    for where, item in read.combine(by_row()):
        assert not isinstance(item, Labelled), f"{type(read).__name__} makes no pairs of labelled completions"
        yield where, item


def _what_reads(path: str, split: str, source: DatasetConfig) -> str:
    """A sentence with the settings that read the rows of `path`, if they have a known layout that `source` is not."""
    try:
        layout = find_layout(
            path, None if resolve_path(path).is_file() else split, {}, "python -m prefopt.train"
        ).layout
    except UserError:  # none, or several: then there is nothing to advise
        return ""
    same = isinstance(build(source.format, Format, "dataset.format"), layout.format)
    if same and layout.columns == source.columns:
        return ""
    settings = layout.overrides(path)
    if path != source.train:  # of held-out rows, how they are read, and not as what
        settings = [s for s in settings if s.startswith(("dataset.format", "+dataset"))]
    return f"\nThe rows of this file are read by: {shlex.join(settings)}"


def _defects(item: Item) -> dict[str, str]:
    """The defects that an item has by itself, whatever other items there are, each with a detail for messages."""
    if isinstance(item, Chat):
        answers = [m for m in item.messages if m["role"] == "assistant"]
        conditions = {"empty_completion": not all(m["content"].strip() or m.get("tool_calls") for m in answers)}
        return {defect: "" for defect, holds in conditions.items() if holds}
    answers, rewards = item.answers, (item.chosen_reward, item.rejected_reward)
    is_pair = item.others is None  # in a group, samples that are empty or equal are samples like others
    conditions = {
        "empty_completion": is_pair and not all(m["content"].strip() or m.get("tool_calls") for m in answers),
        "identical": is_pair and answers[0] == answers[1],
        "tied_rewards": rewards[0] is not None and rewards[0] == rewards[1],
        "contradicting_rewards": None not in rewards and rewards[0] < rewards[1],  # type: ignore[operator]
    }
    return item.defects | {defect: "" for defect, holds in conditions.items() if holds}


def dataset_fingerprint(config: DatasetConfig) -> dict[str, Any]:
    """What decides the items of a data set besides the content of its files and `made_share`, for a `fingerprint`."""
    # Files count by their content and not by their path (`split_digest`); the oracle scores samples, not items.
    left_out = ("oracle", "train", "heldout", "heldout_share")
    return {
        name: {key: value for key, value in vars(source).items() if key not in left_out}
        for name, source in sources(config).items()
    }
