"""GPU hours and disk of a training job, for the dry run of a sweep: estimates from the sizes of model and data.

Nothing is measured. Only the model's config and the rows are loaded.
"""

import functools
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.errors import UserError
from prefopt.training.config import EVALUATIONS, TrainConfig

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective

GPU = "an A100 at 40 % of its 312 TFLOP/s, which small models do not reach"
FLOP_PER_HOUR = 0.4 * 312e12 * 3600
CHARACTERS_PER_TOKEN = 4.0  # English text in a vocabulary of 32,000 to 150,000
# For data sets that are not on this machine: training rows, and mean characters of prompt, chosen and rejected (of a
# chat: of all of it), from the data sets' cards, with the lengths rounded.
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
    kept_gb: float  # what stays: policies, and the last checkpoint where that is kept
    checkpoint_gb: float  # what a job under way takes besides


def parameters(config: ModelConfig | None) -> int:
    """The number of parameters of a model, from its config: no weights are read, but a GGUF is converted once. 0 where
    there is no model.

    For a model that is not on this machine it is the number in its name (Llama-3.2-1B). Raises UserError where there is
    none.
    """
    if config is None:
        return 0
    return _parameters(config.name, config.path, config.revision)


@functools.cache
def _parameters(name: str, path: str, revision: str | None) -> int:
    """The arguments can be hashed, so that the jobs of a sweep with one model count it once."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from prefopt.models.load import check_model, checkpoint_path

        check_model(ModelConfig(name, path, revision))
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(
                    checkpoint_path(ModelConfig(name, path, revision)), revision=revision, trust_remote_code=False
                )
            )
        return sum(p.numel() for p in model.parameters())
    except UserError:
        for text in (Path(path).name, name):
            if size := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", text, re.IGNORECASE):
                return round(float(size[1]) * (1e6 if size[2] in "Mm" else 1e9))
        raise


def rows(dataset: DatasetConfig) -> Rows | None:
    """The number of training items, and the mean number of tokens of their parts.

    The parts are prompt, chosen and rejected, or the whole chat; of groups also each of the other responses, with 0
    where a group has fewer than another. None where the rows are not on this machine and not KNOWN.
    """
    from prefopt.data.dataset import sources

    # As JSON, so that the jobs of a sweep with one data set count it once.
    counted = [_rows(json.dumps(asdict(source))) for source in sources(dataset).values()]
    known = [source for source in counted if source is not None]
    if len(known) < len(counted):
        return None
    total = sum(n for n, _ in known)
    parts = zip_longest(*(tuple(n * mean for mean in means) for n, means in known), fillvalue=0.0)
    return total, tuple(sum(part) / total for part in parts)


@functools.cache
def _rows(source: str) -> Rows | None:
    from prefopt.config.schema import PoliciesConfig
    from prefopt.data.dataset import load_split
    from prefopt.data.items import Pair

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
            for i, answer in enumerate(item.answers, start=1):
                total[i] += len(answer["content"])
    return len(split), tuple(total[i] / len(split) / CHARACTERS_PER_TOKEN for i in sorted(total))


def estimate(config: TrainConfig, objective: "Objective") -> Estimate | None:
    """The estimate for a training job; None where the length of the data or the size of the model is not known.

    A token costs 2 FLOP per parameter forwards and 4 backwards (2 where only an adapter is trained), 2 more with
    gradient checkpointing, and 2 for the reference: once with `reference=cached`, else in every epoch.
    """
    counted = rows(config.dataset)
    if counted is None:
        return None
    try:
        n = parameters(config.model)
    except UserError:  # a stage before this one makes it
        return None
    count, parts = counted
    read = parts if "others" in objective.completions else parts[:3]
    completions = sum(min(mean, config.max_completion_tokens) for mean in read[1:])
    tokens = min(parts[0], config.max_prompt_tokens) + completions if len(parts) > 1 else parts[0]
    steps = config.steps or math.ceil(count * (config.epochs or 1) / config.batch_size)

    trained = steps * config.batch_size * tokens
    is_full = not config.peft.target_modules
    flop_per_weight = (6 if is_full else 4) + (2 if config.gradient_checkpointing else 0)
    flop = trained * n * flop_per_weight
    if "reference" in objective.needs:
        flop += 2 * n * (min(trained, count * tokens) if config.reference == "cached" else trained)
    if "mismatched" in objective.needs:
        flop += 2 * 2 * n * trained  # policy and reference once more, without gradient
    evaluations = 1 + (steps // config.eval_every if config.eval_every else EVALUATIONS)
    flop += 2 * n * tokens * (config.heldout_pairs or 0) * evaluations

    state = 4 + (2 if config.optimizer.eight_bit else 8)  # bytes: the weight, and Adam's two moments
    checkpoint_gb = state * n / 1e9 if is_full else 0.0  # that of an adapter is small
    policies_gb = config.exports * (2 if config.export_dtype == "bfloat16" else 4) * n / 1e9
    return Estimate(
        gpu_hours=flop / FLOP_PER_HOUR,
        kept_gb=policies_gb + (checkpoint_gb if config.keep_checkpoint else 0.0),
        checkpoint_gb=checkpoint_gb,
    )
