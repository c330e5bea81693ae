"""The policy of a run as a Hugging Face folder."""

import contextlib
import copy
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
from prefopt.training import checkpoint
from prefopt.training.config import TrainConfig


@dataclass
class PolicyExporter:
    """Writes the policy with its adapter merged, and the adapter by itself into `adapter_folder`."""

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
                save_adapter(policy, folder / "adapter")
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
        save_adapter(self.policy, self.adapter_folder)
        merge(self.policy)
        return self._write(self.policy, target)

    def _merged_copy(self) -> PreTrainedModel:
        """The initial weights, loaded again on the CPU, with the adapter merged."""
        save_adapter(self.policy, self.adapter_folder)
        load_again = load.load_reward_model if hasattr(self.policy, "score") else load.load_model
        merged = load_again(self.config.model, "cpu")
        if self.config.peft.path:
            merge_adapter(merged, self.config.peft.path)
        merge_adapter(merged, str(self.adapter_folder))
        return merged

    def _write(self, policy: PreTrainedModel, target: Path) -> str:
        checkpoint.export(policy, self.tokenizer, target)
        return load.weights_digest(policy)


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose tensors are on torch's meta device: names, shapes and which of them are one tensor."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
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
