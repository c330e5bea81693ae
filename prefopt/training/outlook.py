"""What a run says of itself before its first step, and after its first ones: its size, its memory, and the time that is
left."""

import logging
import math
from typing import Any

from prefopt.data.cache import Prepared, TokenizedPairs
from prefopt.objectives import SIDES
from prefopt.objectives.base import Objective
from prefopt.tracking.status import age
from prefopt.training.checkpoint import gib, state_bytes
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.utils.console import log_wrapped

log = logging.getLogger(__name__)

TIMED_STEPS = 3  # steps after which the time that is left is said; the one before them warms up


def size_lines(config: TrainConfig, objective: Objective, train: Prepared, heldout_pairs: int) -> list[str]:
    """The length of a run whose steps are counted (`TrainConfig.count_steps`), and how often it is evaluated."""
    pairs, steps = len(train.pairs), config.total_steps
    epochs = steps * config.batch_size / pairs if config.epochs is None else config.epochs
    lines = [
        f"{pairs:,} {train.counts['kind']}, {epochs:.3g} epoch{'' if epochs == 1 else 's'}: {steps:,} steps of "
        f"{config.batch_size}"
    ]
    if isinstance(train.pairs, TokenizedPairs):
        # A layout computes a prompt once for both completions, or once for each (of a group: for each of its pair).
        sides = [side for side in objective.completions if side in SIDES]
        prompts = len(sides) if config.layout == "padded" else 1
        tokens = train.pairs.num_tokens(["prompt"] * prompts + list(objective.completions))
        total = round(tokens / pairs * steps * config.batch_size)
        lines[0] += f", {total:,} tokens of prompts and completions ({tokens / pairs:.0f} a row)"
    often = f"evaluated before the first step and every {config.eval_every}"
    lines.append(f"{heldout_pairs:,} held out, {often}" if heldout_pairs else "none held out")
    return lines


def memory_line(config: TrainConfig, engine: Engine) -> str:
    return f"memory: {gib(state_bytes(config, engine))} for weights, gradients and AdamW's moments; activations on top"


class Pace:
    """Says how long a run that begins after `start` steps still takes: after its first steps, and once more when it has
    been evaluated."""

    def __init__(self, config: TrainConfig, start: int):
        self.config, self.start = config, start
        self.seconds: list[float] = []  # of the steps but the first, which warms up
        self.evaluated = False

    def step(self, done: int, metrics: dict[str, Any]) -> None:
        """Take note of step `done`, with the metrics of `train_step`."""
        if "pairs_per_second" not in metrics:  # it was refused: loss or gradient was not finite
            return
        if done > self.start + 1:
            self.seconds.append(self.config.batch_size / metrics["pairs_per_second"])
        if len(self.seconds) == TIMED_STEPS and done < self.config.total_steps:
            peak = f"; at most {metrics['peak_memory_gib']:.1f} GiB of memory so far"
            self._say(done, "evaluations not counted", 0.0, peak)

    def evaluation(self, done: int, seconds: float) -> None:
        """Take note of how long the evaluation after step `done` took. That before the first step does not count: its
        samples may have come from the cache."""
        if self.evaluated or len(self.seconds) < TIMED_STEPS or done == self.config.total_steps:
            return
        self.evaluated = True
        left = math.ceil(self.config.total_steps / self.config.eval_every) - done // self.config.eval_every
        self._say(done, f"{left} evaluation{'s' * (left > 1)} of {seconds:.2g} s counted", left * seconds)

    def _say(self, done: int, what: str, more_s: float, behind: str = "") -> None:
        left = self.config.total_steps - done
        mean_s = sum(self.seconds) / len(self.seconds)
        speed = self.config.batch_size / mean_s
        steps = f"{left:,} step{'s' * (left > 1)} at {speed:.3g} pairs/s"
        log_wrapped(log, f"about {age(left * mean_s + more_s)} left: {steps}, {what}{behind}")
