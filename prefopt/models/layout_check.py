"""Does this model compute packed and prefix-shared rows right? Asked before the first step, not assumed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from prefopt.data.collate import LAYOUTS, Group, Layout
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models.logprobs import autocast, completion_logps, last_hidden_states
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.utils.console import say

# Nats per completion token (or units of a hidden state); leaks and wrong positions are off by far more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


@torch.no_grad()
def choose_layout(
    name: str, model: PreTrainedModel, pairs: Sequence[TokenizedPair], precision: str = "float32"
) -> Layout:
    """The layout `name`; or the next simpler one that gives the numbers of the model's own forward pass on the longest
    of `pairs`, with a line that says why. A reward model has no log-probs, and its head is zero at first: there the
    last hidden states are compared.

    On a CPU the comparison is made in float32; on a GPU, whose kernel for packed rows knows no float32, and of a model
    with quantized weights, which are computed with in `precision`, in that.
    Raises UserError if not even padded rows give those numbers.
    """
    if model.device.type == "cpu" and not getattr(model, "is_quantized", False):
        precision = "float32"
    pair = max(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))
    group = Group(pair.prompt, [c for c in (pair.chosen, pair.rejected) if c])
    original = model.config._attn_implementation
    names = list(LAYOUTS)  # from the fastest to the one that every model knows
    reason = ""
    with autocast(model.device, precision):
        expected = torch.stack([_own_numbers(model, group.prompt, c) for c in group.completions], -1)
        if not expected.isfinite().all():
            raise UserError(
                f"the {model.config.model_type} gives {expected.flatten()[0]:g} for a row of the data, so its weights "
                "hold what is no number, or are too large. Get the checkpoint again."
            )
        for candidate in names[names.index(name) :]:
            try:
                if candidate == "packed":
                    enable_packed_attention(model)
                found = _numbers(model, LAYOUTS[candidate], group)
                difference = ((found - expected).abs() / found.new_tensor([len(c) for c in group.completions])).max()
                if difference <= TOLERANCE[precision]:
                    if reason:
                        say(f"  layout: {candidate}, because {model.config.model_type} {reason}")
                    return LAYOUTS[candidate]
                reason = f"gives other log-probs in a {candidate} row (by {difference.item():.2g} nats per token)"
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ImportError) as error:
                reason = f"cannot read a {candidate} row ({str(error).splitlines()[0]})"
            if candidate == "packed":
                model.set_attn_implementation(original)
    raise UserError(
        f"prefopt cannot compute this model: {model.config.model_type} {reason}. It may change its logits after the "
        "output embedding in a way that prefopt does not know. Use another model."
    )


def _numbers(model: PreTrainedModel, layout: Layout, group: Group) -> Tensor:
    """(completions,) log-probs; or (hidden, completions) of a reward model."""
    batch = layout.make([group]).to(model.device)
    if hasattr(model, "score"):
        return last_hidden_states(model, batch).float().T
    return completion_logps(model, batch).sums


def _own_numbers(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """The same of one completion, from the model's own forward pass on an ordinary row."""
    row = torch.tensor([prompt + completion], device=model.device)
    if hasattr(model, "score"):
        return model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1].float()
    logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return -cross_entropy(logits, row[0, len(prompt) :], reduction="sum")
