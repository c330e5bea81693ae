"""Log-probabilities and rewards of completions: the only place that calls log-softmax.

The head is applied to those hidden states alone that predict a completion token, tile by tile of the vocabulary, and
logits become float32 before the log-sum-exp, whatever the model computes in. Policy and reference go through the same
function.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt import UserError
from prefopt.data.layout import Batch
from prefopt.tiled import tiled_logps


@dataclass(frozen=True)
class Logps:
    """Per completion of a batch, `(C,)` float32. `sums`: nats over the completion; `lengths`: its tokens.

    `entropies`, if asked for, is the surrogate of MMPO's appendix B.2,
    sum_t [H_t + stopgrad(H_t) * log pi(y_<t | x)], H_t the entropy of the next-token distribution at position t:
    its gradient is the score-function form of the gradient of the sequence entropy.
    """

    sums: Tensor
    lengths: Tensor
    entropies: Tensor | None = None


def completion_logps(model: PreTrainedModel, batch: Batch, entropies: bool = False, tiled: bool = True) -> Logps:
    """Score every completion of the batch; `tiled`: without the (N, vocabulary) matrix of logits (`prefopt.tiled`).

    A head that is not a plain linear layer (one with an adapter on it, say) is computed whole.
    """
    head, hidden = cast(torch.nn.Module, model.get_output_embeddings()), _hidden(model, batch)[batch.sources]
    found: Tensor | None  # (N,) entropies
    if tiled and type(head) is torch.nn.Linear:
        chosen, found = tiled_logps(hidden, head, batch.labels, entropies)
    else:
        logps = head(hidden).float().log_softmax(-1)
        chosen = logps.gather(-1, batch.labels[:, None])[:, 0]
        found = -(logps.exp() * logps).sum(-1) if entropies else None
    token_logps = _by_completion(chosen, batch)
    surrogate = None
    if found is not None:
        token_entropies = _by_completion(found, batch)
        before = token_logps.cumsum(-1) - token_logps
        surrogate = (token_entropies + token_entropies.detach() * before).sum(-1)
    return Logps(token_logps.sum(-1), batch.lengths, surrogate)


def completion_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The scalar head `model.score` on the last token of every completion, `(C,)` float32."""
    hidden = last_hidden_states(model, batch).float()
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(torch.nn.Linear, model.score)(hidden)[:, 0]


def last_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """`(C, hidden)`: the backbone's output on the last token of every completion."""
    return _hidden(model, batch)[batch.ends]


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(R * T, hidden): the backbone's last hidden states, which the batch's indices point into."""
    output = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    )
    return output.last_hidden_state.flatten(0, 1)


def check_head(model: PreTrainedModel) -> None:
    """Refuse models that change logits after the output embedding (soft-capping, scaling): `completion_logps`
    applies the embedding alone, and their numbers would be silently wrong."""
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"{model.config.model_type} models change their logits after the head ({key}="
                f"{getattr(model.config, key)}), which prefopt does not compute yet. Use another model."
            )


def _by_completion(values: Tensor, batch: Batch) -> Tensor:
    """(N,) -> (C, longest), zero behind each completion's end. Every place is written once, so the sums over it are
    the same in every run, on a GPU too."""
    grid = values.new_zeros(len(batch.lengths), int(batch.offsets.max()) + 1)
    return grid.index_put((batch.completions, batch.offsets), values)
