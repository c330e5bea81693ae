"""A value head beside the policy: what a completion is worth, read at its last token (SVPO, arXiv 2406.10858).

V = tanh(w h + b) of the hidden state h, in (-1, 1): the head of the same authors' AlphaMath. It is a module of the
policy, so that engines train it and checkpoints hold it. An exported policy goes without it: it is an ordinary language
model, and the head served to shape its hidden states.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.models.frozen import VALUE_HEAD


def add_value_head(policy: PreTrainedModel) -> None:
    """Put a trainable head on `policy`, in float32. It starts at zero, and so does V."""
    head = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    setattr(policy, VALUE_HEAD, head)


def completion_values(policy: PreTrainedModel, hidden: Tensor) -> Tensor:
    """V `(C,)`, float32, from the hidden states `(C, H)` of the last tokens."""
    # In float32 whatever the precision, as the rewards of a reward model.
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(nn.Linear, getattr(policy, VALUE_HEAD))(hidden.float())[:, 0].tanh()


def without_value_head(policy: PreTrainedModel) -> PreTrainedModel:
    """`policy`, or, where it has a value head, the same modules without it."""
    if not hasattr(policy, VALUE_HEAD):
        return policy
    other = copy.copy(policy)
    other._modules = {name: module for name, module in policy._modules.items() if name != VALUE_HEAD}
    return other
