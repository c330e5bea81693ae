"""The training loop, from top to bottom: evaluate, step, log, save. It knows no objective by name."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import UserError, stop
from prefopt.checkpoint import latest_checkpoint, load_checkpoint, not_finite, save_checkpoint
from prefopt.config import TrainConfig
from prefopt.data.formats import Message
from prefopt.data.layout import LAYOUTS, Batch, Layout
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.engine import Engine
from prefopt.generate import Sample, sample
from prefopt.loggers import Loggers, read_metrics
from prefopt.logps import Scorer, autocast, casting_once, completion_rewards
from prefopt.metrics import mean_and_error, peak_memory_gib, reliability, step_metrics
from prefopt.models.adapter import seed_dropout, training
from prefopt.models.load import resolved_config
from prefopt.models.reference import ROUNDING, SIDES, Reference
from prefopt.objectives.base import DIFFERENTIABLE, Objective, ObjectiveOutput, PairInputs, concatenate
from prefopt.optim import Schedule
from prefopt.paths import cache_dir, write_json, write_whole
from prefopt.posthoc.oracle import Oracle
from prefopt.progress import Bar, say, track
from prefopt.ranks import by_first, gather, is_first, pulse, rank, world_size
from prefopt.run import Run
from prefopt.utils.fingerprint import fingerprint

# Policy and reference are the same function of the same weights before the first step; what is left is rounding.
STEP0_TOLERANCE = 1e-3


@dataclass
class Job:
    """Everything one run needs. `reference` is None where a reward model is trained; `prompts` are the held-out ones;
    `export` writes the policy as it is into a folder; `state` is the objective's."""

    config: TrainConfig
    run: Run
    objective: Objective
    schedule: Schedule
    engine: Engine
    reference: Reference | None
    tokenizer: PreTrainedTokenizerBase
    train_pairs: Sequence[TokenizedPair]
    heldout_pairs: Sequence[TokenizedPair]
    prompts: list[list[Message]]
    oracle: Oracle | None
    layout: Layout = LAYOUTS["padded"]
    export: Callable[[Path], Any] | None = None
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.objective.initial_state()
        self.score = Scorer(self.config.precision, self.config.logits == "tiled")

    def step(self, step: int) -> list["MicroBatch"]:
        """The pairs of optimizer step `step`, or this process's share of them: of pairs from long to short every n-th,
        of an objective's own micro-batches likewise. All processes get the same number of micro-batches, since each
        backward pass is one of all of them; where the pairs do not suffice, one without pairs follows."""
        indices = step_indices(len(self.train_pairs), self.config.seed, step, self.config.batch_size)
        pairs, n = [self.train_pairs[i] for i in indices], world_size()
        parts = self.cut(pairs)
        if n == 1:
            return self.collate(parts)
        if self.objective.scope == "micro_batch":
            shares = [parts[r::n] for r in range(n)]
        else:
            ordered = [p for part in parts for p in part]
            shares = [self.cut(ordered[r::n]) for r in range(n)]
        own, rounds = shares[rank()], max(map(len, shares))
        lacking = rounds - len(own)
        stand_in = [m._replace(pairs=[]) for m in self.collate([parts[-1][-1:]])] if lacking else []
        return self.collate(own) + stand_in * lacking

    def micro_batches(self, pairs: Sequence[TokenizedPair]) -> list["MicroBatch"]:
        """What is computed at a time, collated on the CPU; the same for the same pairs."""
        return self.collate(self.cut(pairs))

    def cut(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        size = self.objective.micro_batch_size if self.objective.scope == "micro_batch" else None
        return self.layout.micro_batches(pairs, self.config.micro_batch_tokens, size, self.objective.sides)

    def collate(self, parts: Sequence[list[TokenizedPair]]) -> list["MicroBatch"]:
        batches = [self.layout.collate(part, self.objective.sides) for part in parts]
        if self.engine.device.type == "cuda":
            batches = [batch.pin() for batch in batches]
        return [MicroBatch(part, batch) for part, batch in zip(parts, batches, strict=True)]


class MicroBatch(NamedTuple):
    """Without `pairs` its batch holds a stand-in, whose gradient is to count nothing."""

    pairs: list[TokenizedPair]
    batch: Batch


def train(job: Job) -> list[dict[str, Any]]:
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
    best = Best()
    # The first process chooses, since it may put a damaged one aside.
    checkpoint = gather(latest_checkpoint(run.checkpoints) if is_first() else None)[0]
    if checkpoint:
        tensors, meta = load_checkpoint(checkpoint)
        engine.load_state(tensors)
        job.state = tensors["objective"]
        start = meta["step"]
        if config.patience is not None:
            best = Best(tensors.get("best", {}), **meta.get("best", {}))
        say(f"  going on from step {start} of {steps} ({checkpoint})")
    logger = Loggers(run, config.logger, start)
    try:
        if start == 0:
            metrics = evaluate_once(job, 0)
            logger.log("heldout", 0, metrics)
            best.watch(job, 0, metrics)
        with Bar("training", steps, config.logger.progress, done=start) as bar:
            for step, micro_batches in upcoming(job, start):
                metrics = train_step(job, step, micro_batches)
                pulse()
                done = step + 1
                logger.log("train", done, metrics)
                if done % config.eval_every == 0 or done == steps:
                    found = evaluate_once(job, done)
                    logger.log("heldout", done, found)
                    best.watch(job, done, found)
                over = done == steps or best.evaluations_since == config.patience
                leave = not over and stop.requested()
                # Before the checkpoint: a run that goes on from there would not come by here again.
                if job.export and done in exports and not over:
                    by_first(partial(job.export, run.folder / "policies" / f"step_{done:07d}"))
                if (done % config.save_every == 0 and not over) or leave:
                    state = engine.state() | {"objective": job.state} | best.state()
                    by_first(partial(save_checkpoint, run.checkpoints, done, state, best.meta()))
                if leave:
                    raise stop.Interrupted(f"saved after step {done} of {steps}")
                bar.advance("  ".join(f"{k} {metrics[k]:.4g}" for k in ("loss", "accuracy") if k in metrics))
                if over:
                    break
    finally:
        logger.close()
    best.restore(job)
    last = steps if config.patience is None else best.step
    return [row for row in read_metrics(run) if row["split"] == "heldout" and row["step"] <= last]


@dataclass
class Best:
    """Where `patience` is set: the weights at the evaluation with the lowest held-out loss, on the CPU, its step and
    its loss, and how many evaluations have come since. The checkpoints carry it along."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    loss: float = math.inf
    evaluations_since: int = 0

    def watch(self, job: Job, step: int, metrics: dict[str, Any]) -> None:
        """`metrics` are the first process's; the others learn the loss from it."""
        if job.config.patience is None:
            return
        loss = gather(metrics.get("loss"))[0]
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

    def restore(self, job: Job) -> None:
        """Give the policy its best weights back."""
        if self.evaluations_since and self.weights:
            say(f"  patience: the held-out loss was lowest after step {self.step}, {self.loss:.4f}; back to it")
            job.engine.load_state({"weights": self.weights, "moments": {}})


def upcoming(job: Job, start: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, its micro-batches); those of the next step are collated while this one computes."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(job.step, start)
        for step in range(start, job.config.total_steps):
            micro_batches = coming.result()
            if step + 1 < job.config.total_steps:
                coming = pool.submit(job.step, step + 1)
            yield step, micro_batches


def train_step(job: Job, step: int, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """One optimizer step over `batch_size` pairs, in micro-batches. Returns the step's metrics.

    The host waits for the device once, for the metrics. If loss or gradient is not finite the weights stay as they are:
    raises UserError, or the metrics say `skipped`, as `nonfinite` asks for.
    """
    config, engine = job.config, job.engine
    began = time.monotonic()
    pairs = [p for micro_batch in micro_batches for p in micro_batch.pairs]
    where = f"step {step + 1}"
    with training(engine.policy), casting_once(), short_of_memory(job, where, micro_batches):
        scored = accumulate_gradients(job, step, micro_batches)
    if config.gradient_checkpointing and (lacking := engine.without_gradient()):
        raise RuntimeError(f"gradient_checkpointing: {len(lacking)} trainable tensors got no gradient: {lacking[:3]}")
    gradient_norm = engine.clip_gradients()
    sides = job.objective.sides
    ids, tokens = [p.id for p in pairs], sum(len(p.prompt) + len(getattr(p, side)) for p in pairs for side in sides)
    if world_size() > 1:
        # An objective over the step has seen all pairs in every process.
        shares = gather(([] if job.objective.scope == "step" and not is_first() else scored, ids, tokens))
        scored = [part for share, _, _ in shares for part in share]
        ids, tokens = [i for _, share, _ in shares for i in share], sum(share for *_, share in shares)
        gradient_norm = gradient_norm.cpu()
    metrics = step_metrics(job.objective, scored, gradient_norm=gradient_norm)
    lr = config.optimizer.lr * job.schedule(step, config.total_steps)
    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
    if bad:
        refuse(job, step, bad, ids, metrics | {"lr": lr})
        engine.discard()
        return {name: value for name, value in metrics.items() if math.isfinite(value)} | {"lr": lr, "skipped": 1}
    with short_of_memory(job, where, micro_batches):
        engine.step(lr)
    job.state = scored[-1][1].state
    seconds = time.monotonic() - began
    return metrics | {
        "lr": lr,
        "pairs_per_second": len(ids) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }


def refuse(job: Job, step: int, bad: list[str], ids: list[str], metrics: dict[str, Any]) -> None:
    """Write what there is to know about a step that was refused to nonfinite/ in the run's folder; say so, or raise
    UserError where the run is to stop, or every step would be refused since the weights are not finite."""
    config, run = job.config, job.run
    file = run.folder / "nonfinite" / f"step_{step + 1:07d}.json"
    weights = not_finite({name: p.detach() for name, p in job.engine.parameters.items()})
    if is_first():
        before = [row for row in read_metrics(run) if row["step"] <= step]
        shown = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        told = {"step": step + 1, "not_finite": bad, "weights_not_finite": weights, "pairs": ids, "metrics": shown}
        write_json(file, told | {"metrics_before": before[-1:]})
    message = (
        f"step {step + 1}: {' and '.join(bad)} not finite; the step was refused and the weights are unchanged. Its "
        f"{len(ids)} pairs and the metrics are in {file}."
    )
    if config.nonfinite == "skip" and not weights:
        say(f"  {message}")
        return
    hint = "with nonfinite=skip it passes over such a step"
    if weights:
        hint = f"the weights are not finite either (first in {weights[0]}), so no later step could be taken"
    raise UserError(
        f"{message} Its pairs: {', '.join(ids)}. Look at these pairs, or lower optimizer.lr={config.optimizer.lr}. The "
        f"same command goes on from the last checkpoint; {hint}."
    )


@contextlib.contextmanager
def short_of_memory(job: Job, where: str, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Where the memory does not suffice: UserError with the largest micro-batch, and with what makes it smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter, and so is a CPU's
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        config = job.config
        largest = max(micro_batches, key=lambda m: m.batch.input_ids.numel())
        rows, tokens = largest.batch.input_ids.shape
        ways = []
        if len(largest.pairs) > 1:
            ways.append(f"micro_batch_tokens={rows * tokens // 2}")
        if not config.gradient_checkpointing:
            ways.append("gradient_checkpointing=true")
        raise UserError(
            f"{where}: out of memory on {config.device}. The largest of its {len(micro_batches)} micro-batches has "
            f"{len(largest.pairs)} pairs in {rows} rows of {tokens} tokens (micro_batch_tokens="
            f"{config.micro_batch_tokens}). "
            + (
                f"Give {' or '.join(ways)}: a step stays one of {config.batch_size} pairs, and the run the same, which "
                "goes on from its last checkpoint. "
                if ways
                else "It is one pair already: use peft=lora_attention, engine=zero2 on more GPUs, or a smaller model. "
            )
            + f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def accumulate_gradients(
    job: Job, step: int, micro_batches: Sequence[MicroBatch]
) -> list[tuple[PairInputs, ObjectiveOutput]]:
    """Add up the gradient of the step's loss, the mean over its pairs (or over their chosen tokens, where the objective
    says so), micro-batch by micro-batch. It does not depend on the micro-batches unless the objective's scope is one.

    An objective over the whole step cannot be differentiated in parts. Its gradient has two factors, though: by the
    `(B,)` log-probs, which is cheap once they are all known, and of the log-probs by the weights. So a first pass
    collects the log-probs without graph, the objective is differentiated on them, and a second pass backpropagates
    sum(gradient * log-prob) micro-batch by micro-batch. The second pass must repeat the first: its dropout is the same.
    """
    config, objective, engine = job.config, job.objective, job.engine
    pairs = [p for micro_batch in micro_batches for p in micro_batch.pairs]
    denominator = sum(p.learnt for p in pairs) if objective.per == "chosen_token" else len(pairs)
    denominator = sum(gather(denominator))
    scored = []
    if objective.scope != "step" or (len(micro_batches) == 1 and world_size() == 1):
        for i, micro_batch in enumerate(micro_batches):
            seed_dropout(config.seed, step, i, rank())
            if not micro_batch.pairs:
                nothing(job, micro_batch)
                continue
            inputs = pair_inputs(job, micro_batch)
            if objective.scope == "step":
                inputs = whole_step(job, step, [inputs])
            output = objective(inputs)
            engine.backward(output.losses.sum() / denominator)
            # Without its graph, which would keep the model's activations.
            scored.append((inputs.map(Tensor.detach), output))
        return scored
    parts = []
    with torch.no_grad():
        for i, micro_batch in enumerate(micro_batches):
            seed_dropout(config.seed, step, i, rank())
            if micro_batch.pairs:
                parts.append(pair_inputs(job, micro_batch))
        inputs = whole_step(job, step, exchange(job, parts))
    leaves = {name: getattr(inputs, name).requires_grad_() for name in inputs.tensors() if name in DIFFERENTIABLE}
    output = objective(inputs)
    total = output.losses.sum() / denominator
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    own = slice(rank(), None, world_size())
    gradients = {name: g[own] for name, g in zip(leaves, found, strict=True) if g is not None}
    start = 0
    for i, micro_batch in enumerate(micro_batches):
        seed_dropout(config.seed, step, i, rank())
        if not micro_batch.pairs:
            nothing(job, micro_batch)
            continue
        tensors = policy_tensors(job, micro_batch.batch.to(engine.device))
        part = slice(start, start + len(micro_batch.pairs))
        engine.backward(torch.stack([(gradients[name][part] * tensors[name]).sum() for name in gradients]).sum())
        start += len(micro_batch.pairs)
    return [(inputs, output)]


def nothing(job: Job, micro_batch: MicroBatch) -> None:
    """Take part in the others' backward pass without a gradient of one's own."""
    tensors = policy_tensors(job, micro_batch.batch.to(job.engine.device))
    job.engine.backward(0 * torch.stack([value.sum() for value in tensors.values()]).sum())


def exchange(job: Job, parts: Sequence[PairInputs]) -> Sequence[PairInputs]:
    """The pairs of all processes, one by one, in the order that they have in one process; see `Job.step`."""
    if world_size() == 1:
        return parts
    shares = gather(concatenate(parts).tensors() if parts else {})
    n = sum(len(share["chosen_lengths"]) for share in shares if share)  # the first has one pair at least
    whole: dict[str, Any] = {name: torch.empty(n) for name in shares[0]}
    for r, share in enumerate(shares):
        for name, value in share.items():
            whole[name][r :: len(shares)] = value
    whole = {name: value.to(job.engine.device) for name, value in whole.items()}
    return [PairInputs(**whole)]


def whole_step(job: Job, step: int, parts: Sequence[PairInputs]) -> PairInputs:
    """All pairs of a step, with what only objectives of that scope may read: the state, and noise drawn for it."""
    inputs = concatenate(parts)
    n = len(inputs.chosen_lengths)
    generator = torch.Generator().manual_seed(job.config.seed * 1_000_003 + step)
    noise = torch.rand(n, generator=generator).to(inputs.chosen_lengths.device)
    return replace(inputs, noise=noise, state=job.state)


def pair_inputs(job: Job, micro_batch: MicroBatch, reference: bool = False) -> PairInputs:
    """Score B pairs with the policy, and with the reference where the objective needs it or `reference` asks for it."""
    needs = job.objective.needs
    batch = micro_batch.batch.to(job.engine.device)
    inputs = policy_tensors(job, batch)
    if reference or "reference" in needs:
        assert job.reference is not None
        inputs |= by_side(job, "reference_{}_logps", job.reference.logps(micro_batch.pairs, batch))
    inputs |= by_side(job, "{}_lengths", batch.lengths)
    if "rewards" in needs:
        for side in job.objective.sides:
            rewards = torch.tensor([getattr(p, f"{side}_reward") for p in micro_batch.pairs], dtype=torch.float32)
            inputs[f"{side}_rewards"] = rewards.to(batch.lengths.device, non_blocking=True)
    return PairInputs(**inputs)


def policy_tensors(job: Job, batch: Batch) -> dict[str, Any]:
    """What the model in training gives, by the names of `PairInputs`: the tensors that carry gradient."""
    if job.objective.trains == "reward_model":
        with autocast(job.engine.device, job.config.precision):
            return by_side(job, "policy_{}_rewards", completion_rewards(job.engine.policy, batch))
    logps = job.score(job.engine.policy, batch, "entropies" in job.objective.needs)
    tensors = by_side(job, "policy_{}_logps", logps.sums)
    return tensors if logps.entropies is None else tensors | by_side(job, "{}_entropies", logps.entropies)


def by_side(job: Job, name: str, values: Tensor) -> dict[str, Any]:
    """Split `(C,)` values of a batch's completions into `(B,)` ones: first all chosen, then all rejected."""
    sides = job.objective.sides
    return {name.format(side): part for side, part in zip(sides, values.chunk(len(sides)), strict=True)}


def evaluate_once(job: Job, step: int) -> dict[str, Any]:
    """`evaluate` by the first process, while the others wait."""
    return by_first(partial(evaluate, job, step)) or {}


def evaluate(job: Job, step: int) -> dict[str, Any]:
    """Held-out pairs and, with an oracle, samples to the held-out prompts; says the main figures."""
    metrics: dict[str, Any] = {}
    if job.heldout_pairs:
        metrics |= evaluate_pairs(job, step, job.heldout_pairs)
    elif step == 0:  # for its check alone
        first = step_indices(len(job.train_pairs), job.config.seed, 0, job.config.batch_size)
        evaluate_pairs(job, 0, [job.train_pairs[i] for i in first])
    if job.oracle:
        metrics |= initial_sample_metrics(job) if step == 0 else sample_metrics(job, step)
    parts = []
    if "accuracy" in metrics:
        parts.append(f"held-out accuracy {metrics['accuracy']:.3f} (ties {metrics['tie_rate']:.2f}, n {metrics['n']})")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "calibration_error" in metrics:
        parts.append(f"calibration error {metrics['calibration_error']:.3f}")
    if "oracle_reward" in metrics:
        parts.append(f"oracle reward {metrics['oracle_reward']:.3f} ± {metrics['oracle_reward_se']:.3f}")
        parts.append(f"KL {metrics['kl']:.2f} ± {metrics['kl_se']:.2f}")
        parts.append(f"length {metrics['sample_length']:.1f}")
    say(f"  step {step}/{job.config.total_steps}: {', '.join(parts) or 'nothing to evaluate'}")
    for row in metrics.get("reliability", []) if step == job.config.total_steps else []:
        found = f"{row['confidence']:.3f} on average, right {row['accuracy']:.3f} (n {row['n']})"
        say(f"    confidence {row['low']:.1f} to {row['high']:.1f}: {found}")
    fall, limit = -metrics.get("chosen_logratio_per_token", 0.0), job.config.squeeze_alarm
    if limit is not None and fall > limit:
        say(
            f"  squeezing: the held-out chosen completions have lost {fall:.2f} nats per token since the start, more "
            f"than squeeze_alarm={limit:g} (the rejected ones {-metrics.get('rejected_logratio_per_token', 0):.2f}). "
            "Lower optimizer.lr, or hold the chosen ones up with objective.nll_weight."
        )
    return metrics


@torch.no_grad()
def evaluate_pairs(job: Job, step: int, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """The pair metrics over `pairs`, the same in every call. At step 0 also the check that policy and reference agree.

    An objective whose scope is the step sees all pairs at once, with its state as it stands.
    """
    micro_batches = job.micro_batches(pairs)
    known = job.reference is not None and job.objective.sides == SIDES
    show = job.config.logger.progress
    with short_of_memory(job, f"evaluation after step {step}", micro_batches):
        parts = [pair_inputs(job, part, reference=known) for part in track(micro_batches, "held-out pairs", show)]
    if job.objective.scope == "step":
        parts = [whole_step(job, 0, parts)]
    scored = [(inputs, job.objective(inputs)) for inputs in parts]
    metrics = step_metrics(job.objective, scored)
    if job.objective.trains == "reward_model":
        margins = [output.chosen_scores - output.rejected_scores for _, output in scored]  # type: ignore[operator]
        metrics |= reliability(torch.cat(margins))
    if step == 0:
        check_step0(job, [inputs for inputs, _ in scored], metrics["loss"])
    return metrics


def check_step0(job: Job, scored: Sequence[PairInputs], loss: float) -> None:
    """Before the first step policy and reference are the same: every log-ratio is 0 and the loss is known.

    Where the reference was scored in other batches than the policy, in bfloat16, on hardware whose products depend on
    the batch, log-ratios may be as large as that rounding. Raises UserError beyond; says so if all is well.
    """
    if job.config.reference_model:
        return  # they need not be the same
    found, exact = [], True
    sides = [(x, side) for x in scored for side in job.objective.sides if x.has_reference]
    if sides:
        logratios = torch.cat([getattr(x, f"{side}_logratios") for x, side in sides]).abs()
        lengths = torch.cat([getattr(x, f"{side}_lengths") for x, side in sides])
        largest = logratios.max().item()
        exact = largest <= STEP0_TOLERANCE
        if not exact and not (logratios <= ROUNDING[job.config.precision] * lengths).all():
            raise UserError(
                f"before the first step the policy differs from the reference: largest |log-ratio| {largest:.3g} "
                "nats over its pairs. They must be the same model, scored in the same way; this is a bug or a "
                "model whose forward pass is random."
            )
        found.append(f"policy = reference {'' if exact else 'up to rounding '}(largest |log-ratio| {largest:.2g})")
    expected = job.objective.step0_loss
    if expected is not None and exact:
        if not abs(loss - expected) <= STEP0_TOLERANCE * max(1.0, abs(expected)):
            raise UserError(f"before the first step the loss is {loss:.6f}; it must be {expected:.6f} there")
        found.append(f"loss {loss:.6f} = {expected:.6f}")
    if found:
        say(f"  step 0: {', '.join(found)}")


def initial_sample_metrics(job: Job) -> dict[str, Any]:
    """`sample_metrics` of the initial policy, which all the runs of a sweep share: drawn once, then read from the
    user's cache under everything that decides them."""
    config = job.config
    if config.reference_model:
        return sample_metrics(job, 0)  # the KL is to another model
    decides = [
        job.run.record["initial_weights"],
        resolved_config(job.engine.policy),
        job.run.record["versions"],
        [encode_prompt(job.tokenizer, prompt) for prompt in job.prompts],
        repr(job.oracle),
        config.sampling,
        [config.seed, config.precision, config.device, torch.get_num_threads()],
    ]
    key = fingerprint(decides, sample, Scorer, type(job.oracle))
    cached = cache_dir() / "initial_samples" / key[:16]
    samples_file = file_of_samples(job, 0)
    if not (cached / "metrics.json").is_file():
        metrics = sample_metrics(job, 0)
        write_whole(cached / "samples.jsonl", samples_file.read_text())
        write_whole(cached / "metrics.json", json.dumps(metrics))
    write_whole(samples_file, (cached / "samples.jsonl").read_text())
    return json.loads((cached / "metrics.json").read_text())


@torch.no_grad()
def sample_metrics(job: Job, step: int) -> dict[str, Any]:
    """Draw one response to each held-out prompt and score it; write the texts to samples/.

    `kl` estimates KL(policy || reference) in nats per response: the mean log-ratio over the policy's own samples,
    unbiased at temperature 1.
    """
    assert job.oracle is not None
    show = job.config.logger.progress
    with autocast(job.engine.device, job.config.precision):
        drawn = sample(job.engine.policy, job.tokenizer, job.prompts, job.config.sampling, job.config.seed, 1, show)
    samples = [responses[0] for responses in drawn]
    logratios = sample_logratios(job, samples)
    rewards = [job.oracle(prompt, s.text) for prompt, s in zip(job.prompts, samples, strict=True)]
    lines = [
        {"prompt": prompt, "response": s.text, "finished": s.finished, "reward": reward, "logratio": logratio}
        for prompt, s, reward, logratio in zip(job.prompts, samples, rewards, logratios, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(file_of_samples(job, step), text)
    reward, reward_se = mean_and_error(rewards)
    kl, kl_se = mean_and_error(logratios)
    return {
        "oracle_reward": reward,
        "oracle_reward_se": reward_se,
        "kl": kl,
        "kl_se": kl_se,
        "sample_length": sum(len(s.tokens) for s in samples) / len(samples),
        "sample_finished": sum(s.finished for s in samples) / len(samples),
        "samples": len(samples),
    }


def file_of_samples(job: Job, step: int) -> Path:
    """Its folder is there afterwards. Raises FileNotFoundError where the run's own is gone, with its file system."""
    folder = job.run.folder / "samples"
    folder.mkdir(exist_ok=True)
    return folder / f"step_{step:07d}.jsonl"


def sample_logratios(job: Job, samples: Sequence[Sample]) -> list[float]:
    """log pi - log pi_ref of each sample, nats."""
    assert job.reference is not None
    # As pairs without a rejected side, which the layouts know how to cut into micro-batches.
    pairs = [TokenizedPair(str(i), s.prompt_tokens, s.tokens, []) for i, s in enumerate(samples)]
    parts = job.layout.micro_batches(pairs, job.config.micro_batch_tokens, None, ("chosen",))

    def scored(model: PreTrainedModel, what: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part in track(parts, f"KL of samples: {what}", job.config.logger.progress):
            found = job.score(model, job.layout.collate(part, ("chosen",)).to(job.engine.device)).sums
            sums |= dict(zip((p.id for p in part), found.tolist(), strict=True))
        return sums

    policy = scored(job.engine.policy, "policy")
    with job.reference.model() as model:
        reference = scored(model, "reference")
    return [policy[p.id] - reference[p.id] for p in pairs]
