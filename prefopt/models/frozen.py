"""Models that are not trained: below an adapter, as a reference, as a reward model that scores, or to sample from.

Where products are computed in bfloat16, they take 2 bytes a parameter instead of 4, and compute the same.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

VALUE_HEAD = "value_head"  # the policy's module of that name (`prefopt.models.value_head`)


def freeze(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """Freeze `model` (in place). With precision=bfloat16 the weights of its linear layers become bfloat16, and so do
    its embeddings where bfloat16 holds their values exactly, as it does those of a checkpoint in bfloat16.

    Under autocast this changes no bit of what the model computes: autocast rounds the same weights before every
    product, and embeddings come out in float32 as before. Norms, biases and buffers stay float32; so does the head
    `score` of a reward model, which is applied in float32, and the fused experts of a mixture, of which autocast knows
    nothing.
    """
    model.requires_grad_(False)
    if precision != "bfloat16":
        return model
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    # A subclass of Embedding may compute with its weight.
    kept = {id(m.weight) for m in tables if type(m) is not nn.Embedding or not holds_exactly(m.weight)}
    for name, module in model.named_modules():
        if is_product(name, module) or type(module) is nn.Embedding:
            weight = cast(Tensor, module.weight)
            if weight.dtype == torch.float32 and id(weight) not in kept:  # weights of 4 bits are not
                weight.data = weight.data.to(torch.bfloat16)
    for table in tables:
        if table.weight.dtype == torch.bfloat16:
            table.register_forward_hook(as_float32)
    return model


def is_product(name: str, module: nn.Module) -> bool:
    """Whether autocast rounds the weight of `module`, `name` in its model, for a product. The heads of a reward model
    and of values are applied in float32."""
    return (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and name not in ("score", VALUE_HEAD)


def products(model: nn.Module) -> set[Tensor]:
    """The weights that autocast rounds wherever they are used: those of `is_product` that are no embeddings, too."""
    found = {cast(Tensor, m.weight) for name, m in model.named_modules() if is_product(name, m)}
    return found - {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}


def holds_exactly(weight: Tensor) -> bool:
    """Whether bfloat16 holds every value of `weight`. A tensor without values is taken for one of such a checkpoint."""
    return weight.is_meta or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def as_float32(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.float()
