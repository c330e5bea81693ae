"""Failures in training, as messages that say what was kept and what to change."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from prefopt.errors import OutOfMemory, UserError
from prefopt.tracking.metrics import read_metrics
from prefopt.training.checkpoint import complete_checkpoints, not_finite
from prefopt.training.state import MicroBatch, TrainState
from prefopt.utils.distributed import all_gather_object, is_main_process
from prefopt.utils.files import cache_dir, write_json
from prefopt.utils.memory import is_out_of_memory
from prefopt.utils.os_errors import explain, from_text

if TYPE_CHECKING:
    from prefopt.tracking.run import Run

log = logging.getLogger(__name__)


def handle_nonfinite_step(
    train_state: TrainState, step: int, bad: list[str], ids: list[str], metrics: dict[str, Any]
) -> None:
    """Record a refused step in nonfinite/ of the run's folder, and go on or stop as the config asks.

    Raises UserError with nonfinite=stop, and with weights that are not finite, since every later step would be refused.
    """
    config, run = train_state.config, train_state.run
    file = run.folder / "nonfinite" / f"step_{step + 1:07d}.json"
    found = all_gather_object(not_finite(train_state.engine.local()))
    weights = list(dict.fromkeys(name for names in found for name in names))
    if is_main_process():
        before = [row for row in read_metrics(run.metrics_file) if row["step"] <= step]
        # JSON has no NaN and no infinity.
        as_json = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        report = {"step": step + 1, "not_finite": bad, "weights_not_finite": weights, "pairs": ids, "metrics": as_json}
        write_json(file, report | {"metrics_before": before[-1:]})
    message = (
        f"step {step + 1}: {' and '.join(bad)} not finite; the step was refused and the weights are unchanged. Its "
        f"{len(ids)} pairs and the metrics are in {file}."
    )
    if config.nonfinite == "skip" and not weights:
        log.warning(f"  {message}")
        return
    hint = "with nonfinite=skip it passes over such a step"
    if weights:
        hint = f"the weights are not finite either (first in {weights[0]}), so no later step could be taken"
    raise UserError(
        f"{message} Its pairs: {', '.join(ids)}. Look at these pairs, or lower optimizer.lr={config.optimizer.lr}. The "
        f"same command goes on from the last checkpoint; {hint}."
    )


@contextlib.contextmanager
def explain_oom(train_state: TrainState, where: str, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Convert an out-of-memory error into a UserError that names the largest micro-batch and what makes it smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter, and so is a CPU's
        if not is_out_of_memory(error):
            raise
        config = train_state.config
        largest = max(micro_batches, key=lambda m: m.batch.input_ids.numel())
        rows, tokens = largest.batch.input_ids.shape
        remedies = []
        if len(largest.pairs) > 1:
            remedies.append(f"micro_batch_tokens={rows * tokens // 2}")
        if not config.gradient_checkpointing:
            remedies.append("gradient_checkpointing=true")
        raise OutOfMemory(
            f"{where}: out of memory on {config.device}. The largest of its {len(micro_batches)} micro-batches has "
            f"{len(largest.pairs)} pairs in {rows} rows of {tokens} tokens (micro_batch_tokens="
            f"{config.micro_batch_tokens}). "
            + (
                f"Give {' or '.join(remedies)}: a step stays one of {config.batch_size} pairs, and the run the same, "
                "which goes on from its last checkpoint. "
                if remedies
                else "It is one pair already: use peft=lora_attention, engine=fsdp on more GPUs, or a smaller model. "
            )
            + f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


@contextlib.contextmanager
def explain_os_errors(run: "Run") -> Iterator[None]:
    """Convert OSError (disk full, no permission, file system gone) into a UserError that names the checkpoint to resume
    from."""
    try:
        yield
    except (OSError, SafetensorError) as failure:
        if isinstance(failure, SafetensorError) and "os error" not in str(failure):  # a file that is none of its kind
            raise
        error = failure if isinstance(failure, OSError) else from_text(str(failure))
        if error.errno is None:  # not the system's: transformers raises its own, with its own advice
            raise
        kept = "the first step"
        with contextlib.suppress(OSError):
            if checkpoints := complete_checkpoints(run.checkpoints):
                kept = f"its last checkpoint, {max(checkpoints).name}, which is kept"
        places = {"the run's folder": run.folder, "the cache": cache_dir()}
        raise UserError(f"{run.folder}: {explain(error, places)} The same command then goes on from {kept}.") from error
