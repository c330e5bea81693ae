"""The order of the training pairs: a pure function of (seed, epoch, position), so a resumed run needs no saved
state."""

import functools

import torch
from torch import Tensor

from prefopt.utils.seed import mix_seed


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int, linked: bool = False) -> Tensor:
    """`(n,)` int64: the order of `n` pairs in one epoch. Two are cached, for a step that ends one epoch and begins the
    next. With `linked`, pair 2k + 1 always comes right behind pair 2k (`prefopt.data.linked`), and `n` is even."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    if linked:
        first = 2 * torch.randperm(n // 2, generator=generator)
        return torch.stack([first, first + 1], 1).flatten()
    return torch.randperm(n, generator=generator)


def step_indices(n: int, seed: int, step: int, batch_size: int, linked: bool = False) -> list[int]:
    """Indices of the pairs of optimizer step `step` (from 0). Epochs follow each other without a gap, so a step may end
    one and begin the next. Every epoch holds every pair once. `linked`: as of `permutation`; `batch_size` is even."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(n, seed, position // n, linked)[position % n]) for position in positions]


def run_indices(n: int, seed: int, steps: int, batch_size: int, linked: bool = False) -> list[int]:
    """Indices of all pairs that a run trains on, in ascending order, without repetition."""
    seen = min(n, steps * batch_size)
    if seen == n:
        return list(range(n))
    return sorted(permutation(n, seed, 0, linked)[:seen].tolist())
