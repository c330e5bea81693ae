"""Mismatched completions: each prompt of a step with the completions of another prompt (KTO's reference point)."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset, Subset

from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair


def with_mismatched(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """`pairs`, each with its `mismatched`: its prompt, and the completions of the next pair that has another prompt.

    Behind the last pair comes the first. So without repeated prompts every completion is used once, as in the step
    itself. Where no pair has another prompt, the next pair's completions are taken; of a single pair, its own.
    """
    return [replace(pair, mismatched=_mismatched(pairs, i)) for i, pair in enumerate(pairs)]


def _mismatched(pairs: Sequence[TokenizedPair], i: int) -> TokenizedPair:
    pair, n = pairs[i], len(pairs)
    others = (pairs[(i + k) % n] for k in range(1, n))
    other = next((p for p in others if p.prompt != pair.prompt), pairs[(i + 1) % n])
    return TokenizedPair(f"{pair.id} with the completions of {other.id}", pair.prompt, other.chosen, other.rejected)


class MismatchedOfRun(Dataset[TokenizedPair]):
    """The mismatched pairs of all optimizer steps of a run, one step behind the other; made when they are indexed."""

    def __init__(self, pairs: Sequence[TokenizedPair], seed: int, steps: int, batch_size: int):
        self.pairs, self.steps, self.batch_size = pairs, steps, batch_size
        # They are read in order, so the indices of one step at a time suffice.
        self.indices = functools.lru_cache(1)(lambda step: step_indices(len(pairs), seed, step, batch_size))

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> TokenizedPair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, i = divmod(index, self.batch_size)
        of_step: Any = Subset(self.pairs, self.indices(step))  # type: ignore[arg-type]  # any sequence will do
        return _mismatched(of_step, i)
