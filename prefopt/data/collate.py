"""Token ids -> tensors. How completions lie in rows is decided here alone; log-probs see only where each completion
token is predicted from.

* `packed`: all groups of a micro-batch in one row, one behind the other, no padding; the prompt of a pair is computed
  once, positions restart after it, and no completion sees another (`prefopt.models.packed_attention`).
* `prefix_shared`: one row a group, with a mask of [row x row]; for models whose attention cannot be exchanged.
* `padded`: one row a completion, padding on the right. Works with every model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.tokenize import TokenizedPair


@dataclass(frozen=True)
class PackedSegments:
    """How a packed row is cut: per group the tokens of its prompt and of each of its completions, in their order."""

    groups: Sequence[tuple[int, Sequence[int]]]
    # What all layers of a forward pass share, made by the first.
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def query_lengths(self) -> list[int]:
        """The first completion is computed together with the prompt, each other one by itself."""
        return [n for prompt, (first, *others) in self.groups for n in (prompt + first, *others)]

    @property
    def key_lengths(self) -> list[int]:
        return [n for prompt, completions in self.groups for n in (prompt, *completions)]

    def mask(self, like: Tensor, queries: int, keys: int, window: int | None) -> Tensor:
        """(queries, keys), added to the scores: the queries are the last positions of the keys'."""
        name = (queries, keys, window, like.dtype, like.device)
        if name not in self._made:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._made[name] = torch.zeros(queries, keys, dtype=like.dtype).masked_fill(~seen, -torch.inf).to(like)
        return self._made[name]

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For variable-length kernels: places of all segments' keys in the row, one segment behind the other, int64;
        cumulative query and key lengths, int32; the longest of each."""
        if device not in self._made:
            keys, counts, start = [], [], 0
            for prompt, completions in self.groups:
                own = start + prompt
                for n in completions:
                    keys += [torch.arange(start, start + prompt), torch.arange(own, own + n)]
                    counts.append(prompt + n)
                    own += n
                start = own
            lengths = [torch.tensor([0, *n]) for n in (self.query_lengths, counts)]
            cumulative = [n.cumsum(0).to(torch.int32).to(device, non_blocking=True) for n in lengths]
            places = torch.cat(keys).to(device, non_blocking=True)
            self._made[device] = (places, *cumulative, max(self.query_lengths), max(counts))
        return self._made[device]


class Group(NamedTuple):
    """Token ids of a prompt and of the completions that follow it."""

    prompt: list[int]
    completions: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """`C` completions with `N` tokens in all, in `R` rows of up to `T` tokens, numbered: the first completion of
    each group, then the second one of each.

    `input_ids` (R, T) int64. `attention_mask`: (R, T) int64, 1 on real tokens; or (R, 1, T, T) bool, True where a
    query may look; or, with `segments`, a stand-in. `position_ids` (R, T) int64, or None for the model's default. Per
    completion token, (N,) int64 each: `sources`, the flat index in (R, T) of the hidden state that predicts it;
    `labels`, its id; `completions`, which completion it belongs to; `offsets`, its place in it. Per completion, (C,):
    `lengths` float32; `ends` int64, the flat index of its last token's hidden state. `longest`: the largest length.
    Everything comes from lengths and nothing from token ids, so a tokenizer whose pad is its eos is safe.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    segments: PackedSegments | None
    sources: Tensor
    labels: Tensor
    completions: Tensor
    offsets: Tensor
    lengths: Tensor
    ends: Tensor
    longest: int

    def to(self, device: torch.device) -> "Batch":
        """On `device`; a copy to a GPU goes on beside what the GPU does."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values)


def packed(groups: Sequence[Group]) -> Batch:
    """
    >>> batch = packed([Group([5, 6], [[7, 2], [8]]), Group([9], [[3], [4, 2]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8, 9, 3, 4, 2]], [[0, 1, 2, 3, 2, 0, 1, 1, 2]])
    >>> batch.sources.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 5, 1, 5, 7], [7, 2, 3, 8, 4, 2], [0, 0, 1, 2, 3, 3])
    >>> batch.ends.tolist()
    [3, 6, 4, 8]
    """
    starts, at = [], 0
    for group in groups:
        starts.append(at)
        at += _tokens(group)
    row = [token for g in groups for part in (g.prompt, *g.completions) for token in part]
    positions = torch.cat([_positions(g) for g in groups])[None]
    segments = PackedSegments([(len(g.prompt), [len(c) for c in g.completions]) for g in groups])
    # Masks of four dimensions are passed on as they are, so transformers makes none of its own.
    return _batch(groups, starts, torch.tensor([row]), torch.ones(1, 1, 1, 1, dtype=torch.bool), positions, segments)


def prefix_shared(groups: Sequence[Group]) -> Batch:
    """
    >>> batch = prefix_shared([Group([5, 6], [[7, 2], [8]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8]], [[0, 1, 2, 3, 2]])
    >>> batch.attention_mask[0, 0].int().tolist()[-1]
    [1, 1, 0, 0, 1]
    """
    input_ids = _rows([[t for part in (g.prompt, *g.completions) for t in part] for g in groups])
    width = input_ids.shape[1]
    position_ids = torch.zeros_like(input_ids)
    owners = torch.zeros_like(input_ids)  # 0: the prompt; i: the i-th completion
    for r, group in enumerate(groups):
        lengths = torch.tensor([len(group.prompt), *map(len, group.completions)])
        position_ids[r, : _tokens(group)] = _positions(group)
        owners[r, : _tokens(group)] = torch.arange(len(lengths)).repeat_interleave(lengths)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    visible = causal & ((owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None]))
    starts = [r * width for r in range(len(groups))]
    return _batch(groups, starts, input_ids, visible[:, None], position_ids, None)


def padded(groups: Sequence[Group]) -> Batch:
    """
    >>> batch = padded([Group([5, 6], [[7, 2], [8]])])
    >>> batch.input_ids.tolist()
    [[5, 6, 7, 2], [5, 6, 8, 0]]
    >>> batch.attention_mask.tolist()
    [[1, 1, 1, 1], [1, 1, 1, 0]]
    >>> batch.sources.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 5], [7, 2, 8], [0, 0, 1])
    >>> batch.ends.tolist()
    [3, 6]
    """
    rows = [Group(g.prompt, [completion]) for column in _columns(groups) for g, completion in column]
    input_ids = _rows([g.prompt + g.completions[0] for g in rows])
    width = input_ids.shape[1]
    attention_mask = (torch.arange(width) < torch.tensor([_tokens(g) for g in rows])[:, None]).long()
    return _batch(rows, [r * width for r in range(len(rows))], input_ids, attention_mask, None, None)


@dataclass(frozen=True)
class Layout:
    """`make` collates groups; `tokens` says how many tokens, padding included, their rows would hold."""

    name: str
    make: Callable[[Sequence[Group]], Batch]
    tokens: Callable[[Sequence[Group]], int]

    def collate(self, pairs: Sequence[TokenizedPair], sides: Sequence[str] = ("chosen", "rejected")) -> Batch:
        """First the chosen completions of all pairs, then the rejected ones. Of a chat, the tokens that the assistant
        wrote, in all its turns, are one completion."""
        batch = self.make(groups_of(pairs, sides))
        if all(p.chosen_mask is None for p in pairs):
            return batch
        mask = torch.tensor([counted for p in pairs for counted in p.mask])
        return replace(
            batch,
            sources=batch.sources[mask],
            labels=batch.labels[mask],
            completions=batch.completions[mask],
            offsets=torch.tensor([i for p in pairs for i in range(p.num_loss_tokens)]),
            lengths=torch.tensor([float(p.num_loss_tokens) for p in pairs]),
            longest=max(p.num_loss_tokens for p in pairs),
        )

    def micro_batches(
        self, pairs: Sequence[TokenizedPair], tokens: int, size: int | None, sides: Sequence[str]
    ) -> list[list[TokenizedPair]]:
        """Cut `pairs` into micro-batches of up to `tokens` tokens, longest pairs first, so of similar lengths. A pair
        that is longer by itself has one of its own. With `size`, exactly so many pairs each, in the given order.

        Joined, they are the same sequence of pairs in every layout and for every number of tokens."""
        if size is not None:
            return [list(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        parts: list[list[TokenizedPair]] = []
        for pair in sorted(pairs, key=lambda p: _tokens(groups_of([p], sides)[0]), reverse=True):
            if parts and self.tokens(groups_of([*parts[-1], pair], sides)) <= tokens:
                parts[-1].append(pair)
            else:
                parts.append([pair])
        return parts


def groups_of(pairs: Sequence[TokenizedPair], sides: Sequence[str]) -> list[Group]:
    return [Group(p.prompt, [getattr(p, side) for side in sides]) for p in pairs]


def _tokens(group: Group) -> int:
    return len(group.prompt) + sum(map(len, group.completions))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("packed", packed, lambda groups: sum(map(_tokens, groups))),
        Layout("prefix_shared", prefix_shared, lambda groups: len(groups) * max(map(_tokens, groups))),
        Layout(
            "padded",
            padded,
            lambda groups: (
                sum(len(g.completions) for g in groups)
                * max(len(g.prompt) + max(map(len, g.completions)) for g in groups)
            ),
        ),
    )
}


def _columns(groups: Sequence[Group]) -> list[list[tuple[Group, list[int]]]]:
    """The first completion of every group with its group, then the second ones, ..."""
    assert all(c for g in groups for c in g.completions), "every completion holds at least one token"
    return [list(zip(groups, column, strict=True)) for column in zip(*(g.completions for g in groups), strict=True)]


def _positions(group: Group) -> Tensor:
    """They restart behind the prompt."""
    n = len(group.prompt)
    return torch.cat([torch.arange(n), *(torch.arange(n, n + len(c)) for c in group.completions)])


def _rows(rows: list[list[int]]) -> Tensor:
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for r, row in enumerate(rows):
        input_ids[r, : len(row)] = torch.tensor(row)
    return input_ids


def _batch(
    groups: Sequence[Group],
    starts: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    segments: PackedSegments | None,
) -> Batch:
    """`starts`: the flat index of each group's first token; its completions follow its prompt one by one."""
    following = [start + len(g.prompt) for start, g in zip(starts, groups, strict=True)]
    sources, ends, completions = [], [], []
    for column in _columns(groups):
        for i, (group, completion) in enumerate(column):
            # A token is predicted from the position before it; the first one from the prompt's last position.
            last_of_prompt = torch.tensor([starts[i] + len(group.prompt) - 1])
            sources += [last_of_prompt, torch.arange(following[i], following[i] + len(completion) - 1)]
            following[i] += len(completion)
            ends.append(following[i] - 1)
            completions.append(completion)
    lengths = torch.tensor([len(c) for c in completions])
    return Batch(
        input_ids,
        attention_mask,
        position_ids,
        segments,
        sources=torch.cat(sources),
        labels=torch.tensor([token for completion in completions for token in completion]),
        completions=torch.arange(len(completions)).repeat_interleave(lengths),
        offsets=torch.cat([torch.arange(len(c)) for c in completions]),
        lengths=lengths.float(),
        ends=torch.tensor(ends),
        longest=int(lengths.max()),
    )
