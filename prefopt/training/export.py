"""The policy of a run as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.models import load
from prefopt.models.lora import merge, merge_adapter, save_adapter
from prefopt.training import checkpoint
from prefopt.training.config import TrainConfig


@dataclass
class PolicyExporter:
    """Writes the policy with its adapter merged, and the adapter by itself into `adapter_folder`."""

    config: TrainConfig
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter_folder: Path

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
        merged = load.load_model(self.config.model, "cpu")
        if self.config.peft.path:
            merge_adapter(merged, self.config.peft.path)
        merge_adapter(merged, str(self.adapter_folder))
        return merged

    def _write(self, policy: PreTrainedModel, target: Path) -> str:
        checkpoint.export(policy, self.tokenizer, target)
        return load.weights_digest(policy)
