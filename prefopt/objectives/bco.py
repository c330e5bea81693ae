"""Binary classifier optimization on pairs (Jung et al. 2024, BCO, arXiv 2404.04656)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, Scope, require, saturated


@dataclass(frozen=True)
class BCO(ImplicitReward):
    """loss = -log sigma(beta u_w - d) - log sigma(-(beta u_l - d)),  u = log pi - log pi_ref.

    A classifier of single completions, whose logit is the implicit reward; its loss bounds DPO's from above.

    * `shift=running`: d, detached, is the mean of the rewards of both sides, averaged over the optimizer steps so far,
      this one included, each counting the same. It is what the paper asks for, and what earlier versions of TRL
      computed, there over micro-batches. The average is saved with the checkpoint.
    * `shift=none`: d = 0, as TRL 1.16's `bco_pair`.

    Scores are beta * u. Raises ValueError for beta <= 0 or another shift.
    """

    equation = "−log σ(β u_w − δ) − log σ(δ − β u_l), δ = running mean of β u"
    paper = "2404.04656"
    summary = "classifies single completions as good or bad, with the mean reward as threshold"
    loss_at_reference = 2 * math.log(2)

    shift: str = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shift in ("running", "none"), f"shift must be running or none, got {self.shift!r}")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "step" if self.shift == "running" else "pair"

    def initial_state(self) -> dict[str, Tensor]:
        return {"mean": torch.tensor(0.0), "steps": torch.tensor(0.0)} if self.shift == "running" else {}

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        if self.shift == "none":
            return {}
        mean, steps = inputs.state["mean"], inputs.state["steps"] + 1
        rewards = torch.cat([chosen, rejected]).detach().mean()
        return {"mean": mean + (rewards - mean) / steps, "steps": steps}

    def _logits(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        if self.shift == "none":
            return chosen, rejected
        shift = self.next_state(inputs, chosen, rejected)["mean"]
        return chosen - shift, rejected - shift

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        good, bad = self._logits(inputs, chosen, rejected)
        return -logsigmoid(good) - logsigmoid(-bad)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        good, bad = self._logits(inputs, chosen, rejected)
        found = {"chosen_saturation": saturated(good), "rejected_saturation": saturated(bad)}
        return found | {f"running_{name}": value for name, value in self.next_state(inputs, chosen, rejected).items()}
