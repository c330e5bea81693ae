"""LoRA adapters, and the settings in which a policy in training differs from the same policy in evaluation.

transformers puts the adapter into the model itself. So the policy stays a `PreTrainedModel`, and its reference is the
same model with the adapter switched off. `peft` is imported only if there is an adapter.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.config.schema import PeftConfig
from prefopt.errors import UserError
from prefopt.utils.files import follow_umask, write_json
from prefopt.utils.seed import mix_seed


def merge_adapter(model: PreTrainedModel, path: str) -> None:
    """Add the adapter in folder `path` to the weights of `model`. Raises UserError for one that does not fit."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    conversions = getattr(model, "_weight_conversions", None)
    try:
        model.load_adapter(path)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"peft.path={path} cannot be loaded into the model: {str(error).splitlines()[0]} Give an adapter that was "
            "made for this model."
        ) from None
    # Loading an adapter sets the model's rules for renaming weights, by which transformers would save the model, too.
    model._weight_conversions = conversions  # type: ignore[assignment]  # a list
    merge(model)
    # An optimizer on weights that became bfloat16 would lose small updates.
    changed = [name for name, p in model.named_parameters() if dtypes.get(name) != p.dtype]
    assert not changed, changed
    model.requires_grad_(True)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> None:
    """Put a new adapter on the layers that `config` names. It starts as zero, so the model's outputs do not change, and
    its random factor is a function of `seed`. Afterwards only the adapter, and the head of a reward model, is
    trainable.

    Raises UserError as `adapter_layers` does.
    """
    from peft import LoraConfig

    targets = adapter_layers(model, config)
    torch.manual_seed(seed)
    model.add_adapter(
        LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    )
    model.eval()
    if hasattr(model, "score"):
        cast(nn.Linear, model.score).requires_grad_(True)


def adapter_layers(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """The names of the layers that `config` puts an adapter on.

    Raises UserError if there are none, or if the head is among them: prefopt applies the head to selected positions,
    and many models share its weight with the embeddings.
    """
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    targets = {name for name in linear if name.rpartition(".")[2] in config.target_modules}
    heads = {name for name, m in model.named_modules() if m is model.get_output_embeddings() or name == "score"}
    if not targets or targets & heads:
        names = sorted({name.rpartition(".")[2] for name in linear - heads})
        raise UserError(
            f"peft.target_modules={config.target_modules}: "
            + (f"{', '.join(targets & heads)} is the head, which takes no adapter" if targets else "there are none")
            + f" in {model.config.model_type}. Its layers are: {', '.join(names)}."
        )
    return sorted(targets)


def save_adapter(model: PreTrainedModel, target: Path) -> None:
    """Write the adapter without the model below it, as `model.load_adapter(target)` and peft read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns if it cannot find the base model's config on the hub
        model.save_pretrained(target)
    follow_umask(target)
    if not hasattr(model, "score"):
        return
    # The head is trained whole; peft keeps such modules beside the adapter.
    weights, described = target / "adapter_model.safetensors", target / "adapter_config.json"
    head = {"base_model.model.score.weight": cast(nn.Linear, model.score).weight.detach().cpu().contiguous()}
    save_file(load_file(weights) | head, weights, {"format": "pt"})
    write_json(described, json.loads(described.read_text()) | {"modules_to_save": ["score"], "task_type": "SEQ_CLS"})
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
        has_dropout = isinstance(module, nn.Dropout) and module.p > 0
        if has_dropout or isinstance(module, GradientCheckpointingLayer):
            modules.append(module)

    for module in modules:
        # The attribute and not `module.train()`, which would also switch the layers inside.
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def seed_dropout(*numbers: int) -> None:
    """Seed torch's global generators with `mix_seed(*numbers)`. A resumed run so draws the dropout that it would have
    drawn, and the two passes over a micro-batch draw the same."""
    torch.manual_seed(mix_seed(*numbers))
