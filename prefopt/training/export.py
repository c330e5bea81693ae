"""The policy of a run as a Hugging Face folder."""

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
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

from prefopt.errors import UserError
from prefopt.models import load, lora
from prefopt.models.lora import add_adapter, merge, merge_adapter, save_adapter
from prefopt.models.transformers4 import write_tokenizer
from prefopt.training import checkpoint
from prefopt.training.config import TrainConfig
from prefopt.utils.files import atomic_write, follow_umask, remove, resolve_path


@dataclass
class PolicyExporter:
    """Writes the policy with its adapter merged, and the adapter by itself into `adapter_folder`.

    A run that began from `peft.path` has no adapter of its base that is the policy: two lie on it. It gets a file
    beside `adapter_folder` instead, which says so.
    """

    config: TrainConfig
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter_folder: Path

    def check(self) -> None:
        """Export the policy before it is trained, by the same code, with tensors that have a shape and no values.

        The configuration, the tokenizer and the adapter's configuration are written into a folder that is removed
        again, and read from it. The names and shapes of the weights are collected instead of being written, and loaded
        into the model that the written configuration describes. It takes no memory for weights.

        Raises UserError where the export would fail, or would not be read as the model that it was.
        """
        try:
            with tempfile.TemporaryDirectory() as name:
                self._check(Path(name))
        except (UserError, OSError):  # a disk says nothing of the model
            raise
        except Exception as error:  # what code of an architecture, of peft or of transformers raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            adapter = " Or leave layers out of peft.target_modules." if self.config.peft.target_modules else ""
            raise UserError(
                f"the policy could not be exported after its training: {reason}\nThis is found on "
                f"model.path={self.config.model.path} as it is before the first step. Take another model.{adapter}"
            ) from error

    def _check(self, folder: Path) -> None:
        # Weights of 4 bits are exported as the whole weights, loaded again.
        policy = (
            load.load_model(self.config.model, "meta") if self.config.peft.quantize else without_values(self.policy)
        )
        with collect_weights() as files:
            if self.config.peft.target_modules:
                add_adapter(policy, self.config.peft, self.config.seed)
                self._save_adapter(policy, folder / "adapter")
                merge(policy)
            files.clear()
            checkpoint.export(policy, self.tokenizer, folder / "policy")
        check_loads(policy, folder / "policy", {name: t for file in files.values() for name, t in file.items()})

    def __call__(self, target: Path) -> str:
        """Write the policy as it is in training into `target`. Returns the digest of the written weights."""
        return self._write(self._merged_copy() if self.config.peft.target_modules else self.policy, target)

    def final(self, target: Path) -> str:
        """The same for a policy that is not trained any more, which takes up its adapter without a copy."""
        # Quantized weights stay as they are: merged into 4 bits, they would be rounded again.
        if not self.config.peft.target_modules or self.config.peft.quantize:
            return self(target)
        if self.config.peft.path:
            self._explain_no_adapter()
        else:
            self._save_adapter(self.policy, self.adapter_folder)
        merge(self.policy)
        return self._write(self.policy, target)

    def _merged_copy(self) -> PreTrainedModel:
        """The initial weights, loaded again on the CPU, with the adapter merged."""
        load_again = load.load_reward_model if hasattr(self.policy, "score") else load.load_model
        merged = load_again(self.config.model, "cpu")
        if self.config.peft.path:
            merge_adapter(merged, self.config.peft.path)
            aside = self.adapter_folder.with_name("adapter.tmp")
            save_adapter(self.policy, aside)
            merge_adapter(merged, str(aside))
            self._explain_no_adapter()
        else:
            self._save_adapter(self.policy, self.adapter_folder)
            merge_adapter(merged, str(self.adapter_folder))
        return merged

    def _save_adapter(self, policy: PreTrainedModel, target: Path) -> None:
        """Write the adapter so that it loads by itself: with tokenizer and template, and the name of its base."""
        save_adapter(policy, target)
        self.tokenizer.save_pretrained(target)
        write_tokenizer(target)
        name, revision = portable_name(self.config.model.path, self.config.model.revision)
        file = target / "adapter_config.json"
        values = json.loads(file.read_text()) | {"base_model_name_or_path": name, "revision": revision}
        atomic_write(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
        if resolve_path(self.config.model.path).exists() and "/" not in name:  # of this machine, not of the hub's cache
            where = (
                f"`{name}` was a folder or file on the machine of the run, which nobody else has by this name. Its "
                "digests are in `record.json` of the run, under `model`. Give the same model to peft, or write its "
                "place into adapter_config.json as `base_model_name_or_path`."
            )
        else:
            where = f"`{name}` is its name on the hub" + (f", at revision `{revision}`." if revision else ".")
        (target / "README.md").write_text(f"An adapter of the model `{name}`, in the format of peft.\n\n{where}\n")
        follow_umask(target)

    def _explain_no_adapter(self) -> None:
        remove(self.adapter_folder.with_name("adapter.tmp"))
        self.adapter_folder.with_name("adapter.md").write_text(
            f"No adapter is kept of this run. It began from model.path={self.config.model.path} with the adapter "
            f"peft.path={self.config.peft.path} merged into it, and what it has trained lies on top of that: neither "
            "adapter alone makes the policy of the model.\n\nThe folders in policy/ and policies/ are the whole, with "
            "both adapters merged. To train on, give one of them as model.path, without peft.path.\n"
        )

    def _write(self, policy: PreTrainedModel, target: Path) -> str:
        if self.config.export_dtype != "bfloat16":
            checkpoint.export(policy, self.tokenizer, target)
            return load.weights_digest(policy)
        copied = rounded(policy, torch.bfloat16)
        checkpoint.export(copied, self.tokenizer, target)
        return load.weights_digest(rounded(copied, torch.float32))  # as `load_model` has them


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
