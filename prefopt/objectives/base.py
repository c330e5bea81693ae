"""The contract between the training loop and an objective: `(B,)` tensors in, `(B,)` tensors out.

An objective never sees a model, a batch or a config, so it can be called in float64 from a test. What it needs and
over which pairs it takes statistics is declared on it, so the loop never asks for its name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

Need = Literal["reference", "rewards", "entropies"]
Scope = Literal["pair", "micro_batch", "step"]

# The default of tensors that only some objectives need. Not typed as optional: an objective that declares a need may
# rely on it, and one that does not must not touch it (None would fail at once).
_ABSENT: Any = None


@dataclass(frozen=True)
class PairInputs:
    """What an objective may look at, for `B` pairs. Every tensor is `(B,)`, float32 in training, lengths included.

    `*_logps` are sums over the completion's tokens (its terminator included) of log pi(token | what came before), in
    nats; `*_lengths` count those tokens. `*_rewards` are prior rewards from the data. `*_entropies` are the
    surrogates of `prefopt.logps.Logps.entropies`, whose gradient is that of the sequence entropy. What the objective
    does not list in `needs` may be None.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen_logps: Tensor = _ABSENT
    reference_rejected_logps: Tensor = _ABSENT
    chosen_rewards: Tensor = _ABSENT
    rejected_rewards: Tensor = _ABSENT
    chosen_entropies: Tensor = _ABSENT
    rejected_entropies: Tensor = _ABSENT


@dataclass(frozen=True)
class ObjectiveOutput:
    """`losses` `(B,)` with gradient; the step's loss is their mean over all pairs of the optimizer step.

    `*_scores` `(B,)`: reward accuracy is mean(chosen > rejected), margin is mean(chosen - rejected).
    """

    losses: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor


class Objective(ABC):
    """A frozen dataclass whose fields are its hyperparameters; its YAML names it with `_target_`.

    A subclass sets the three class attributes, or makes them properties where a hyperparameter decides:

    * `needs`: which optional fields of `PairInputs` must be filled;
    * `scope`: over which pairs a pair's loss takes statistics (`pair`: none but its own);
    * `step0_loss`: the loss per pair that equal policy and reference give whatever the data (log 2 for DPO), None
      where there is no such constant. The run compares it with the loss it sees before its first step.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    scope: ClassVar[Scope] = "pair"
    step0_loss: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, inputs: PairInputs) -> ObjectiveOutput: ...


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; for hyperparameters, whose errors become composition errors."""
    if not condition:
        raise ValueError(message)
