"""Before the first step: does this model compute packed and prefix-shared rows correctly?"""

import logging
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
from prefopt.utils.memory import is_out_of_memory

log = logging.getLogger(__name__)

# Nats per completion token (or units of a hidden state). Leaks between completions and wrong positions differ by far
# more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


@torch.no_grad()
def choose_layout(
    name: str, model: PreTrainedModel, pairs: Sequence[TokenizedPair], precision: str = "float32"
) -> Layout:
    """The layout `name`, or the next simpler one in which the model computes the longest of `pairs` correctly. If it is
    another one, a message says why.

    Correct means: the same numbers as the model's ordinary forward pass on every completion alone. These are log-probs;
    of a reward model, whose head is zero at first, the last hidden states.

    On a CPU the comparison is made in float32. It is made in `precision` on a GPU, whose kernel for packed rows knows
    no float32, and for quantized weights.

    Raises UserError if not even padded rows give those numbers.
    """
    if model.device.type == "cpu" and not getattr(model, "is_quantized", False):
        precision = "float32"
    pair = max(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))
    group = Group(pair.prompt, [c for c in (pair.chosen, pair.rejected) if c])
    original = model.config._attn_implementation
    names = list(LAYOUTS)  # from the fastest to the one that works with every model
    reason = ""
    with autocast(model.device, precision):
        expected = torch.stack([_expected_numbers(model, group.prompt, c) for c in group.completions], -1)
        if not expected.isfinite().all():
            raise UserError(
                f"the {model.config.model_type} gives {expected.flatten()[0]:g} for a row of the data, so its weights "
                "hold what is no number, or are too large. Get the checkpoint again."
            )

        for candidate in names[names.index(name) :]:
            try:
                if candidate == "packed":
                    enable_packed_attention(model)
                numbers = _numbers(model, LAYOUTS[candidate], group)
                lengths = numbers.new_tensor([len(c) for c in group.completions])
                difference = ((numbers - expected).abs() / lengths).max()
                if difference <= TOLERANCE[precision]:
                    if reason:
                        log.info(f"  layout: {candidate}, because {model.config.model_type} {reason}")
                    return LAYOUTS[candidate]
                reason = f"gives other log-probs in a {candidate} row (by {difference.item():.2g} nats per token)"
            # What the code of an architecture raises for a mask or an argument that it does not know.
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ImportError) as error:
                if is_out_of_memory(error):  # it says nothing of the layout
                    raise
                reason = f"cannot read a {candidate} row ({str(error).splitlines()[0]})"
            if candidate == "packed":  # the other layouts take the model's own attention
                model.set_attn_implementation(original)
    raise UserError(
        f"prefopt cannot compute this model: {model.config.model_type} {reason}. It may change its logits after the "
        "output embedding in a way that prefopt does not know. Use another model."
    )


def _numbers(model: PreTrainedModel, layout: Layout, group: Group) -> Tensor:
    """What the model computes in a layout: (completions,) log-probs; of a reward model, (hidden, completions)."""
    batch = layout.make([group]).to(model.device)
    if hasattr(model, "score"):
        return last_hidden_states(model, batch).float().T
    return completion_logps(model, batch).sums


def _expected_numbers(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """The same numbers for one completion, from an ordinary forward pass: one row, no mask, no positions."""
    row = torch.tensor([prompt + completion], device=model.device)
    if hasattr(model, "score"):
        return model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1].float()
    logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return -cross_entropy(logits, row[0, len(prompt) :], reduction="sum")
