"""Token ids -> tensors. How completions lie in rows is decided here alone; log-probs see only where each completion
token is predicted from.

* `padded`: one row a completion, padding on the right. Works with every model.
* `prefix_shared`: one row a pair, [prompt, chosen, rejected]. The prompt is computed once, positions restart after it,
  and the rejected completion does not see the chosen one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.data.tokenize import TokenizedPair


@dataclass(frozen=True)
class Batch:
    """`C` completions with `N` tokens in all, in `R` rows of up to `T` tokens.

    `input_ids` (R, T) int64. `attention_mask`: (R, T) int64, 1 on real tokens, or (R, 1, T, T) bool, True where a
    query may look. `position_ids` (R, T) int64, or None for the model's default. Per completion token, (N,) int64 each:
    `sources`, the flat index in (R, T) of the hidden state that predicts it; `labels`, its id; `completions`, which
    completion it belongs to; `offsets`, its place in it. Per completion, (C,): `lengths` float32; `ends` int64, the
    flat index of its last token's hidden state. Everything comes from lengths and nothing from token ids, so a
    tokenizer whose pad is its eos is safe.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    sources: Tensor
    labels: Tensor
    completions: Tensor
    offsets: Tensor
    lengths: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in values.items()}
        return Batch(**moved)


Layout = Callable[[Sequence[TokenizedPair]], Batch]


def padded(sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """One (prompt ids, completion ids) per row and completion.

    >>> batch = padded([([5, 6], [7, 2]), ([5], [8])])
    >>> batch.input_ids.tolist()
    [[5, 6, 7, 2], [5, 8, 0, 0]]
    >>> batch.attention_mask.tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    >>> batch.sources.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 4], [7, 2, 8], [0, 0, 1])
    >>> batch.ends.tolist()
    [3, 5]
    """
    input_ids = _rows([prompt + completion for prompt, completion in sequences])
    width = input_ids.shape[1]
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in sequences])
    attention_mask = (torch.arange(width) < lengths[:, None]).long()
    starts = [r * width + len(prompt) for r, (prompt, _) in enumerate(sequences)]
    # A token is predicted from the position before it; the first one from the prompt's last position.
    sources = [[start - 1 + i for i in range(len(c))] for start, (_, c) in zip(starts, sequences, strict=True)]
    ends = [start + len(c) - 1 for start, (_, c) in zip(starts, sequences, strict=True)]
    return _batch(input_ids, attention_mask, None, sources, [completion for _, completion in sequences], ends)


def chosen_only(pairs: Sequence[TokenizedPair]) -> Batch:
    """B rows and completions: the chosen sides, for objectives that read no other. Of a chat, the tokens that the
    assistant wrote, in all its turns, are one completion."""
    batch = padded([(p.prompt, p.chosen) for p in pairs])
    mask = torch.tensor([counted for p in pairs for counted in p.mask])
    return replace(
        batch,
        sources=batch.sources[mask],
        labels=batch.labels[mask],
        completions=batch.completions[mask],
        offsets=torch.tensor([i for p in pairs for i in range(p.learnt)]),
        lengths=torch.tensor([float(p.learnt) for p in pairs]),
    )


def padded_pairs(pairs: Sequence[TokenizedPair]) -> Batch:
    """2B rows and completions: the chosen sides of B pairs, then their rejected sides."""
    return padded([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs])


def prefix_shared(pairs: Sequence[TokenizedPair]) -> Batch:
    """B rows [prompt, chosen, rejected]; 2B completions in the order of `padded_pairs`.

    >>> batch = prefix_shared([TokenizedPair("", [5, 6], [7, 2], [8])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8]], [[0, 1, 2, 3, 2]])
    >>> batch.attention_mask[0, 0].int().tolist()[-1]
    [1, 1, 0, 0, 1]
    >>> batch.sources.tolist(), batch.labels.tolist(), batch.completions.tolist()
    ([1, 2, 1], [7, 2, 8], [0, 0, 1])
    >>> batch.ends.tolist()
    [3, 4]
    """
    input_ids = _rows([p.prompt + p.chosen + p.rejected for p in pairs])
    width = input_ids.shape[1]
    first_chosen = torch.tensor([len(p.prompt) for p in pairs])[:, None]
    first_rejected = torch.tensor([len(p.prompt) + len(p.chosen) for p in pairs])[:, None]
    places = torch.arange(width)[None]
    is_chosen = (places >= first_chosen) & (places < first_rejected)
    is_rejected = places >= first_rejected
    position_ids = torch.where(is_rejected, places - first_rejected + first_chosen, places)
    causal = places[0, :, None] >= places
    attention_mask = (causal & ~(is_rejected[:, :, None] & is_chosen[:, None, :]))[:, None]
    chosen_sources, rejected_sources = [], []
    for r, p in enumerate(pairs):
        last_prompt = r * width + len(p.prompt) - 1
        chosen_sources.append([last_prompt + i for i in range(len(p.chosen))])
        after = last_prompt + len(p.chosen)
        rejected_sources.append([last_prompt] + [after + i for i in range(1, len(p.rejected))])
    completions = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    ends = [r * width + int(last) - 1 for r, last in enumerate(first_rejected[:, 0])]
    ends += [end + len(p.rejected) for end, p in zip(ends, pairs, strict=True)]
    return _batch(input_ids, attention_mask, position_ids, chosen_sources + rejected_sources, completions, ends)


LAYOUTS: dict[str, Layout] = {"padded": padded_pairs, "prefix_shared": prefix_shared}


def _rows(rows: list[list[int]]) -> Tensor:
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for r, row in enumerate(rows):
        input_ids[r, : len(row)] = torch.tensor(row)
    return input_ids


def _batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    sources: list[list[int]],
    completions: list[list[int]],
    ends: list[int],
) -> Batch:
    assert all(completions), "every completion holds at least one token"
    return Batch(
        input_ids,
        attention_mask,
        position_ids,
        sources=torch.tensor([s for row in sources for s in row]),
        labels=torch.tensor([token for completion in completions for token in completion]),
        completions=torch.tensor([c for c, completion in enumerate(completions) for _ in completion]),
        offsets=torch.tensor([i for completion in completions for i in range(len(completion))]),
        lengths=torch.tensor([float(len(completion)) for completion in completions]),
        ends=torch.tensor(ends),
    )
