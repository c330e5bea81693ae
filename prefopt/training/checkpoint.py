"""Atomic checkpoints, and the export in Hugging Face format.

A checkpoint is written into a folder of another name, flushed, and renamed: a folder called step_NNNNNNN is complete.
SHA256SUMS in it (`sha256sum -c` reads it) reveals damage on the disk; for that case the checkpoint before is kept.
Older ones are removed only after the new one is complete. No pickle is ever read.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, modeling_utils

from prefopt.errors import UserError
from prefopt.models.generation_config import stop_tokens
from prefopt.models.padding import save_reward_tokenizer
from prefopt.models.transformers4 import write_for_transformers4
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.utils.distributed import heartbeat, world_size
from prefopt.utils.files import remove, write_plain_json
from prefopt.utils.os_errors import from_text
from prefopt.utils.store import SUMS, damage, format_sums, publish

log = logging.getLogger(__name__)

MODEL_CARD = "README.md"
KEPT = 2  # checkpoints: the newest, and the one before it in case the newest is damaged on the disk
OURS = re.compile(r"step_\d+(\.tmp|\.damaged)?")  # what is written and removed in checkpoints/
FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2
ADAMW_MOMENTS = 2  # numbers that AdamW keeps for each weight
WEIGHTS_PER_BYTE = 2  # of weights quantized to 4 bits


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write `folder`/step_NNNNNNN after `step` optimizer steps, then remove all but it and the one before it.

    Args:
        tensors: groups of named tensors, one file each.
        meta: what else `load_checkpoint` returns, as JSON.

    Raises OSError where it cannot be written, and UserError where a tensor is not finite; older checkpoints are kept.
    """
    if bad := [f"{name}/{key}" for name, group in tensors.items() for key in not_finite(group)]:
        raise UserError(
            f"NaN or Inf after step {step}, first in {bad[0]}: no checkpoint is made of that; the last one is kept. "
            "Lower optimizer.lr, or look at the steps before in metrics.jsonl."
        )
    target = folder / f"step_{step:07d}"
    folder.mkdir(exist_ok=True)  # without parents: where the run's folder is gone, its file system is gone
    with written_whole(target) as aside:
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, aside / f"{name}.safetensors")
            heartbeat()
        (aside / "meta.json").write_text(json.dumps({"step": step, **meta}))
        (aside / SUMS).write_text(format_sums(aside))
    kept = sorted(complete_checkpoints(folder))[-KEPT:]
    for old in folder.iterdir():
        if old not in kept and OURS.fullmatch(old.name):
            remove(old)


def tidy_checkpoints(folder: Path, keep: bool) -> None:
    """Remove the checkpoints of a finished run, but for the last one where that is to be kept. Does nothing where there
    are none."""
    last = max(complete_checkpoints(folder), default=None) if keep else None
    if last is None:
        remove(folder)
        return
    for path in folder.iterdir():
        if path != last and OURS.fullmatch(path.name):
            remove(path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end: folders without a suffix (.tmp, .damaged)."""
    return [path for path in folder.glob("step_*") if OURS.fullmatch(path.name) and not path.suffix and path.is_dir()]


def latest_checkpoint(folder: Path, check: Callable[[Path], str | None] | None = None) -> Path | None:
    """The newest checkpoint that is not damaged, or None where there is none yet. `check` says what is wrong with one
    (None: `damage`).

    Renames damaged newer ones to step_NNNNNNN.damaged, and says so; the next checkpoint removes them. Raises UserError
    where all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in sorted(complete_checkpoints(folder), reverse=True):
        if why := (check or damage)(path):
            damaged.append((path, why))
            continue
        for bad, why in damaged:
            log.warning(f"  {bad} is damaged: {why}. Going on from the one before it.")
            aside = bad.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return path
    if damaged:
        raise UserError(
            "\n".join(f"{path} is damaged: {why}." for path, why in damaged)
            + f"\nThere is no other checkpoint. Bring the files back, or remove {folder} to begin again."
        )
    return None


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors in which there is a NaN or an Inf."""
    # A tensor without values, of an export that is only tried, has nothing to look at. The sum, which is quicker, is
    # finite where all values are, unless it overflows.
    values = {name: value for name, value in tensors.items() if not value.is_meta}
    return [name for name, value in values.items() if not value.sum().isfinite() and not value.isfinite().all()]


def run_bytes(config: TrainConfig, engine: Engine) -> int:
    """The most that a run's checkpoints and policies take on the disk at a time, in bytes."""
    saves = (config.total_steps - 1) // config.save_every + 1  # one after the last step
    checkpoints = min(KEPT + 1, saves)  # old ones go when a new one is complete
    before, last = config.exports - 1, policy_bytes(config, engine.policy)
    adapter = FLOAT32_BYTES * sum(p.numel() for p in engine.parameters.values())
    each = adapter if is_one_adapter(config, engine.policy) else last
    policies = each * before + (last if config.merge_adapter else each)
    return checkpoint_bytes(config, engine) * checkpoints + policies


def checkpoint_bytes(config: TrainConfig, engine: Engine) -> int:
    """The size of a checkpoint: trained weights, their moments, with `patience` the best weights too, and a reference
    that moves."""
    trained = sum(p.numel() for p in engine.parameters.values())
    moment = 1 if config.optimizer.eight_bit else FLOAT32_BYTES
    best = 0 if config.patience is None else FLOAT32_BYTES
    reference = FLOAT32_BYTES if config.reference_sync.every else 0
    return trained * (FLOAT32_BYTES + ADAMW_MOMENTS * moment + best + reference)


def state_bytes(config: TrainConfig, engine: Engine) -> int:
    """What weights, gradients and moments take in the memory of one process, and a resident reference, in bytes."""
    weights = sum(p.numel() * p.element_size() for p in engine.policy.parameters())
    trained = sum(p.numel() for p in engine.parameters.values())
    moment = 1 if config.optimizer.eight_bit else FLOAT32_BYTES
    # Several processes share gradients and moments out, and with engine=fsdp the weights.
    state = trained * (FLOAT32_BYTES + ADAMW_MOMENTS * moment) // world_size()
    resident = weights if config.reference == "resident" else 0
    return (weights // world_size() if engine.sharded else weights) + resident + state


def policy_bytes(config: TrainConfig, policy: PreTrainedModel) -> int:
    """The size of a whole exported policy, also where the weights in training are quantized."""
    weights = sum(p.numel() * (WEIGHTS_PER_BYTE if p.element_size() == 1 else 1) for p in policy.parameters())
    return weights * (BFLOAT16_BYTES if config.export_dtype == "bfloat16" else FLOAT32_BYTES)


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError where the disk has no room for the run in `folder`.

    `needed` is the most that the run holds at a time, in bytes. What an interrupted run has written is part of it.
    """
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed - written > free:
        raise UserError(
            f"{folder} needs about {gib(needed - written)} more for checkpoints and policies, and {gib(free)} are free "
            "there. Make room, set runs_dir to another disk, or ask for fewer exports."
        )


def gib(size: float) -> str:
    """`size` bytes in words."""
    return f"{size / 2**30:.3g} GiB"


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, meta) as `save_checkpoint` took them; meta has "step" too."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, load_meta(path)


def load_meta(path: Path) -> dict[str, Any]:
    """The meta that `save_checkpoint` took, with "step"."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    return meta


def export(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, card: str = "") -> None:
    """Write policy, tokenizer and model card into folder `target`, as `from_pretrained` of transformers 5 and 4 loads
    them.

    Raises UserError where a weight is not finite, and OSError where the folder cannot be written; then nothing is left
    of it.
    """
    if bad := not_finite(dict(policy.named_parameters())):
        raise UserError(f"NaN or Inf in the weights, first in {bad[0]}: no policy is made of that. Lower optimizer.lr.")
    with written_whole(target) as aside:
        with never_wrapped():
            policy.save_pretrained(aside)
        if hasattr(policy, "score"):
            save_reward_tokenizer(policy, tokenizer, aside)
        else:
            tokenizer.save_pretrained(aside)
        if policy.can_generate():
            write_terminator(policy, tokenizer, aside)
        write_for_transformers4(aside)
        (aside / MODEL_CARD).write_text(card)


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target`, in place of what is there, once it is written and flushed. Raises OSError
    where it cannot be written; then nothing is left of it."""
    aside = target.with_name(f"{target.name}.tmp")
    remove(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        remove(target)
        publish(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk this makes room for the record of the failure
        raise error if isinstance(error, OSError) else from_text(str(error), target) from error


def is_one_adapter(config: TrainConfig, policy: PreTrainedModel) -> bool:
    """Whether the policy is the model with one adapter. Not so on another adapter, beside the head of a reward model,
    or on new embeddings."""
    on_files = config.model.adapter is None and not config.model.resize_embeddings
    return bool(config.peft.target_modules) and on_files and not hasattr(policy, "score")


@contextlib.contextmanager
def never_wrapped() -> Iterator[None]:
    """Inside, transformers saves a model as it is. It would look whether deepspeed has wrapped it, which none of ours
    is, and import deepspeed for that where it is installed: half of what the start of a small run takes."""
    original = modeling_utils.unwrap_model
    modeling_utils.unwrap_model = lambda model, **_: model  # type: ignore[assignment]
    try:
        yield
    finally:
        modeling_utils.unwrap_model = original


def write_terminator(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the terminator that was trained into config.json and generation_config.json in `folder`, before the tokens
    that end a generation there already. So `generate` and `pipeline` stop where the policy learnt to stop."""
    stops = stop_tokens(tokenizer, policy.config, policy.generation_config)
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.is_file() else {}
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        if "text_config" in values:
            values["text_config"]["eos_token_id"] = values["eos_token_id"]
        write_plain_json(file, values)
