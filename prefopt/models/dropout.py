"""Dropout of an adapter whose noise is a function of seed, step and pair: the micro-batches that the pairs lie in, and
the processes that compute them, change nothing."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefopt.data.collate import Batch
from prefopt.errors import UserError
from prefopt.utils.seed import mix_seed


@dataclass
class Noise:
    """What the dropout layers of an adapter share: (seed, tokens) of each span of the present batch, in the order of
    its tokens. Padding has no seed."""

    spans: list[tuple[int | None, int]] = field(default_factory=list)


class PairDropout(nn.Module):
    """Dropout with probability `p`, the `number`-th of its adapter. Unlike in nn.Dropout the noise is not drawn in the
    order of the calls: `seed_pairs` must tell the batch first."""

    def __init__(self, p: float, number: int, noise: Noise):
        super().__init__()
        self.p, self.number, self.noise = p, number, noise

    @torch.compiler.disable  # every batch has other spans, for each of which it would be compiled anew
    def forward(self, x: Tensor) -> Tensor:
        """`x`: (..., d), the batch's tokens in their order."""
        if not self.training:
            return x
        if x.shape[:-1].numel() != sum(tokens for _, tokens in self.noise.spans):
            raise UserError(
                "a layer of this model sees other tokens than the batch holds (an expert, for example), and dropout is "
                "drawn by the batch's tokens: set peft.dropout=0, or leave the layer out of peft.target_modules."
            )
        generator = torch.Generator(x.device)
        parts = []
        for seed, tokens in self.noise.spans:
            if seed is None:
                parts.append(torch.ones(tokens, x.shape[-1], device=x.device))
            else:
                generator.manual_seed(mix_seed(seed, self.number))
                parts.append(torch.rand(tokens, x.shape[-1], generator=generator, device=x.device))
        kept = (torch.cat(parts) >= self.p).view(x.shape)
        return x * kept / (1 - self.p)


def seed_pairs(model: nn.Module, seeds: Sequence[int], batch: Batch) -> None:
    """Tell the dropout layers of `model` the batch that comes next, and the seeds of its B pairs."""
    layer = next((m for m in model.modules() if isinstance(m, PairDropout)), None)
    if layer is None:
        return
    # In the padded layout each side of a pair is a row of its own, with other noise.
    layer.noise.spans = [
        (None if owner is None else mix_seed(seeds[owner % len(seeds)], owner // len(seeds)), tokens)
        for owner, tokens in batch.spans
    ]


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter's dropout is off, for a batch other than the one that `seed_pairs` has told."""
    active = [m for m in model.modules() if isinstance(m, PairDropout) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True
