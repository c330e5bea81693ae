"""A Bradley-Terry reward model (Ouyang et al. 2022, arXiv 2203.02155, Eq. 1), also on soft labels (2410.03145)."""

import math
from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Need, Objective, ObjectiveOutput, PairInputs, require, saturated
from prefopt.objectives.margin_matching import cross_entropy, soft_labels


@dataclass(frozen=True)
class Reward(Objective):
    """loss = -log sigma(r_w - r_l),  r the scalar head's output on a completion's last token. Scores are r.

    With `labels=soft` it is -p log sigma(z) - (1 - p) log sigma(-z), z = r_w - r_l, p = sigma(gamma (s_w - s_l)) with
    the prior rewards s of the rows: the reward model of margin matching (arXiv 2410.03145), whose gamma is 2.2 for
    UltraFeedback's scores. A label of p < 1/2 says that the rejected completion is the better one.

    The head starts at zero, so the first loss is log 2. Raises ValueError for other labels, or unless gamma is positive
    with soft labels and null without.
    """

    equation = "−log σ(z), z = r_φ(x, y_w) − r_φ(x, y_l); soft: −p log σ(z) − (1−p) log σ(−z), p = σ(γ(r_w − r_l))"
    paper = "2203.02155, Eq. 1; soft labels 2410.03145"
    summary = "trains a reward model and no policy"
    model_kind = "reward_model"
    learning_rates = (1e-5, 1e-4)
    step0_loss = math.log(2)

    labels: str = "hard"
    gamma: float | None = None

    def __post_init__(self) -> None:
        require(self.labels in ("hard", "soft"), f"labels must be hard or soft, got {self.labels!r}")
        if self.labels == "hard":
            require(self.gamma is None, f"gamma must be null unless labels=soft, got {self.gamma}")
        else:
            require(self.gamma is not None and self.gamma > 0, f"gamma must be positive, got {self.gamma}")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset() if self.gamma is None else frozenset({"rewards"})

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen, rejected = inputs.policy_chosen_rewards, inputs.policy_rejected_rewards
        z = chosen - rejected
        diagnostics = {"saturation": saturated(z.detach())}
        if self.gamma is None:
            losses = -logsigmoid(z)
        else:
            p = soft_labels(inputs, self.gamma)
            losses = cross_entropy(z, p)
            diagnostics["soft_label"] = p
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach(), diagnostics)
