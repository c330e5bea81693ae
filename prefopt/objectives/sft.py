"""Supervised fine-tuning on the chosen completions."""

from dataclasses import dataclass

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs


@dataclass(frozen=True)
class SFT(Objective):
    """The step's loss is -sum log pi(y_w) over all chosen tokens of the step, divided by their number, so that every
    token counts the same whatever the micro-batches. Rejected completions are not read."""

    equation = "−Σ lp_w / Σ n_w over the optimizer step"
    paper = "–"
    summary = "fine-tuning on the chosen completions"
    completions = ("chosen",)
    normalize_by = "chosen_token"
    learning_rates = (2e-5, 2e-4)

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        return ObjectiveOutput(-inputs.policy_chosen_logps)
