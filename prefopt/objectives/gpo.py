"""Generalized preference optimization: convex losses of DPO's margin (Tang et al. 2024, arXiv 2402.05749)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from prefopt.objectives.base import ImplicitReward, PairInputs, clamped_exp, require

# Losses as functions of the margin z, by the name in the configuration.
FUNCTIONS = {
    "logistic": lambda z: softplus(-z),
    "hinge": lambda z: relu(1 - z),
    "squared": lambda z: (z - 1) ** 2,
    "exponential": lambda z: clamped_exp(-z),
    "truncated_quadratic": lambda z: relu(1 - z) ** 2,
    "savage": lambda z: torch.sigmoid(-z) ** 2,
}


@dataclass(frozen=True)
class GPO(ImplicitReward):
    """loss = f(beta (u_w - u_l)),  f one of

    * `logistic` log(1 + e^-z), which is DPO;
    * `hinge` max(0, 1 - z) (SLiC);
    * `squared` (z - 1)^2 (IPO: with IPO's beta b, z - 1 = 2 b (u_w - u_l - 1 / (2 b)) at beta = 2 b);
    * `exponential` e^-z (beyond z = -40 its tangent);
    * `truncated_quadratic` max(0, 1 - z)^2;
    * `savage` 1 / (1 + e^z)^2.

    Scores are beta * u. Raises ValueError for beta <= 0 or another function.
    """

    equation = "f(β(u_w − u_l)), f(z): log(1+e^−z) | max(0, 1−z) | (z−1)² | e^−z | max(0, 1−z)² | (1+e^z)^−2"
    paper = "2402.05749"
    summary = "DPO with another convex loss of the margin: hinge, squared, exponential and others"

    function: str = "hinge"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.function in FUNCTIONS, f"function must be one of {', '.join(FUNCTIONS)}, got {self.function!r}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return FUNCTIONS[self.function](torch.zeros((), dtype=torch.float64)).item()

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return FUNCTIONS[self.function](chosen - rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"past_margin": chosen - rejected > 1}
