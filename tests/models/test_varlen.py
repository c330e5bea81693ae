"""The packed row's attention by the variable-length kernel, against the attention segment by segment.

The kernel runs on a GPU alone. Here a plain implementation of what its documentation says stands in for it, so that the
indices that it is given are tested everywhere; `make test-gpu` tests the kernel itself.
"""

import random

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from prefopt.data import segments as segments_module
from prefopt.data.segments import PackedSegments
from prefopt.models import packed_attention
from prefopt.models.packed_attention import _by_segment, _varlen


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `varlen_attn` documents: segments by cumulative lengths; of each, the queries are the last positions of its
    keys; (left, right) positions beside its own are seen, -1: all."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    (left, right), outputs = window_size, []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (t[cu_seq_k[i] : cu_seq_k[i + 1]] for t in (key, value))
        assert len(q) <= max_q
        assert len(k) <= max_k
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (distance >= -right if right >= 0 else distance == distance) & (
            distance <= left if left >= 0 else distance == distance
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def without_groups(query, key, value, *others, scale=None, window_size=(-1, -1)):
    """The same in torch 2.11, which knows no grouped heads."""
    return documented(query, key, value, *others, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [documented, without_groups])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_the_kernel_is_given_the_segments(monkeypatch, kernel, window):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    packed_attention.knows_grouped_heads.cache_clear()
    draw = random.Random(0)
    for heads, key_heads in ((4, 4), (4, 2), (6, 1)) * 5:
        groups = [
            (draw.randint(1, 9), [draw.randint(1, 7) for _ in range(draw.randint(1, 4))])
            for _ in range(draw.randint(1, 4))
        ]
        tokens = sum(prompt + sum(completions) for prompt, completions in groups)
        segments = PackedSegments(groups)
        inputs = [
            torch.randn(1, n, tokens, 8, dtype=torch.float64, requires_grad=True) for n in (heads, key_heads, key_heads)
        ]
        expected = _by_segment(*inputs, segments, 0.3, window, None).transpose(1, 2)
        found = _varlen(*inputs, segments, 0.3, window)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
        ):
            torch.testing.assert_close(a, b)
    packed_attention.knows_grouped_heads.cache_clear()


@pytest.mark.parametrize("window", [None, 5])
def test_padded_segments_have_the_numbers_of_exact_ones_and_none_of_their_neighbours(window, monkeypatch):
    groups = [(9, [5, 30]), (1, [1, 2]), (12, [19, 7]), (100, [20, 29]), (40, [200, 3])]
    tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, tokens, 8, requires_grad=True) for n in (4, 2, 2)]
    weights = torch.randn(1, 4, tokens, 8)

    def numbers(of, tensors, weights):
        output = _by_segment(*tensors, PackedSegments(of), 0.3, window, None)
        return [output, *torch.autograd.grad(output, tensors, weights)]

    found = numbers(groups, inputs, weights)
    start = 0
    for group in groups:  # each by itself: its numbers are the same to the bit, its gradients to rounding
        part = slice(start, start + group[0] + sum(group[1]))
        own = [t[:, :, part].detach().requires_grad_() for t in inputs]
        alone = numbers([group], own, weights[:, :, part])
        assert torch.equal(alone[0], found[0][:, :, part])
        for a, b in zip(alone, found, strict=True):
            torch.testing.assert_close(a, b[:, :, part], atol=1e-6, rtol=1e-5)
        start = part.stop
    shapes = PackedSegments(groups).by_shape(torch.device("cpu"))[3]
    assert any(shape.padding for shape in shapes)
    assert any(not shape.padding for shape in shapes)
    monkeypatch.setattr(segments_module, "SMALL", 0)
    for a, b in zip(found, numbers(groups, inputs, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
