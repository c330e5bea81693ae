"""The training loop, from top to bottom: evaluate, step, log, save. It knows no objective by name."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from prefopt.errors import Interrupted
from prefopt.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from prefopt.training.evaluate import evaluate_on_main
from prefopt.training.loggers import Loggers, read_metrics
from prefopt.training.state import MicroBatch, TrainState
from prefopt.training.step import train_step
from prefopt.utils import signals
from prefopt.utils.console import Bar, say
from prefopt.utils.distributed import all_gather_object, heartbeat, is_main_process, on_main_process


def train_loop(job: TrainState) -> list[dict[str, Any]]:
    """Run from the last checkpoint, or from the start, to the end. Returns the rows of all evaluations, up to that of
    the weights which the policy ends with.

    The order of pairs, the learning rate and what dropout draws are functions of the step, so weights, moments, the
    objective's state and the step are all there is: a run that goes on is bit for bit the run that was never
    interrupted.
    """
    config, run, engine = job.config, job.run, job.engine
    steps = config.total_steps
    exports = {round(k * steps / config.exports) for k in range(1, config.exports)}
    start = 0
    early_stopping = EarlyStopping()
    # The first process chooses, since it may put a damaged one aside.
    checkpoint = all_gather_object(latest_checkpoint(run.checkpoints) if is_main_process() else None)[0]
    if checkpoint:
        tensors, meta = load_checkpoint(checkpoint)
        engine.load_state(tensors)
        job.state = tensors["objective"]
        start = meta["step"]
        if config.patience is not None:
            early_stopping = EarlyStopping(tensors.get("best", {}), **meta.get("best", {}))
        say(f"  going on from step {start} of {steps} ({checkpoint})")
    logger = Loggers(run, config.logger, start)
    try:
        if start == 0:
            metrics = evaluate_on_main(job, 0)
            logger.log("heldout", 0, metrics)
            early_stopping.update(job, 0, metrics)
        with Bar("training", steps, config.logger.progress, done=start) as bar:
            for step, micro_batches in prefetch_batches(job, start):
                metrics = train_step(job, step, micro_batches)
                heartbeat()
                done = step + 1
                logger.log("train", done, metrics)
                if done % config.eval_every == 0 or done == steps:
                    found = evaluate_on_main(job, done)
                    logger.log("heldout", done, found)
                    early_stopping.update(job, done, found)
                over = done == steps or early_stopping.evaluations_since == config.patience
                leave = not over and signals.stop_requested()
                # Before the checkpoint: a run that goes on from there would not come by here again.
                if job.export and done in exports and not over:
                    on_main_process(partial(job.export, run.folder / "policies" / f"step_{done:07d}"))
                if (done % config.save_every == 0 and not over) or leave:
                    state = engine.state() | {"objective": job.state} | early_stopping.state()
                    on_main_process(partial(save_checkpoint, run.checkpoints, done, state, early_stopping.meta()))
                if leave:
                    raise Interrupted(f"saved after step {done} of {steps}")
                bar.advance("  ".join(f"{k} {metrics[k]:.4g}" for k in ("loss", "accuracy") if k in metrics))
                if over:
                    break
    finally:
        logger.close()
    early_stopping.restore(job)
    last = steps if config.patience is None else early_stopping.step
    return [row for row in read_metrics(run) if row["split"] == "heldout" and row["step"] <= last]


@dataclass
class EarlyStopping:
    """Where `patience` is set: the weights at the evaluation with the lowest held-out loss, on the CPU, its step and
    its loss, and how many evaluations have come since. The checkpoints carry it along."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    loss: float = math.inf
    evaluations_since: int = 0

    def update(self, job: TrainState, step: int, metrics: dict[str, Any]) -> None:
        """`metrics` are the first process's; the others learn the loss from it."""
        if job.config.patience is None:
            return
        loss = all_gather_object(metrics.get("loss"))[0]
        if loss < self.loss:
            weights = {name: w.cpu().clone() for name, w in job.engine.state()["weights"].items()}
            self.weights, self.step, self.loss, self.evaluations_since = weights, step, loss, 0
        else:
            self.evaluations_since += 1

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"best": self.weights} if self.weights else {}

    def meta(self) -> dict[str, Any]:
        kept = {"step": self.step, "loss": self.loss, "evaluations_since": self.evaluations_since}
        return {"best": kept} if self.weights else {}

    def restore(self, job: TrainState) -> None:
        """Give the policy its best weights back."""
        if self.evaluations_since and self.weights:
            say(f"  patience: the held-out loss was lowest after step {self.step}, {self.loss:.4f}; back to it")
            job.engine.load_state({"weights": self.weights, "moments": {}})


def prefetch_batches(job: TrainState, start: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, its micro-batches); those of the next step are collated while this one computes."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(job.step, start)
        for step in range(start, job.config.total_steps):
            micro_batches = coming.result()
            if step + 1 < job.config.total_steps:
                coming = pool.submit(job.step, step + 1)
            yield step, micro_batches
