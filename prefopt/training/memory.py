"""The memory of a training step, known before anything is loaded or trained.

The forward and backward pass of a micro-batch (the job's model, adapter, layout, log-probs and objective, by the code
that trains) is run on tensors that have a shape and no values, and the bytes that they would take are counted. It
allocates nothing, and takes a second for a model of any size. The rest is arithmetic: AdamW's moments, and what the
engines for several processes share out.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from prefopt.data.collate import LAYOUTS
from prefopt.data.tokenize import TokenizedPair
from prefopt.models import packed_attention
from prefopt.models.frozen import freeze, products
from prefopt.models.load import finalize, fit_tokenizer
from prefopt.models.logprobs import LogprobComputer, Logps, autocast_weight_cache
from prefopt.models.lora import add_adapter, checkpoint_activations, freeze_unreached, train_mode
from prefopt.models.reference import AdapterOff, Following, Reference, Resident
from prefopt.models.value_head import add_value_head
from prefopt.objectives.base import Objective
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.training.state import TrainState
from prefopt.training.step import accumulate_gradients

FLOAT32_BYTES = 4
ADAMW_MOMENTS = 2
# Of a weight in 4 bits: half a byte, and its share of the quantized scales (Dettmers et al. 2023, section 3).
NF4_BYTES = 0.516
BUCKET = 500_000_000  # numbers that DeepSpeed's ZeRO gathers before it reduces them (reduce_bucket_size)
TRACED_LAYERS = (2, 4)  # of a decoder whose layers are all alike: each takes the same


@dataclass(frozen=True)
class StepMemory:
    """What one process holds at the fullest moment of a micro-batch, in bytes. All gradients are there already, as they
    are from a step's second micro-batch on, and so are the moments."""

    weights: int  # the policy's, with those that are gathered for a while, and those of a resident reference
    gradients: int
    optimizer: int  # the moments, and ZeRO-2's own copy of the weights
    activations: int  # all else: activations, logits, copies of weights in bfloat16
    # Outside of the steps: weights and moments while all weights are whole, as the model is loaded (with FSDP in the
    # main memory alone) or evaluated.
    whole: int = 0

    @property
    def total(self) -> int:
        """The most that is held at any time."""
        return max(self.weights + self.gradients + self.optimizer + self.activations, self.whole)


class TracedStep:
    """The steps of a job, of which each of `processes` has its share. `values` are the configuration of its model.

    Raises what code of an architecture raises that cannot be run on tensors without values.
    """

    def __init__(self, config: TrainConfig, objective: Objective, values: PreTrainedConfig, processes: int = 1):
        self.config, self.processes = config, processes
        policy = model_of_shapes(config, objective, values)
        layout = config.layout
        if layout == "packed":
            try:
                packed_attention.enable_packed_attention(policy)
            except ValueError:  # its attention cannot be exchanged
                layout = "prefix_shared"
        if config.peft.target_modules:
            freeze(policy, config.precision)
        reference: Reference = Cached()
        score = LogprobComputer(config.precision, config.logits == "tiled")
        sync = config.reference_sync
        if sync.every:
            reference = Following.starting_at(policy, score, sync.every, sync.alpha)
        elif config.reference == "resident" and objective.model_kind == "policy":
            reference = Resident.copy_of(policy, score)
        elif config.reference == "adapter_off":
            reference = AdapterOff(policy, score)
        freeze_unreached(policy)
        self.loaded = weight_bytes(policy, config.peft.quantize)
        if config.peft.target_modules:
            add_adapter(policy, config.peft, config.seed)
        if "values" in objective.needs:
            add_value_head(policy)
        # What an engine for several processes holds in bfloat16 while it computes, and trains in float32.
        self.rounded: Set[Tensor] = set()
        if config.precision == "bfloat16" and config.engine.name != "single" and not config.peft.target_modules:
            self.rounded = {p for p in products(policy) if p.requires_grad}
        if config.gradient_checkpointing:
            checkpoint_activations(policy)
        self.state = TrainState(
            config=config,
            run=cast(Any, None),
            objective=objective,
            schedule=cast(Any, None),
            engine=cast(Any, Shapes(policy)),
            reference=reference,
            tokenizer=cast(Any, None),
            train_pairs=[],
            heldout_pairs=[],
            prompts=[],
            oracle=None,
            layout=LAYOUTS[layout],
        )

    def memory(self, pairs: Sequence[TokenizedPair]) -> StepMemory:
        """The memory while a micro-batch of these `pairs` is computed, one of several in its step."""
        config, policy = self.config, self.state.engine.policy
        models = [policy, *([self.state.reference.frozen] if isinstance(self.state.reference, Resident) else [])]
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        gradients = FLOAT32_BYTES * trained
        optimizer = ADAMW_MOMENTS * trained * (1 if config.optimizer.eight_bit else FLOAT32_BYTES)
        weights = sum(weight_bytes(model, config.peft.quantize) for model in models)
        if config.engine.name == "fsdp":
            resident = weights - weight_bytes(policy, False)
            shards, gathered, of_gathered, whole = self.shared_out()
            optimizer //= self.processes
            return StepMemory(
                weights=shards + gathered + resident,
                gradients=gradients // self.processes + of_gathered,
                optimizer=optimizer,
                activations=self.activations(pairs),
                whole=resident + max(self.loaded if config.device == "cpu" else 0, shards + whole + optimizer),
            )
        if config.engine.name == "zero2":
            weights -= 2 * sum(p.numel() for p in self.rounded)  # their masters are in the optimizer's state
            gradients = gradients // self.processes + FLOAT32_BYTES * BUCKET
            optimizer = (optimizer + FLOAT32_BYTES * trained) // self.processes  # with its copy of the weights
            if config.engine.offload_optimizer:
                optimizer = 0
        return StepMemory(weights, gradients, optimizer, self.activations(pairs), self.loaded)

    def shared_out(self) -> tuple[int, int, int, int]:
        """What a process has of the policy with engine=fsdp, in bytes: its shards; the weights that are gathered at a
        time, and their gradients before they are summed up; all weights, as they are gathered."""
        from prefopt.training.fsdp import parts_of

        policy = self.state.engine.policy
        *parts, (_, own, dtype) = parts_of(policy, self.config.precision)

        def held(parameters: Sequence[Tensor], dtype: torch.dtype | None) -> int:
            return sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)

        def trained(parameters: Sequence[Tensor]) -> list[Tensor]:
            return [p for p in parameters if p.requires_grad]

        vectors = held([p for p in policy.parameters() if p.ndim < 2], None)
        shards = vectors + (held(list(policy.parameters()), None) - vectors) // self.processes
        # The part that computes, and the next one, which is on its way; the rest of the model stays.
        largest = sorted((held(*part[1:]) for part in parts), reverse=True)[:2]
        # Gradients are copied in float32 to be summed up.
        waiting = [held(trained(p), d) + FLOAT32_BYTES * sum(x.numel() for x in trained(p)) for _, p, d in parts]
        of_gathered = held(trained(own), dtype) + max(waiting, default=0)
        return (
            shards,
            held(own, dtype) + sum(largest),
            of_gathered,
            sum(held(p, d) for _, p, d in [*parts, (0, own, dtype)]),
        )

    def activations(self, pairs: Sequence[TokenizedPair]) -> int:
        """The most bytes beside weights, gradients and moments. Of many layers that are alike, few are computed."""
        state, policy = self.state, self.state.engine.policy
        # Of real tensors, since their values decide about shapes; two pairs at least, for mismatched completions.
        completed = state.complete([*pairs, pairs[0]])[: len(pairs)]
        models = [policy, *([state.reference.frozen] if isinstance(state.reference, Resident) else [])]
        layers = len(layers_of(policy))
        if layers <= TRACED_LAYERS[-1] or not are_alike(layers_of(policy)):
            return max(self._peaks(models, completed))
        found = []
        for n in TRACED_LAYERS:
            with contextlib.ExitStack() as stack:
                for model in models:
                    stack.enter_context(first_layers(model, n))
                found.append(self._peaks(models, completed))
        few, more = TRACED_LAYERS
        # Each part grows by its own share a layer, so the part that is fullest in few layers need not be so in many.
        return max(high + (layers - more) * (high - low) // (more - few) for low, high in zip(*found, strict=True))

    def _peaks(self, models: Sequence[PreTrainedModel], pairs: Sequence[TokenizedPair]) -> list[int]:
        """The most bytes while layers and head are computed, and while the gradient of the embeddings is, when the
        layers' activations are gone."""
        state, config = self.state, self.config
        (micro_batch,) = state.collate([list(pairs)])
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            policy, *frozen = [with_fakes(model, self.rounded) for model in models]
            for p in policy.parameters():
                if p.requires_grad and config.engine.name == "single":
                    p.grad = torch.zeros_like(p)
                elif p.requires_grad:  # they leave for the bucket, or are counted with what is gathered
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        reference = state.reference
        if isinstance(reference, Resident):
            reference = Resident(frozen[0], reference.score)
        elif isinstance(reference, AdapterOff):
            reference = AdapterOff(policy, reference.score)
        traced = copy.copy(state)
        traced.engine, traced.reference = cast(Engine, Shapes(policy)), reference
        counted = PeakBytes()

        def layers_begin(module: nn.Module, inputs: Any, embedded: Tensor) -> None:
            counted.part = 0
            if embedded.requires_grad:
                embedded.register_hook(layers_end)

        def layers_end(gradient: Tensor) -> None:
            counted.part = 1

        policy.get_input_embeddings().register_forward_hook(layers_begin)
        with as_device(config.device), mode, counted, train_mode(policy), autocast_weight_cache():
            accumulate_gradients(traced, 0, [micro_batch])
        return counted.peaks


def model_of_shapes(config: TrainConfig, objective: Objective, values: PreTrainedConfig) -> PreTrainedModel:
    """The policy as it is before its adapter, on torch's meta device."""
    values = copy.deepcopy(values)
    auto: Any = AutoModelForCausalLM
    if objective.model_kind == "reward_model":
        auto, values.num_labels = AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        model = auto.from_config(values, dtype=torch.float32)
    return cast(PreTrainedModel, finalize(fit_tokenizer(model, config.model), "meta"))


def weight_bytes(model: PreTrainedModel, quantized: bool) -> int:
    """The bytes of the parameters. `quantized`: those of frozen linear layers, except the head, in 4 bits."""
    head, saved = model.get_output_embeddings(), 0.0
    if quantized:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        saved = sum(w.numel() * (w.element_size() - NF4_BYTES) for w in weights if not w.requires_grad)
    return round(sum(p.numel() * p.element_size() for p in model.parameters()) - saved)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the text decoder; none where it keeps them under another name than most."""
    layers = getattr(cast(Any, model.base_model).get_decoder(), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else nn.ModuleList()


def are_alike(layers: nn.ModuleList) -> bool:
    return len({tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters()) for layer in layers}) == 1


@contextlib.contextmanager
def first_layers(model: PreTrainedModel, n: int) -> Iterator[None]:
    """Inside, `model` has no more layers than its first `n`."""
    decoder = cast(Any, model.base_model).get_decoder()
    layers = decoder.layers
    decoder.layers = layers[:n]
    try:
        yield
    finally:
        decoder.layers = layers


def with_fakes(model: PreTrainedModel, rounded: Set[Tensor]) -> PreTrainedModel:
    """A copy of `model` with new tensors of the same shapes, on the CPU; the parameters in `rounded` are bfloat16."""
    memo: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    for p in model.parameters():
        dtype = torch.bfloat16 if p in rounded else p.dtype
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


@dataclass
class Shapes:
    """An engine without an optimizer: its gradients are not looked at."""

    policy: PreTrainedModel
    device = torch.device("cpu")
    sharded = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Cached(Reference):
    """Log-probs from the cache, which have shapes alone."""

    def logps(self, pairs: Sequence[TokenizedPair], batch: Any, prefixes: bool = False) -> Logps:
        zeros = torch.zeros_like(batch.lengths)
        tokens = torch.zeros(len(batch.lengths), batch.longest)
        return Logps(zeros, batch.lengths, tokens, prefixes=zeros if prefixes else None, weighted=zeros)

    def model(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def as_device(device: str) -> Iterator[None]:
    """Inside, packed rows go through the attention kernel of `device`, whatever device the tensors are on."""
    before = set(packed_attention.VARLEN_DEVICES)
    packed_attention.VARLEN_DEVICES.update({"cpu"} if device.startswith("cuda") else {})
    try:
        yield
    finally:
        packed_attention.VARLEN_DEVICES.intersection_update(before)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside: `now`, and at their most, `peak`; in each of two parts,
    `peaks`, of which `part` is the present one. Those on torch's meta device take none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.part = 0
        self.peaks = [0, 0]
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view, or what is changed in place, has the memory of an input.
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs | self._live:
                    self._live.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peaks[self.part] = max(self.peaks[self.part], self.now)
        return output

    @property
    def peak(self) -> int:
        return max(self.peaks)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size
