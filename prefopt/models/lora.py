"""Adapters, and the settings in which a policy in training differs from the same policy in evaluation.

transformers puts the adapter into the model itself. So the policy stays a `PreTrainedModel`, and its reference is the
same model with the adapter switched off. `peft` is imported only if there is an adapter.
"""

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.config.schema import PeftConfig
from prefopt.errors import UserError
from prefopt.models.dropout import Noise, PairDropout
from prefopt.models.safe_weights import ADAPTER, check_adapter, no_pickles
from prefopt.utils.files import follow_umask

log = logging.getLogger(__name__)


def merge_adapter(model: PreTrainedModel, path: str) -> None:
    """Merge the adapter in folder `path`, of any kind that peft can merge, into `model`, in place.

    peft makes the adapter's layers from its adapter_config.json, loads the file into them and merges them. In between,
    every tensor of the file must be one of the model, and every tensor of the adapter's layers must be in the file.
    Where an adapter changes one of two tied matrices (embeddings and head), the two are untied: merged into both, it
    would not be the adapter that was trained.

    Raises UserError for an adapter that does not fit, with the names of its tensors.
    """
    from peft import PeftConfig as AdapterConfig
    from peft import PeftModel

    check_adapter(path)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    try:
        config = AdapterConfig.from_pretrained(path)
        # Otherwise peft takes the class of that task, which asks for a model of that task: an adapter of a language
        # model is a start for a reward model, too.
        config.task_type = None
        with no_pickles(f"model.adapter={path}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are refused below, and of tied weights
            peft_model = PeftModel.from_pretrained(model, path, config=config)
        problems = differing_tensors(peft_model, path)
    except Exception as error:  # peft raises anything for an adapter that does not fit
        raise UserError(
            f"model.adapter={path} cannot be loaded into the model: {reason_of(error)}. {ADAPTER_ADVICE}"
        ) from None
    if problems:
        raise UserError(f"model.adapter={path} does not fit the model: {'; '.join(problems)}. {ADAPTER_ADVICE}")

    if not hasattr(peft_model.base_model, "merge_and_unload"):
        raise UserError(
            f"model.adapter={path} is a {config.peft_type.value} adapter, which cannot be merged into weights. Give "
            "one of another kind, LoRA for example."
        )
    note_tied_embeddings(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft_model.merge_and_unload()
    except Exception as error:  # a layer of a kind that peft cannot merge
        raise UserError(f"model.adapter={path} cannot be merged into the weights: {reason_of(error)}") from None
    assert merged is model
    # An optimizer on weights that became bfloat16 would lose small updates.
    changed = [name for name, p in model.named_parameters() if dtypes.get(name, torch.float32) != p.dtype]
    assert not changed, changed
    model.requires_grad_(True)


ADAPTER_ADVICE = "Give an adapter that was made for this model, with the adapter_config.json it was saved with."


def differing_tensors(peft_model: Any, path: str) -> list[str]:
    """In what the adapter in `peft_model` differs from its file in folder `path`: nothing, or the tensors' names."""
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # transformers 5 stores the experts of a layer in one tensor; peft brings adapters of single experts into that form.
    file = convert_peft_adapter_state_dict_for_transformers(
        peft_model, peft_model.peft_config["default"], load_file(Path(path) / ADAPTER)
    )
    adapter = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    everything = peft_model.state_dict()  # a file may hold the embeddings, too, where tokens had been added

    def same(name: str) -> bool:
        loaded = adapter.get(name, everything.get(name))
        return loaded is not None and torch.equal(loaded.cpu(), file[name].to(loaded.dtype))

    lacking, foreign = sorted(adapter.keys() - file.keys()), sorted(name for name in file if not same(name))
    problems = []
    if lacking:
        problems.append(f"its file lacks {len(lacking)} tensors of its layers ({', '.join(lacking[:3])})")
    if foreign:
        problems.append(f"the model has no place for {len(foreign)} of its tensors ({', '.join(foreign[:3])})")
    return problems


def note_tied_embeddings(model: PreTrainedModel) -> None:
    """Say it where an adapter lies on one of two tied matrices, embeddings and head: merged by peft, it changes both,
    while the adapter by itself changed one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    embeddings, head = (cast(Any, x.get_base_layer() if isinstance(x, BaseTunerLayer) else x) for x in layers)
    if head is not None and head.weight is embeddings.weight:
        log.warning(
            "  model.adapter: it lies on embeddings or head, which are one matrix in this model. Merged, as peft "
            "merges it, it changes both; the model is another than that of the adapter by itself."
        )


def reason_of(error: Exception) -> str:
    """The reason in words: of torch's errors, which begin with a heading, the line below it."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (others[0].strip() if others and first.endswith(":") else first).rstrip(".")


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> None:
    """Put a new adapter on the layers that `config` names. It starts as zero, so the model's outputs do not change, and
    its random factor is a function of `seed`. Afterwards only the adapter, and the head of a reward model, is
    trainable.

    Raises UserError as `adapter_layers` does.
    """
    from peft import LoraConfig

    targets = adapter_layers(model, config)
    model.add_adapter(
        LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    )
    # peft has rounded its factors to the type of the layer below: they are drawn again, as it draws them.
    generator = torch.Generator().manual_seed(seed)
    for name in targets:
        layer = cast(Any, model.get_submodule(name))
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        drawn = nn.init.kaiming_uniform_(torch.empty(first.shape), math.sqrt(5), generator=generator)
        first.data, second.data = drawn.to(first.device), second.data.float()
    exchange_dropout(model)
    model.eval()
    if hasattr(model, "score"):
        cast(nn.Linear, model.score).requires_grad_(True)


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there is an adapter in `model`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def exchange_dropout(model: PreTrainedModel) -> None:
    """Put dropout that does not depend on the micro-batches in place of the new adapter's."""
    noise, number = Noise(), 0
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    dropouts[name] = PairDropout(dropout.p, number, noise)
                    number += 1


def adapter_layers(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """The names of the layers that `config` puts an adapter on. As in peft, a target is a layer's name or the end of it
    (`q_proj`, `mlp.down_proj`).

    Raises UserError with the layers that exist for a target that is none of them; for the head, since prefopt applies
    it to selected positions and many models share its weight with the embeddings; and for a name that peft understands
    as that of fused experts.
    """
    heads = {name for name, m in model.named_modules() if m is model.get_output_embeddings() or name == "score"}
    unreached = unreached_modules(model)
    layers = {
        name
        for name, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and name not in unreached | heads
    }
    of_experts = {leaf for leaf in map(leaf_name, layers) if means_experts(model, leaf)}

    problems, targets = [], set()
    for target in config.target_modules:
        matches = {name for name in layers | heads if f".{name}".endswith(f".{target}")}
        if not matches:
            problems.append(f"there are none with the name {target} in {model.config.model_type}")
        elif matches & heads:
            problems.append(f"{target} is the head, which takes no adapter")
        elif target.rpartition(".")[2] in of_experts:
            problems.append(
                f"in {model.config.model_type} peft takes {target} for the fused experts, which take no adapter here"
            )
        targets |= matches
    if problems:
        names = sorted(set(map(leaf_name, layers)) - of_experts)
        raise UserError(
            f"peft.target_modules: {'; '.join(problems)}. All layers that can have one: "
            f"peft.target_modules=[{','.join(names)}]"
        )
    return sorted(targets)


def leaf_name(name: str) -> str:
    return name.rpartition(".")[2]


def means_experts(model: PreTrainedModel, leaf: str) -> bool:
    """Whether peft replaces the target `leaf` by the fused experts' parameters, also where a layer has that name.

    So it reads adapters that were made when each expert had layers of its own; shared experts still have."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of two matrices that are fused
        return True
    return not probe.target_modules


def unreached_modules(model: PreTrainedModel) -> set[str]:
    """The names of the modules that a loss on text does not reach: what lies beside the text decoder and the head, as
    the towers for images and sound."""
    # Of the model without its head: some models call their head `decoder`.
    parts = [cast(Any, model.base_model).get_decoder(), model.get_output_embeddings(), getattr(model, "score", None)]
    reached = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {
        name
        for name, module in model.named_modules()
        if (parameters := list(module.parameters())) and not any(id(p) in reached for p in parameters)
    }


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze what a loss on text does not reach (`unreached_modules`), and say so."""
    unreached = unreached_modules(model)
    tops = sorted(name for name in unreached if name.rpartition(".")[0] not in unreached)
    for name in tops:
        model.get_submodule(name).requires_grad_(False)
    if tops:
        log.info(f"  frozen, since a loss on text does not reach it: {', '.join(tops)}")


def save_adapter(model: PreTrainedModel, target: Path) -> None:
    """Write the adapter without the model below it, as `model.load_adapter(target)` and peft read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns if it cannot find the base model's config on the hub
        tensors = model.get_adapter_state_dict()
    config = copy.deepcopy(cast(Any, model.peft_config["default"]))
    if hasattr(model, "score"):
        # The head is trained whole; peft keeps such modules beside the adapter.
        tensors["score.weight"] = cast(nn.Linear, model.score).weight.detach()
        config.modules_to_save, config.task_type = ["score"], "SEQ_CLS"
    else:
        config.task_type = "CAUSAL_LM"  # peft's AutoPeftModelForCausalLM asks for it
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    # Copies: resized embeddings, which peft keeps beside the adapter, may be tied, and a file holds no memory twice.
    save_file(
        {f"base_model.model.{name}": tensor.clone().contiguous() for name, tensor in tensors.items()},
        target / ADAPTER,
        {"format": "pt"},
    )
    follow_umask(target)


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the weights below it and remove it. The result is a plain model with the same outputs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    # Otherwise transformers would save an adapter instead of the model.
    del model.peft_config
    model._hf_peft_config_loaded = False


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: in training, store only the inputs of the layers and recompute the rest in the backward
    pass.

    Raises UserError for an architecture that does not support it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed late in transformers 5
            # The reentrant form gives no gradient where the embeddings are frozen.
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"gradient_checkpointing: {model.config.model_type} does not support it; set it to false."
        ) from None


@contextlib.contextmanager
def train_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the adapter's dropout and gradient checkpointing are active; outside, the policy is as it is exported.

    Not `model.train()`: only the modules that implement these two change. All other modules stay in evaluation mode,
    as `models.load.finalize` left them, without dropout.
    """
    modules = []
    for module in model.modules():
        if isinstance(module, PairDropout | GradientCheckpointingLayer):
            modules.append(module)

    for module in modules:
        # The attribute and not `module.train()`, which would also switch the layers inside.
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False
