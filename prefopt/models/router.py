"""The load-balancing loss of a mixture of experts, as the model's own module in transformers computes it."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.data.collate import Batch
from prefopt.errors import UserError

ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model's configuration names experts, as every mixture of experts in transformers does."""
    values = vars(config.get_text_config())
    return any("experts" in name and isinstance(n, int) and n > 1 for name, n in values.items())


def balancing_loss(model: PreTrainedModel) -> Callable[..., Tensor]:
    """`load_balancing_loss_func` of the model's module. Raises UserError for a model whose module has none."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if not has_experts(model.config) or function is None or list(inspect.signature(function).parameters) != ARGUMENTS:
        why = "has no load-balancing loss in transformers" if has_experts(model.config) else "is no mixture of experts"
        raise UserError(
            "model.router_aux_loss_coef weighs a mixture of experts' load-balancing loss, and "
            f"{model.config.model_type} {why}: set it to 0."
        )
    return function


class RouterLoss:
    """The load-balancing loss of the forward passes of `model`, those without gradient left out.

    Of a step, whose loss it is added to with the factor `coef`, it is the mean over the micro-batches, weighted by
    their tokens; the loss of a micro-batch is transformers' own, over all its tokens but padding. (It is not linear in
    the tokens, so the mean depends on the micro-batches, as everywhere.) `total` is that of the present step.

    Raises UserError as `balancing_loss` does.
    """

    def __init__(self, model: PreTrainedModel, coef: float):
        self.coef = coef
        self.total: Tensor | float = 0.0
        self._function = balancing_loss(model)
        # A language model has the number as its own attribute; a reward model of the same architecture has not.
        holder: Any = model if hasattr(model, "num_experts_per_tok") else model.config.get_text_config()
        self._top_k: int = holder.num_experts_per_tok
        self._logits: tuple[Tensor, ...] = ()
        model.base_model.register_forward_pre_hook(self._ask, with_kwargs=True)
        model.base_model.register_forward_hook(self._keep)

    def _ask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | ({"output_router_logits": True} if torch.is_grad_enabled() else {})

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._logits = output.router_logits

    def __call__(self, batch: Batch, tokens: int) -> Tensor:
        """The share of `batch`, whose forward pass was the last one, in the loss of a step of `tokens` tokens."""
        mask = None
        if any(owner is None for owner, _ in batch.spans):
            values = [0.0 if owner is None else 1.0 for owner, _ in batch.spans]
            mask = torch.tensor(values).repeat_interleave(torch.tensor([n for _, n in batch.spans]))
        loss = self._function(self._logits, self._logits[0].shape[-1], self._top_k, mask)
        self._logits = ()
        share = loss * (batch.tokens / tokens)
        self.total = self.total + share.detach()
        return self.coef * share
