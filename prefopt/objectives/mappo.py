"""Maximum a posteriori preference optimization (arXiv 2507.21183): prior rewards for any pairwise objective."""

from dataclasses import dataclass

from prefopt.objectives.base import Need, Objective, ObjectiveOutput, PairInputs, Pairwise, Scope


@dataclass(frozen=True)
class MaPPO(Objective):
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
    reward_range = (0.0, 1.0)
    learning_rates = (5e-7, 1e-5)

    base: Pairwise

    @property
    def name(self) -> str:
        return f"mappo_{self.base.name}"

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.base.needs | {"rewards"}

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
    def derived(self) -> dict[str, float]:
        return self.base.derived

    def initial_state(self) -> dict:
        return self.base.initial_state()

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        delta_r = inputs.chosen_rewards - inputs.rejected_rewards
        # Diagnostics and losses see the scaled term, scores do not.
        output = self.base.compare(inputs, rejected_scale=delta_r)
        output.diagnostics["delta_r"] = delta_r
        return output
