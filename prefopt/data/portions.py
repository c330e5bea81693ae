"""Which items and prompts are taken of many: those whose content hashes lowest.

So a choice depends neither on the order of the rows nor on a seed, and runs that differ in their seed compare.
"""

from collections.abc import Collection, Sequence
from typing import TypeVar

from prefopt.config.schema import DatasetConfig
from prefopt.data.fields import content_id
from prefopt.data.items import Item

Used = tuple[Item, list[str]]  # an item, and its defects
T = TypeVar("T", bound=Used)

MOST_HELDOUT = 500  # prompts that are held out of the training rows


def heldout_prompts(prompts: Collection[str], share: float) -> frozenset[str]:
    """Of the `content_id` of every distinct prompt, those that are held out: about `share` of them, at least one, at
    most MOST_HELDOUT, and none where no other would be left to train on."""
    wanted = min(max(1, min(MOST_HELDOUT, round(share * len(prompts)))), len(prompts) - 1)
    return frozenset(sorted(prompts, key=lambda prompt: content_id("heldout", prompt))[: max(0, wanted)])


def subsample(items: Sequence[T], source: DatasetConfig, repeat: bool = True) -> list[T]:
    """As many items as `source.weight` (a share) or `source.count` asks for: all items so many times, and for the rest
    those whose ids hash lowest. So a subset is the same whatever else is in the mixture. With `repeat=False` no item
    comes twice."""
    wanted = round(source.weight * len(items)) if source.weight is not None else source.count
    assert wanted is not None
    passes, rest = divmod(wanted, max(1, len(items)))
    if passes and not repeat:
        passes, rest = 1, 0
    by_hash = sorted(range(len(items)), key=lambda i: content_id("portion", items[i][0].id))
    return [*items] * passes + [items[i] for i in sorted(by_hash[:rest])]  # the rest in the order of the file
