"""Attention over packed rows, segment by segment, through transformers' attention registry.

A packed row holds whole groups one behind the other, each a prompt and the completions that follow it. A completion
sees its prompt and itself and nothing else, so a row needs no mask of its size: every segment is a dense causal
attention of its own, and what else is in the row does not enter into its numbers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.data.collate import PackedSegments

NAME = "prefopt_segments"
# Up to so many scores per head, plain products are faster on a CPU than its fused kernel, whose backward pass is slow
# (on 2 cores with AVX-512: 4 ms instead of 8 for 280 x 280, forward and backward); beyond, they cost memory.
DENSE = 2**18


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
    """query (1, heads, T, d), key and value (1, key heads, T, d) -> (1, T, heads, d), as transformers calls it.

    Without `segments` (sampling) it is sdpa with transformers' own mask. Raises ValueError for what it cannot compute.
    """
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise ValueError(f"its attention has {', '.join(unknown) or 'dropout or no causal order'}")
    if torch.is_autocast_enabled(query.device.type):  # once here instead of once a segment
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    if segments is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        mask = attention_mask
        if mask is None:  # transformers leaves out the mask of a plain causal batch
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = mask.tril(key.shape[2] - query.shape[2])
        # Finite, because left padding sees nothing at all, and must not become NaN.
        lowest = torch.finfo(query.dtype).min
        added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
        return _dense(query, key, value, added, scaling, softcap).transpose(1, 2), None
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    # Split, not slices: the backward pass of a slice fills a gradient of the row's size with zeros.
    queries = iter(query.split(segments.query_lengths, 2))
    keys, values = iter(key.split(segments.key_lengths, 2)), iter(value.split(segments.key_lengths, 2))
    outputs = []
    for _, completions in segments.groups:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in completions:
            q = next(queries)
            k, v = torch.cat([prompt_key, next(keys)], 2), torch.cat([prompt_value, next(values)], 2)
            n, seen = q.shape[2], k.shape[2]
            causal = n == seen and (sliding_window is None or seen <= sliding_window)
            fused = softcap is None and (n * seen > DENSE or q.is_cuda)
            if fused and causal:
                outputs.append(_fused(q, k, v, None, scaling))
                continue
            mask = segments.mask(q, n, seen, sliding_window)
            outputs.append(_fused(q, k, v, mask, scaling) if fused else _dense(q, k, v, mask, scaling, softcap))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """(batch, heads, queries, d). No mask: causal."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """(batch, heads, queries, d)."""
    batch, heads, n, d = q.shape
    # The heads that share a key head are rows of one product.
    rows = q.reshape(batch, k.shape[1], -1, d)
    scores = (rows @ k.transpose(2, 3)).view(batch, heads, n, -1) * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = (scores + mask).softmax(-1)
    return (shares.view(batch, k.shape[1], -1, k.shape[2]) @ v).view(q.shape)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one flash attention call; its causal order is that of the last positions, as `mask`'s."""
    from torch.nn.attention.varlen import varlen_attn

    places, query_ends, key_ends, longest_query, longest_key = segments.cu_seqlens(query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, heads, d)
    output = varlen_attn(
        q,
        k[places],
        v[places],
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
