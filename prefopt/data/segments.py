"""How the packed row is cut into the segments of its attention (`prefopt.models.packed_attention`)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Small segments are padded to a multiple of so many tokens, so that more of them share a product. Of larger ones hardly
# two have the same length, and padding would cost more than it saves.
SMALL, MULTIPLE = 128, 16


class SegmentShape(NamedTuple):
    """The segments of a packed row that are computed together: how many there are, and of one the number of queries and
    of keys. `padding`: for each segment, how many of its first queries and keys are none of its own; empty without."""

    segments: int
    queries: int
    keys: int
    padding: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class PackedSegments:
    """How a packed row is cut. `groups`: the length of a prompt and the lengths of its completions, in tokens, in the
    order of the row."""

    groups: Sequence[tuple[int, Sequence[int]]]
    # Masks and indices are the same in all layers: the first layer of a forward pass makes them, the others read them.
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def positions(self) -> list[tuple[range, list[int]]]:
        """The positions in the row of the queries and of the keys of every segment. A segment is a completion with its
        prompt before it; the prompt's queries are those of its first completion alone."""
        found, start = [], 0
        for prompt, completions in self.groups:
            prompt_keys, end = range(start, start + prompt), start + prompt
            for n in completions:
                own = range(end, end + n)
                found.append((range(start, end + n) if end == start + prompt else own, [*prompt_keys, *own]))
                end += n
            start = end
        return found

    def by_shape(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[SegmentShape]]:
        """The segments in the order of their shapes: the positions in the row of their queries and of their keys, and
        where among the former those of the row are, in its order, int64 on `device`; and the shapes. Padding is before
        a segment's own positions, and stands at position 0. A segment's shape follows from its own lengths, so that the
        other rows of a batch do not enter into its numbers."""
        cache_key = "by_shape", device
        if cache_key not in self._cache:
            found: dict[tuple[int, int], list[tuple[range, list[int]]]] = {}
            positions = self.positions()
            for segment in positions:
                size = len(segment[0]), len(segment[1])
                if size[1] <= SMALL:
                    size = _rounded_up(size[0]), _rounded_up(size[1])
                found.setdefault(size, []).append(segment)
            queries, keys, shapes = list[int](), list[int](), []
            places = [0] * sum(len(q) for q, _ in positions)
            for (num_queries, num_keys), segments in sorted(found.items()):
                padding = tuple((num_queries - len(q), num_keys - len(k)) for q, k in segments)
                for (q, k), (before_q, before_k) in zip(segments, padding, strict=True):
                    queries += [0] * before_q
                    places[q.start : q.stop] = range(len(queries), len(queries) + len(q))
                    queries += q
                    keys += [*[0] * before_k, *k]
                padded = any(map(any, padding))
                shapes.append(SegmentShape(len(segments), num_queries, num_keys, padding if padded else ()))
            tensors = (torch.tensor(values).to(device, non_blocking=True) for values in (queries, keys, places))
            self._cache[cache_key] = (*tensors, shapes)
        return self._cache[cache_key]

    def mask(self, like: Tensor, shape: SegmentShape, window: int | None) -> Tensor:
        """The causal mask, to be added to the scores, 0 or -inf: (queries, keys) for all segments of a shape, or with
        padding (segments, 1, queries, keys). The queries are the last positions of the keys. With `window`, a query
        sees so many positions, itself included. Dtype and device are those of `like`."""
        cache_key = (shape, window, like.dtype, like.device)
        if cache_key not in self._cache:
            _, queries, keys, padding = shape
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            if padding:
                before_q, before_k = torch.tensor(padding).T[:, :, None]
                # A query that is padding sees padding: its softmax must not become NaN.
                own = (torch.arange(keys) >= before_k)[:, None] | (torch.arange(queries) < before_q)[:, :, None]
                visible = (visible & own)[:, None]
            mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, -torch.inf)
            self._cache[cache_key] = mask.to(like)
        return self._cache[cache_key]

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """What a variable-length kernel takes, for `S` segments: the positions in the row of all segments' keys, one
        segment behind the other, int64; cumulative lengths of queries and of keys, (S + 1,) int32 each; the longest
        query length and the longest key length. The tensors are on `device`."""
        if device not in self._cache:
            queries, keys = zip(*self.positions(), strict=True)
            lengths = [[len(positions) for positions in of_segments] for of_segments in (queries, keys)]
            cumulative = [
                torch.tensor([0, *n]).cumsum(0).to(torch.int32).to(device, non_blocking=True) for n in lengths
            ]
            key_positions = torch.tensor(list(itertools.chain.from_iterable(keys))).to(device, non_blocking=True)
            self._cache[device] = (key_positions, *cumulative, *map(max, lengths))
        return self._cache[device]


def _rounded_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
