"""One optimizer step: forward, objective, backward, in micro-batches."""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.collate import Batch, completions_of
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.dropout import seed_pairs, without_dropout
from prefopt.models.logprobs import Logps, as_forward, autocast, autocast_weight_cache, completion_rewards
from prefopt.models.lora import train_mode
from prefopt.models.reference import AdapterOff
from prefopt.objectives import GROUP, SIDES
from prefopt.objectives.base import (
    DIFFERENTIABLE,
    GroupInputs,
    Objective,
    ObjectiveOutput,
    PairInputs,
    apply_objective,
    concatenate,
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


class StepCounts(NamedTuple):
    """What a step's means are taken over, in all micro-batches of all processes."""

    pairs: int
    chosen_tokens: int
    group_tokens: int  # of all responses of groups

    def denominator(self, objective: Objective) -> int:
        """What the sum of the losses is divided by."""
        return self.chosen_tokens if objective.normalize_by == "chosen_token" else self.pairs


def count_step(micro_batches: Sequence[MicroBatch]) -> StepCounts:
    """The counts of these micro-batches."""
    pairs = [pair for micro_batch in micro_batches for pair in micro_batch.pairs]
    group_tokens = sum(len(completion) for pair in pairs for completion in completions_of(pair, GROUP))
    return StepCounts(len(pairs), sum(pair.num_loss_tokens for pair in pairs), group_tokens)


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
    tokens = step_tokens(micro_batches) if train_state.router_loss else 0
    for micro_batch in micro_batches:
        seed_dropout(train_state, step, micro_batch)
        if not micro_batch.pairs:
            zero_backward(train_state, micro_batch)
            continue
        tensors, _ = forward_policy(train_state, micro_batch.batch.to(engine.device))
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


def stand_in(train_state: TrainState, micro_batch: MicroBatch, passes: int) -> None:
    """Forward passes of policy and reference whose results do not count, without gradient."""
    batch = micro_batch.batch.to(train_state.engine.device)
    for _ in range(passes):
        with torch.no_grad(), without_dropout(train_state.engine.policy):
            forward_policy(train_state, batch)
        reference_stand_in(train_state, micro_batch)


def lacking_mismatched(train_state: TrainState, micro_batch: MicroBatch) -> int:
    """How many fewer micro-batches of mismatched completions this process has than another, where the processes gather
    weights for each. A collective then."""
    if not train_state.engine.sharded or "mismatched" not in train_state.objective.needs:
        return 0
    n = len(micro_batch.mismatched) if micro_batch.pairs else 0  # of a stand-in they are not scored
    return max(all_gather_object(n)) - n


def reference_stand_in(train_state: TrainState, micro_batch: MicroBatch) -> None:
    """The references' passes over a micro-batch without pairs, where they are passes of all processes."""
    if not train_state.engine.sharded:
        return
    asked = [train_state.reference] if reads_reference(train_state) else []
    for reference in [*asked, train_state.initial]:
        if isinstance(reference, AdapterOff):
            reference.logps([], micro_batch.batch.to(train_state.engine.device))


def reads_reference(train_state: TrainState) -> bool:
    """Whether the objective asks for `train_state.reference`, which is also the initial policy unless that is kept
    beside it."""
    needs = train_state.objective.needs
    return "reference" in needs or ("initial" in needs and train_state.initial is None)


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


def forward_pairs(
    train_state: TrainState, micro_batch: MicroBatch, total: StepCounts, reference: bool = False
) -> PairInputs:
    """Score B pairs with the policy, and with the reference where the objective needs it or `reference` asks for it.
    `total` counts the pairs that are averaged, these among them."""
    needs = train_state.objective.needs
    batch = micro_batch.batch.to(train_state.engine.device)
    inputs, logps = forward_policy(train_state, batch)
    found = None
    if reference or reads_reference(train_state):
        assert train_state.reference is not None
        found = train_state.reference.logps(micro_batch.pairs, batch, "prefixes" in needs)
        inputs |= split_completions(train_state, "reference_{}_logps", found.sums, batch)
        inputs |= split_completions(train_state, "reference_{}_prefix_logps", found.prefixes, batch)
    inputs |= split_completions(train_state, "{}_lengths", batch.lengths, batch)
    weights = torch.tensor([pair.weight for pair in micro_batch.pairs], dtype=torch.float32)
    inputs["weights"] = weights.to(batch.lengths.device, non_blocking=True)
    inputs["mean_chosen_length"] = torch.full_like(inputs["chosen_lengths"], total.chosen_tokens / total.pairs)
    if "rewards" in needs:
        for side in SIDES:
            rewards = torch.tensor([getattr(p, f"{side}_reward") for p in micro_batch.pairs], dtype=torch.float32)
            inputs[f"{side}_rewards"] = rewards.to(batch.lengths.device, non_blocking=True)
    if "mismatched" in needs:
        logratios = mismatched_logratios(train_state, micro_batch)
        inputs |= split_completions(train_state, "mismatched_{}_logratios", logratios, batch)
    if "others" in train_state.objective.completions:
        assert logps is not None
        inputs["group"] = group_inputs(train_state, micro_batch.pairs, batch, logps, found, total)
    return PairInputs(**inputs)


def group_inputs(
    train_state: TrainState,
    pairs: Sequence[TokenizedPair],
    batch: Batch,
    logps: Logps,
    reference: Logps | None,
    total: StepCounts,
) -> GroupInputs:
    """What an objective reads of B groups whose responses `batch` holds. `logps` are the policy's, `reference` the
    reference's where they were asked for."""
    needs, mask = train_state.objective.needs, batch.grid >= 0

    def by_group(values: Tensor) -> Tensor:
        """(C, ...) -> (B, n, ...)."""
        found = values[batch.grid.clamp(min=0)]
        return found.masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - 1)), 0)

    rewards = torch.zeros(mask.shape)
    for row, pair in zip(rewards, pairs, strict=True):
        values = [pair.chosen_reward, pair.rejected_reward, *(pair.other_rewards or [])]
        row[: len(values)] = torch.tensor(values, dtype=torch.float32)
    found: dict[str, Any] = {
        "mask": mask,
        "lengths": by_group(batch.lengths),
        "rewards": rewards.to(batch.lengths.device, non_blocking=True),
        "policy_logps": by_group(logps.sums),
        "mean_tokens": batch.lengths.new_tensor(total.group_tokens / total.pairs),
    }
    initial = train_state.initial.logps(pairs, batch) if train_state.initial else reference
    for name, scored in (("reference", reference), ("initial", initial)):
        if name in needs:
            assert scored is not None
            found[f"{name}_logps"] = by_group(scored.sums)
            if "tokens" in needs:
                assert scored.tokens is not None
                found[f"{name}_tokens"] = by_group(scored.tokens)
    if "tokens" in needs:
        assert logps.tokens is not None
        found["policy_tokens"] = by_group(logps.tokens)
    return GroupInputs(**found)


@torch.no_grad()
def mismatched_logratios(train_state: TrainState, micro_batch: MicroBatch) -> Tensor:
    """log pi - log pi_ref of the mismatched completions of B pairs, `(2B,)`: first the chosen ones. They measure how
    far the policy is from the reference, so an adapter's dropout is off."""
    assert train_state.reference is not None
    lacking = lacking_mismatched(train_state, micro_batch)
    parts: list[Tensor] = []
    order: dict[int, int] = {}
    for pairs, batch, _ in micro_batch.mismatched:
        batch = batch.to(train_state.engine.device)
        with without_dropout(train_state.engine.policy):
            policy = train_state.score(train_state.engine.policy, batch).sums
        parts.append((policy - train_state.reference.logps(pairs, batch).sums).view(2, -1))
        order |= {id(pair): len(order) + i for i, pair in enumerate(pairs)}
    stand_in(train_state, micro_batch, lacking)
    places = torch.tensor([order[id(pair.mismatched)] for pair in micro_batch.pairs])
    return torch.cat(parts, 1)[:, places.to(parts[0].device, non_blocking=True)].flatten()


def forward_policy(train_state: TrainState, batch: Batch) -> tuple[dict[str, Any], Logps | None]:
    """What the policy computes, `(B,)`, by the names in `PairInputs`: log-probs and what else the objective needs of
    them, or the reward model's rewards. All that carries gradient is among it, for all objectives but those on groups,
    which read the log-probs themselves, of all completions."""
    if train_state.objective.model_kind == "reward_model":
        with autocast(train_state.engine.device, train_state.config.precision):
            rewards = as_forward(train_state.engine.policy, lambda policy: completion_rewards(policy, batch))
            return split_completions(train_state, "policy_{}_rewards", rewards, batch), None
    needs = train_state.objective.needs
    further = "entropies" in needs, "on_policy" in needs, "prefixes" in needs
    logps = train_state.score(train_state.engine.policy, batch, *further)
    tensors = (
        split_completions(train_state, "policy_{}_logps", logps.sums, batch)
        | split_completions(train_state, "{}_entropies", logps.entropies, batch)
        | split_completions(train_state, "{}_on_policy", logps.on_policy, batch)
        | split_completions(train_state, "policy_{}_prefix_logps", logps.prefixes, batch)
    )
    return tensors, logps


def split_completions(train_state: TrainState, name: str, values: Tensor | None, batch: Batch) -> dict[str, Any]:
    """Split `(C,)` values of a batch's completions into `(B,)` ones: first all chosen, then all rejected. What a group
    has besides is left out. None gives none."""
    if values is None:
        return {}
    sides = [side for side in train_state.objective.completions if side in SIDES]
    return {name.format(side): part for side, part in zip(sides, values.split(len(batch.grid)), strict=False)}
