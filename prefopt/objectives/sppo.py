"""Self-play preference optimization (Wu et al. 2024, arXiv 2405.00675, Eq. 4.7)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import Need, PairInputs, Pairwise, require


@dataclass(frozen=True)
class SPPO(Pairwise):
    """loss = (u_w - eta (P_w - 1/2))^2 + (u_l - eta (P_l - 1/2))^2,  eta = 1 / beta,  u = log pi - log pi_ref.

    P is the probability that the completion beats one of the policy. The two squares are summed as in public code (the
    authors' own halves the sum).

    * `labels=hard`: P is 1 for the chosen and 0 for the rejected completion.
    * `labels=soft`: P is the row's reward, as in the authors' code (github.com/uclaml/SPPO): the mean over the n
      samples of the prompt of sigma(s_i - s_j), the sample itself included, s a reward model's log-odds (theirs is
      PairRM). `dataset.format.win_rates=true` makes these rewards from n scored responses.

    The authors' learning rate is 5e-7. Scores are u. Raises ValueError for beta <= 0 or other labels.
    """

    equation = "(u_w − (P_w−½)/β)² + (u_l − (P_l−½)/β)², 1/β = η; hard labels: P_w = 1, P_l = 0"
    paper = "2405.00675, Eq. 4.7"
    summary = "moves each log-ratio to a target, from the probability that its completion beats the policy"
    made_for = frozenset({"online"})
    learning_rates = (5e-7, 1e-5)

    beta: float
    labels: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(self.labels in ("hard", "soft"), f"labels must be hard or soft, got {self.labels!r}")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference", "rewards"} if self.labels == "soft" else {"reference"})

    @property
    def reward_range(self) -> tuple[float, float] | None:  # type: ignore[override]
        return (0.0, 1.0) if self.labels == "soft" else None

    @property
    def loss_at_reference(self) -> float | None:  # type: ignore[override]
        return 2 * (1 / (2 * self.beta)) ** 2 if self.labels == "hard" else None

    @property
    def derived(self) -> dict[str, float]:
        return {"eta": 1 / self.beta}

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return inputs.chosen_logratios, inputs.rejected_logratios

    def targets(self, inputs: PairInputs) -> tuple[Tensor | float, Tensor | float]:
        """eta (P - 1/2) of both sides: `(B,)` with soft labels."""
        if self.labels == "hard":
            return 0.5 / self.beta, -0.5 / self.beta
        return (inputs.chosen_rewards - 0.5) / self.beta, (inputs.rejected_rewards - 0.5) / self.beta

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen_target, rejected_target = self.targets(inputs)
        return (chosen - chosen_target) ** 2 + (rejected - rejected_target) ** 2
