"""Load a causal language model and its tokenizer by name, folder, or GGUF file."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prefopt.config.schema import ModelConfig
from prefopt.data.tokenize import check_chat_template
from prefopt.errors import UserError
from prefopt.models.gguf import _convert_gguf
from prefopt.utils.files import resolve_path

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# transformers would ask a service on the hub, in the background, to make safetensors of a pickle.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# With every adapter on a CPU it asks for a package that would fetch code from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# Saving a model and adapters import deepspeed where it is installed, which warns where it finds no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or one without chat template or eos token."""
    own = config.tokenizer is None
    path = checkpoint_path(config) if own else str(config.tokenizer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision if own else None, trust_remote_code=False
        )
    except Exception as error:  # whatever reading somebody's files raises
        given = f"model.path={path}" if own else f"model.tokenizer={path}"
        raise UserError(_cannot_load("tokenizer", given, path, error)) from None
    check_chat_template(tokenizer)
    return tokenizer


def check_model(config: ModelConfig, key: str = "model.path") -> int | None:
    """The most tokens that a row may have, where the model says so (`max_position_embeddings`). Raises UserError,
    before any weight is read, for a model that cannot be found. `key`: where the user named it."""
    try:
        found = AutoConfig.from_pretrained(checkpoint_path(config), revision=config.revision, trust_remote_code=False)
        return getattr(found, "max_position_embeddings", None)
    except UserError:
        raise
    except Exception as error:  # whatever reading somebody's files raises
        raise UserError(_cannot_load("model", f"{key}={config.path}", config.path, error)) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer with more tokens than the model has embeddings."""
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model {rows} embeddings: "
            "they do not belong together."
        )


def load_model(config: ModelConfig, device: str, quantize: str | None = None) -> PreTrainedModel:
    """Float32 weights in evaluation mode, with every dropout probability at 0, on `device`. `quantize`: the weights of
    the linear layers but the head in 4 bits (NF4, with quantized scales; Dettmers et al. 2023, arXiv 2305.14314), to
    be computed with in this precision.

    Raises UserError for a model that cannot be found.
    """
    changes: dict[str, Any] = {}
    if quantize:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, quantize),
        )
        changes = {"quantization_config": four_bits, "device_map": {"": device}}
    model, lacking = _from_pretrained(AutoModelForCausalLM, config, **changes)
    if lacking:
        raise UserError(
            f"the checkpoint {config.path} lacks {len(lacking)} of its model's weights, or has them in another shape: "
            f"{', '.join(lacking[:3])}. They would be random; get the checkpoint again."
        )
    return finalize(model, device)


def load_reward_model(config: ModelConfig, device: str) -> PreTrainedModel:
    """The same backbone with a scalar head `score` (hidden -> 1, no bias), which starts at zero.

    Raises UserError for a model that cannot be found or that already is a reward model.
    """
    model, lacking = _from_pretrained(AutoModelForSequenceClassification, config, num_labels=1)
    if lacking != ["score.weight"]:
        raise UserError(
            f"objective=reward puts a new head on a causal language model; {config.path} "
            + (
                f"lacks {', '.join(lacking[:3])}."
                if lacking
                else "already has one. Start from the model it was made of."
            )
        )
    torch.nn.init.zeros_(cast(torch.nn.Linear, model.score).weight)
    # transformers reads the last token that is not padding. Where pad is the terminator that would be the wrong one:
    # without a pad id it refuses batches instead.
    if model.config.pad_token_id == model.config.eos_token_id:
        model.config.pad_token_id = None
    return finalize(model, device)


def load_trained_reward_model(config: ModelConfig, device: str) -> PreTrainedModel:
    """A model whose head `score` of one output has been trained. Raises UserError for any other."""
    model, lacking = _from_pretrained(AutoModelForSequenceClassification, config)
    head = getattr(model, "score", None)
    if lacking or not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        why = f"lacks {', '.join(lacking[:3])}" if lacking else "has no linear head `score` of one output"
        raise UserError(
            f"{config.path} is no reward model that prefopt can read: it {why}. Give the policy/ folder of a run of "
            "objective=reward, or a sequence-classification model with one label."
        )
    return finalize(model, device)


def load_custom_reward_model(config: ModelConfig, device: str) -> PreTrainedModel:
    """A reward model with code of its own, which is run. The user has asked for it, for this model."""
    model, lacking = _from_pretrained(AutoModelForSequenceClassification, config, trust_remote_code=True)
    if lacking:
        raise UserError(f"the checkpoint {config.path} lacks {', '.join(lacking[:3])}, which would be random.")
    return finalize(model, device)


def _from_pretrained(auto: Any, config: ModelConfig, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model in float32, and the names of weights that its checkpoint lacks or holds in another shape."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is missing is judged below, not in a table on the screen
    try:
        # The dtype is explicit because transformers 5 takes the checkpoint's own otherwise, and an optimizer on
        # bfloat16 weights loses small updates.
        model, loading = auto.from_pretrained(
            checkpoint_path(config),
            revision=config.revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are among what is lacking
            use_safetensors=True,
            **{"trust_remote_code": False} | changes,
        )
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever reading somebody's files raises
        raise UserError(_cannot_load("model", f"model.path={config.path}", config.path, error)) from None
    return model, sorted(str(key) for key in [*loading["missing_keys"], *loading["mismatched_keys"]])


def finalize(model: torch.nn.Module, device: str) -> Any:
    """On its device, in evaluation mode, without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # a plain attribute of attention modules
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack weights of 4 bits anew when it first computes without gradient, with coarser
            # scales, and could not differentiate afterwards.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile the MLPs and norms of the layers in place; attention and the head stay as they are. Row lengths are
    dynamic, so nothing is compiled twice; inductor keeps its kernels on disk (TORCHINDUCTOR_CACHE_DIR)."""
    for name, module in model.named_modules():
        if name.endswith("mlp") or type(module).__name__.endswith("RMSNorm"):
            module.compile(dynamic=True)


def checkpoint_path(config: ModelConfig) -> str:
    """What transformers can load: the configured name or folder, or for a GGUF file its converted checkpoint."""
    if not config.path.endswith(".gguf"):
        return str(resolve_path(config.path)) if config.path.startswith("package://") else config.path
    gguf = resolve_path(config.path)
    if not gguf.is_file():
        raise UserError(f"model file {config.path} does not exist.")
    return str(_convert_gguf(gguf))


def resolved_config(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration with every default, as JSON values: what its numbers depend on besides the weights
    (rotary scaling, sliding window, ...), and not where it was read from."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and values of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        values = parameter.detach()
        if hasattr(parameter, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            values = dequantize_4bit(values, parameter.quant_state)
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cannot_load(what: str, given: str, path: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    folder = Path(path)
    if what == "model" and folder.is_dir() and (pickles := [f for s in PICKLES for f in sorted(folder.rglob(s))]):
        reason = (
            f"{pickles[0].relative_to(folder)} is a pickle (PyTorch's or DeepSpeed's), which could run any code and is "
            "not read; weights must be safetensors. If you trust it, convert it with the program that wrote it."
        )
    return (
        f"no {what} can be loaded from {given}: {reason}\nGive a hub name (with network), a folder "
        "that save_pretrained wrote, or model=smollm2_135m_offline."
    )
