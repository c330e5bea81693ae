"""LoRA inside of a `PreTrainedModel`, and what differs between the policy in training and the policy as it is measured.

The adapter is put into the model by transformers itself, so that the policy stays what the rest of prefopt expects and
its reference is the same model with the adapter switched off. `peft` is imported only where there is an adapter.
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
from prefopt.utils.files import write_json
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
    # transformers keeps how the adapter's names were read, and would write the model's own names by it.
    model._weight_conversions = conversions  # type: ignore[assignment]  # a list
    merge(model)
    changed = [name for name, p in model.named_parameters() if dtypes.get(name) != p.dtype]
    assert not changed, changed
    model.requires_grad_(True)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> None:
    """Put a fresh adapter, which changes nothing yet, on the layers that `config` names: from now on it is all that is
    trainable, besides the head of a reward model. Its initial values are a function of `seed`.

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

    Raises UserError where there are no such layers, or the head is one of them: prefopt applies it to chosen positions
    alone, and its weight is that of the embeddings in many models.
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
    """Write the adapter by itself, as `model.load_adapter(target)` and peft read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base model's config on the hub
        model.save_pretrained(target)
    if not hasattr(model, "score"):
        return
    # The head is trained whole; peft keeps such modules beside the adapter.
    weights, described = target / "adapter_model.safetensors", target / "adapter_config.json"
    head = {"base_model.model.score.weight": cast(nn.Linear, model.score).weight.detach().cpu().contiguous()}
    save_file(load_file(weights) | head, weights, {"format": "pt"})
    write_json(described, json.loads(described.read_text()) | {"modules_to_save": ["score"], "task_type": "SEQ_CLS"})


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the weights below it and remove it: a plain model that computes the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep each layer's input alone, in training, and compute the rest again in the backward pass.

    Raises UserError for an architecture that does not know how.
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
    """Inside, dropout is drawn and activations are computed again, in forward and backward passes alike; outside, the
    policy is what is exported. The model has no other dropout than the adapter's (`models.load`)."""
    modules = [
        m
        for m in model.modules()
        if (isinstance(m, nn.Dropout) and m.p > 0) or isinstance(m, GradientCheckpointingLayer)
    ]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def seed_dropout(*numbers: int) -> None:
    """What is drawn from now on is a function of `numbers`: a run that goes on draws what it would have drawn, and two
    passes over a micro-batch see the same model."""
    torch.manual_seed(mix_seed(*numbers))
