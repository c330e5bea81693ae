"""Groups of scored responses: how they are read and batched, their reference, and GRPO and RLOO against TRL."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefopt.config.schema import PoliciesConfig
from prefopt.data.cache import Limits, TokenizedPairs, write_split
from prefopt.data.collate import LAYOUTS
from prefopt.data.dataset import Split, _defects
from prefopt.data.formats import ScoredResponses
from prefopt.data.tokenize import TokenizedPair, tokenize
from prefopt.models.dropout import Noise, PairDropout, seed_pairs
from prefopt.models.group_reference import cached_groups
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import LoadedOnce, Resident
from prefopt.objectives.grpo import GRPO
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.rloo import RLOO
from prefopt.objectives.rrhf import RRHF
from prefopt.training.engine import Engine
from prefopt.training.evaluate import evaluate_pairs
from prefopt.training.state import TrainState
from prefopt.training.step import accumulate_gradients
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.training.test_loop import make_train_state

OBJECTIVES = {
    "rloo": RLOO(beta=0.3, epsilon=0.2),
    "rloo-free": RLOO(beta=0.0, epsilon=0.2),
    "grpo": GRPO(beta=0.3, epsilon=0.02),
    "grpo-free": GRPO(beta=0.0, epsilon=0.02),
    "grpo-token": GRPO(beta=0.3, epsilon=0.02, per="token"),
    "grpo-unscaled": GRPO(beta=0.3, epsilon=0.02, scale="none"),
}
N, PROMPTS = 3, 4


def rows(sizes: list[int]) -> list[dict[str, Any]]:
    """A row of scored responses for each size. Rewards are neither ordered nor all different."""
    rewards = [0.25, 1.0, 0.25, -1.5, 0.75]
    return [
        {
            "prompt": f"Review the kettle number {i}.",
            "responses": [f"The kettle {'was loud ' * k}in room {i}." for k in range(n)],
            "rewards": [rewards[(i + k) % 5] for k in range(n)],
        }
        for i, n in enumerate(sizes)
    ]


def groups(sizes: list[int]) -> list[TokenizedPair]:
    items = [ScoredResponses("group")(row) for row in rows(sizes)]
    found = tokenize(tiny_tokenizer(), items, 100, 100)  # type: ignore[arg-type]
    assert not found.dropped
    return found.pairs


def moved(model: torch.nn.Module, seed: int, by: float = 0.005) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return model


def state_of(objective, pairs: list[TokenizedPair], tmp_path, layout: str = "packed", **changes) -> TrainState:
    """The policy, the policy that has drawn the responses and the reference are three models."""
    state = make_train_state(objective, tmp_path, batch_size=len(pairs), **changes)
    state.train_pairs, state.heldout_pairs, state.layout = pairs, pairs[:2], LAYOUTS[layout]
    score = LogprobComputer("float32")
    policy = state.engine.policy
    if layout == "packed":
        enable_packed_attention(policy)
    state.reference = Resident.copy_of(policy, score)
    state.initial = Resident.copy_of(moved(policy, 1), score)
    state.engine = Engine(moved(policy, 2), state.config.optimizer)
    return state


def loss_and_gradient(state: TrainState) -> tuple[float, dict[str, torch.Tensor]]:
    micro_batches = state.step_micro_batches(0)
    scored = accumulate_gradients(state, 0, micro_batches)
    gradient = {name: p.grad.clone() for name, p in state.engine.parameters.items()}  # type: ignore[union-attr]
    state.engine.discard()
    return sum(output.losses.sum().item() for _, output in scored) / len(state.train_pairs), gradient


def test_a_group_holds_all_responses_the_best_and_the_worst_first():
    first, second = groups([5, 2])
    assert [first.chosen_reward, first.rejected_reward, *first.other_rewards] == [1.0, -1.5, 0.75, 0.25, 0.25]
    assert [len(first.others), second.others] == [3, []]
    lengths = [len(first.chosen), len(first.rejected), *map(len, first.others)]
    by_place = [len(t) for t in sorted([first.chosen, first.rejected, *first.others], key=len)]
    assert lengths == [by_place[k] for k in (1, 3, 4, 0, 2)]  # each response is longer than the one before it


def test_tied_and_equal_responses_stay_in_a_group():
    row = {"prompt": "Hi", "responses": ["a", "a", "a"], "rewards": [1.0, 1.0, 1.0]}
    (pair,) = tokenize(tiny_tokenizer(), [ScoredResponses("group")(row)], 50, 50).pairs  # type: ignore[list-item]
    assert pair.chosen == pair.rejected == pair.others[0]
    assert set(_defects(ScoredResponses("group")(row))) == {"tied_rewards"}  # type: ignore[arg-type]


def test_groups_come_back_from_the_disk(tmp_path):
    items = [replace(ScoredResponses("group")(row), source="s") for row in rows([4, 2, 3])]  # type: ignore[type-var]
    split = Split(lambda: iter(items), "groups", Counter(), Counter(), Counter({"s": 3}), {})
    file, policies = tmp_path / "train.arrow", {"s": PoliciesConfig()}
    counts, longest = write_split(file, "train", split, tiny_tokenizer(), Limits(100, 100), policies, False)
    found, expected = TokenizedPairs(file), groups([4, 2, 3])
    assert [replace(pair, source="") for pair in found] == expected
    assert counts["items"] == 3
    assert longest == max(len(p.prompt) + max(map(len, [p.chosen, p.rejected, *p.others])) for p in expected)
    assert found.num_tokens(["others"]) == sum(len(c) for p in expected for c in p.others)


CANDIDATES = {
    "rloo": OBJECTIVES["rloo"],
    "grpo": OBJECTIVES["grpo-token"],
    "rrhf": RRHF(candidates="group"),
    "mmpo": MMPO(0.3, normalization="group", auxiliary_weight=0.0, candidates="group"),
}


@pytest.mark.parametrize("objective", CANDIDATES.values(), ids=CANDIDATES)
def test_layouts_and_micro_batches_change_nothing(objective, tmp_path):
    pairs = groups([4, 2, 3, 5])
    loss, gradient = loss_and_gradient(state_of(objective, pairs, tmp_path, micro_batch_tokens=10_000))
    assert loss != 0
    for layout in LAYOUTS:
        for tokens in (150,):
            state = state_of(objective, pairs, tmp_path, layout, micro_batch_tokens=tokens)
            other_loss, other = loss_and_gradient(state)
            assert other_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
            for name, expected in gradient.items():
                torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=2e-5)


def test_the_cached_reference_is_the_resident_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    pairs = groups([4, 2, 3, 5])
    state = state_of(OBJECTIVES["grpo"], pairs, tmp_path)
    resident = state.reference
    batch = state.layout.collate(pairs, state.objective.completions)
    for tokens in (True, False):
        for start in (2, 0):  # the second time two groups are known
            cached = cached_groups(
                resident.frozen, "weights", pairs[start:], state.layout, 100, resident.score,
                LoadedOnce(lambda: resident.frozen, "cpu"), tokens, False,
            )  # fmt: skip
        torch.testing.assert_close(
            cached.logps(pairs, batch).sums, resident.logps(pairs, batch).sums, rtol=1e-5, atol=1e-5
        )
        if tokens:
            torch.testing.assert_close(
                cached.logps(pairs, batch).tokens, resident.logps(pairs, batch).tokens, rtol=1e-5, atol=1e-5
            )


def test_dropout_of_a_response_does_not_depend_on_the_other_groups():
    pairs = groups([4, 2, 3])
    seen = []
    for chosen in (pairs, pairs[2:]):
        batch = LAYOUTS["padded"].collate(chosen, ("chosen", "rejected", "others"))
        layer = PairDropout(0.5, 0, Noise())
        seed_pairs(layer, [pairs.index(p) for p in chosen], batch)
        spans = [seed for seed, _ in layer.noise.spans if seed is not None]
        owners = [i for k in range(4) for i, p in enumerate(chosen) if k < 2 + len(p.others)]
        seen.append([seed for seed, i in zip(spans, owners, strict=True) if chosen[i] is pairs[2]])
    assert len(seen[0]) == 3
    assert seen[0] == seen[1]


def test_an_evaluation_compares_the_best_with_the_worst(tmp_path):
    state = state_of(OBJECTIVES["grpo"], groups([3, 3, 3]), tmp_path)
    state.config.reference_model = "another"  # so that policy and reference may differ before the first step
    metrics = evaluate_pairs(state, 0, state.heldout_pairs)
    logratios = {}
    for pair in state.heldout_pairs:
        batch = state.layout.collate([pair])
        logratios[pair.id] = (
            state.score(state.engine.policy, batch).sums - state.reference.logps([pair], batch).sums
        ).tolist()
    assert metrics["accuracy"] == sum(w > l for w, l in logratios.values()) / 2
    assert metrics["margin"] == pytest.approx(sum(w - l for w, l in logratios.values()) / 2, abs=1e-4)


# TRL 1.16 asks transformers for a name that is going to be renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_trl(name, tmp_path):
    """TRL's trainer computes rewards, advantages, old and reference log-probs of the same responses itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    objective: Any = OBJECTIVES[name]
    pairs = groups([N] * PROMPTS)
    state = state_of(objective, pairs, tmp_path)
    expected_loss, expected = loss_and_gradient(state)

    settings: dict[str, Any] = {"beta": objective.beta, "epsilon": objective.epsilon}
    trainer_of, config_of = RLOOTrainer, RLOOConfig
    if isinstance(objective, GRPO):
        trainer_of, config_of = GRPOTrainer, GRPOConfig
        settings |= {"loss_type": "grpo" if objective.per == "response" else "dapo", "scale_rewards": objective.scale}
        settings |= {"use_bias_correction_kl": False}
    completions = [c for pair in pairs for c in (pair.chosen, pair.rejected, *pair.others)]
    rewards = [r for pair in pairs for r in (pair.chosen_reward, pair.rejected_reward, *pair.other_rewards)]
    config = config_of(
        output_dir=str(tmp_path / "trl"), num_generations=N, per_device_train_batch_size=N * PROMPTS, num_iterations=2,
        temperature=1.0, max_completion_length=100, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    trainer = trainer_of(
        model=str(save_tiny(tmp_path / "base")),
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * PROMPTS),
        processing_class=tiny_tokenizer(),
    )
    prompts = [pair.prompt for pair in pairs for _ in range(N)]
    texts = ["text"] * len(prompts)
    drawn = (prompts, completions, texts)
    if isinstance(objective, GRPO):
        drawn = (prompts, completions, None, texts, None, {}, None, None)
    trainer._generate = lambda _: drawn
    model = trainer.model.train()
    moved(model, 1)
    batch = trainer._generate_and_score_completions([{"prompt": "x"}] * len(prompts))
    moved(model, 2)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, batch)
    loss.backward()

    assert expected_loss == pytest.approx(loss.item(), abs=1e-5)
    for key, p in model.named_parameters():
        torch.testing.assert_close(expected[key], p.grad, rtol=1e-4, atol=1e-5)


def test_the_ratio_clips_some_and_not_all(tmp_path):
    """So that the comparisons above see both sides of the clipping."""
    for objective in (OBJECTIVES["rloo"], OBJECTIVES["grpo"]):
        state = state_of(objective, groups([N] * PROMPTS), tmp_path)
        (_, output), *_ = accumulate_gradients(state, 0, state.step_micro_batches(0))
        shares = output.diagnostics["clipped"]
        assert 0 < shares.mean() < 1


def test_at_its_start_the_gradient_is_that_of_reinforce(tmp_path):
    """With policy = initial policy = reference: mean_i A_i grad lp_i, A of the rewards alone."""
    pairs = groups([4])
    state = make_train_state(RLOO(), tmp_path, batch_size=1)
    state.train_pairs = pairs
    _, gradient = loss_and_gradient(state)
    rewards = torch.tensor([pairs[0].chosen_reward, pairs[0].rejected_reward, *pairs[0].other_rewards])
    advantages = rewards - (rewards.sum() - rewards) / 3
    model = tiny_model(len(tiny_tokenizer()))
    sums = state.score(model, state.layout.collate(pairs, state.objective.completions)).sums
    (-(advantages * sums).mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, rtol=1e-4, atol=1e-5)
