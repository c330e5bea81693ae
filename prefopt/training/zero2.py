"""The engine for several processes: DeepSpeed's ZeRO stage 2 partitions gradients and optimizer state over them.

    torchrun --nproc-per-node=8 -m prefopt.train engine=zero2 objective=dpo

Every process holds all weights and computes its share of each step's pairs. With precision=bfloat16 the weights of
linear layers are held in bfloat16, to which autocast would round them, and their float32 masters are in the partitions
of the optimizer's state; an adapter stays in float32. Some of DeepSpeed's defaults
are switched off: the caller owns the denominator, gradients add up in float32 until `step`, no loss is scaled, and
communication does not overlap with computation (older versions computed wrong gradients then). Checkpoints hold the
whole state, not shards, so a run can resume with another number of processes.
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from prefopt.config.schema import OptimizerConfig
from prefopt.models.frozen import products
from prefopt.models.lora import has_adapter
from prefopt.training.engine import Engine, in_main, present, with_weights, without_weights
from prefopt.training.optim import adamw
from prefopt.utils.distributed import broadcast, is_main_process, world_size


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

    def __init__(self, policy: PreTrainedModel, config: OptimizerConfig, offload: bool, precision: str):
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it; a process without torchrun has none
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        # DeepSpeed calls a deprecated function, and every process would print the warning.
        warnings.filterwarnings("ignore", ".*all_gather_into_tensor.* is deprecated", FutureWarning)
        self.policy = policy
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        optimizer = adamw(policy, config)
        masters = {}
        if precision == "bfloat16" and not has_adapter(policy):
            masters = round_products(policy, optimizer)
        self._shell = without_weights(policy) if masters else None
        self._reached: set[str] = set()
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
        self.deepspeed, *_ = deepspeed.initialize(
            model=_Pass(self.parameters.values()),
            optimizer=optimizer,
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
        for p, master in masters.items():
            safe_set_full_fp32_param(p, master.to(self.device))

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

    @contextlib.contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        if self._shell is None:
            yield self.policy
            return
        yield with_weights(self._shell, dict(self.policy.named_parameters()) | self._masters())

    def state(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, Tensor | None] = {}
        if self.zero.optimizer.state:  # empty before the first step
            self._link()
            step = next(iter(self.zero.optimizer.state.values()))["step"]
            for name, p in self.parameters.items():
                moments[f"{name}/step"] = in_main(step.clone())
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[f"{name}/{key}"] = in_main(safe_get_full_optimizer_state(p, key))
        return {"weights": self._masters(), "moments": present(moments)}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        weights, moments = state["weights"], state["moments"]
        if is_main_process():
            self.check_names(weights)
        for name, p in self.parameters.items():
            value = self._from_main(weights.get(name), p.shape)
            with torch.no_grad():
                p.copy_(value)
            safe_set_full_fp32_param(p, value)
        if not broadcast(bool(moments)):
            return
        step = self._from_main(moments.get(f"{next(iter(self.parameters))}/step"), torch.Size())
        for partition in self.zero.single_partition_of_fp32_groups:
            state_ = self.zero.optimizer.state[partition]
            state_["step"] = step.clone().to(partition.device)
            state_["exp_avg"], state_["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        self._link()
        for name, p in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, self._from_main(moments.get(f"{name}/{key}"), p.shape), key)

    def _masters(self) -> dict[str, Tensor]:
        """The trained weights in float32, on the CPU of the main process."""
        from deepspeed.utils import safe_get_full_fp32_param

        return present({name: in_main(safe_get_full_fp32_param(p)) for name, p in self.parameters.items()})

    def _from_main(self, value: Tensor | None, shape: torch.Size) -> Tensor:
        """The main process's `value`, which has this shape, on the device of each process."""
        found = torch.empty(shape, device=self.device) if value is None else value.to(self.device)
        distributed.broadcast(found, 0)
        return found

    def _link(self) -> None:
        """Link each parameter to its moments again. DeepSpeed does it once, within the first step, when the second
        parameter group has no moments yet."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()


def round_products(policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """Round `models.frozen.products` to bfloat16, in place, with parameter groups of their own in `optimizer`. Returns
    their values before, on the CPU.

    DeepSpeed adds gradients up in the type of the first group: that is one of float32.
    """
    rounded = products(policy)
    groups: list[dict[str, Any]] = []
    for low in (False, True):
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if (p in rounded) == low]
            groups += [{**group, "params": params}] if params else []
    if not any(p in rounded for p in groups[-1]["params"]) or groups[0]["params"][0] in rounded:
        return {}  # of one type alone
    optimizer.param_groups[:] = groups
    masters = {}
    for p in (p for group in groups for p in group["params"] if p in rounded):
        masters[p] = p.data.cpu().clone()
        p.data = p.data.to(torch.bfloat16)
    return masters
