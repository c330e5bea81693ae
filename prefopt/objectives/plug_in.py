"""Plug-ins: any pairwise objective with a factor on its rejected term. mappo.py and arpo.py say which factor."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives import SIDES
from prefopt.objectives.base import Need, Objective, ObjectiveOutput, PairInputs, Pairwise, Scope, require


@dataclass(frozen=True)
class PlugIn(Objective):
    """The base objective with its rejected term times `scale`; at a scale of 1 it is its base.

    It declares what its base declares. Diagnostics and losses see the scaled term. Scores, and so accuracy and margin,
    are the base's, unscaled.
    """

    scale_name = "scale"  # of the factor in the log

    base: Pairwise

    def __post_init__(self) -> None:
        require(self.base.completions == SIDES, f"base must compare two completions; {self.base.name} reads a group")

    @abstractmethod
    def scale(self, inputs: PairInputs) -> Tensor:
        """The factor, `(B,)`, without gradient."""

    @property
    def name(self) -> str:
        return f"{super().name}_{self.base.name}"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.base.needs

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return self.base.scope

    @property
    def micro_batch_size(self) -> int | None:  # type: ignore[override]
        return self.base.micro_batch_size

    @property
    def step0_loss(self) -> float | None:  # type: ignore[override]
        return self.base.step0_loss

    @property
    def reward_range(self) -> tuple[float, float] | None:  # type: ignore[override]
        return self.base.reward_range

    @property
    def learning_rates(self) -> tuple[float, float]:  # type: ignore[override]
        return self.base.learning_rates

    @property
    def derived(self) -> dict[str, float]:
        return self.base.derived

    def initial_state(self) -> dict:
        return self.base.initial_state()

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        scale = self.scale(inputs)
        output = self.base.compare(inputs, rejected_scale=scale)
        output.diagnostics[self.scale_name] = scale
        return output
