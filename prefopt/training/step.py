"""One optimizer step: forward, objective, backward, in micro-batches."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefopt.data.collate import Batch
from prefopt.models.logprobs import autocast, autocast_weight_cache, completion_rewards
from prefopt.models.lora import seed_dropout, train_mode
from prefopt.objectives.base import DIFFERENTIABLE, ObjectiveOutput, PairInputs, concatenate
from prefopt.training.guards import explain_oom, handle_nonfinite_step
from prefopt.training.metrics import peak_memory_gib, step_metrics
from prefopt.training.state import MicroBatch, TrainState
from prefopt.utils.distributed import all_gather_object, is_main_process, rank, world_size
from prefopt.utils.seed import mix_seed


def train_step(job: TrainState, step: int, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """One optimizer step over `batch_size` pairs, in micro-batches. Returns the step's metrics.

    The host waits for the device once, for the metrics. If loss or gradient is not finite the weights stay as they are:
    raises UserError, or the metrics say `skipped`, as `nonfinite` asks for.
    """
    config, engine = job.config, job.engine
    began = time.monotonic()
    pairs = [p for micro_batch in micro_batches for p in micro_batch.pairs]
    where = f"step {step + 1}"
    with train_mode(engine.policy), autocast_weight_cache(), explain_oom(job, where, micro_batches):
        scored = accumulate_gradients(job, step, micro_batches)
    if config.gradient_checkpointing and (lacking := engine.without_gradient()):
        raise RuntimeError(f"gradient_checkpointing: {len(lacking)} trainable tensors got no gradient: {lacking[:3]}")
    gradient_norm = engine.clip_gradients()
    sides = job.objective.completions
    ids, tokens = [p.id for p in pairs], sum(len(p.prompt) + len(getattr(p, side)) for p in pairs for side in sides)
    if world_size() > 1:
        # An objective over the step has seen all pairs in every process.
        shares = all_gather_object(
            ([] if job.objective.scope == "step" and not is_main_process() else scored, ids, tokens)
        )
        scored = [part for share, _, _ in shares for part in share]
        ids, tokens = [i for _, share, _ in shares for i in share], sum(share for *_, share in shares)
        gradient_norm = gradient_norm.cpu()
    metrics = step_metrics(job.objective, scored, gradient_norm=gradient_norm)
    lr = config.optimizer.lr * job.schedule(step, config.total_steps)
    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
    if bad:
        handle_nonfinite_step(job, step, bad, ids, metrics | {"lr": lr})
        engine.discard()
        return {name: value for name, value in metrics.items() if math.isfinite(value)} | {"lr": lr, "skipped": 1}
    with explain_oom(job, where, micro_batches):
        engine.step(lr)
    job.state = scored[-1][1].state
    seconds = time.monotonic() - began
    return metrics | {
        "lr": lr,
        "pairs_per_second": len(ids) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }


def accumulate_gradients(
    job: TrainState, step: int, micro_batches: Sequence[MicroBatch]
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
    denominator = sum(p.num_loss_tokens for p in pairs) if objective.normalize_by == "chosen_token" else len(pairs)
    denominator = sum(all_gather_object(denominator))
    scored = []
    if objective.scope != "step" or (len(micro_batches) == 1 and world_size() == 1):
        for i, micro_batch in enumerate(micro_batches):
            seed_dropout(config.seed, step, i, rank())
            if not micro_batch.pairs:
                zero_backward(job, micro_batch)
                continue
            inputs = forward_pairs(job, micro_batch)
            if objective.scope == "step":
                inputs = step_inputs(job, step, [inputs])
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
                parts.append(forward_pairs(job, micro_batch))
        inputs = step_inputs(job, step, all_gather_pairs(job, parts))
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
            zero_backward(job, micro_batch)
            continue
        tensors = forward_policy(job, micro_batch.batch.to(engine.device))
        part = slice(start, start + len(micro_batch.pairs))
        engine.backward(torch.stack([(gradients[name][part] * tensors[name]).sum() for name in gradients]).sum())
        start += len(micro_batch.pairs)
    return [(inputs, output)]


def zero_backward(job: TrainState, micro_batch: MicroBatch) -> None:
    """Take part in the others' backward pass without a gradient of one's own."""
    tensors = forward_policy(job, micro_batch.batch.to(job.engine.device))
    job.engine.backward(0 * torch.stack([value.sum() for value in tensors.values()]).sum())


def all_gather_pairs(job: TrainState, parts: Sequence[PairInputs]) -> Sequence[PairInputs]:
    """The pairs of all processes, one by one, in the order that they have in one process; see `Job.step`."""
    if world_size() == 1:
        return parts
    shares = all_gather_object(concatenate(parts).tensors() if parts else {})
    n = sum(len(share["chosen_lengths"]) for share in shares if share)  # the first has one pair at least
    whole: dict[str, Any] = {name: torch.empty(n) for name in shares[0]}
    for r, share in enumerate(shares):
        for name, value in share.items():
            whole[name][r :: len(shares)] = value
    whole = {name: value.to(job.engine.device) for name, value in whole.items()}
    return [PairInputs(**whole)]


def step_inputs(job: TrainState, step: int, parts: Sequence[PairInputs]) -> PairInputs:
    """All pairs of a step, with what only objectives of that scope may read: the state, and noise drawn for it."""
    inputs = concatenate(parts)
    n = len(inputs.chosen_lengths)
    generator = torch.Generator().manual_seed(mix_seed(job.config.seed, step))
    noise = torch.rand(n, generator=generator).to(inputs.chosen_lengths.device)
    return replace(inputs, noise=noise, state=job.state)


def forward_pairs(job: TrainState, micro_batch: MicroBatch, reference: bool = False) -> PairInputs:
    """Score B pairs with the policy, and with the reference where the objective needs it or `reference` asks for it."""
    needs = job.objective.needs
    batch = micro_batch.batch.to(job.engine.device)
    inputs = forward_policy(job, batch)
    if reference or "reference" in needs:
        assert job.reference is not None
        inputs |= split_completions(job, "reference_{}_logps", job.reference.logps(micro_batch.pairs, batch))
    inputs |= split_completions(job, "{}_lengths", batch.lengths)
    if "rewards" in needs:
        for side in job.objective.completions:
            rewards = torch.tensor([getattr(p, f"{side}_reward") for p in micro_batch.pairs], dtype=torch.float32)
            inputs[f"{side}_rewards"] = rewards.to(batch.lengths.device, non_blocking=True)
    return PairInputs(**inputs)


def forward_policy(job: TrainState, batch: Batch) -> dict[str, Any]:
    """What the model in training gives, by the names of `PairInputs`: the tensors that carry gradient."""
    if job.objective.model_kind == "reward_model":
        with autocast(job.engine.device, job.config.precision):
            return split_completions(job, "policy_{}_rewards", completion_rewards(job.engine.policy, batch))
    logps = job.score(job.engine.policy, batch, "entropies" in job.objective.needs)
    tensors = split_completions(job, "policy_{}_logps", logps.sums)
    return tensors if logps.entropies is None else tensors | split_completions(job, "{}_entropies", logps.entropies)


def split_completions(job: TrainState, name: str, values: Tensor) -> dict[str, Any]:
    """Split `(C,)` values of a batch's completions into `(B,)` ones: first all chosen, then all rejected."""
    sides = job.objective.completions
    return {name.format(side): part for side, part in zip(sides, values.chunk(len(sides)), strict=True)}
