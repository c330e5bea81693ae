"""Load a causal language model and its tokenizer by name, folder, or GGUF file."""

import contextlib
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
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prefopt.config.schema import ModelConfig
from prefopt.data.chat_template import resolve
from prefopt.data.rendering import check_chat_template
from prefopt.errors import UserError
from prefopt.models.generation_config import named_stops
from prefopt.models.gguf import convert_gguf
from prefopt.models.lora import merge_adapter
from prefopt.models.safe_weights import load_pretrained, no_pickles, refuse_adapter
from prefopt.utils.files import made_by, resolve_path

log = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Otherwise transformers asks a service on the hub, in the background, to convert pickles to safetensors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# It warns on a CPU, with every adapter, that a package is missing. That package would fetch code from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Saving a model or an adapter imports deepspeed if it is installed, and deepspeed warns if it finds no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in `config.tokenizer`, or the one beside the model, with template and terminator as `config` says
    (`chat_template.resolve`). Raises UserError if it cannot be loaded, or as `resolve` does."""
    if config.tokenizer is None:
        path, revision, key = checkpoint_path(config), config.revision, "model.path"
    else:
        path, revision, key = str(config.tokenizer), None, "model.tokenizer"
    try:
        with no_pickles(path):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # reading a foreign file may raise anything
        raise UserError(_cannot_load("tokenizer", f"{key}={path}", path, error)) from None
    resolve(tokenizer, config, named_stops(*stopping_configs(config)))
    check_chat_template(tokenizer)
    return tokenizer


def stopping_configs(config: ModelConfig) -> tuple[PreTrainedConfig | None, GenerationConfig | None]:
    """The model's config.json and generation_config.json, which name the tokens that end a generation. Neither has to
    be there: a tokenizer may stand alone, and a broken config is refused by `check_model`."""
    path, revision = checkpoint_path(config), config.revision or "main"
    values = generation = None
    with contextlib.suppress(Exception):
        values = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    with contextlib.suppress(Exception):
        generation = GenerationConfig.from_pretrained(path, revision=revision)
    return values, generation


def check_model(config: ModelConfig, key: str = "model.path", trust_remote_code: bool = False) -> int | None:
    """The most tokens that a row may have (`max_position_embeddings`), or None if the model's configuration has no
    limit. Reads no weights. Raises UserError for a model that cannot be found. `key`: the key in which the user named
    it. `trust_remote_code`: run the code that comes with it, which the user has allowed."""
    return getattr(read_config(config, key, trust_remote_code).get_text_config(), "max_position_embeddings", None)


def read_config(config: ModelConfig, key: str = "model.path", trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration. Raises UserError for a model that cannot be found, and for an adapter."""
    refuse_adapter(config.path, config.revision, key)
    path = checkpoint_path(config)
    try:
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # reading a foreign file may raise anything
        raise UserError(_cannot_load("model", f"{key}={config.path}", config.path, error)) from None


def check_trainable(config: ModelConfig) -> None:
    """Raise UserError for a checkpoint whose weights are quantized. Reads no weights."""
    values = read_config(config)
    for part in (values, values.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            values_of = quantization if isinstance(quantization, dict) else quantization.to_dict()
            method = values_of.get("quant_method") or "an unnamed method"
            raise UserError(
                f"model.path={config.path} holds quantized weights ({getattr(method, 'value', method)}), which cannot "
                "be trained and exported. Give the unquantized model that it was made of; peft.quantize=true trains an "
                "adapter on weights of 4 bits that are made when the model is loaded."
            )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer with more tokens than the model has embeddings."""
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model {rows} embeddings. "
            "If tokens were added to the model's own tokenizer, model.resize_embeddings=true gives them embeddings; "
            "otherwise the two do not belong together: take another model.tokenizer."
        )


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Give `model` embeddings, and rows of its head, for `tokens` tokens, if it has fewer (in place). A new row is the
    mean of the old ones (Hewitt 2021), so that a new token is as likely as the old ones are on average.

    transformers adds noise of a billionth of the rows' covariance to the mean; without it, every process and every
    later run gets the same weights.
    """
    old = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    head = model.get_output_embeddings()
    tensors = [t for layer in (model.get_input_embeddings(), head) if layer is not None for t in layer.parameters()]
    for tensor in {id(t): t for t in tensors}.values():  # they may be one
        if len(tensor) == tokens:
            tensor[old:] = tensor[:old].mean(0, dtype=torch.float64).to(tensor.dtype)
    if not tensors[0].is_meta:
        log.info(f"  model.resize_embeddings: {tokens - old} new embeddings, the mean of the {old} old ones")


def load_model(config: ModelConfig, device: str, quantize: str | None = None) -> PreTrainedModel:
    """A causal language model on `device`: float32 weights, in evaluation mode, with every dropout probability at 0 and
    its adapter merged.

    `quantize`: a precision. The weights of the linear layers, except the head, are then stored in 4 bits (NF4, with
    quantized scales; Dettmers et al. 2023, arXiv 2305.14314), and products are computed in that precision.

    Raises UserError for a model that cannot be found, whose checkpoint lacks weights, or that its adapter does not fit.
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
    elif device == "meta":
        changes = {"device_map": {"": device}}  # names and shapes alone
    model, lacking = _from_pretrained(AutoModelForCausalLM, config, **changes)
    if lacking:
        raise UserError(
            f"the checkpoint {config.path} lacks {len(lacking)} of its model's weights, or has them in another shape: "
            f"{', '.join(lacking[:3])}. They would be random; get the checkpoint again."
        )
    return _with_adapter(finalize(fit_tokenizer(model, config), device), config)


def load_reward_model(config: ModelConfig, device: str) -> PreTrainedModel:
    """The backbone of a causal language model with a scalar head `score` (hidden -> 1, no bias) that starts at zero.

    Raises UserError for a model that cannot be found or that already is a reward model.
    """
    model, lacking = _from_pretrained(AutoModelForSequenceClassification, config, num_labels=1)
    if lacking != ["score.weight"]:
        if lacking:
            problem = f"lacks {', '.join(lacking[:3])}."
        else:
            problem = "already has one. Start from the model it was made of."
        raise UserError(f"objective=reward puts a new head on a causal language model; {config.path} {problem}")

    torch.nn.init.zeros_(cast(torch.nn.Linear, model.score).weight)
    # transformers reads the score at the last token that is not padding. If the pad token is the terminator, that is
    # the wrong token. Without a pad id, transformers refuses batches instead of reading the wrong one.
    values = model.config.get_text_config()
    terminators = values.eos_token_id if isinstance(values.eos_token_id, list) else [values.eos_token_id]
    if values.pad_token_id in terminators:
        values.pad_token_id = None
    return _with_adapter(finalize(fit_tokenizer(model, config), device), config)


def fit_tokenizer(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """`model`, with model.resize_embeddings=true grown for the tokens of its tokenizer (in place)."""
    if config.resize_embeddings:
        resize_embeddings(model, len(load_tokenizer(config)))
    return model


def _with_adapter(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """`model` with its adapter merged (in place). A model without values stays as it is: merging changes no shape."""
    if config.adapter and model.device.type != "meta":
        merge_adapter(model, config.adapter)
    return model


def load_trained_reward_model(config: ModelConfig, device: str) -> PreTrainedModel:
    """A model with a trained head `score` of one output. Raises UserError for any other model."""
    _refuse_adapter_of(config)
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
    """A reward model that comes with its own code. The code is run, because the user has allowed it for this model.

    Raises UserError for a model that cannot be found, or whose checkpoint lacks weights.
    """
    _refuse_adapter_of(config)
    model, lacking = _from_pretrained(AutoModelForSequenceClassification, config, trust_remote_code=True)
    if lacking:
        raise UserError(f"the checkpoint {config.path} lacks {', '.join(lacking[:3])}, which would be random.")
    return finalize(model, device)


def _refuse_adapter_of(config: ModelConfig) -> None:
    if config.adapter:
        raise UserError(
            f"{config.adapter} is an adapter, not a reward model: merge the two with peft (merge_and_unload), and give "
            "that folder."
        )


def _from_pretrained(auto: Any, config: ModelConfig, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """(model in float32, names of the weights that its checkpoint lacks or holds in another shape)."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # missing weights are returned, not printed in a table
    try:
        # Without a dtype, transformers 5 takes that of the checkpoint, and an optimizer on bfloat16 weights loses small
        # updates.
        model, loading = load_pretrained(
            auto,
            checkpoint_path(config),
            config.revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported as mismatched_keys instead of raised
            **{"trust_remote_code": False} | changes,
        )
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # reading a foreign file may raise anything
        raise UserError(_cannot_load("model", f"model.path={config.path}", config.path, error)) from None
    unread = sorted(map(str, loading["unexpected_keys"]))
    if unread and auto is AutoModelForCausalLM:  # a reward model has another head than the checkpoint
        names = ", ".join([*unread[:3], *(["..."] if unread[3:] else [])])
        log.warning(f"  {len(unread)} weights of {config.path} are no part of {type(model).__name__}: {names}")
    return model, sorted(str(key) for key in [*loading["missing_keys"], *loading["mismatched_keys"]])


def finalize(model: torch.nn.Module, device: str) -> Any:
    """The model on `device`, in evaluation mode, with every dropout probability at 0 (in place)."""
    switch_off_dropout(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise bitsandbytes repacks 4-bit weights with coarser scales at the first forward pass without
            # gradient, and has no backward pass for these.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0 (in place): of dropout modules, of layers that keep one as an attribute and
    pass it to a function (`self.dropout`, `self.attention_dropout`, `self.layerdrop`), and of the configurations, which
    some layers read in their forward pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        configs = [config, *vars(config).values()] if isinstance(config, PreTrainedConfig) else []
        for holder in (module, *(c for c in configs if isinstance(c, PreTrainedConfig))):
            for name, value in list(vars(holder).items()):
                if isinstance(value, float) and "drop" in name.lower():
                    setattr(holder, name, 0.0)


def check_decoder(config: ModelConfig) -> None:
    """Raise UserError for an encoder-decoder model, of which a causal language model would lack a half."""
    values = AutoConfig.from_pretrained(checkpoint_path(config), revision=config.revision, trust_remote_code=False)
    if values.is_encoder_decoder:
        raise UserError(
            f"model.path={config.path} is an encoder-decoder model ({values.model_type}). prefopt trains decoder-only "
            "models, which read the prompt and write the answer in one sequence: take one of these."
        )


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile the MLPs and norms of the layers, in place. Attention and the head stay as they are. Row lengths
    are dynamic, so nothing is compiled twice. Inductor keeps its kernels on disk (TORCHINDUCTOR_CACHE_DIR)."""
    for name, module in model.named_modules():
        if name.endswith("mlp") or type(module).__name__.endswith("RMSNorm"):
            module.compile(dynamic=True)


def checkpoint_path(config: ModelConfig) -> str:
    """The name or folder that transformers can load: the configured one, or the converted checkpoint of a GGUF file.
    Raises UserError for a GGUF file that does not exist."""
    if not config.path.endswith(".gguf"):
        return str(resolve_path(config.path)) if config.path.startswith("package://") else config.path
    gguf = resolve_path(config.path)
    if not gguf.is_file():
        raise UserError(f"model file {config.path} does not exist.")
    return str(convert_gguf(gguf))


def resolved_config(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration with every default, as JSON values: everything besides the weights that decides its
    outputs (rotary scaling, sliding window, ...). Path and version of transformers are left out."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and values of all parameters, and of the buffers that a checkpoint holds (the routing bias
    of some mixtures of experts), in the order of their names."""
    digest = hashlib.sha256()
    computed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in computed]
    for name, parameter in sorted([*model.named_parameters(), *buffers], key=lambda named: named[0]):
        digest.update(name.encode())
        values = parameter.detach()
        if hasattr(parameter, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            values = dequantize_4bit(values, parameter.quant_state)
        digest.update(values.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cannot_load(what: str, setting: str, path: str, error: Exception) -> str:
    """The message for a model or tokenizer (`what`) that cannot be loaded from `setting`, written key=value."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    folder = Path(path)
    if "trust_remote_code" in str(error):
        reason = (
            "its architecture is none of transformers' own but code in its repository, which prefopt does not run for "
            "a model that it trains."
        )
    if what == "model" and folder.is_dir() and (pickles := [f for s in PICKLES for f in sorted(folder.rglob(s))]):
        reason = (
            f"{pickles[0].relative_to(folder)} is a pickle (PyTorch's or DeepSpeed's), which could run any code and is "
            "not read; weights must be safetensors. If you trust it, convert it with the program that wrote it."
        )
    if made := made_by(path):
        reason = f"there is none.{made}"
    return (
        f"no {what} can be loaded from {setting}: {reason}\nGive a hub name (with network), a folder "
        "that save_pretrained wrote, or model=smollm2_135m_offline."
    )
