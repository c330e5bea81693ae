"""Token ids -> tensors. The padded layout: one row a completion, padding on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.data.tokenize import TokenizedPair


@dataclass(frozen=True)
class Batch:
    """`R` rows of up to `T` tokens; row r holds `lengths[r]` real tokens, of which the completion is the last part.

    `input_ids` (R, T) int64; `attention_mask` (R, T) int64, 1 on real tokens; `completion_mask` (R, T) bool, True
    on completion tokens. All masks come from lengths, so a tokenizer whose pad is its eos is safe.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))


def padded(sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """(prompt ids, completion ids) per row -> Batch.

    >>> batch = padded([([5, 6], [7, 2]), ([5], [8])])
    >>> batch.input_ids.tolist()
    [[5, 6, 7, 2], [5, 8, 0, 0]]
    >>> batch.attention_mask.tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    >>> batch.completion_mask.int().tolist()
    [[0, 0, 1, 1], [0, 1, 0, 0]]
    """
    prompts = torch.tensor([len(prompt) for prompt, _ in sequences])
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in sequences])
    input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, (prompt, completion) in enumerate(sequences):
        input_ids[row, : lengths[row]] = torch.tensor(prompt + completion)
    positions = torch.arange(input_ids.shape[1])
    real = positions < lengths[:, None]
    return Batch(input_ids, real.long(), real & (positions >= prompts[:, None]))


def padded_pairs(pairs: Sequence[TokenizedPair]) -> Batch:
    """2B rows: the chosen sides of B pairs, then their rejected sides."""
    return padded([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs])
