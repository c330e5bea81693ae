"""What the loop asks of the machinery below it. This is plain PyTorch in one process."""

import importlib.metadata
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from torch import Tensor

from prefopt.config.schema import EngineConfig, OptimizerConfig
from prefopt.errors import UserError
from prefopt.training.optim import adamw
from prefopt.utils.distributed import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEEPSPEED = "0.19.8"  # 0.17.6 to 0.18.2 compute wrong gradients at stage 2; caller-owned accumulation came with 0.19


def check_engine(config: EngineConfig, device: str) -> None:
    """Raise UserError where the engine lacks its package, or does not fit the number of processes."""
    if world_size() > 1 and ":" in device:
        raise UserError(f"device={device} would be the GPU of all {world_size()} processes. Give device=cuda.")
    if config.name == "single" and world_size() > 1:
        raise UserError(
            f"this was started as {world_size()} processes (WORLD_SIZE), and engine=single trains in one: add "
            "engine=zero2, or start one."
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
    """Holds the policy and its optimizer; weights and moments are float32. Gradients add up over `backward` calls until
    `step`; the caller owns the denominator."""

    def __init__(self, policy: "PreTrainedModel", config: OptimizerConfig):
        self.policy = policy
        self.optimizer = adamw(policy, config)
        self.max_grad_norm = config.max_grad_norm
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def without_gradient(self) -> list[str]:
        """Names of trainable tensors that no backward pass since the last step has reached."""
        return [name for name, p in self.parameters.items() if p.grad is None]

    def clip_gradients(self) -> Tensor:
        """Clip to the configured global norm (0: leave as they are); return the norm before."""
        limit = self.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Forget the gradients instead of a step."""
        self.optimizer.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"weights", "moments"}: flat, named tensors; `load_state` takes them back exactly."""
        moments = {
            # bitsandbytes counts steps by an int, and lets parameters share its maps, which one file cannot.
            f"{name}/{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state[p].items()
        }
        return {"weights": {name: p.detach() for name, p in self.parameters.items()}, "moments": moments}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Raises KeyError where the names are not exactly those of this policy's trainable parameters."""
        weights, moments = state["weights"], state["moments"]
        self.check_names(weights)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])
        for key, value in moments.items():
            name, _, field = key.rpartition("/")
            p = self.parameters[name]
            # A clone of its own: fused AdamW updates moments in place.
            moment = value.to(p.device).clone()
            as_int = field == "step" and not isinstance(self.optimizer, torch.optim.AdamW)
            self.optimizer.state[p][field] = int(moment) if as_int else moment

    def check_names(self, weights: dict[str, Tensor]) -> None:
        """Raise KeyError unless `weights` are all that is trainable, and nothing else."""
        if weights.keys() != self.parameters.keys():
            raise KeyError(f"parameters differ: {sorted(weights.keys() ^ self.parameters.keys())[:5]}")
