"""The training loop, from top to bottom: evaluate, step, log, save. It knows no objective by name."""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from prefopt.errors import Interrupted, UserError
from prefopt.tracking.metrics import metrics_damage, read_metrics
from prefopt.tracking.run import Run
from prefopt.training.checkpoint import SUMS, damage, latest_checkpoint, load_checkpoint, load_meta, save_checkpoint
from prefopt.training.evaluate import evaluate
from prefopt.training.loggers import Loggers
from prefopt.training.outlook import Pace
from prefopt.training.state import MicroBatch, TrainState
from prefopt.training.step import train_step
from prefopt.utils import signals
from prefopt.utils.console import Bar
from prefopt.utils.distributed import broadcast, check_agreement, heartbeat, is_main_process, on_main_process
from prefopt.utils.memory import memory_for

log = logging.getLogger(__name__)

# What helps where memory is short.
LESS_STATE = "train fewer weights (peft=lora_attention), or engine=fsdp on more GPUs"
RESUMES = "the same command goes on from the last checkpoint"


class Trained(NamedTuple):
    """`evaluations`: the rows of all held-out evaluations, up to that of the weights which the policy ends with.
    `metrics`: length in bytes and SHA-256 of metrics.jsonl."""

    evaluations: list[dict[str, Any]]
    metrics: dict[str, Any]


def train_loop(train_state: TrainState) -> Trained:
    """Train from the last checkpoint, or from the start, to the end.

    Order of pairs, learning rate and dropout are functions of the step. So a checkpoint of weights, moments, the
    objective's state, a reference that moves, and the step is complete: a resumed run is bit for bit the run that was
    never interrupted.

    Raises:
        Interrupted: stopped by a signal, after a checkpoint.
        UserError: out of memory, a step that is not finite, or metrics that another process has damaged.
    """
    config, run = train_state.config, train_state.run
    steps, exports = config.total_steps, config.export_steps(config.total_steps)
    with memory_for("reading the last checkpoint", LESS_STATE):
        start, early_stopping, vouched = resume(train_state)
    logger = Loggers(run, config.logger, vouched)
    try:
        if start == 0:
            metrics = evaluate(train_state, 0)
            logger.log("heldout", 0, metrics)
            early_stopping.update(train_state, 0, metrics)

        if early_stopping.should_stop(config.patience):
            start = steps  # a run that was killed between its last checkpoint and its policy

        pace = Pace(config, start)
        with Bar("training", steps, config.logger.progress, done=start) as bar:
            for step, micro_batches in prefetch_batches(train_state, start):
                metrics = train_step(train_state, step, micro_batches)
                heartbeat()
                done = step + 1
                if train_state.reference:
                    train_state.reference.follow(train_state.engine.policy, done)
                logger.log("train", done, metrics)
                pace.step(done, metrics)

                if done % config.eval_every == 0 or done == steps:
                    began = time.monotonic()
                    heldout_metrics = evaluate(train_state, done)
                    pace.evaluation(done, time.monotonic() - began)
                    logger.log("heldout", done, heldout_metrics)
                    early_stopping.update(train_state, done, heldout_metrics)

                last = done == steps or early_stopping.should_stop(config.patience)
                interrupted = not last and signals.stop_requested()

                # Before the checkpoint: a run that resumes from it does not come by this step again.
                if done in exports and not last and train_state.export:
                    folder = run.folder / "policies" / f"step_{done:07d}"
                    writing = memory_for(f"writing the policy after step {done}", RESUMES)
                    with writing, train_state.engine.gathered() as policy:
                        on_main_process(partial(export_policy, train_state, policy, folder, done))
                # After the last step too: should the disk fill up under the policy, no step is repeated.
                if interrupted or last or done % config.save_every == 0:
                    with memory_for(f"saving step {done}", RESUMES):
                        save(train_state, early_stopping, logger, done)
                if interrupted:
                    raise Interrupted(f"saved after step {done} of {steps}")

                bar.advance("  ".join(f"{k} {metrics[k]:.4g}" for k in ("loss", "accuracy") if k in metrics))
                if last:
                    break
        vouched = logger.vouch()
    finally:
        logger.close()

    if is_main_process() and (why := metrics_damage(run.metrics_file, vouched)):
        raise UserError(f"{run.folder}: {why}. The same command goes on from the last checkpoint before that.")
    early_stopping.restore(train_state)
    return Trained(heldout_rows(run, steps if config.patience is None else early_stopping.step), vouched)


def heldout_rows(run: Run, last: int) -> list[dict[str, Any]]:
    """The held-out evaluations up to that after `last` steps."""
    return [row for row in read_metrics(run.metrics_file) if row["split"] == "heldout" and row["step"] <= last]


def export_policy(train_state: TrainState, policy: PreTrainedModel, folder: Path, done: int) -> None:
    """Write the `policy` after `done` steps into `folder`."""
    assert train_state.export
    train_state.export(policy, folder, heldout_rows(train_state.run, done))


def resume(train_state: TrainState) -> tuple[int, "EarlyStopping", dict[str, Any] | None]:
    """Load the last checkpoint, if there is one, into `train_state`. Returns (steps done, early stopping, what the
    checkpoint says of metrics.jsonl).

    Raises UserError where all checkpoints are damaged, or the metrics that they vouch for.
    """
    config, run = train_state.config, train_state.run
    # The main process chooses for all, since it may put a damaged checkpoint aside.
    usable = partial(checkpoint_damage, run)
    checkpoint = broadcast(latest_checkpoint(run.checkpoints, usable) if is_main_process() else None)
    if not checkpoint:
        return 0, EarlyStopping(), None
    tensors, meta = load_checkpoint(checkpoint)
    check_agreement("go on from different checkpoints", {SUMS: (checkpoint / SUMS).read_text()})
    train_state.engine.load_state(tensors)
    train_state.objective_state = tensors["objective"]
    if train_state.reference:
        train_state.reference.load_state(tensors["reference"])
    log.info(f"  going on from step {meta['step']} of {config.total_steps} ({checkpoint})")
    if config.patience is None:
        return meta["step"], EarlyStopping(), meta["metrics"]
    return meta["step"], EarlyStopping(tensors.get("best", {}), **meta.get("best", {})), meta["metrics"]


def checkpoint_damage(run: Run, checkpoint: Path) -> str | None:
    """What keeps the run from going on from a checkpoint; None where nothing does.

    Metrics that are damaged before the checkpoint may be whole before an older one, from which their rows come again.
    """
    return damage(checkpoint) or metrics_damage(run.metrics_file, load_meta(checkpoint)["metrics"])


def save(train_state: TrainState, early_stopping: "EarlyStopping", logger: Loggers, done: int) -> None:
    """Write a checkpoint after `done` steps. All processes gather the tensors, the main one has and writes them."""
    tensors = train_state.engine.state() | {"objective": train_state.objective_state} | early_stopping.state()
    if train_state.reference:
        tensors["reference"] = train_state.reference.state()
    meta = {"metrics": logger.vouch(), **early_stopping.meta()}
    write = partial(save_checkpoint, train_state.run.checkpoints, done, tensors, meta)
    on_main_process(write)


@dataclass
class EarlyStopping:
    """The evaluation with the lowest held-out loss: its weights (on the CPU), step and loss, and how many evaluations
    came after it. Nothing is kept unless `patience` is set. Checkpoints contain it."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    loss: float = math.inf
    evaluations_since: int = 0

    def update(self, train_state: TrainState, step: int, metrics: dict[str, Any]) -> None:
        """Take note of an evaluation after `step` steps. The loss in the main process's `metrics` counts for all."""
        if train_state.config.patience is None:
            return
        loss = broadcast(metrics["loss"])
        if loss < self.loss:
            weights = {name: w.cpu().clone() for name, w in train_state.engine.state()["weights"].items()}
            self.weights, self.step, self.loss, self.evaluations_since = weights, step, loss, 0
        else:
            self.evaluations_since += 1

    def should_stop(self, patience: int | None) -> bool:
        """Whether the loss has not fallen for `patience` evaluations. None: never."""
        return patience is not None and self.evaluations_since >= patience

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"best": self.weights} if self.weights else {}

    def meta(self) -> dict[str, Any]:
        kept = {"step": self.step, "loss": self.loss, "evaluations_since": self.evaluations_since}
        return {"best": kept} if self.weights else {}

    def restore(self, train_state: TrainState) -> None:
        """Give the policy its best weights back."""
        if broadcast(bool(self.evaluations_since and self.weights)):  # the main process alone has the weights
            log.info(f"  patience: the held-out loss was lowest after step {self.step}, {self.loss:.4f}; back to it")
            train_state.engine.load_state({"weights": self.weights, "moments": {}})


def prefetch_batches(train_state: TrainState, start: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield (step, its micro-batches) from step `start` on. A thread collates the next step during this one."""
    if start >= train_state.config.total_steps:
        return
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(train_state.step_micro_batches, start)
        for step in range(start, train_state.config.total_steps):
            micro_batches = upcoming.result()
            if step + 1 < train_state.config.total_steps:
                upcoming = pool.submit(train_state.step_micro_batches, step + 1)
            yield step, micro_batches
