"""Log-probabilities and rewards of completions: the only place that calls log-softmax.

The head is applied to those hidden states alone that predict a completion token, tile by tile of the vocabulary, and
logits become float32 before the log-sum-exp, whatever the model computes in. Policy and reference go through the same
function.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.collate import Batch
from prefopt.models.chunked_logprobs import LogitTransform, chunked_logps
from prefopt.models.packed_attention import NAME as SEGMENTS


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


@dataclass(frozen=True)
class LogprobComputer:
    """`completion_logps` as one run computes them: in its precision, with or without the matrix of logits."""

    precision: str
    tiled: bool = True

    def __call__(self, model: PreTrainedModel, batch: Batch, entropies: bool = False) -> Logps:
        with autocast(model.device, self.precision):
            return completion_logps(model, batch, entropies, self.tiled)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def autocast_weight_cache() -> Iterator[None]:
    """Inside, autocast casts each weight once, and not once for every micro-batch. No weight may change meanwhile."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def completion_logps(model: PreTrainedModel, batch: Batch, entropies: bool = False, tiled: bool = True) -> Logps:
    """Score every completion of the batch; `tiled`: without the (N, vocabulary) matrix of logits
    (`prefopt.models.chunked_logprobs`).

    A head that is not a plain linear layer (one with an adapter on it, say) is computed whole.
    """
    head, cap = cast(torch.nn.Module, model.get_output_embeddings()), logit_cap(model)
    hidden = _hidden(model, batch)[batch.predictor_index]
    found: Tensor | None  # (N,) entropies
    if tiled and type(head) is torch.nn.Linear:
        chosen, found = chunked_logps(hidden, head, batch.labels, entropies, cap)
    else:
        logps = cap(head(hidden).float()).log_softmax(-1)
        chosen = logps.gather(-1, batch.labels[:, None])[:, 0]
        found = -(logps.exp() * logps).sum(-1) if entropies else None
    token_logps = _by_completion(chosen, batch)
    surrogate = None
    if found is not None:
        token_entropies = _by_completion(found, batch)
        before = token_logps.cumsum(-1) - token_logps
        surrogate = _sum(token_entropies + token_entropies.detach() * before)
    return Logps(_sum(token_logps), batch.lengths, surrogate)


def completion_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The scalar head `model.score` on the last token of every completion, `(C,)` float32."""
    hidden = last_hidden_states(model, batch).float()
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(torch.nn.Linear, model.score)(hidden)[:, 0]


def last_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """`(C, hidden)`: the backbone's output on the last token of every completion."""
    return _hidden(model, batch)[batch.last_token_index]


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(R * T, hidden): the backbone's last hidden states, which the batch's indices point into."""
    segments = {} if batch.segments is None else {"segments": batch.segments}
    if segments and model.config._attn_implementation != SEGMENTS:
        raise ValueError("its attention does not know packed rows (`use_segments`)")
    output = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **segments,
    )
    return output.last_hidden_state.flatten(0, 1)


def logit_cap(model: PreTrainedModel) -> LogitTransform:
    """What the architecture does to its logits after the output embedding: scaling (Cohere, Granite, Falcon-H1) and
    soft-capping (Gemma 2)."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def _sum(values: Tensor) -> Tensor:
    """(C,) float32 from (C, longest). Added up in float64, so that how many zeros follow changes no bit."""
    return values.sum(-1, dtype=torch.float64).float()


def _by_completion(values: Tensor, batch: Batch) -> Tensor:
    """(N,) -> (C, longest), zero behind each completion's end. Every place is written once, so the sums over it are
    the same in every run, on a GPU too."""
    grid = values.new_zeros(len(batch.lengths), batch.longest)
    return grid.index_put((batch.completions, batch.offsets), values)
