"""The order of the training pairs: a pure function of (seed, epoch, position), so a resumed run needs no saved
state."""

import functools

import torch
from torch import Tensor

from prefopt.utils.seed import mix_seed


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """`(n,)` int64: the order of `n` pairs in one epoch. Two are cached, for a step that ends one epoch and begins the
    next."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(n, generator=generator)


def step_indices(n: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Indices of the pairs of optimizer step `step` (from 0). Epochs follow each other without a gap, so a step may end
    one and begin the next. Every epoch holds every pair once."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(n, seed, position // n)[position % n]) for position in positions]


def run_indices(n: int, seed: int, steps: int, batch_size: int) -> list[int]:
    """Indices of all pairs that a run trains on, in ascending order, without repetition."""
    seen = min(n, steps * batch_size)
    if seen == n:
        return list(range(n))
    return sorted(permutation(n, seed, 0)[:seen].tolist())
