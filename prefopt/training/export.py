"""The policy of a run as a Hugging Face folder."""

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)

from prefopt.config.schema import ADAPTER_CONFIG, ModelConfig
from prefopt.errors import UserError
from prefopt.models import load, lora
from prefopt.models.lora import add_adapter, merge, merge_adapter, save_adapter
from prefopt.models.transformers4 import write_tokenizer
from prefopt.models.value_head import without_value_head
from prefopt.training import checkpoint
from prefopt.training.config import TrainConfig
from prefopt.utils.files import resolve_path, write_plain_json


@dataclass
class PolicyExporter:
    """Writes a policy of this `config` with its tokenizer and model card.

    With LoRA the adapter alone is written: the last policy is whole with `merge_adapter`, and every policy is where one
    adapter on the model does not make it (`is_one_adapter`). `card`: the card's text, of the evaluations so far.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    card: Callable[[list[dict[str, Any]]], str]

    def check(self, policy: PreTrainedModel) -> None:
        """Export `policy` before it is trained, by the same code, with tensors that have a shape and no values.

        The configuration, the tokenizer and the adapter's configuration are written into a folder that is removed
        again, and read from it. The names and shapes of the weights are collected instead of being written, and loaded
        into the model that the written configuration describes. It takes no memory for weights.

        Raises UserError where the export would fail, or would not be read as the model that it was.
        """
        try:
            with tempfile.TemporaryDirectory() as name:
                self._check(policy, Path(name))
        except (UserError, OSError):  # a disk says nothing of the model
            raise
        except Exception as error:  # what code of an architecture, of peft or of transformers raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            adapter = " Or leave layers out of peft.target_modules." if self.config.peft.target_modules else ""
            raise UserError(
                f"the policy could not be exported after its training: {reason}\nThis is found on "
                f"model.path={self.config.model.path} as it is before the first step. Take another model.{adapter}"
            ) from error

    def _check(self, policy: PreTrainedModel, folder: Path) -> None:
        # Weights of 4 bits are exported as the whole weights, loaded again.
        policy = load.load_model(self.config.model, "meta") if self.config.peft.quantize else without_values(policy)
        with collect_weights() as files:
            if self.config.peft.target_modules:
                add_adapter(policy, self.config.peft, self.config.seed)
                self._write_adapter(policy, folder / "adapter", "")
                merge(policy)
            files.clear()
            checkpoint.export(policy, self.tokenizer, folder / "policy")
        check_loads(policy, folder / "policy", {name: t for file in files.values() for name, t in file.items()})

    def __call__(self, policy: PreTrainedModel, target: Path, evaluations: list[dict[str, Any]]) -> None:
        """Write `policy` as it is in training into `target`, without a value head."""
        policy = without_value_head(policy)
        if checkpoint.is_one_adapter(self.config, policy):
            self._write_adapter(policy, target, self.card(evaluations))
        else:
            self._write(self._whole(policy), target, evaluations)

    def final(self, policy: PreTrainedModel, target: Path, evaluations: list[dict[str, Any]]) -> str | None:
        """Write `policy`, which is not trained any more, into `target`. Returns the digest of its whole weights; of an
        adapter, None."""
        policy = without_value_head(policy)
        if checkpoint.is_one_adapter(self.config, policy) and not self.config.merge_adapter:
            self(policy, target, evaluations)
            return None
        return self._write(self._whole(policy), target, evaluations)

    def _whole(self, policy: PreTrainedModel) -> PreTrainedModel:
        return self._merged_copy(policy) if self.config.peft.target_modules else policy

    def _merged_copy(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The initial weights, loaded again on the CPU, with the adapter merged. Those below it in training may have 4
        bits, or 16, and would round it."""
        load_again = load.load_reward_model if hasattr(policy, "score") else load.load_model
        merged = load_again(self.config.model, "cpu")
        with tempfile.TemporaryDirectory() as aside:
            save_adapter(policy, Path(aside))
            merge_adapter(merged, aside)
        return merged

    def _write_adapter(self, policy: PreTrainedModel, target: Path, card: str) -> None:
        """Write the adapter so that it loads by itself: with tokenizer and template, and the place of its base."""
        with checkpoint.written_whole(target) as aside:
            save_adapter(policy, aside)
            self.tokenizer.save_pretrained(aside)
            write_tokenizer(aside)
            name, revision = base_of(self.config.model)
            file = aside / ADAPTER_CONFIG
            values = json.loads(file.read_text()) | {"base_model_name_or_path": name, "revision": revision}
            write_plain_json(file, values)
            (aside / checkpoint.MODEL_CARD).write_text(card)

    def _write(self, policy: PreTrainedModel, target: Path, evaluations: list[dict[str, Any]]) -> str:
        card = self.card(evaluations)
        if self.config.export_dtype != "bfloat16":
            checkpoint.export(policy, self.tokenizer, target, card)
            return load.weights_digest(policy)
        copied = rounded(policy, torch.bfloat16)
        checkpoint.export(copied, self.tokenizer, target, card)
        return load.weights_digest(rounded(copied, torch.float32))  # as `load_model` has them


def base_of(config: ModelConfig) -> tuple[str, str | None]:
    """(name or place, revision) by which transformers finds the model below an adapter: its name on the hub; of a model
    of this machine its folder, and of a GGUF file that of its conversion."""
    name, revision = portable_name(config.path, config.revision)
    if "/" in name:
        return name, revision
    return (
        str(Path(load.checkpoint_path(config)).absolute()) if resolve_path(config.path).exists() else name
    ), revision


def portable_name(path: str, revision: str | None) -> tuple[str, str | None]:
    """(name, revision) of a model for other machines: on the hub, also of a folder in the hub's cache; else the name of
    its folder or file, without the place."""
    local = resolve_path(path).absolute()
    if not local.exists():
        return path, revision
    parts = local.parts
    for folder, kind, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if folder.startswith("models--") and kind == "snapshots":
            return folder.removeprefix("models--").replace("--", "/"), commit
    return local.name, None


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose tensors are on torch's meta device: names, shapes and which of them are one tensor."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of `model` on the CPU with parameters of `dtype`; buffers stay as they are, as the routing bias does."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("cpu", dtype)) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def collect_weights() -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, nothing is written where transformers or `save_adapter` write weights. Yields {file: {name: tensor}} of
    what they would have written."""
    files: dict[str, dict[str, Tensor]] = {}

    def collect(tensors: dict[str, Tensor], filename: Any, metadata: Any = None) -> None:
        names: dict[Any, str] = {}
        for name, tensor in tensors.items():
            # A file of safetensors holds no memory twice.
            other = names.setdefault((tensor.untyped_storage()._cdata, tensor.storage_offset()), name)
            if other != name:
                raise ValueError(f"{name} and {other} are the same weights, and its architecture does not say so")
        files[Path(filename).name] = dict(tensors)

    originals = modeling_utils.safe_save_file, lora.save_file
    modeling_utils.safe_save_file = lora.save_file = collect
    try:
        yield files
    finally:
        modeling_utils.safe_save_file, lora.save_file = originals


def check_loads(policy: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless `weights`, with the configuration in `folder`, are read as the model `policy`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto: Any = AutoModelForSequenceClassification if hasattr(policy, "score") else AutoModelForCausalLM
    if auto._model_mapping[type(config)] is not type(policy):
        raise ValueError(f"its configuration is read as another model than {type(policy).__name__}")
    loaded, info = cast(Any, type(policy)).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,  # reported instead of raised
        output_loading_info=True,
    )
    wrong = {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
    shapes, expected = ({name: p.shape for name, p in m.named_parameters()} for m in (loaded, policy))
    wrong |= {name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)}
    if wrong:
        raise ValueError(f"{len(wrong)} weights would not be read again ({', '.join(sorted(wrong)[:3])})")
