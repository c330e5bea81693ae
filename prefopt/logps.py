"""Log-probabilities of completions: the only place that calls log-softmax.

The head is applied to those hidden states alone that predict a completion token, and logits become float32 before
the log-sum-exp, whatever the model computes in. Policy and reference go through the same function.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt import UserError
from prefopt.data.layout import Batch


@dataclass(frozen=True)
class Logps:
    """Per row of a batch, `(R,)` float32. `sums`: nats over the completion; `lengths`: its tokens.

    `entropies`, if asked for, is the surrogate of MMPO's appendix B.2,
    sum_t [H_t + stopgrad(H_t) * log pi(y_<t | x)], H_t the entropy of the next-token distribution at position t:
    its gradient is the score-function form of the gradient of the sequence entropy.
    """

    sums: Tensor
    lengths: Tensor
    entropies: Tensor | None = None


def completion_logps(model: PreTrainedModel, batch: Batch, entropies: bool = False) -> Logps:
    """Score every row's completion. The token at position t is predicted from the hidden state at t - 1, so the
    first completion token is scored from the prompt's last position."""
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    target = batch.completion_mask[:, 1:]
    labels = batch.input_ids[:, 1:][target]
    logits = model.get_output_embeddings()(hidden[:, :-1][target]).float()  # (completion tokens, vocabulary)
    logps = logits.log_softmax(-1)
    token_logps = _rows(logps.gather(-1, labels[:, None])[:, 0], target)
    surrogate = None
    if entropies:
        token_entropies = _rows(-(logps.exp() * logps).sum(-1), target)
        before = token_logps.cumsum(-1) - token_logps
        surrogate = (token_entropies + token_entropies.detach() * before).sum(-1)
    return Logps(token_logps.sum(-1), target.sum(-1).float(), surrogate)


def check_head(model: PreTrainedModel) -> None:
    """Refuse models that change logits after the output embedding (soft-capping, scaling): `completion_logps`
    applies the embedding alone, and their numbers would be silently wrong."""
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"{model.config.model_type} models change their logits after the head ({key}="
                f"{getattr(model.config, key)}), which prefopt does not compute yet. Use another model."
            )


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the mask's True places, in order, back into their rows; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
