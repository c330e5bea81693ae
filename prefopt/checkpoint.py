"""Checkpoints that are there whole or not at all, and the export in Hugging Face format.

A checkpoint is written into a folder of another name, flushed, and renamed: a folder called step_NNNNNNN is complete.
Older ones go only after that. No pickle is ever read.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Write `folder`/step_NNNNNNN after `step` optimizer steps, then remove what is older."""
    target = folder / f"step_{step:07d}"
    aside = folder / f"{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: value.contiguous() for key, value in group.items()}, aside / f"{name}.safetensors")
    (aside / "meta.json").write_text(json.dumps({"step": step, **meta}))
    publish(aside, target)
    for old in folder.iterdir():
        if old != target:
            shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = [p for p in folder.glob("step_*") if p.suffix != ".tmp"]
    return max(complete, default=None)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_checkpoint` was given: (tensors, meta with "step")."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "meta.json").read_text())


def export(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(target)` and `AutoTokenizer` load."""
    aside = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if policy.device.type == "cpu":  # what saves imports deepspeed where it is installed, which else warns of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    policy.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    publish(aside, target)


def publish(aside: Path, target: Path) -> None:
    """Flush the files of folder `aside` to the disk and give it its final name."""
    for path in [*aside.iterdir(), aside]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    aside.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
