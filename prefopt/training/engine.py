"""The engine: backward, clip, optimizer step and state. This one is plain PyTorch in one process."""

import contextlib
import copy
import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from prefopt.config.schema import EngineConfig, OptimizerConfig
from prefopt.errors import UserError
from prefopt.training.optim import adamw
from prefopt.utils.distributed import is_main_process, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEEPSPEED = "0.19.8"  # 0.17.6 to 0.18.2 compute wrong gradients at stage 2; caller-owned accumulation came with 0.19


def check_engine(config: EngineConfig) -> None:
    """Raise UserError where the engine lacks its package, or does not fit the number of processes."""
    if config.name == "single" and world_size() > 1:
        raise UserError(
            f"this was started as {world_size()} processes (WORLD_SIZE), and engine=single trains in one: add "
            "engine=fsdp or engine=zero2, or start one."
        )
    if config.name == "zero2":
        try:
            version = importlib.metadata.version("deepspeed")
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or Version(version) < Version(DEEPSPEED):
            raise UserError(
                f"engine=zero2 needs the package deepspeed, {DEEPSPEED} or later; there is {version}: pip install "
                "-e '.[deepspeed]'"
            )


class Engine:
    """Holds the policy and its optimizer. Weights and moments are float32.

    Gradients add up over `backward` calls until `step`. Nothing is averaged: the caller divides its losses.
    """

    sharded = False  # whether a forward pass of the policy is a collective

    def __init__(self, policy: "PreTrainedModel", config: OptimizerConfig):
        self.policy = policy
        self.optimizer = adamw(policy, config)
        self.max_grad_norm = config.max_grad_norm
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (0-dim) to that of the step."""
        loss.backward()

    def without_gradient(self) -> list[str]:
        """Names of trainable tensors that got no gradient since the last step."""
        return [name for name, p in self.parameters.items() if p.grad is None]

    def clip_gradients(self) -> Tensor:
        """Clip to the global norm `max_grad_norm` (0: do not). Returns the norm before clipping, 0-dim."""
        limit = self.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def step(self, lr: float) -> None:
        """Take an optimizer step with learning rate `lr`, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Clear the gradients without a step."""
        self.optimizer.zero_grad()

    def unsharded(self) -> contextlib.AbstractContextManager[None]:
        """Inside, each process has all weights of the policy, to compute with them alone and without gradient."""
        return contextlib.nullcontext()

    def gathered(self) -> contextlib.AbstractContextManager["PreTrainedModel"]:
        """The policy with its weights as they are trained, for an export by the main process."""
        return contextlib.nullcontext(self.policy)

    def local(self) -> dict[str, Tensor]:
        """What this process holds of the trained weights."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"weights", "moments"}: named tensors, which `load_state` restores bit for bit. They are whole, whatever the
        engine, in the main process; of several processes the others get none."""
        moments = {
            # In bitsandbytes the step is an int, and parameters share quantization maps. A safetensors file cannot hold
            # one tensor under two names, so the maps are cloned.
            f"{name}/{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state[p].items()
        }
        return {"weights": {name: p.detach() for name, p in self.parameters.items()}, "moments": moments}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state` returned, by what the main process has of it. Raises KeyError unless the names are those
        of the trainable parameters."""
        weights, moments = state["weights"], state["moments"]
        self.check_names(weights)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])
        for key, value in moments.items():
            name, _, field = key.rpartition("/")
            p = self.parameters[name]
            # A clone: fused AdamW updates moments in place, and `state` still belongs to the caller.
            moment = value.to(p.device).clone()
            as_int = field == "step" and not isinstance(self.optimizer, torch.optim.AdamW)
            self.optimizer.state[p][field] = int(moment) if as_int else moment

    def check_names(self, weights: dict[str, Tensor]) -> None:
        """Raise KeyError unless `weights` has exactly the names of the trainable parameters."""
        if weights.keys() != self.parameters.keys():
            raise KeyError(f"parameters differ: {sorted(weights.keys() ^ self.parameters.keys())[:5]}")


def without_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of `model` on the CPU, whose parameters have shapes alone."""
    memo: dict[int, Any] = {id(b): b.detach().cpu().clone() for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def with_weights(shell: "PreTrainedModel", weights: dict[str, Tensor]) -> "PreTrainedModel":
    """A copy of `without_weights` that has these weights; the others stay shapes."""
    parameters = {name: p for name, p in shell.named_parameters() if name in weights}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(weights[name].detach(), p.requires_grad) for name, p in parameters.items()
    }
    return copy.deepcopy(shell, memo)


def in_main(value: Tensor) -> Tensor | None:
    """`value` on the CPU in the main process, None elsewhere."""
    return value.detach().cpu() if is_main_process() else None


def present(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}
