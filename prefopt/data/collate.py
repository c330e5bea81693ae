"""Token ids -> tensors. Only this module knows how completions lie in rows. Log-probs are computed from the positions
in a `Batch`, whatever the layout.

* `packed`: all groups of a micro-batch in one row, one behind the other, without padding. The prompt of a pair is
  computed once, and no completion sees another (`prefopt.models.packed_attention`).
* `prefix_shared`: one row for each group, with a mask of (row x row). For models whose attention function cannot be
  replaced.
* `padded`: one row for each completion, with padding on the right. Works with every model.

In the first two, the positions of every completion continue those of its prompt.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.segments import PackedSegments
from prefopt.data.tokenize import TokenizedPair
from prefopt.objectives import SIDES


class Group(NamedTuple):
    """Token ids of a prompt and of the completions that follow it."""

    prompt: list[int]
    completions: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """`C` completions with `N` tokens in all, in `R` rows of up to `T` tokens. Completions are numbered: first the
    first completion of every group, then the second of every group.

    Rows:
    * `input_ids`: (R, T) int64.
    * `attention_mask`: (R, T) int64, 1 on real tokens; or (R, 1, T, T) bool, True where a query may look; with
      `segments`, (1, 1, 1, 1), which nobody reads.
    * `position_ids`: (R, T) int64, or None for the model's default.
    * `segments`: of the packed layout alone.
    * `spans`: what lies in the (R * T) positions, in order: (number of the group, tokens), and (None, tokens) for
      padding. In the padded layout a group is a completion with its prompt.

    Completion tokens, (N,) int64 each:
    * `predictor_index`: the position in (R * T,) of the hidden state that predicts the token.
    * `labels`: the token's id.
    * `completions`: the number of the completion that the token belongs to.
    * `offsets`: the token's place in that completion, from 0.
    * `token_weights`: the token's weight, (N,) float32, or None where the pairs have none.

    Completions:
    * `lengths`: (C,) float32, in tokens.
    * `last_token_index`: (C,) int64, the position in (R * T,) of the last token's hidden state.
    * `longest`: the largest length.
    * `grid`: (B, n) int64, the numbers of each group's completions, in order; -1 where it has fewer than n.

    All of it follows from lengths, nothing from token ids. So a tokenizer whose pad token is its eos token is safe.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    segments: PackedSegments | None
    spans: Sequence[tuple[int | None, int]]
    predictor_index: Tensor
    labels: Tensor
    completions: Tensor
    offsets: Tensor
    lengths: Tensor
    last_token_index: Tensor
    longest: int
    grid: Tensor
    token_weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the rows hold, without padding."""
        return sum(n for owner, n in self.spans if owner is not None)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`. A copy from pinned memory to a GPU does not wait for the GPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values | tensors)


def packed(groups: Sequence[Group]) -> Batch:
    """All groups in one row.

    >>> batch = packed([Group([5, 6], [[7, 2], [8]]), Group([9], [[3], [4, 2]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8, 9, 3, 4, 2]], [[0, 1, 2, 3, 2, 0, 1, 1, 2]])
    >>> batch.predictor_index.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 5, 1, 5, 7], [7, 2, 3, 8, 4, 2], [0, 0, 1, 2, 3, 3])
    >>> batch.last_token_index.tolist()
    [3, 6, 4, 8]
    """
    starts, end = [], 0
    for group in groups:
        starts.append(end)
        end += _num_tokens(group)

    row = [token for g in groups for part in (g.prompt, *g.completions) for token in part]
    positions = torch.cat([_positions(g) for g in groups])[None]
    segments = PackedSegments([(len(g.prompt), [len(c) for c in g.completions]) for g in groups])
    # transformers passes a mask of four dimensions on as it is. Without one it would make a (T, T) mask of its own.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return _batch(groups, starts, torch.tensor([row]), no_mask, positions, segments)


def prefix_shared(groups: Sequence[Group]) -> Batch:
    """One row for each group. The mask hides the completions of a group from each other.

    >>> batch = prefix_shared([Group([5, 6], [[7, 2], [8]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8]], [[0, 1, 2, 3, 2]])
    >>> batch.attention_mask[0, 0].int().tolist()[-1]
    [1, 1, 0, 0, 1]
    """
    input_ids = _rows([[t for part in (g.prompt, *g.completions) for t in part] for g in groups])
    width = input_ids.shape[1]
    position_ids = torch.zeros_like(input_ids)
    part = torch.zeros_like(input_ids)  # which part of its row a token belongs to: 0, the prompt; i, completion i
    for r, group in enumerate(groups):
        lengths = torch.tensor([len(group.prompt), *map(len, group.completions)])
        position_ids[r, : _num_tokens(group)] = _positions(group)
        part[r, : _num_tokens(group)] = torch.arange(len(lengths)).repeat_interleave(lengths)

    causal = torch.ones(width, width, dtype=torch.bool).tril()
    visible = causal & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))
    starts = [r * width for r in range(len(groups))]
    return _batch(groups, starts, input_ids, visible[:, None], position_ids, None)


def padded(groups: Sequence[Group]) -> Batch:
    """One row for each completion, with the prompt in front of it.

    >>> batch = padded([Group([5, 6], [[7, 2], [8]])])
    >>> batch.input_ids.tolist()
    [[5, 6, 7, 2], [5, 6, 8, 0]]
    >>> batch.attention_mask.tolist()
    [[1, 1, 1, 1], [1, 1, 1, 0]]
    >>> batch.predictor_index.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 5], [7, 2, 8], [0, 0, 1])
    >>> batch.last_token_index.tolist()
    [3, 6]
    """
    columns = _columns(groups)
    rows = [Group(groups[i].prompt, [completion]) for column in columns for i, completion in column]
    input_ids = _rows([g.prompt + g.completions[0] for g in rows])
    width = input_ids.shape[1]
    attention_mask = (torch.arange(width) < torch.tensor([_num_tokens(g) for g in rows])[:, None]).long()
    batch = _batch(rows, [r * width for r in range(len(rows))], input_ids, attention_mask, None, None)
    # Completion k of group i has dropout of its own, by this number.
    owners = [k * len(groups) + i for k, column in enumerate(columns) for i, _ in column]
    spans = [(None if r is None else owners[r], n) for r, n in batch.spans]
    return replace(batch, spans=spans, grid=_grid(columns, len(groups)))


@dataclass(frozen=True)
class Layout:
    """`make` collates groups. `tokens` counts the tokens, padding included, that their rows would hold."""

    name: str
    make: Callable[[Sequence[Group]], Batch]
    tokens: Callable[[Sequence[Group]], int]

    def collate(self, pairs: Sequence[TokenizedPair], sides: Sequence[str] = SIDES) -> Batch:
        """A batch of the pairs' completions: first those of `sides[0]`, in the order of the pairs, then of `sides[1]`;
        then the first of the `others` of each group that has one, and so on.

        Of a chat, the tokens that the assistant wrote, in all its turns, count as one completion.
        """
        batch = replace(self.make(groups_of(pairs, sides)), token_weights=_token_weights(pairs, sides))
        if all(p.loss_mask is None for p in pairs):
            return batch
        # The batch holds the chats' tokens in this order, so one mask fits all fields of completion tokens.
        mask = torch.tensor([in_loss for p in pairs for in_loss in p.mask])
        return replace(
            batch,
            predictor_index=batch.predictor_index[mask],
            labels=batch.labels[mask],
            completions=batch.completions[mask],
            offsets=torch.tensor([i for p in pairs for i in range(p.num_loss_tokens)]),
            lengths=torch.tensor([float(p.num_loss_tokens) for p in pairs]),
            longest=max(p.num_loss_tokens for p in pairs),
        )

    def micro_batches(
        self, pairs: Sequence[TokenizedPair], tokens: int, size: int | None, sides: Sequence[str]
    ) -> list[list[TokenizedPair]]:
        """Cut `pairs` into micro-batches of up to `tokens` tokens, padding included. Pairs are sorted by length,
        longest first, so that a micro-batch holds pairs of similar lengths. A pair with more than `tokens` tokens is a
        micro-batch alone. With `size`, micro-batches hold `size` pairs (the last one the rest), in the order of
        `pairs`.

        The concatenation is the same sequence of pairs in every layout and for every number of tokens.
        """
        if size is not None:
            return [list(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        parts: list[list[TokenizedPair]] = []
        for pair in sorted(pairs, key=lambda p: _num_tokens(groups_of([p], sides)[0]), reverse=True):
            if parts and self.tokens(groups_of([*parts[-1], pair], sides)) <= tokens:
                parts[-1].append(pair)
            else:
                parts.append([pair])
        return parts


def groups_of(pairs: Sequence[TokenizedPair], sides: Sequence[str]) -> list[Group]:
    """One group for each pair, with the completions named in `sides`."""
    return [Group(p.prompt, completions_of(p, sides)) for p in pairs]


def completions_of(pair: TokenizedPair, sides: Sequence[str]) -> list[list[int]]:
    """The completions named in `sides`. A pair that is no group has no others."""
    return [c for side in sides for c in (pair.others or [] if side == "others" else [getattr(pair, side)])]


def _token_weights(pairs: Sequence[TokenizedPair], sides: Sequence[str]) -> Tensor | None:
    """Those of the pairs' completions in a batch's order; None unless all have some. Groups have none."""
    weights: list[float] = []
    for side, pair in itertools.product(sides, pairs):
        of_completion = getattr(pair, f"{side}_token_weights", None)
        if of_completion is None:
            return None
        weights += of_completion
    return torch.tensor(weights)


def _num_tokens(group: Group) -> int:
    return len(group.prompt) + sum(map(len, group.completions))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("packed", packed, lambda groups: sum(map(_num_tokens, groups))),
        Layout("prefix_shared", prefix_shared, lambda groups: len(groups) * max(map(_num_tokens, groups))),
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


def _columns(groups: Sequence[Group]) -> list[list[tuple[int, list[int]]]]:
    """For each number of a completion, the groups that have one of that number, by their number, and it."""
    assert all(c for g in groups for c in g.completions), "every completion holds at least one token"
    columns = itertools.zip_longest(*(g.completions for g in groups))
    return [[(i, completion) for i, completion in enumerate(column) if completion] for column in columns]


def _grid(columns: Sequence[Sequence[tuple[int, list[int]]]], num_groups: int) -> Tensor:
    """`Batch.grid`."""
    grid, number = [[-1] * len(columns) for _ in range(num_groups)], itertools.count()
    for k, column in enumerate(columns):
        for i, _ in column:
            grid[i][k] = next(number)
    return torch.tensor(grid)


def _positions(group: Group) -> Tensor:
    """Position ids of a group in one row: every completion starts right behind the prompt."""
    n = len(group.prompt)
    return torch.cat([torch.arange(n), *(torch.arange(n, n + len(c)) for c in group.completions)])


def _rows(rows: list[list[int]]) -> Tensor:
    """(R, T) int64, zeros on the right."""
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
    """The batch of `groups` as they lie in `input_ids`. `starts`: the position in (R * T,) of each group's first token;
    the completions of a group follow its prompt one by one."""
    next_position = [start + len(g.prompt) for start, g in zip(starts, groups, strict=True)]
    predictors, last_tokens, completions = [], [], []
    columns = _columns(groups)
    for column in columns:
        for i, completion in column:
            # A token is predicted from the position before it; the first one from the prompt's last position.
            last_of_prompt = torch.tensor([starts[i] + len(groups[i].prompt) - 1])
            first = next_position[i]
            predictors += [last_of_prompt, torch.arange(first, first + len(completion) - 1)]
            next_position[i] += len(completion)
            last_tokens.append(next_position[i] - 1)
            completions.append(completion)

    spans: list[tuple[int | None, int]] = []
    ends = [*starts[1:], input_ids.numel()]
    for i, (group, start, end) in enumerate(zip(groups, starts, ends, strict=True)):
        spans.append((i, _num_tokens(group)))
        if padding := end - start - _num_tokens(group):
            spans.append((None, padding))

    lengths = torch.tensor([len(c) for c in completions])
    return Batch(
        input_ids,
        attention_mask,
        position_ids,
        segments,
        spans,
        predictor_index=torch.cat(predictors),
        labels=torch.tensor([token for completion in completions for token in completion]),
        completions=torch.arange(len(completions)).repeat_interleave(lengths),
        offsets=torch.cat([torch.arange(len(c)) for c in completions]),
        lengths=lengths.float(),
        last_token_index=torch.tensor(last_tokens),
        longest=int(lengths.max()),
        grid=_grid(columns, len(groups)),
    )
