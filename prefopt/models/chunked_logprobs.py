"""Log-probs of tokens without the matrix of logits: tile by tile of the vocabulary, forward and backward.

The logits (tokens, vocabulary) are the largest tensor of a preference step, and most of its memory for vocabularies of
100,000 and more. Here only (tokens, TILE) exists at a time. The backward pass computes the logits of every tile again,
unless all logits together are so small (KEPT) that this would save nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

TILE = 4096  # columns of the vocabulary at a time
KEPT = 2**26  # up to so many bytes, the head's outputs are kept for the backward pass instead of computed again


@dataclass(frozen=True)
class LogitTransform:
    """From the head's output x to logits: y = scale x, then softcap tanh(y / softcap) unless `softcap` is None."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = x if self.scale == 1 else self.scale * x
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def backward(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The gradient with respect to x. `slope`: the gradient with respect to the logits; `logits`: their values."""
        if self.softcap is not None:
            slope = slope * (1 - (logits / self.softcap) ** 2)
        return slope if self.scale == 1 else self.scale * slope


class Distributions(NamedTuple):
    """A model's next-token distributions at N places, as what they are computed from, so that the (N, V) logits need
    not exist together."""

    hidden: Tensor  # (N, H)
    head: nn.Module
    cap: LogitTransform

    def logits(self) -> Tensor:
        """(N, V) float32."""
        return self.cap(self.head(self.hidden).float())


class TiledLogps(torch.autograd.Function):
    """(hidden (N, H), weight (V, H), bias (V) or None, labels (N)) -> (log-probs (N) of the labels, entropies (N) of
    the distributions or, without `with_entropies`, None, with a `reference` KL(reference || these) (N) or None, and
    with `with_squares` the logs (N) of the sums of squared probabilities, without gradient, or None), float32. Products
    are computed in `hidden`'s dtype, log-sum-exp and sums in float32. No gradient reaches the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        with_entropies: bool = True,
        cap: LogitTransform = LogitTransform(),  # frozen, so it is safe as a default
        with_squares: bool = False,
        reference: Distributions | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        # One pass over the tiles, as in online softmax: running maximum, and sums relative to it, which are rescaled
        # when a tile raises the maximum.
        n = len(labels)
        top = hidden.new_full((n,), -torch.inf, dtype=torch.float32)
        # With d = logit - top: the sums of exp(d), of exp(d) d, which gives the entropy, and of exp(2d).
        total, weighted, squares, chosen = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(4))
        # Of the reference, the same; with e its d, the sum of exp(e) (e - d) gives the KL.
        reference_top, reference_total, apart = top, torch.zeros_like(total), torch.zeros_like(total)
        keep = n * len(weight) * hidden.element_size() <= KEPT and any(ctx.needs_input_grad)
        products: list[Tensor] = []
        for start, product in _products(hidden, weight, bias):
            if keep:
                products.append(product)
            logits = cap(product.float())
            higher = torch.maximum(top, logits.amax(-1))
            lower = torch.where(total > 0, top - higher, 0.0)
            above = logits - higher[:, None]
            powers = above.exp()
            if with_entropies:
                weighted = (weighted + total * lower) * lower.exp() + (powers * above).sum(-1)
            if with_squares:
                squares = squares * (2 * lower).exp() + powers.square().sum(-1)
            if reference is not None:
                reference_logits = _reference_logits(reference, start)
                reference_higher = torch.maximum(reference_top, reference_logits.amax(-1))
                reference_lower = torch.where(reference_total > 0, reference_top - reference_higher, 0.0)
                reference_above = reference_logits - reference_higher[:, None]
                reference_powers = reference_above.exp()
                shrink = reference_lower.exp()
                apart = (apart + reference_total * (reference_lower - lower)) * shrink
                apart = apart + (reference_powers * (reference_above - above)).sum(-1)
                reference_total = reference_total * shrink + reference_powers.sum(-1)
                reference_top = reference_higher
            total = total * lower.exp() + powers.sum(-1)
            top = higher
            # The label's logit, of the labels that lie in this tile. No shape depends on values, so no GPU has to wait.
            inside = (labels >= start) & (labels < start + logits.shape[1])
            label_logits = logits.gather(-1, (labels - start).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            chosen = torch.where(inside, label_logits, chosen)

        entropies = total.log() - weighted / total if with_entropies else None
        kl = None if reference is None else apart / reference_total - reference_total.log() + total.log()
        ctx.cap, ctx.reference, ctx.reference_normalizer = cap, reference, (reference_top, reference_total.log())
        ctx.save_for_backward(hidden, weight, bias, labels, top, total.log(), entropies, *products)
        # `top` is subtracted first: a sum top + log(total) would round away digits of the logarithm.
        log_squares = squares.log() - 2 * total.log() if with_squares else None
        if log_squares is not None:
            ctx.mark_non_differentiable(log_squares)
        return chosen - top - total.log(), entropies, kl, log_squares

    @staticmethod
    def backward(
        ctx: Any, of_logps: Tensor, of_entropies: Tensor | None, of_kl: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, top, log_total, entropies, *products = ctx.saved_tensors
        # Sums over tiles stay in float32, whatever the products are computed in.
        hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32)
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        kept = zip(range(0, len(weight), TILE), products, strict=True)

        for start, product in kept if products else _products(hidden, weight, bias):
            logits = ctx.cap(product.float())
            end = start + logits.shape[1]
            logps = logits - top[:, None] - log_total[:, None]
            # With p = exp(logps), logit j of a label y and of entropy H has the gradients 1[j = y] - p_j (of the
            # log-prob), -p_j (log p_j + H) (of the entropy) and p_j - q_j (of the KL from a reference q).
            pull = of_logps[:, None]
            if entropies is not None and of_entropies is not None:  # both are, or neither
                pull = pull + of_entropies[:, None] * (logps + entropies[:, None])
            slope = -logps.exp() * pull
            if ctx.reference is not None and of_kl is not None:  # as above
                reference_top, reference_log_total = ctx.reference_normalizer
                reference_logps = _reference_logits(ctx.reference, start) - reference_top[:, None]
                reference_logps = reference_logps - reference_log_total[:, None]
                slope += of_kl[:, None] * (logps.exp() - reference_logps.exp())
            inside = (labels >= start) & (labels < end)
            place = (labels - start).clamp(0, end - start - 1)[:, None]
            slope.scatter_add_(1, place, torch.where(inside, of_logps, 0.0)[:, None])
            slope = ctx.cap.backward(slope, logits)
            low = slope.to(hidden.dtype)
            hidden_gradient += low @ weight[start:end].to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient[start:end] = low.T @ hidden
            if bias_gradient is not None:
                bias_gradient[start:end] = slope.sum(0)
        return hidden_gradient.to(hidden.dtype), weight_gradient, bias_gradient, *[None] * 5


def chunked_logps(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    with_entropies: bool = True,
    cap: LogitTransform = LogitTransform(),
    with_squares: bool = False,
    reference: Distributions | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Of p = softmax(cap(head(hidden))), float32: log-probs (N) of `labels` (N), entropies (N) with `with_entropies`,
    KL(reference || p) (N) with a `reference`, whose head is a linear layer, and log sum_v p_v^2 (N) with
    `with_squares`, which carries no gradient.

    `hidden` is (N, H). Under autocast the products are computed in its dtype, as the head itself would do.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    reference = reference and reference._replace(hidden=reference.hidden.to(hidden.dtype))
    with torch.autocast(device, enabled=False):
        return TiledLogps.apply(hidden, head.weight, head.bias, labels, with_entropies, cap, with_squares, reference)


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """For every tile: (its first column, the head's outputs (N, up to TILE) in `hidden`'s dtype)."""
    for start in range(0, len(weight), TILE):
        yield start, _product(hidden, weight, bias, start)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int) -> Tensor:
    part = weight[start : start + TILE].to(hidden.dtype)
    return linear(hidden, part, None if bias is None else bias[start : start + TILE].to(hidden.dtype))


def _reference_logits(reference: Distributions, start: int) -> Tensor:
    """(N, up to TILE) float32: those of the tile that begins at `start`."""
    head = cast(nn.Linear, reference.head)
    return reference.cap(_product(reference.hidden, head.weight, head.bias, start).float())
