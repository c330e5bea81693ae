"""Length-normalized DPO (Lambert et al. 2024, Tülu 3, arXiv 2411.15124)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class DPONorm(DPO):
    """DPO's loss of z = beta (u_w / n_w - u_l / n_l),  n the number of tokens.

    Log-ratios per token, so beta is larger than DPO's: 5 in Tülu 3, whose 8B model was trained at a learning rate of
    5e-7 (the commands in github.com/allenai/open-instruct). `label_smoothing` as in `dpo`, 0 there. Scores are
    beta * u / n. Raises ValueError for beta <= 0 or a label_smoothing outside [0, 0.5).
    """

    equation = "−log σ(β(u_w/n_w − u_l/n_l)), with label smoothing as in dpo"
    paper = "2411.15124"
    summary = "DPO per token, so that long completions do not count more: the setting of Tülu 3"
    learning_rates = (5e-7, 1e-5)

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().scores(inputs)
        return chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
