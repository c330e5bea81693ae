"""Attention over packed rows, segment by segment, through transformers' attention registry.

A packed row holds whole groups one behind the other: a prompt, then its completions. A completion sees its prompt and
itself and nothing else. So a row needs no mask of its size: every segment is a dense causal attention by itself, and
the other segments of the row do not enter into its numbers.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.data.segments import PackedSegments

NAME = "prefopt_segments"
# Up to this many scores per head, plain products are faster on a CPU than the fused kernel, whose backward pass is slow
# (on 2 cores with AVX-512: 4 ms instead of 8 for 280 x 280, forward and backward). Beyond it they cost memory.
DENSE = 2**18
VARLEN_DEVICES = {"cuda"}  # which have the kernel for variable lengths


def enable_packed_attention(model: PreTrainedModel) -> None:
    """Let `model` understand packed rows; every other batch goes through scaled_dot_product_attention as before.

    Raises ValueError for an architecture whose attention does not come from the registry.
    """
    if not model._can_set_attn_implementation():
        raise ValueError("its attention cannot be exchanged")
    model.set_attn_implementation(NAME)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: PackedSegments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function as transformers calls it: query (1, heads, T, d), key and value (1, key heads, T, d) ->
    (1, T, heads, d).

    Without `segments` (sampling, and layouts other than packed) the batch may have any size, and `attention_mask` is
    transformers' own. Raises ValueError for an attention with dropout, sinks, position biases or no causal order.
    """
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise ValueError(f"its attention has {', '.join(unknown) or 'dropout or no causal order'}")
    if torch.is_autocast_enabled(query.device.type):  # once here instead of once a segment
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))

    if segments is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if segments is None:
        output = _softcapped(query, key, value, attention_mask, scaling, softcap)
        return output.transpose(1, 2), None
    # The kernel for variable lengths knows neither soft-capping nor float32.
    if query.device.type in VARLEN_DEVICES and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    return _by_segment(query, key, value, segments, scaling, sliding_window, softcap).transpose(1, 2), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """(batch, heads, queries, d) of an ordinary batch. `mask`: (batch, 1, queries, keys) bool, True where a query may
    look. sdpa cannot soft-cap, so this is computed by plain products."""
    if mask is None:  # transformers leaves out the mask of a plain causal batch
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    # A finite number instead of -inf: a query on left padding sees no key, and its softmax must not become NaN.
    lowest = torch.finfo(query.dtype).min
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    return _dense(query, key, value, bias, scaling, softcap)


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: PackedSegments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, heads, T, d) of a packed row: a causal attention for each completion over its prompt and itself. Completions
    of one shape are computed together."""
    # One selection each, whose backward pass fills one gradient of the row's size.
    query_positions, key_positions, places, shapes = segments.by_shape(query.device)
    queries = query[0].index_select(1, query_positions).split([s.segments * s.queries for s in shapes], 1)
    sizes = [s.segments * s.keys for s in shapes]
    keys, values = (t[0].index_select(1, key_positions).split(sizes, 1) for t in (key, value))

    outputs = []
    for shape, *of_shape in zip(shapes, queries, keys, values, strict=True):
        q, k, v = (t.unflatten(1, (shape.segments, -1)).transpose(0, 1) for t in of_shape)  # (n, heads, tokens, d)
        if softcap is not None or (shape.queries * shape.keys <= DENSE and not q.is_cuda):
            output = _dense(q, k, v, segments.mask(q, shape, window), scaling, softcap)
        elif shape.queries == shape.keys and not shape.padding and (window is None or shape.keys <= window):
            output = _fused(q, k, v, None, scaling)  # plainly causal: the kernel needs no mask
        else:
            output = _fused(q, k, v, segments.mask(q, shape, window), scaling)
        outputs.append(output.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, 1).index_select(1, places)[None]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """(batch, heads, queries, d), by scaled_dot_product_attention. Without `mask`: causal."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """(batch, heads, queries, d), by two products with the softmax between them; `mask` is added to the scores."""
    batch, heads, n, d = q.shape
    # The heads that share a key head are rows of one product, so keys and values need not be repeated.
    rows = q.reshape(batch, k.shape[1], -1, d)
    scores = (rows @ k.transpose(2, 3)).view(batch, heads, n, -1) * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = (scores + mask).softmax(-1)
    return (shares.view(batch, k.shape[1], -1, k.shape[2]) @ v).view(q.shape)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, scaling: float | None, window: int | None
) -> Tensor:
    """(1, T, heads, d): all segments in one call of flash attention. As in `PackedSegments.mask`, the queries of a
    segment are the last positions of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if knows_grouped_heads():
            grouped["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    key_positions, query_ends, key_ends, longest_query, longest_key = segments.cu_seqlens(query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, heads, d)
    output = varlen_attn(
        q,
        k[key_positions],
        v[key_positions],
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(output, Tensor)
    return output[None]


@functools.cache
def knows_grouped_heads() -> bool:
    """Whether torch's kernel takes fewer key heads than query heads; before 2.12 it does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
