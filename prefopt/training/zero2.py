"""The engine for several processes: DeepSpeed's ZeRO stage 2 partitions gradients and optimizer state over them.

    torchrun --nproc-per-node=8 -m prefopt.train engine=zero2 objective=dpo

Every process holds all weights, in float32, and computes its share of each step's pairs. Some of DeepSpeed's defaults
are switched off: the caller owns the denominator, gradients add up in float32 until `step`, no loss is scaled, and
communication does not overlap with computation (older versions computed wrong gradients then). Checkpoints hold the
whole state, not shards, so a run can resume with another number of processes.
"""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.config.schema import OptimizerConfig
from prefopt.training.engine import Engine
from prefopt.training.optim import adamw
from prefopt.utils.distributed import world_size


class _Pass(nn.Module):
    """The model as DeepSpeed sees it: the trained parameters, and a forward pass that passes the loss through.

    DeepSpeed hooks into the output of its model's forward pass, but the loop calls the policy directly. It takes no
    frozen parameter that is not float32.
    """

    def __init__(self, trained: Iterable[nn.Parameter]):
        super().__init__()
        self.trained = nn.ParameterList(trained)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class Zero2(Engine):
    """An `Engine` over several processes. Its methods are collective: all processes must call them equally often."""

    def __init__(self, policy: PreTrainedModel, config: OptimizerConfig, offload: bool):
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it; a process without torchrun has none
        import deepspeed

        # DeepSpeed calls a deprecated function, and every process would print the warning.
        warnings.filterwarnings("ignore", ".*all_gather_into_tensor.* is deprecated", FutureWarning)
        self.policy = policy
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._reached: set[str] = set()
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
        self.deepspeed, *_ = deepspeed.initialize(
            model=_Pass(self.parameters.values()),
            optimizer=adamw(policy, config),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # required, and not used: the loop makes the micro-batches
                "gradient_clipping": config.max_grad_norm,
                "managed_gradient_accumulation": False,
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": 2,
                    "overlap_comm": False,
                    "offload_optimizer": {"device": "cpu" if offload else "none"},
                },
            },
        )
        self.zero: Any = self.deepspeed.optimizer

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over processes. Here the losses of all processes add up to the step's loss.
        self.deepspeed.backward(self.deepspeed(loss * world_size()), scale_wrt_gas=False)

    def without_gradient(self) -> list[str]:
        return sorted(self.parameters.keys() - self._reached)

    def clip_gradients(self) -> Tensor:
        self.zero.finalize_gradient_accumulation_boundary()
        norm = torch.as_tensor(self.zero.scaled_global_norm())
        return torch.where(norm < 0, torch.nan, norm)  # DeepSpeed returns -1 for a norm that is not finite

    def step(self, lr: float) -> None:
        """As in `Engine`; DeepSpeed clips in here."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.zero.step()
        self.zero.zero_grad()
        self._reached.clear()

    def discard(self) -> None:
        """As in `Engine`. DeepSpeed has no such call; these are the steps of its handling of an overflow."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        self.zero.micro_step_id = INITIAL_MICRO_STEP_ID
        self.zero.zero_grad()
        self.zero._release_preflattened_grad_buffers()
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()
            self.zero._offload_accumulated_param_ids = set()
        else:
            self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
            self.zero.all_grad_tensors = dict.fromkeys(self.zero.all_grad_tensors)
        self._reached.clear()

    def state(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = {name: safe_get_full_fp32_param(p) for name, p in self.parameters.items()}
        moments = {}
        if self.zero.optimizer.state:  # empty before the first step
            self._link()
            step = next(iter(self.zero.optimizer.state.values()))["step"]
            for name, p in self.parameters.items():
                moments[f"{name}/step"] = step.clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[f"{name}/{key}"] = safe_get_full_optimizer_state(p, key)
        return {"weights": weights, "moments": moments}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        weights, moments = state["weights"], state["moments"]
        self.check_names(weights)
        for name, p in self.parameters.items():
            with torch.no_grad():
                p.copy_(weights[name])
            safe_set_full_fp32_param(p, weights[name].to(self.device))
        if not moments:
            return
        step = moments[f"{next(iter(self.parameters))}/step"]
        for partition in self.zero.single_partition_of_fp32_groups:
            state_ = self.zero.optimizer.state[partition]
            state_["step"] = step.clone().to(partition.device)
            state_["exp_avg"], state_["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        self._link()
        for name, p in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, moments[f"{name}/{key}"].to(self.device), key)

    def _link(self) -> None:
        """Link each parameter to its moments again. DeepSpeed does it once, within the first step, when the second
        parameter group has no moments yet."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()
