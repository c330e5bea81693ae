"""What the loop carries from step to step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefopt.data.collate import LAYOUTS, Batch, Layout
from prefopt.data.formats import Message
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import Reference
from prefopt.objectives.base import Objective
from prefopt.rewards.oracle import Oracle
from prefopt.tracking.run import Run
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.training.optim import Schedule
from prefopt.utils.distributed import rank, world_size


@dataclass
class TrainState:
    """Everything one run needs. `reference` is None where a reward model is trained; `prompts` are the held-out ones;
    `export` writes the policy as it is into a folder; `state` is the objective's."""

    config: TrainConfig
    run: Run
    objective: Objective
    schedule: Schedule
    engine: Engine
    reference: Reference | None
    tokenizer: PreTrainedTokenizerBase
    train_pairs: Sequence[TokenizedPair]
    heldout_pairs: Sequence[TokenizedPair]
    prompts: list[list[Message]]
    oracle: Oracle | None
    layout: Layout = LAYOUTS["padded"]
    export: Callable[[Path], Any] | None = None
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.objective.initial_state()
        self.score = LogprobComputer(self.config.precision, self.config.logits == "tiled")

    def step(self, step: int) -> list["MicroBatch"]:
        """The pairs of optimizer step `step`, or this process's share of them: of pairs from long to short every n-th,
        of an objective's own micro-batches likewise. All processes get the same number of micro-batches, since each
        backward pass is one of all of them; where the pairs do not suffice, one without pairs follows."""
        indices = step_indices(len(self.train_pairs), self.config.seed, step, self.config.batch_size)
        pairs, n = [self.train_pairs[i] for i in indices], world_size()
        parts = self.split_micro_batches(pairs)
        if n == 1:
            return self.collate(parts)
        if self.objective.scope == "micro_batch":
            shares = [parts[r::n] for r in range(n)]
        else:
            ordered = [p for part in parts for p in part]
            shares = [self.split_micro_batches(ordered[r::n]) for r in range(n)]
        own, rounds = shares[rank()], max(map(len, shares))
        lacking = rounds - len(own)
        stand_in = [m._replace(pairs=[]) for m in self.collate([parts[-1][-1:]])] if lacking else []
        return self.collate(own) + stand_in * lacking

    def micro_batches(self, pairs: Sequence[TokenizedPair]) -> list["MicroBatch"]:
        """What is computed at a time, collated on the CPU; the same for the same pairs."""
        return self.collate(self.split_micro_batches(pairs))

    def split_micro_batches(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        size = self.objective.micro_batch_size if self.objective.scope == "micro_batch" else None
        return self.layout.micro_batches(pairs, self.config.micro_batch_tokens, size, self.objective.completions)

    def collate(self, parts: Sequence[list[TokenizedPair]]) -> list["MicroBatch"]:
        batches = [self.layout.collate(part, self.objective.completions) for part in parts]
        if self.engine.device.type == "cuda":
            batches = [batch.pin() for batch in batches]
        return [MicroBatch(part, batch) for part, batch in zip(parts, batches, strict=True)]


class MicroBatch(NamedTuple):
    """Without `pairs` its batch holds a stand-in, whose gradient is to count nothing."""

    pairs: list[TokenizedPair]
    batch: Batch
