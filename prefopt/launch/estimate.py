"""What a training job will take, for the dry run of a sweep: GPU hours and disk, from the sizes of model and data.
Nothing is measured, and nothing is loaded but the model's config and the rows."""

import functools
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.errors import UserError
from prefopt.training.config import TrainConfig

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective

GPU = "an A100 at 40 % of its 312 TFLOP/s, which small models do not reach"
FLOP_PER_HOUR = 0.4 * 312e12 * 3600
CHARACTERS_PER_TOKEN = 4.0  # English text in a vocabulary of 32,000 to 150,000
# Training rows, and characters in prompt, chosen and rejected (of a chat: in it), for where the rows are not here: as
# the data sets' cards have it, lengths rounded.
KNOWN = {
    "HuggingFaceH4/ultrafeedback_binarized": (61_135, (670, 1_270, 1_110)),
    "HuggingFaceH4/orca_dpo_pairs": (12_859, (1_000, 850, 1_300)),
    "HuggingFaceTB/smol-smoltalk": (460_341, (2_500,)),
    "HuggingFaceH4/ultrachat_200k": (207_865, (5_000,)),
}
Rows = tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Estimate:
    gpu_hours: float
    policies_gb: float  # what is kept
    checkpoint_gb: float  # besides, until the run has finished


def parameters(config: ModelConfig) -> int:
    """How many a model has, from its config: no weight is read (but a GGUF is converted first, once). Of a model that
    is not here, what its name says (Llama-3.2-1B). Raises UserError where that says nothing."""
    return _parameters(config.name, config.path, config.revision)


@functools.cache
def _parameters(name: str, path: str, revision: str | None) -> int:
    """Counted once for all the jobs of a sweep that have the model."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from prefopt.models.load import check_model, checkpoint_path

        check_model(ModelConfig(name, path, revision))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(
                    checkpoint_path(ModelConfig(name, path, revision)), revision=revision, trust_remote_code=False
                )
            )
        return sum(p.numel() for p in model.parameters())
    except UserError:
        for each in (Path(path).name, name):
            if said := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", each, re.IGNORECASE):
                return round(float(said[1]) * (1e6 if said[2] in "Mm" else 1e9))
        raise


def rows(dataset: DatasetConfig) -> Rows | None:
    """How many training items there are, and how many tokens each part of one has on average; None where they are not
    here and not KNOWN."""
    from prefopt.data.dataset import sources

    found = [_rows(json.dumps(asdict(source))) for source in sources(dataset).values()]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    total = sum(n for n, _ in known)
    parts = zip(*(tuple(n * mean for mean in means) for n, means in known), strict=True)
    return total, tuple(sum(part) / total for part in parts)


@functools.cache
def _rows(source: str) -> Rows | None:
    from prefopt.config.schema import PoliciesConfig
    from prefopt.data.dataset import load_split
    from prefopt.data.formats import Pair

    values = json.loads(source)
    config = DatasetConfig(**values | {"policies": PoliciesConfig(**values["policies"])})
    try:
        split = load_split(config, "train")
    except UserError:
        n, characters = KNOWN.get(config.train or "", (0, ()))
        n = config.count or round(n * (config.weight or 1))
        return (n, tuple(c / CHARACTERS_PER_TOKEN for c in characters)) if n else None
    total = Counter[int]()
    for item in split:
        messages = item.prompt if isinstance(item, Pair) else item.messages
        total[0] += sum(len(message["content"]) for message in messages)
        if isinstance(item, Pair):
            total[1] += len(item.chosen)
            total[2] += len(item.rejected)
    return len(split), tuple(total[i] / len(split) / CHARACTERS_PER_TOKEN for i in sorted(total))


def estimate(config: TrainConfig, objective: "Objective") -> Estimate | None:
    """None where the length of the data is not known.

    A token costs 2 FLOP per parameter forwards and 4 backwards (2 where only an adapter is trained), 2 more with
    gradient checkpointing, and 2 for the reference: once with `reference=cached`, else in every epoch.
    """
    found, n = rows(config.dataset), parameters(config.model)
    if found is None:
        return None
    count, parts = found
    limits = [config.max_prompt_tokens, config.max_completion_tokens, config.max_completion_tokens]
    tokens = sum(min(mean, limit) for mean, limit in zip(parts, limits, strict=False)) if len(parts) > 1 else parts[0]
    steps = config.steps or math.ceil(count * (config.epochs or 1) / config.batch_size)
    trained, full = steps * config.batch_size * tokens, not config.peft.target_modules
    flop = trained * n * ((6 if full else 4) + 2 * config.gradient_checkpointing)
    if "reference" in objective.needs:
        flop += 2 * n * (min(trained, count * tokens) if config.reference == "cached" else trained)
    flop += 2 * n * tokens * (config.heldout_pairs or 0) * (1 + steps // config.eval_every)
    state = 4 + (2 if config.optimizer.eight_bit else 8)  # bytes: the weight, and Adam's two moments
    return Estimate(flop / FLOP_PER_HOUR, config.exports * 4 * n / 1e9, (state * n if full else 0) / 1e9)
