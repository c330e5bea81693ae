"""Symmetric multimodal preference optimization for language alone (Liu et al. 2025, SymMPO, arXiv 2506.11712)."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs, require, saturated


@dataclass(frozen=True)
class SymMPO(Objective):
    """loss_i = -log sigma(beta z_i) - a log sigma(beta u_w,i) + (c / 2) (z_1 - z_2)^2,  z = u_w - u_l,  i = 1, 2.

    Two linked pairs are two prompts with exchanged preference over the same completions, such as contrary system
    prompts: (x_1: y_1 over y_2) and (x_2: y_2 over y_1). The second term holds each chosen completion above the
    reference (`anchor_weight`, a). The third one makes both margins alike (`consistency_weight`, c; in nats^2, not
    times beta), and half of it counts for each of the two pairs. So both must lie in one micro-batch, one behind the
    other. A last pair without a partner has no third term. Scores are beta * u.

    The paper's prompts are an image and a question, and x_1 has a third completion y_l. Its loss of a linked pair is

        -log sigma(beta (u(y_1|x_1) - u(y_l|x_1))) - lambda (log sigma(beta z_1) + log sigma(beta z_2))
        - log sigma(beta u(y_1|x_1)) - log sigma(beta_2 u(y_2|x_2)) + 1e-4 (z_1 - z_2)^2

    with beta = beta_2 = 0.1 and lambda = 0.5. This form is derived from it and not published: without images y_l is the
    pair's own rejected completion, y_2, and the mean is taken over both orders of the two pairs. -log sigma(beta z_i)
    then has the weight 1/2 + lambda, so 1, and the sum of the two losses is the paper's. Another lambda is, up to a
    factor on the whole, a = 1 / (1/2 + lambda) and c = 1e-4 / (1/2 + lambda). The published loss and its numbers were
    compared with the authors' code (github.com/Liuwq-bit/SymMPO); the paper itself was not at hand, and nobody has
    reported this form.

    MaPPO and ARPO do not take it as their base: they scale the rejected term of a pair, which is its partner's chosen
    one. Raises ValueError for beta <= 0, a < 0 or c < 0.
    """

    equation = "−log σ(βz) − a log σ(βu_w) + ½c(z − z′)², z = u_w − u_l, z′ of the linked pair"
    paper = "2506.11712, for language alone: derived"
    summary = "DPO on two prompts with exchanged preference, whose margins are to be alike"
    needs = frozenset({"reference"})
    scope = "micro_batch"
    micro_batch_size = 2
    linked = True

    beta: float
    anchor_weight: float = 1.0
    consistency_weight: float = 1e-4

    def __post_init__(self) -> None:
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(self.anchor_weight >= 0, f"anchor_weight must not be negative, got {self.anchor_weight}")
        require(self.consistency_weight >= 0, f"consistency_weight must not be negative, got {self.consistency_weight}")

    @property
    def step0_loss(self) -> float:  # type: ignore[override]
        return (1 + self.anchor_weight) * math.log(2)

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen, rejected = inputs.chosen_logratios, inputs.rejected_logratios
        z = chosen - rejected
        # 1, 0, 3, 2, ...; a last pair alone is its own partner.
        partners = (torch.arange(len(z), device=z.device) ^ 1).clamp(max=len(z) - 1)
        gaps = z - z[partners]
        losses = -logsigmoid(self.beta * z) - self.anchor_weight * logsigmoid(self.beta * chosen)
        losses = losses + self.consistency_weight / 2 * gaps**2
        diagnostics = {"saturation": saturated(self.beta * z.detach()), "margin_gap": gaps.detach().abs()}
        return ObjectiveOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach(), diagnostics)
