"""Does this model compute the prefix-shared layout right? Asked before the first step, not assumed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.layout import LAYOUTS, Batch, Layout, padded_pairs, prefix_shared
from prefopt.data.tokenize import TokenizedPair
from prefopt.logps import completion_logps, last_hidden_states
from prefopt.progress import say

# Nats per completion (or units of a hidden state) in float32; leaks and wrong positions are off by far more.
TOLERANCE = 0.02


@torch.no_grad()
def choose_layout(name: str, model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> Layout:
    """The layout `name`; or the padded one, with a line that says why, if the model's log-probs of the longest of
    `pairs` differ between the two (sliding windows, recurrent layers, attention that ignores a 4D mask). A reward model
    has no log-probs, and its head is zero at first: there the last hidden states are compared."""
    if name == "padded":
        return LAYOUTS[name]
    longest = [max(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))]
    expected = _numbers(model, padded_pairs(longest).to(model.device))
    try:
        difference = (_numbers(model, prefix_shared(longest).to(model.device)) - expected).abs().max().item()
        reason = f"log-probs would differ by {difference:.2g} nats"
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        difference, reason = float("inf"), str(error).splitlines()[0]
    if difference <= TOLERANCE:
        return LAYOUTS[name]
    say(f"  layout: padded, because {model.config.model_type} cannot share prefixes here ({reason})")
    return LAYOUTS["padded"]


def _numbers(model: PreTrainedModel, batch: Batch) -> Tensor:
    if hasattr(model, "score"):
        return last_hidden_states(model, batch)
    return completion_logps(model, batch).sums
