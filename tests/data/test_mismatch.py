"""Each prompt of a step with another prompt's completions, in the step and in advance for the whole run."""

import pytest
import torch

from prefopt.data.cache import Prepared
from prefopt.data.mismatch import MismatchedOfRun, with_mismatched
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.lora import train_mode
from prefopt.objectives.kto import KTO
from prefopt.training.build import longest_row
from prefopt.training.step import accumulate_gradients
from tests.models.test_lora import steps, with_lora

A, B, C = (TokenizedPair(name, [i], [10 * i], [10 * i + 1]) for i, name in enumerate("abc", start=1))


def found(pairs: list[TokenizedPair]) -> list[tuple]:
    completed = with_mismatched(pairs)
    assert [p.id for p in completed] == [p.id for p in pairs]
    return [(p.mismatched.prompt, p.mismatched.chosen, p.mismatched.rejected) for p in completed if p.mismatched]


def test_a_prompt_gets_the_next_pairs_completions():
    """x_i with y_{i+1}, chosen with chosen; every completion is used once."""
    assert found([A, B, C]) == [([1], [20], [21]), ([2], [30], [31]), ([3], [10], [11])]


def test_a_pair_with_the_same_prompt_is_passed_over():
    again = TokenizedPair("a2", [1], [77], [78])
    assert found([A, again, B]) == [([1], [20], [21]), ([1], [20], [21]), ([2], [10], [11])]
    assert found([A, again]) == [([1], [77], [78]), ([1], [10], [11])]  # no other prompt: another completion at least
    assert found([A]) == [([1], [10], [11])]


def test_those_of_a_run_are_those_of_its_steps():
    """With steps that end one epoch and begin the next, and a seed."""
    pairs = [TokenizedPair(str(i), [i // 2], [10 * i], [10 * i + 1]) for i in range(7)]
    of_run = MismatchedOfRun(pairs, seed=3, steps=4, batch_size=5)
    expected = []
    for step in range(4):
        expected += [p.mismatched for p in with_mismatched([pairs[i] for i in step_indices(7, 3, step, 5)])]
    assert [of_run[i] for i in range(len(of_run))] == expected
    assert len(of_run) == 20


@pytest.mark.parametrize(("reference_point", "longest"), [("own", 7), ("mismatched", 11)])
def test_the_longest_row_counts_the_longest_prompt_with_anothers_completion(reference_point, longest):
    """What is held against max_position_embeddings."""
    long_prompt = TokenizedPair("p", [1] * 6, [2], [3])
    long_completion = TokenizedPair("c", [1] * 2, [2] * 3, [3] * 5)
    split = Prepared([long_prompt, long_completion], [], {}, {}, longest=7)
    assert longest_row(split, KTO(0.1, reference_point=reference_point), 64) == longest


@pytest.mark.parametrize("tokens", [300, 10_000])
def test_they_are_scored_without_dropout_which_stays_on_for_the_pairs_themselves(tokens, tmp_path):
    train_state = with_lora(KTO(0.5), tmp_path, dropout=0.5, micro_batch_tokens=tokens)
    steps(train_state, 0, 2)  # so that the adapter does something
    micro_batches = train_state.step_micro_batches(2)
    (still, _), *_ = accumulate_gradients(train_state, 2, micro_batches)  # as it is evaluated
    with train_mode(train_state.engine.policy):
        (drawn, _), *_ = accumulate_gradients(train_state, 2, micro_batches)
        assert any(module.training for module in train_state.engine.policy.modules())
    assert still.mismatched_chosen_logratios.abs().max() > 1e-3
    assert torch.equal(still.mismatched_chosen_logratios, drawn.mismatched_chosen_logratios)
    assert torch.equal(still.mismatched_rejected_logratios, drawn.mismatched_rejected_logratios)
    assert not torch.allclose(still.policy_chosen_logps, drawn.policy_chosen_logps)
