"""Maximum a posteriori preference optimization (arXiv 2507.21183): prior rewards for any pairwise objective."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import Need, PairInputs
from prefopt.objectives.plug_in import PlugIn


@dataclass(frozen=True)
class MaPPO(PlugIn):
    """The base objective with its rejected term times delta_r = r_w - r_l, the gap of the prior rewards.

    For DPO: -log sigma(beta u_w - delta_r beta u_l). It adds no hyperparameter, and at delta_r = 1 it is its base. The
    rewards of the data must lie in [0, 1] (the output of a raw reward model goes through a sigmoid first). Scores, and
    so accuracy and margin, are the base's, unscaled.

    The paper has delta_r in [0, 1] too. Where the rewards contradict the label, delta_r < 0, and the loss falls as the
    *rejected* completion becomes more likely: both completions are raised, and nothing is preferred. Nothing is clamped
    here; such pairs are a defect of the data, which its policy counts and drops before.
    """

    equation = "the base's loss with Δr = r_w − r_l times its rejected term"
    paper = "2507.21183"
    summary = "any pairwise objective with prior rewards: a near tie pushes its rejected side less"
    made_for = frozenset({"online"})
    reward_range = (0.0, 1.0)
    learning_rates = (5e-7, 1e-5)
    scale_name = "delta_r"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.base.needs | {"rewards"}

    def scale(self, inputs: PairInputs) -> Tensor:
        return inputs.chosen_rewards - inputs.rejected_rewards
