"""What the loop is given: one run's data, models and optimizer, and how its pairs become micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.collate import LAYOUTS, Batch, Layout
from prefopt.data.items import Message
from prefopt.data.mismatch import with_mismatched
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import Reference
from prefopt.models.router import RouterLoss
from prefopt.objectives.base import Objective
from prefopt.rewards.scorers import RewardScorer
from prefopt.tracking.run import Run
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.training.optim import Schedule
from prefopt.utils.distributed import rank, world_size


@dataclass
class TrainState:
    """Everything one run needs.

    `reference` is None where a reward model is trained, `initial` is the policy that the run began with where the
    objective needs it and the reference is another one. `prompts` are the held-out ones that get a sample, `export`
    writes a policy, and what its evaluations were, into a folder. `router_loss` is None unless it is added
    to the objective's loss, and `objective_state` is what the objective carries from step to step.
    """

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
    oracle: RewardScorer | None
    layout: Layout = LAYOUTS["padded"]
    export: Callable[[PreTrainedModel, Path, list[dict[str, Any]]], None] | None = None
    router_loss: RouterLoss | None = None
    initial: Reference | None = None
    objective_state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.objective_state = self.objective.initial_state()
        self.score = LogprobComputer(self.config.precision, self.config.logits == "tiled")

    def step_micro_batches(self, step: int) -> list["MicroBatch"]:
        """The micro-batches of optimizer step `step`, or this process's share of them.

        Of n processes each takes every n-th pair, from long to short; of an objective's own micro-batches every n-th.
        All processes get equally many micro-batches, since a backward pass is one of all processes; a process with
        too few pairs gets micro-batches without pairs.
        """
        config, linked = self.config, self.objective.linked
        indices = step_indices(len(self.train_pairs), config.seed, step, config.batch_size, linked)
        parts = self.split_micro_batches(self.complete([self.train_pairs[i] for i in indices]))
        n = world_size()
        if n == 1:
            return self.collate(parts)

        if self.objective.scope == "micro_batch":  # the loss depends on which pairs lie together: never cut them
            shares = [parts[r::n] for r in range(n)]
        else:
            ordered = [pair for part in parts for pair in part]
            shares = [self.split_micro_batches(ordered[r::n]) for r in range(n)]
        share = shares[rank()]

        lacking = max(map(len, shares)) - len(share)
        if lacking == 0:
            return self.collate(share)
        # A backward pass needs some input: one pair stands in, and its gradient is multiplied by zero.
        (stand_in,) = self.collate([parts[-1][-1:]])
        return self.collate(share) + [stand_in._replace(pairs=[])] * lacking

    def micro_batches(self, pairs: Sequence[TokenizedPair]) -> list["MicroBatch"]:
        """`pairs` as the micro-batches that are computed at a time, collated on the CPU; a function of `pairs`."""
        return self.collate(self.split_micro_batches(self.complete(pairs)))

    def complete(self, pairs: Sequence[TokenizedPair]) -> Sequence[TokenizedPair]:
        """All pairs of a step, with mismatched completions where the objective needs them."""
        return with_mismatched(pairs) if "mismatched" in self.objective.needs else pairs

    def split_micro_batches(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        size = self.objective.micro_batch_size if self.objective.scope == "micro_batch" else None
        return self.layout.micro_batches(pairs, self.config.micro_batch_tokens, size, self.objective.completions)

    def collate(self, parts: Sequence[list[TokenizedPair]]) -> list["MicroBatch"]:
        mismatched = [[pair.mismatched for pair in part if pair.mismatched] for part in parts]
        # Another prompt's completions may be longer: these micro-batches keep to `micro_batch_tokens` by themselves.
        extra = [self.collate(self.split_micro_batches(pairs)) if pairs else [] for pairs in mismatched]
        batches = [self.layout.collate(part, self.objective.completions) for part in parts]
        if self.engine.device.type == "cuda":  # pinned memory is copied to the GPU while it computes
            batches = [batch.pin() for batch in batches]
        return [MicroBatch(*values) for values in zip(parts, batches, extra, strict=True)]


class MicroBatch(NamedTuple):
    """Pairs and their collated batch. Without `pairs` the batch holds a stand-in, whose gradient must count nothing.

    `mismatched` holds the pairs' mismatched completions, where the objective needs them, in an order of its own.
    """

    pairs: list[TokenizedPair]
    batch: Batch
    mismatched: "Sequence[MicroBatch]" = ()
