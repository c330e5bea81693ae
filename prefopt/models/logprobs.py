"""Log-probabilities and rewards of completions: the only place that calls log-softmax.

The head is applied only to the hidden states that predict a completion token, tile by tile of the vocabulary. Logits
become float32 before the log-sum-exp, whatever the model's precision. Policy and reference use the same function.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.collate import Batch
from prefopt.models.chunked_logprobs import Distributions, LogitTransform, chunked_logps
from prefopt.models.packed_attention import NAME as SEGMENTS
from prefopt.models.value_head import completion_values

T = TypeVar("T")
AS_FORWARD = "prefopt_as_forward"  # the method by which an engine that has shared a model out computes with it


class Logps(NamedTuple):
    """For the completions of a batch, `(C,)` float32 each. `sums`: their log-probs in nats. `lengths`: their tokens.

    `tokens`: `(C, longest)`, the log-probs of their tokens, 0 behind their ends.

    `entropies`, if requested, is the surrogate of MMPO's appendix B.2,
    sum_t [H_t + stopgrad(H_t) * log pi(y_<t | x)], H_t the entropy of the next-token distribution at position t:
    its gradient is the score-function form of the gradient of the sequence entropy.

    `on_policy`, if requested, is the mean over tokens of log pi(y_t) - log sum_v pi(v)^2, without gradient (WPO's
    alignment, arXiv 2406.11827).

    `prefixes`, if requested, are the log-probs of the first m tokens alone, where m is the length of the shorter
    completion of the pair (LD-DPO's public length, arXiv 2409.06411).

    `weighted`, where the batch has weights for its tokens, is sum_t w_t log pi(y_t) (TIS-DPO, arXiv 2410.04350).

    `values`, if requested, are the outputs of the value head at the last tokens, with gradient.

    `sequential_kl`, if a reference's distributions are given, is sum_t KL(reference(. | x, y_<t) || pi(. | x, y_<t)) in
    nats, with gradient into pi (TDPO, arXiv 2404.11999).

    `distributions`: at the place before each of all N tokens, without gradient, to be given as a reference's.
    """

    sums: Tensor
    lengths: Tensor
    tokens: Tensor | None = None
    entropies: Tensor | None = None
    on_policy: Tensor | None = None
    prefixes: Tensor | None = None
    weighted: Tensor | None = None
    values: Tensor | None = None
    sequential_kl: Tensor | None = None
    distributions: Distributions | None = None


@dataclass(frozen=True)
class LogprobComputer:
    """`completion_logps` with the settings of a run. `tiled`: without the matrix of logits."""

    precision: str
    tiled: bool = True

    def __call__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        entropies: bool = False,
        on_policy: bool = False,
        prefixes: bool = False,
        reference: Distributions | None = None,
        values: bool = False,
    ) -> Logps:
        further = on_policy, prefixes, reference, values
        with autocast(model.device, self.precision):
            return as_forward(model, lambda model: completion_logps(model, batch, entropies, self.tiled, *further))


def as_forward(model: PreTrainedModel, compute: Callable[[PreTrainedModel], T]) -> T:
    """`compute(model)`: tensors, or a tuple or dict of them. Where an engine has shared the weights out, they are
    gathered for it as for a forward pass."""
    return getattr(model, AS_FORWARD, lambda compute: compute(model))(compute)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """torch's autocast to bfloat16 if that is the `precision`; nothing in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def autocast_weight_cache() -> Iterator[None]:
    """Inside, autocast casts every weight once, and not once for every micro-batch. No weight may change inside."""
    # The outermost autocast clears its cache when it ends; with one more level around, the inner ones do not.
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def completion_logps(
    model: PreTrainedModel,
    batch: Batch,
    entropies: bool = False,
    tiled: bool = True,
    on_policy: bool = False,
    prefixes: bool = False,
    reference: Distributions | None = None,
    values: bool = False,
) -> Logps:
    """Log-probs, and entropies, `on_policy`, `prefixes` and `values` if requested, of every completion of the batch.
    For `prefixes` it holds pairs: the chosen completions, then the rejected ones. With the distributions that a
    `reference` of the same vocabulary has for the same batch, also `sequential_kl`.

    `tiled`: without the (N, vocabulary) matrix of logits (`prefopt.models.chunked_logprobs`). A head that is not a
    plain linear layer (one with an adapter, for example) is computed as a whole nevertheless.
    """
    head, cap = cast(torch.nn.Module, model.get_output_embeddings()), logit_cap(model)
    states = _hidden(model, batch)
    hidden = states[batch.predictor_index]
    of_head = completion_values(model, states[batch.last_token_index]) if values else None
    label_logps: Tensor  # (N,)
    step_entropies: Tensor | None  # (N,)
    step_kl: Tensor | None  # (N,)
    log_squares: Tensor | None  # (N,)
    heads = [head, *([] if reference is None else [reference.head])]
    if tiled and all(type(h) is torch.nn.Linear for h in heads):
        label_logps, step_entropies, step_kl, log_squares = chunked_logps(
            hidden, cast(torch.nn.Linear, head), batch.labels, entropies, cap, on_policy, reference
        )
    else:
        logps = vocabulary_logps(Distributions(hidden, head, cap).logits())
        label_logps = logps.gather(-1, batch.labels[:, None])[:, 0]
        step_entropies = -(logps.exp() * logps).sum(-1) if entropies else None
        log_squares = (2 * logps.detach()).logsumexp(-1) if on_policy else None
        step_kl = None
        if reference is not None:
            with torch.no_grad():
                reference_logps = vocabulary_logps(reference.logits())
            step_kl = (reference_logps.exp() * (reference_logps - logps)).sum(-1)

    token_logps = _by_completion(label_logps, batch)
    surrogate = None
    if step_entropies is not None:
        token_entropies = _by_completion(step_entropies, batch)
        before = token_logps.cumsum(-1) - token_logps  # log pi of the tokens before each token
        surrogate = _sum(token_entropies + token_entropies.detach() * before)
    alignment = None
    if log_squares is not None:
        alignment = _sum(_by_completion(label_logps.detach() - log_squares, batch)) / batch.lengths
    prefix_logps = _prefix_sums(token_logps, batch) if prefixes else None
    weighted = None if batch.token_weights is None else _sum(_by_completion(batch.token_weights * label_logps, batch))
    kl = None if step_kl is None else _sum(_by_completion(step_kl, batch))
    distributions = Distributions(hidden.detach(), head, cap)
    further = surrogate, alignment, prefix_logps, weighted, of_head, kl, distributions
    return Logps(_sum(token_logps), batch.lengths, token_logps, *further)


def vocabulary_logps(logits: Tensor) -> Tensor:
    """Log-probs in float32 from logits of any precision, over the last dimension."""
    return logits.float().log_softmax(-1)


def _prefix_sums(token_logps: Tensor, batch: Batch) -> Tensor:
    """(C,) from (C, longest): the sum over as many tokens as the shorter completion of the pair has."""
    shorter = batch.lengths.view(2, -1).amin(0).repeat(2)
    places = torch.arange(batch.longest, device=token_logps.device)
    return _sum(token_logps * (places < shorter[:, None]))


def completion_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The scalar head `model.score` on the last token of every completion, `(C,)` float32."""
    hidden = last_hidden_states(model, batch).float()
    # In float32 whatever the precision: rewards are compared, and bfloat16 has only 8 bits for their differences.
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(torch.nn.Linear, model.score)(hidden)[:, 0]


def last_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """`(C, hidden)`: the backbone's output on the last token of every completion."""
    return _hidden(model, batch)[batch.last_token_index]


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(R * T, hidden): the backbone's last hidden states. The batch's indices point into them."""
    segments = {} if batch.segments is None else {"segments": batch.segments}
    if segments and model.config._attn_implementation != SEGMENTS:
        raise ValueError("its attention does not know packed rows (`enable_packed_attention`)")
    output = backbone(model)(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **segments,
    )
    return output.last_hidden_state.flatten(0, 1)


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The model below its head. Of Llama 4's text model, transformers' `base_model` is the whole model."""
    found = model.base_model
    return cast(torch.nn.Module, getattr(model, "model", model)) if found is model else found


def logit_cap(model: PreTrainedModel) -> LogitTransform:
    """What the architecture does to its logits after the output embedding: scaling (Cohere, Granite, Falcon-H1) and
    soft-capping (Gemma 2, RecurrentGemma)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    # RecurrentGemma has a name of its own for it.
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return LogitTransform(scale, cap)


def _sum(values: Tensor) -> Tensor:
    """(C,) float32 from (C, longest). The sum is taken in float64, so that the number of zeros behind a completion
    changes no bit of it."""
    return values.sum(-1, dtype=torch.float64).float()


def _by_completion(values: Tensor, batch: Batch) -> Tensor:
    """(N,) -> (C, longest), with zeros behind the end of a completion. Unlike an index_add, every element is written
    once, so sums are the same in every run, on a GPU too."""
    grid = values.new_zeros(len(batch.lengths), batch.longest)
    return grid.index_put((batch.completions, batch.offsets), values)
