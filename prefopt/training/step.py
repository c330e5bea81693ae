"""One optimizer step: forward, objective, backward, in micro-batches."""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefopt.data.collate import completions_of
from prefopt.models.dropout import seed_pairs
from prefopt.models.logprobs import autocast_weight_cache
from prefopt.models.lora import train_mode
from prefopt.objectives.base import (
    DIFFERENTIABLE,
    ObjectiveOutput,
    PairInputs,
    apply_objective,
    concatenate,
)
from prefopt.training.forward import (
    StepCounts,
    count_step,
    forward_pairs,
    forward_policy,
    lacking_mismatched,
    reference_stand_in,
    stand_in,
)
from prefopt.training.guards import explain_oom, handle_nonfinite_step
from prefopt.training.metrics import peak_memory_gib, step_metrics
from prefopt.training.state import MicroBatch, TrainState
from prefopt.training.step0 import check_step0
from prefopt.utils.distributed import all_gather_object, is_main_process, rank, world_size
from prefopt.utils.seed import mix_seed

log = logging.getLogger(__name__)

Scored = list[tuple[PairInputs, ObjectiveOutput]]


def train_step(train_state: TrainState, step: int, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Take one optimizer step over `batch_size` pairs, in micro-batches. Returns the step's metrics.

    The host waits for the device once, for the metrics. Where loss or gradient is not finite, the weights stay as they
    are: nonfinite=stop raises UserError, nonfinite=skip returns metrics with `skipped`.
    """
    config, engine = train_state.config, train_state.engine
    began = time.monotonic()
    where = f"step {step + 1}"
    # Casts of weights that were gathered for a moment would stay for the whole step.
    cache = contextlib.nullcontext() if engine.sharded else autocast_weight_cache()
    with train_mode(engine.policy), cache, explain_oom(train_state, where, micro_batches):
        scored = accumulate_gradients(train_state, step, micro_batches)
    if config.gradient_checkpointing and (lacking := engine.without_gradient()):
        raise RuntimeError(f"gradient_checkpointing: {len(lacking)} trainable tensors got no gradient: {lacking[:3]}")
    gradient_norm = engine.clip_gradients()

    scored, ids, tokens = gather_step(train_state, scored, micro_batches)
    if world_size() > 1:
        gradient_norm = gradient_norm.cpu()  # where the gathered outputs are
    metrics = step_metrics(train_state.objective, scored, gradient_norm=gradient_norm)
    if train_state.router_loss:
        metrics["router_aux_loss"] = sum(all_gather_object(float(train_state.router_loss.total)))
    lr = config.optimizer.peak * train_state.schedule(step, config.total_steps)

    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
    if bad:
        handle_nonfinite_step(train_state, step, bad, ids, metrics | {"lr": lr})
        engine.discard()
        return {name: value for name, value in metrics.items() if math.isfinite(value)} | {"lr": lr, "skipped": 1}

    if step == 0:
        inputs = [inputs for inputs, _ in scored]
        agreed = check_step0(train_state, inputs, metrics["loss"], "in the first training step")
        if agreed and not train_state.heldout_pairs:  # else the evaluation has said it
            log.info(f"  step 0: {agreed}")
    with explain_oom(train_state, where, micro_batches):
        engine.step(lr)
    train_state.objective_state = scored[-1][1].state

    seconds = time.monotonic() - began
    return metrics | {
        "lr": lr,
        "pairs_per_second": len(ids) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }


def gather_step(
    train_state: TrainState, scored: Scored, micro_batches: Sequence[MicroBatch]
) -> tuple[Scored, list[str], int]:
    """(what was scored, the pairs' ids, the number of their tokens) of all processes together."""
    objective = train_state.objective
    pairs = [pair for micro_batch in micro_batches for pair in micro_batch.pairs]
    ids = [pair.id for pair in pairs]
    tokens = sum(len(pair.prompt) + len(c) for pair in pairs for c in completions_of(pair, objective.completions))
    if world_size() == 1:
        return scored, ids, tokens

    # With an objective over the step every process has scored all pairs: count them once.
    duplicate = objective.scope == "step" and not is_main_process()
    shares = all_gather_object(([] if duplicate else scored, ids, tokens))
    return (
        [part for share, _, _ in shares for part in share],
        [i for _, share, _ in shares for i in share],
        sum(share for *_, share in shares),
    )


def accumulate_gradients(train_state: TrainState, step: int, micro_batches: Sequence[MicroBatch]) -> Scored:
    """Add up the gradient of the step's loss, micro-batch by micro-batch.

    The loss is the mean over the step's pairs, or over their chosen tokens where `objective.normalize_by` says so. The
    gradient does not depend on the micro-batches unless `objective.scope` is "micro_batch".
    """
    objective = train_state.objective
    counts = [StepCounts(*share) for share in all_gather_object(tuple(count_step(micro_batches)))]
    total = StepCounts(*map(sum, zip(*counts, strict=True)))

    if train_state.router_loss:
        train_state.router_loss.total = 0.0

    sees_whole_step = len(micro_batches) == 1 and world_size() == 1
    if objective.scope == "step" and not sees_whole_step:
        return two_passes(train_state, step, micro_batches, total)
    return single_pass(train_state, step, micro_batches, total)


def single_pass(train_state: TrainState, step: int, micro_batches: Sequence[MicroBatch], total: StepCounts) -> Scored:
    """Forward, objective, backward of one micro-batch after the other: the step's loss is the sum of their losses."""
    scored: Scored = []
    tokens = step_tokens(micro_batches) if train_state.router_loss else 0
    for micro_batch in micro_batches:
        seed_dropout(train_state, step, micro_batch)
        if not micro_batch.pairs:
            reference_stand_in(train_state, micro_batch)
            zero_backward(train_state, micro_batch)
            continue
        inputs = forward_pairs(train_state, micro_batch, total)
        if train_state.objective.scope == "step":
            inputs = step_inputs(train_state, step, [inputs])
        output = apply_objective(train_state.objective, inputs)
        loss = output.losses.sum() / total.denominator(train_state.objective)
        if train_state.router_loss:
            loss = loss + train_state.router_loss(micro_batch.batch, tokens)
        train_state.engine.backward(loss)
        # Detached: the graph would keep the model's activations.
        scored.append((inputs.map(Tensor.detach), output))
    return scored


def two_passes(train_state: TrainState, step: int, micro_batches: Sequence[MicroBatch], total: StepCounts) -> Scored:
    """The gradient of an objective over the whole step, which cannot be computed one micro-batch at a time.

    By the chain rule it is (loss by log-probs) x (log-probs by weights). The first pass collects the `(B,)` log-probs
    of all pairs without a graph, and the objective is differentiated by them. The second pass backpropagates
    sum(gradient * log-prob), one micro-batch at a time. Both passes draw the same dropout.
    """
    objective, engine = train_state.objective, train_state.engine

    parts = []
    with torch.no_grad():
        for micro_batch in micro_batches:
            seed_dropout(train_state, step, micro_batch)
            if micro_batch.pairs:
                parts.append(forward_pairs(train_state, micro_batch, total))
            elif engine.sharded:
                stand_in(train_state, micro_batch, 1)
                stand_in(train_state, micro_batch, lacking_mismatched(train_state, micro_batch))
        inputs = step_inputs(train_state, step, all_gather_pairs(train_state, parts))

    leaves = {name: getattr(inputs, name).requires_grad_() for name in inputs.tensors() if name in DIFFERENTIABLE}
    output = apply_objective(objective, inputs)
    step_loss = output.losses.sum() / total.denominator(objective)
    by_logps = torch.autograd.grad(step_loss, list(leaves.values()), allow_unused=True)
    share = slice(rank(), None, world_size())  # this process's pairs; see `all_gather_pairs`
    gradients = {name: g[share] for name, g in zip(leaves, by_logps, strict=True) if g is not None}

    start = 0
    reads_kl = "sequential_kl" in objective.needs
    tokens = step_tokens(micro_batches) if train_state.router_loss else 0
    for micro_batch in micro_batches:
        seed_dropout(train_state, step, micro_batch)
        if not micro_batch.pairs:
            if reads_kl:
                reference_stand_in(train_state, micro_batch)
            zero_backward(train_state, micro_batch)
            continue
        batch, reference = micro_batch.batch.to(engine.device), None
        if reads_kl:
            assert train_state.reference is not None
            reference = train_state.reference.logps(micro_batch.pairs, batch)
        tensors, _ = forward_policy(train_state, batch, reference)
        part = slice(start, start + len(micro_batch.pairs))
        loss = torch.stack([(gradients[name][part] * tensors[name]).sum() for name in gradients]).sum()
        if train_state.router_loss:
            loss = loss + train_state.router_loss(micro_batch.batch, tokens)
        engine.backward(loss)
        start = part.stop
    return [(inputs, output)]


def step_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """The tokens in the rows of a step, of all processes, without padding."""
    return sum(all_gather_object(sum(m.batch.tokens for m in micro_batches if m.pairs)))


def seed_dropout(train_state: TrainState, step: int, micro_batch: MicroBatch) -> None:
    """Make the adapter's dropout in the next passes over `micro_batch` a function of seed, step and pair. A resumed run
    so draws the dropout that it would have drawn, and the two passes over a micro-batch draw the same."""
    ids = [zlib.crc32(pair.id.encode()) for pair in micro_batch.pairs] or [0]
    seeds = [mix_seed(train_state.config.seed, step, number) for number in ids]
    seed_pairs(train_state.engine.policy, seeds, micro_batch.batch)


def zero_backward(train_state: TrainState, micro_batch: MicroBatch) -> None:
    """Backward pass with a gradient of zero: every process takes part in the same number of collectives."""
    tensors, _ = forward_policy(train_state, micro_batch.batch.to(train_state.engine.device))
    loss = 0 * torch.stack([value.sum() for value in tensors.values()]).sum()
    train_state.engine.backward(loss)


def all_gather_pairs(train_state: TrainState, parts: Sequence[PairInputs]) -> Sequence[PairInputs]:
    """The scored pairs of all processes, in the order of a single process: `TrainState.step_micro_batches` deals pair i
    to process i modulo n."""
    if world_size() == 1:
        return parts
    shares = all_gather_object(concatenate(parts).tensors() if parts else {})
    n = sum(len(share["chosen_lengths"]) for share in shares if share)
    merged: dict[str, Any] = {name: torch.empty(n) for name in shares[0]}  # the main process has a pair at least
    for r, share in enumerate(shares):
        for name, value in share.items():
            merged[name][r :: len(shares)] = value
    return [PairInputs(**{name: value.to(train_state.engine.device) for name, value in merged.items()})]


def step_inputs(train_state: TrainState, step: int, parts: Sequence[PairInputs]) -> PairInputs:
    """All pairs of a step as one, with what an objective over the step may read besides: its state, and `(B,)` noise
    from [0, 1) that is a function of seed and step."""
    inputs = concatenate(parts)
    generator = torch.Generator().manual_seed(mix_seed(train_state.config.seed, step))
    noise = torch.rand(len(inputs.chosen_lengths), generator=generator).to(inputs.chosen_lengths.device)
    return replace(inputs, noise=noise, state=train_state.objective_state)
