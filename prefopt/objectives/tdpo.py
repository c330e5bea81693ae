"""Token-level direct preference optimization (Zeng et al. 2024, arXiv 2404.11999)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class TDPO(DPO):
    """DPO that also holds the policy near the reference at each token: more on the rejected side than on the chosen.

    loss = -log sigma(beta (u_w - u_l - alpha (D_l - D_w))),  D = sum_t KL(pi_ref || pi) over a completion's tokens,
    between the distributions of the next token. No gradient flows through D_w with `stop_gradient`: this is TDPO2.
    TDPO1 is alpha 1 with that gradient. KL and gradients are those of the authors' code.

    Scores are beta (u + alpha D), what the loss compares; the authors report them at alpha 1. Label smoothing is DPO's.
    The reference must be a model that scores every batch (reference=resident or adapter_off). Raises ValueError where
    DPO does, and for alpha < 0.
    """

    equation = "−log σ(β(u_w − u_l − α(D_l − sg D_w))), D = Σ_t KL(π_ref ‖ π), sg: without gradient"
    paper = "2404.11999"
    summary = "DPO with the KL to the reference at each token; it needs reference=resident or adapter_off"
    needs = frozenset({"reference", "sequential_kl"})

    alpha: float = 0.5
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha must not be negative, got {self.alpha}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen_kl = inputs.chosen_kl.detach() if self.stop_gradient else inputs.chosen_kl
        chosen = inputs.chosen_logratios + self.alpha * chosen_kl
        rejected = inputs.rejected_logratios + self.alpha * inputs.rejected_kl
        return self.beta * chosen, self.beta * rejected

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        kl = {"chosen_kl": inputs.chosen_kl.detach(), "rejected_kl": inputs.rejected_kl.detach()}
        return super().diagnostics(inputs, chosen, rejected) | kl
