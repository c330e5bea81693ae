"""The engine that shares out everything: PyTorch's `fully_shard` splits weights, gradients and moments over processes.

    torchrun --nproc-per-node=8 -m prefopt.train engine=fsdp objective=dpo

Each process holds a part of every matrix, in float32 where it is trained. The main process alone loads the model, on
its CPU, and shares it out part by part. A layer's matrices are gathered when the layer computes, and let go again. With
precision=bfloat16 the weights of linear layers are gathered in bfloat16, to which autocast would round them; an
adapter's are gathered in float32. Gradients are summed over the processes in float32 after each micro-batch. Vectors
(norms, biases) are small, and whole in every process. What each process computes by itself (the layout's check, the
reference pass, an evaluation) gathers all weights for as long as it takes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.config.schema import OptimizerConfig
from prefopt.models.frozen import products
from prefopt.models.logprobs import AS_FORWARD, as_forward
from prefopt.models.lora import has_adapter
from prefopt.training.engine import Engine, in_main, present, with_weights, without_weights
from prefopt.utils.distributed import broadcast, is_main_process, world_size


class Fsdp(Engine):
    """An `Engine` over several processes. Its methods are collective: all processes must call them equally often, and
    so they must run forward and backward passes of the policy in training. Inside of `unsharded` each computes alone.
    """

    def __init__(self, policy: PreTrainedModel, config: OptimizerConfig, precision: str, device: str):
        """`policy`: as `from_main` gives it. It is shared out over the processes' `device`s, part by part."""
        self._shell, module = without_weights(policy), type(policy).__module__
        mesh = init_device_mesh(torch.device(device).type, (world_size(),))
        for buffer in policy.buffers():
            buffer.data = buffer.to(device)
        vectors = [p for p in policy.parameters() if p.ndim < 2]
        receive(vectors, device)
        for part, own, dtype in parts_of(policy, precision):
            receive(own, device)
            dtypes = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            fully_shard(part, mesh=mesh, mp_policy=dtypes, ignored_params=set(vectors))
            own.clear()  # only the shards stay
        self._parts = [m for m in policy.modules() if isinstance(m, FSDPModule)]
        for part in self._parts:  # gradients are sums over the processes, and no means
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        type(policy).__module__ = module  # by which the model's own code is found
        setattr(policy, AS_FORWARD, lambda compute: compute(policy))
        register_fsdp_forward_method(policy, AS_FORWARD)
        super().__init__(policy, config)
        self.sharded = True  # but not inside of `unsharded`

    def clip_gradients(self) -> Tensor:
        """As in `Engine`. Before it the gradients of vectors are sums over this process's pairs alone."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        parts = [g.to_local() for g in gradients.values() if isinstance(g, DTensor)]
        whole = [g for g in gradients.values() if not isinstance(g, DTensor)]
        for gradient in whole:
            distributed.all_reduce(gradient)
        squares = torch.stack([torch.zeros((), device=self.device), *(g.square().sum() for g in parts)]).sum()
        distributed.all_reduce(squares)
        norm = torch.stack([squares, *(g.square().sum() for g in whole)]).sum().sqrt()
        if self.max_grad_norm:
            torch._foreach_mul_([*parts, *whole], (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        self.policy.set_reshard_after_forward(False)  # type: ignore[operator]  # it is an FSDPModule
        as_forward(self.policy, lambda policy: None)  # the first forward pass must be the policy's, and no part's
        for part in self._parts:
            part.unshard()
        self.sharded = False
        try:
            yield
        finally:
            self.sharded = True
            for part in self._parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.policy, recurse=False)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """As in `Engine`, on the CPU of the main process. Below an adapter there are shapes alone."""
        wanted = {n: p for n, p in self.policy.named_parameters() if p.requires_grad or not has_adapter(self.policy)}
        yield with_weights(self._shell, present({name: whole(p) for name, p in wanted.items()}))

    def local(self) -> dict[str, Tensor]:
        return {name: local(p.detach()) for name, p in self.parameters.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        weights = {name: whole(p) for name, p in self.parameters.items()}
        moments = {
            f"{name}/{key}": whole(value)
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state[p].items()
        }
        return {"weights": present(weights), "moments": present(moments)}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        weights, moments = state["weights"], state["moments"]
        if is_main_process():
            self.check_names(weights)
        has_moments = broadcast(bool(moments))
        for name, p in self.parameters.items():
            scatter(weights.get(name), p.detach())
            if has_moments:
                step = torch.zeros((), device=self.device)
                of_p = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for key, value in of_p.items():
                    scatter(moments.get(f"{name}/{key}"), value.detach())
                self.optimizer.state[p] = of_p


def from_main(load: Callable[[], tuple[PreTrainedModel, str]]) -> tuple[PreTrainedModel, str]:
    """The model that `load` makes on the CPU of the main process, and its digest. In the other processes the model's
    parameters have shapes alone; all else, buffers too, is the main process's. A collective."""
    loaded = load() if is_main_process() else None
    told = broadcast((without_weights(loaded[0]), loaded[1]) if loaded else None)
    found = loaded or told
    assert found
    return found


def receive(parameters: Iterable[nn.Parameter], device: str) -> None:
    """Give `parameters` (in place) the main process's values, in all processes, on `device`. A collective."""
    for p in parameters:
        value = p.detach().to(device) if is_main_process() else torch.empty(p.shape, dtype=p.dtype, device=device)
        distributed.broadcast(value, 0)
        torch.utils.swap_tensors(p, nn.Parameter(value, p.requires_grad))


def parts_of(policy: PreTrainedModel, precision: str) -> list[tuple[nn.Module, list[nn.Parameter], torch.dtype | None]]:
    """The parts of `policy` whose matrices are gathered together: the module, its matrices that no part before it has,
    and in which type they are gathered (None: in their own). The last one is `policy`, for what is left: it stays
    gathered from the forward to the end of the backward pass."""
    parts: list[nn.Module] = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    embeddings, head = policy.get_input_embeddings(), policy.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:  # else they are gathered for the head, too
        parts.append(embeddings)
    taken, found = set[nn.Parameter](), []
    # An adapter is small, and peft computes its dropout in the type of its weights.
    rounded = set() if has_adapter(policy) else products(policy)
    for part in [*reversed(parts), policy]:
        own = [p for p in part.parameters() if p.ndim >= 2 and p not in taken]
        taken |= set(own)
        # What autocast leaves in float32 is gathered in float32, with what is gathered beside it.
        low = precision == "bfloat16" and all(p in rounded for p in own if p.dtype == torch.float32)
        found.append((part, own, torch.bfloat16 if low else None))
    return found


def local(value: Tensor) -> Tensor:
    """What this process has of `value`."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor | None:
    """`value` in whole, on the CPU of the main process; None elsewhere. A collective."""
    value = value.detach()
    return in_main(value.full_tensor() if isinstance(value, DTensor) else value)


def scatter(value: Tensor | None, target: Tensor) -> None:
    """Write the main process's `value`, which is whole, into all parts of `target`. A collective."""
    given = torch.empty(target.shape, dtype=target.dtype) if value is None else value.to(target.dtype)
    given = given.to(target.device)
    if isinstance(target, DTensor):
        target.to_local().copy_(distribute_tensor(given, target.device_mesh, target.placements).to_local())
    else:
        distributed.broadcast(given, 0)
        target.copy_(given)
