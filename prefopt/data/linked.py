"""Linked pairs: two prompts with exchanged preference over the same two completions (SymMPO).

They are found among the tokenized pairs, whatever their order in the rows: the chosen completion of one is the rejected
one of the other, and the other way round, token by token.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from prefopt.data.cache import Prepared
from prefopt.data.fields import content_id
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError

log = logging.getLogger(__name__)


class LinkedPairs(Sequence[TokenizedPair]):
    """Some of `pairs`, in the order of the indices `order`: a pair, then its partner. Each is read when it is
    indexed."""

    def __init__(self, pairs: Sequence[TokenizedPair], order: Sequence[int]):
        self.pairs, self.order = pairs, order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self.pairs[i] for i in self.order[index]]
        return self.pairs[self.order[index]]


def link(split: Prepared, where: str) -> Prepared:
    """`split` with its linked pairs alone, each behind its partner (2k and 2k + 1). The others are counted as dropped:

    * `no_partner`: no pair with another prompt has its completions exchanged;
    * `several_partners`: it cannot be told which one it belongs to, as with answers such as Yes and No.

    Raises UserError, which names the split by `where`, where no linked pairs are left.
    """
    pairs, places = split.pairs, defaultdict[tuple[str, str], list[int]](list)
    sides = [(content_id(pair.chosen), content_id(pair.rejected)) for pair in pairs]
    for i, side in enumerate(sides):
        places[side].append(i)

    order: list[int] = []
    dropped, sources, first = Counter[str](), Counter[str](), ""
    for i, (chosen, rejected) in enumerate(sides):
        partners = places.get((rejected, chosen), [])
        if not partners or (len(partners) == 1 and pairs[i].prompt == pairs[partners[0]].prompt):
            reason = "no_partner"
        elif len(partners) > 1 or len(places[chosen, rejected]) > 1:
            reason = "several_partners"
        else:
            order += [i, partners[0]] if i < partners[0] else []
            sources[pairs[i].source] += 1
            continue
        dropped[reason] += 1
        first = first or f"first {pairs[i].id}"

    found = ", ".join([*(f"{reason} {n}" for reason, n in dropped.items()), first])
    if not order:
        raise UserError(
            f"no linked pairs in the {where} (dropped: {found}). A linked pair is two rows with different prompts and "
            "the same two completions, of which each prefers the other one: the chosen text of one is exactly the "
            "rejected text of the other, in no third row. Write such rows, or take an objective of single pairs."
        )
    log.info(f"  {where}: {len(order)} pairs are linked; dropped: {found if dropped else 'none'}")
    counts = split.counts | {
        "items": len(order),
        "sources": {name: sources[name] for name in split.counts["sources"]},
        "dropped": split.counts["dropped"] | dropped,
    }
    return replace(split, pairs=LinkedPairs(pairs, order), counts=counts)
