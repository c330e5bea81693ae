"""What an objective reads of pairs and groups: log-probs of the policy and the reference, lengths, rewards, weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.data.collate import Batch, completions_of
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.dropout import without_dropout
from prefopt.models.logprobs import Logps, as_forward, autocast, completion_rewards
from prefopt.models.reference import AdapterOff
from prefopt.objectives import GROUP, SIDES
from prefopt.objectives.base import Objective, PairInputs
from prefopt.objectives.groupwise import GroupInputs
from prefopt.training.state import MicroBatch, TrainState
from prefopt.utils.distributed import all_gather_object


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


def forward_pairs(
    train_state: TrainState, micro_batch: MicroBatch, total: StepCounts, reference: bool = False
) -> PairInputs:
    """Score B pairs with the policy, and with the reference where the objective needs it or `reference` asks for it.
    `total` counts the pairs that are averaged, these among them."""
    needs = train_state.objective.needs
    batch = micro_batch.batch.to(train_state.engine.device)
    found = None
    if reference or reads_reference(train_state):
        assert train_state.reference is not None
        found = train_state.reference.logps(micro_batch.pairs, batch, "prefixes" in needs)
    inputs, logps = forward_policy(train_state, batch, found)
    if found is not None:
        inputs |= split_completions(train_state, "reference_{}_logps", found.sums, batch)
        inputs |= split_completions(train_state, "reference_{}_prefix_logps", found.prefixes, batch)
        inputs |= split_completions(train_state, "reference_{}_weighted_logps", weighted(train_state, found), batch)
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


def reads_reference(train_state: TrainState) -> bool:
    """Whether the objective asks for `train_state.reference`, which is also the initial policy unless that is kept
    beside it."""
    needs = train_state.objective.needs
    return "reference" in needs or ("initial" in needs and train_state.initial is None)


def forward_policy(
    train_state: TrainState, batch: Batch, reference: Logps | None = None
) -> tuple[dict[str, Any], Logps | None]:
    """What the policy computes, `(B,)`, by the names in `PairInputs`: log-probs and what else the objective needs of
    them, or the reward model's rewards. The KL to a reference is among it only with what the `reference` has computed
    of the batch. All that carries gradient is among it, for all objectives but those on groups, which read the
    log-probs themselves, of all completions."""
    if train_state.objective.model_kind == "reward_model":
        with autocast(train_state.engine.device, train_state.config.precision):
            rewards = as_forward(train_state.engine.policy, lambda policy: completion_rewards(policy, batch))
            return split_completions(train_state, "policy_{}_rewards", rewards, batch), None
    needs = train_state.objective.needs
    further = "entropies" in needs, "on_policy" in needs, "prefixes" in needs
    distributions = reference.distributions if reference and "sequential_kl" in needs else None
    logps = train_state.score(train_state.engine.policy, batch, *further, distributions, "values" in needs)
    tensors = (
        split_completions(train_state, "policy_{}_logps", logps.sums, batch)
        | split_completions(train_state, "policy_{}_values", logps.values, batch)
        | split_completions(train_state, "{}_entropies", logps.entropies, batch)
        | split_completions(train_state, "{}_on_policy", logps.on_policy, batch)
        | split_completions(train_state, "policy_{}_prefix_logps", logps.prefixes, batch)
        | split_completions(train_state, "policy_{}_weighted_logps", weighted(train_state, logps), batch)
        | split_completions(train_state, "{}_kl", logps.sequential_kl, batch)
    )
    return tensors, logps


def weighted(train_state: TrainState, logps: Logps) -> Tensor | None:
    """`Logps.weighted` where the objective reads it: rows may hold weights of tokens for another one, and some rows
    alone."""
    return logps.weighted if "token_weights" in train_state.objective.needs else None


def split_completions(train_state: TrainState, name: str, values: Tensor | None, batch: Batch) -> dict[str, Any]:
    """Split `(C,)` values of a batch's completions into `(B,)` ones: first all chosen, then all rejected. What a group
    has besides is left out. None gives none."""
    if values is None:
        return {}
    sides = [side for side in train_state.objective.completions if side in SIDES]
    return {name.format(side): part for side, part in zip(sides, values.split(len(batch.grid)), strict=False)}


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
