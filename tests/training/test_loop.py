"""The loop in process, on the tiny model: step 0, accumulation, refusal of non-finite steps."""

from dataclasses import dataclass, replace
from hashlib import sha256
from math import log
from types import SimpleNamespace

import pytest
import torch

from prefopt.config.schema import LoggerConfig, ModelConfig, OptimizerConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.formats import Pairs
from prefopt.data.items import Chat
from prefopt.data.rendering import encode
from prefopt.data.sampler import step_indices
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import TokenizedPair, tokenize
from prefopt.errors import UserError
from prefopt.models.load import load_reward_model
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import Following, Resident
from prefopt.models.value_head import add_value_head
from prefopt.objectives.__main__ import objectives
from prefopt.objectives.base import PairInputs
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.cpo import CPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.madpo import MADPO
from prefopt.objectives.mappo import MaPPO
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.rloo import RLOO
from prefopt.objectives.sft import SFT
from prefopt.objectives.simpo import SimPO
from prefopt.objectives.tdpo import TDPO
from prefopt.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.training.evaluate import evaluate, evaluate_pairs
from prefopt.training.forward import count_step, forward_pairs
from prefopt.training.loop import EarlyStopping, resume, save
from prefopt.training.metrics import Means, step_metrics
from prefopt.training.optim import Cosine
from prefopt.training.state import TrainState
from prefopt.training.step import accumulate_gradients, train_step
from prefopt.training.step0 import check_step0
from prefopt.utils.stats import mean_and_error
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer, write_pairs

TIMING = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def with_token_weights(pair: TokenizedPair) -> TokenizedPair:
    """Some weights from 0 to 2, by the tokens."""
    chosen, rejected = ([(7 * token % 9) / 4 for token in side] for side in (pair.chosen, pair.rejected))
    return replace(pair, chosen_token_weights=chosen, rejected_token_weights=rejected)


def make_train_state(objective, tmp_path, **changes) -> TrainState:
    config = TrainConfig(
        **{"steps": 4, "exports": 1, "batch_size": 8, "micro_batch_tokens": 300, "seed": 0, "squeeze_alarm": None}
        | {"logits": "tiled", "precision": "float32", "gradient_checkpointing": False}
        | {"reference_model": None, "patience": None}
        | {"optimizer": OptimizerConfig(1e-3, [0.9, 0.999], 1e-8, 0.0, 1.0), "logger": LoggerConfig(progress=False)}
        | changes
    )
    tokenizer = tiny_tokenizer()
    rows = [Pairs()(row) for _, row in read_rows(str(write_pairs(tmp_path / "pairs.jsonl", 16)))]
    pairs, drops, _ = tokenize(tokenizer, rows, 100, 100)  # type: ignore[arg-type]
    assert not drops
    if "token_weights" in objective.needs:
        pairs = list(map(with_token_weights, pairs))
    reward_model = objective.model_kind == "reward_model"
    if reward_model:
        folder = save_tiny(tmp_path / "model")
        policy = load_reward_model(ModelConfig("tiny", str(folder)), "cpu")
    else:
        policy = tiny_model(len(tokenizer)).eval()
    reference = None if reward_model else Resident.copy_of(policy, LogprobComputer("float32"))
    if "values" in objective.needs:
        add_value_head(policy)
    engine = Engine(policy, config.optimizer)
    return TrainState(
        config, SimpleNamespace(folder=tmp_path), objective, Cosine(0.25), engine, reference,  # type: ignore[arg-type]
        tokenizer, pairs, pairs[:5], [], None, LAYOUTS["padded"],
    )  # fmt: skip


def step(train_state: TrainState, n: int) -> dict:
    return train_step(train_state, n, train_state.step_micro_batches(n))


def gradients(train_state: TrainState) -> dict[str, torch.Tensor]:
    """The gradient of one step, taken where the loop would hand it to the optimizer."""
    seen = {}
    train_state.engine.step = lambda lr: seen.update(
        {n: p.grad.clone() for n, p in train_state.engine.parameters.items()}
    )  # type: ignore[method-assign,union-attr]
    step(train_state, 0)
    return seen


def test_step_0_of_dpo_is_log_2_with_zero_margin(tmp_path):
    metrics = step(make_train_state(DPO(0.1), tmp_path), 0)
    assert metrics["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics["chosen_logratio"] == metrics["rejected_logratio"] == metrics["margin"] == metrics["accuracy"] == 0
    assert metrics["tie_rate"] == 1
    assert metrics["n"] == 8
    assert metrics["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_run_with_a_moving_reference_resumes_bit_for_bit(alpha, tmp_path):
    """After 3 of 5 steps, between two updates of the reference."""

    def state() -> TrainState:
        train_state = make_train_state(DPO(0.5), tmp_path)
        (tmp_path / "metrics.jsonl").touch()
        train_state.run = SimpleNamespace(
            folder=tmp_path, checkpoints=tmp_path / "checkpoints", metrics_file=tmp_path / "metrics.jsonl"
        )
        policy, score = train_state.engine.policy, LogprobComputer("float32")
        train_state.reference = Following.starting_at(policy, score, 2, alpha)
        return train_state

    def advance(train_state: TrainState, steps: range) -> list[float]:
        losses = []
        for n in steps:
            losses.append(step(train_state, n)["loss"])
            train_state.reference.follow(train_state.engine.policy, n + 1)
        return losses

    whole, first, second = state(), state(), state()
    losses = advance(whole, range(5))
    assert losses[:3] == advance(first, range(3))
    save(first, EarlyStopping(), SimpleNamespace(vouch=lambda: {"length": 0, "sha256": sha256().hexdigest()}), 3)
    done, *_ = resume(second)
    assert done == 3
    assert advance(second, range(3, 5)) == losses[3:]
    for of in (lambda s: s.engine.policy, lambda s: s.reference.frozen):
        assert all(map(torch.equal, of(second).parameters(), of(whole).parameters()))
    fixed = make_train_state(DPO(0.5), tmp_path)
    assert [step(fixed, n)["loss"] for n in range(3)] != losses[:3]  # it does move


# Of those with scope `pair` one of each kind: that such a loss is a function of its pair alone is tested beside them.
KINDS = {
    name if o.scope == "step" else (o.needs, o.completions, o.model_kind, o.normalize_by): (name, o)
    for name, o, _ in objectives()
    if o.scope != "micro_batch"
}
INDEPENDENT = dict(KINDS.values()) | {
    "mmpo-raw": MMPO(0.1, normalization="none", auxiliary_weight=0.5),
    "mmpo-step": MMPO(0.1, normalization="step", auxiliary_weight=0.5),
    "mmpo-step-entropy": MMPO(0.1, normalization="step", auxiliary_weight=0.5, entropy_bonus=True),
    "mappo-beta_dpo": MaPPO(BetaDPO(0.1)),
    "rloo": RLOO(epsilon=0.99),  # so that one large step does not clip every response
    "beta_dpo-nll": BetaDPO(0.1, nll_weight=0.3, nll_per="chosen_token"),
    "cpo-chosen_token": CPO(0.1, nll_weight=1.0, nll_per="chosen_token"),
}


@pytest.mark.parametrize("objective", [pytest.param(o, id=name) for name, o in INDEPENDENT.items()])
def test_gradients_do_not_depend_on_the_micro_batches(objective, tmp_path):
    """Eight pairs of which one was dropped, so that a micro-batch is short; after a step, so that policy and reference
    differ and running moments have moved."""
    results, counts = [], []
    for tokens in (1, 150, 300, 600, 10_000):
        train_state = make_train_state(objective, tmp_path, micro_batch_tokens=10_000)
        step(train_state, 0)
        train_state.config.micro_batch_tokens = tokens
        micro_batches = train_state.micro_batches(train_state.train_pairs[:7])
        counts.append(len(micro_batches))
        scored = accumulate_gradients(train_state, 1, micro_batches)
        assert sum(output.losses.numel() for _, output in scored) == 7
        state = scored[-1][1].state
        results.append({name: p.grad.clone() for name, p in train_state.engine.parameters.items()} | state)
    assert counts[0] == 7
    assert counts[-1] == 1
    assert len(set(counts)) >= 4
    assert any(value.abs().max() > 1e-4 for value in results[0].values())
    for other in results[1:]:
        for name, expected in results[0].items():
            scale = max(1.0, expected.abs().max().item())
            assert torch.allclose(expected, other[name], atol=2e-6 * scale, rtol=1e-4), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tdpo_falls_from_log_2_on(precision, tmp_path):
    train_state = make_train_state(TDPO(0.5), tmp_path, precision=precision)
    train_state.reference.score = train_state.score
    first = evaluate_pairs(train_state, 0, train_state.heldout_pairs)
    assert (first["tdpo/chosen_kl"], first["tdpo/rejected_kl"]) == (0.0, 0.0)
    assert first["loss"] == pytest.approx(log(2), rel=1e-6)
    for n in range(4):
        step(train_state, n)
    last = evaluate_pairs(train_state, 4, train_state.heldout_pairs)
    assert last["loss"] < 0.9 * first["loss"]
    assert min(last["tdpo/chosen_kl"], last["tdpo/rejected_kl"]) > 0


@pytest.mark.parametrize("objective", [DPO(0.1), MMPO(0.1, micro_batch_size=2)], ids=["pair", "micro_batch"])
@pytest.mark.parametrize(("batch_size", "n"), [(8, 2), (8, 3), (2, 3)])
def test_the_pairs_of_a_step_are_dealt_out_whole_and_in_equal_rounds(objective, batch_size, n, tmp_path, monkeypatch):
    train_state = make_train_state(objective, tmp_path, batch_size=batch_size)
    alone = [[p.id for p in micro_batch.pairs] for micro_batch in train_state.step_micro_batches(1)]
    monkeypatch.setenv("WORLD_SIZE", str(n))
    shares = []
    for r in range(n):
        monkeypatch.setenv("RANK", str(r))
        shares.append([[p.id for p in micro_batch.pairs] for micro_batch in train_state.step_micro_batches(1)])
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for part in share for i in part) == sorted(i for part in alone for i in part)
    if objective.scope == "micro_batch":
        assert sorted(part for share in shares for part in share if part) == sorted(alone)
    else:
        assert max(sum(map(len, share)) for share in shares) == -(-batch_size // n)


def test_mmpo_normalization_depends_on_the_micro_batch_as_its_scope_says(tmp_path):
    objective = MMPO(5.0, margin=0.1, length_normalize=True, auxiliary_weight=0.0)
    a, b, c = (
        gradients(make_train_state(replace(objective, micro_batch_size=size), tmp_path, micro_batch_tokens=tokens))
        for size, tokens in ((1, 10_000), (4, 10_000), (4, 100))
    )
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert any(not torch.allclose(a[name], b[name], atol=2e-6, rtol=1e-4) for name in a)


def test_the_state_of_an_objective_moves_with_each_step_and_not_with_evaluations(tmp_path):
    train_state = make_train_state(BetaDPO(0.5), tmp_path)
    assert train_state.objective_state == {"mean": 0.0, "scale": 1.0}
    step(train_state, 0)
    after_one = dict(train_state.objective_state)
    assert after_one["scale"] == pytest.approx(0.9)  # policy = reference: all gaps are 0
    evaluate_pairs(train_state, 1, train_state.heldout_pairs)
    assert train_state.objective_state == after_one
    metrics = step(train_state, 1)
    assert train_state.objective_state["mean"] != after_one["mean"]
    assert metrics["beta_dpo/kept"] == 6 / 8
    assert metrics["beta_dpo/running_mean"] == pytest.approx(train_state.objective_state["mean"].item())


@pytest.mark.parametrize("tokens", [1, 300, 10_000])
def test_the_likelihood_of_nll_per_chosen_token_is_sfts(tokens, tmp_path):
    """At lambda 1 the step's loss and gradient are CPO's without the term, plus SFT's: the mean over chosen tokens."""

    def of(objective):
        train_state = make_train_state(objective, tmp_path, micro_batch_tokens=tokens)
        micro_batches = train_state.step_micro_batches(0)
        loss = step_metrics(objective, accumulate_gradients(train_state, 0, micro_batches))["loss"]
        return loss, {name: p.grad for name, p in train_state.engine.parameters.items()}

    loss, gradient = of(CPO(0.1, nll_weight=1.0, nll_per="chosen_token"))
    (preference, by_preference), (likelihood, by_likelihood) = of(CPO(0.1, nll_weight=0.0)), of(SFT())
    assert loss == pytest.approx(preference + likelihood, rel=1e-6)
    for name, value in gradient.items():
        assert torch.allclose(value, by_preference[name] + by_likelihood[name], atol=2e-6, rtol=1e-4), name


@pytest.mark.parametrize("tokens", [1, 150, 10_000])
def test_ktos_reference_point_is_that_of_the_steps_mismatched_completions(tokens, tmp_path):
    """Each prompt with the next pair's completions, by plain forward passes of policy and reference."""
    train_state = make_train_state(KTO(0.1), tmp_path, micro_batch_tokens=tokens)
    for n in range(2):
        step(train_state, n)
    pairs = [train_state.train_pairs[i] for i in step_indices(16, 0, 2, 8)]
    assert len({tuple(p.prompt) for p in pairs}) == 8

    @torch.no_grad()
    def logp(model, prompt, completion):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits[range(len(completion)), completion].sum().item()

    expected = {}
    for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        models = train_state.engine.policy, train_state.reference.frozen
        logps = [[logp(m, pair.prompt, y) for m in models] for y in (other.chosen, other.rejected)]
        expected[pair.id] = [policy - reference for policy, reference in logps]
    micro_batches = train_state.step_micro_batches(2)
    assert len(micro_batches) == {1: 8, 10_000: 1}.get(tokens, len(micro_batches))
    for micro_batch in micro_batches:
        inputs = forward_pairs(train_state, micro_batch, count_step(micro_batches))
        ratios = torch.stack([inputs.mismatched_chosen_logratios, inputs.mismatched_rejected_logratios], 1)
        assert not ratios.requires_grad
        assert torch.allclose(ratios, torch.tensor([expected[p.id] for p in micro_batch.pairs]), atol=1e-4)
    mean = sum(map(sum, expected.values())) / 16
    assert abs(mean) > 1e-2
    metrics = step(train_state, 2)
    assert metrics["kto/reference_point"] == pytest.approx(max(0.0, mean), abs=1e-5)


def test_sft_is_the_mean_over_tokens(tmp_path):
    train_state = make_train_state(SFT(), tmp_path, micro_batch_tokens=300)
    pairs = [train_state.train_pairs[i] for i in step_indices(16, 0, 0, 8)]
    assert len({len(p.chosen) for p in pairs}) > 1
    logits = [
        train_state.engine.policy(torch.tensor([p.prompt + p.chosen])).logits[0, len(p.prompt) - 1 : -1].log_softmax(-1)
        for p in pairs
    ]
    logps = [log[range(len(p.chosen)), p.chosen] for log, p in zip(logits, pairs, strict=True)]
    metrics = step(train_state, 0)
    assert metrics["loss"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-6)
    assert "accuracy" not in metrics
    assert "rejected_logps" not in metrics


def test_sft_on_chats_counts_every_assistant_turn_and_nothing_else(tmp_path):
    train_state = make_train_state(SFT(), tmp_path, micro_batch_tokens=300, batch_size=3)
    turns = ["Hello", "Hi.", "A river?", "Long and loud.", "Soup?", "Good."]
    chats = [
        Chat(str(n), [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns[:n])])
        for n in (2, 4, 6)
    ]
    train_state.train_pairs, drops, _ = tokenize(train_state.tokenizer, chats, 100, 100)
    assert not drops
    expected = []
    for chat in chats:
        ids, counted = [], []  # turn by turn, as the template writes them
        for message in chat.messages:
            opening = encode(train_state.tokenizer, [f"<|im_start|>{message['role']}\n"])[0]
            said = encode(train_state.tokenizer, [message["content"] + "<|im_end|>"])[0]
            after = encode(train_state.tokenizer, ["\n"])[0]
            ids += opening + said + after
            counted += [False] * len(opening) + [message["role"] == "assistant"] * len(said) + [False] * len(after)
        logits = train_state.engine.policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [logits[i - 1, ids[i]].item() for i in range(len(ids)) if counted[i]]
    assert sum(p.num_loss_tokens for p in train_state.train_pairs) == len(expected)
    metrics = step(train_state, 0)
    assert metrics["loss"] == pytest.approx(-sum(expected) / len(expected), rel=1e-5)
    assert metrics["chosen_length"] == pytest.approx(len(expected) / 3)


def test_diagnostics_are_logged_under_the_objectives_name(tmp_path):
    metrics = step(make_train_state(MADPO(0.1), tmp_path), 0)
    assert metrics["madpo/saturation"] == 0
    for key in ("madpo/weight", "madpo/weight_p10", "madpo/weight_p50", "madpo/weight_p90"):
        assert metrics[key] == pytest.approx(MADPO(0.1).weights(torch.tensor(0.7)).item())  # all rows: 0.9 - 0.2
    metrics = step(make_train_state(MaPPO(DPO(0.1)), tmp_path), 0)
    assert metrics["mappo_dpo/delta_r_p50"] == pytest.approx(0.7)
    assert "mappo_dpo/saturation" in metrics
    assert "mmpo/chosen_reward_p90" in step(make_train_state(MMPO(0.1), tmp_path), 0)


def test_the_squeezing_alarm(tmp_path, capsys):
    """Training both sides down, as an objective that sees only their difference may do."""

    @dataclass(frozen=True)
    class Squeeze(DPO):
        loss_at_reference = 0.0

        def losses(self, inputs, chosen, rejected):
            return chosen + 2 * rejected

    train_state = make_train_state(Squeeze(1.0, nll_weight=0.0), tmp_path, squeeze_alarm=0.05)
    evaluate(train_state, 1)
    assert "squeezing" not in capsys.readouterr().err
    for n in range(4):
        step(train_state, n)
    evaluate(train_state, 4)
    assert "have lost" in (said := capsys.readouterr().err)
    assert "squeeze_alarm=0.05" in said
    train_state.config.squeeze_alarm = None
    evaluate(train_state, 4)
    assert "squeezing" not in capsys.readouterr().err


def test_the_reference_never_changes(tmp_path):
    train_state = make_train_state(DPO(0.5), tmp_path)
    before = [p.clone() for p in train_state.reference.frozen.parameters()]
    policy = [p.detach().clone() for p in train_state.engine.policy.parameters()]
    step(train_state, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, train_state.reference.frozen.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(policy, train_state.engine.policy.parameters(), strict=True))
    assert not train_state.reference.frozen.training


def test_training_lowers_the_loss(tmp_path):
    train_state = make_train_state(DPO(0.5), tmp_path, steps=20)
    losses = [step(train_state, n)["loss"] for n in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_non_finite_step_is_refused_with_the_ids_of_its_pairs(tmp_path):
    train_state = make_train_state(DPO(0.5), tmp_path, batch_size=2)
    train_state.run = SimpleNamespace(folder=tmp_path, metrics_file=tmp_path / "metrics.jsonl")
    with torch.no_grad():
        train_state.engine.policy.get_output_embeddings().weight[0, 0] = float("nan")
    before = [p.detach().clone() for p in train_state.engine.policy.parameters()]
    with pytest.raises(UserError, match="step 1: loss and gradient_norm not finite") as error:
        step(train_state, 0)
    for i in step_indices(16, 0, 0, 2):
        assert train_state.train_pairs[i].id in str(error.value)
    after = list(train_state.engine.policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_evaluation_is_the_mean_over_pairs_also_with_an_uneven_last_batch(tmp_path):
    train_state = make_train_state(SimPO(2.0, 0.5), tmp_path)
    assert len(train_state.heldout_pairs) == 5
    uneven = evaluate_pairs(train_state, 0, train_state.heldout_pairs)
    train_state.config.micro_batch_tokens = 10_000
    whole = evaluate_pairs(train_state, 0, train_state.heldout_pairs)
    assert uneven == pytest.approx(whole, rel=1e-5)
    assert uneven["n"] == 5


def test_an_evaluation_tells_near_ties_from_wide_gaps(tmp_path):
    train_state = make_train_state(SimPO(2.0, 0.5), tmp_path)
    pairs = [replace(p, rejected_reward=p.chosen_reward - gap) for p, gap in zip(
        train_state.heldout_pairs, (0.4, 0.1, 0.3, 0.2, -0.5), strict=True)]  # fmt: skip
    found = evaluate_pairs(train_state, 0, pairs)
    # Five pairs in thirds by |gap|: two, two, one.
    for gap, chosen in (("small_gap", (1, 3)), ("middle_gap", (2, 0)), ("large_gap", (4,))):
        alone = evaluate_pairs(train_state, 0, [pairs[i] for i in chosen])
        assert found[f"{gap}_margin"] == pytest.approx(alone["margin"], rel=1e-5)
        assert found[f"{gap}_accuracy"] == alone["accuracy"]
    without = evaluate_pairs(train_state, 0, [replace(p, chosen_reward=None) for p in pairs])
    assert not [key for key in without if "gap" in key]


def test_a_policy_that_is_not_the_reference_stops_the_run(tmp_path):
    train_state = make_train_state(DPO(0.1), tmp_path)
    with torch.no_grad():
        train_state.engine.policy.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(UserError, match="differs from the reference"):
        evaluate_pairs(train_state, 0, train_state.heldout_pairs)


def test_a_loss_that_is_not_its_constant_stops_the_run():
    zero, lost = torch.zeros(2), torch.tensor([0.0, float("nan")])
    ones = torch.ones(2)
    reference = {"reference_chosen_logps": zero, "reference_rejected_logps": zero}
    same = [PairInputs(zero, zero, ones, ones, **reference, weights=ones)]
    train_state = SimpleNamespace(objective=DPO(0.1), config=TrainConfig(precision="float32"))
    check_step0(train_state, same, 0.693147, "before the first step")
    with pytest.raises(UserError, match=r"loss is 0\.700000; it must be 0\.693147"):
        check_step0(train_state, same, 0.7, "before the first step")
    with pytest.raises(UserError, match="differs from the reference"):
        check_step0(train_state, [replace(same[0], policy_chosen_logps=lost)], 0.693147, "before the first step")


def test_means_are_over_all_values_whatever_their_portions():
    means = Means()
    for part in ([1.0, 2.0, 3.0], [10.0]):
        means.add({"x": torch.tensor(part)})
    assert means.compute() == {"x": 4.0}


def test_mean_and_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, (1 / 3) ** 0.5))
    assert mean_and_error([1.0])[1] != mean_and_error([1.0])[1]  # nan: one value has no spread


def test_step_0_is_checked_by_the_first_step_alone_where_no_pairs_are_held_out(tmp_path, capsys):
    train_state = make_train_state(DPO(0.1), tmp_path)
    train_state.heldout_pairs = []
    assert evaluate(train_state, 0) == {}
    step(train_state, 0)
    assert capsys.readouterr().err.count("step 0: policy = reference") == 1

    train_state = make_train_state(DPO(0.1), tmp_path)
    weights = train_state.engine.policy.get_output_embeddings().weight
    with torch.no_grad():
        weights.mul_(1.01)
    before = weights.detach().clone()
    with pytest.raises(UserError, match="in the first training step the policy differs from the reference"):
        step(train_state, 0)
    assert torch.equal(weights, before)


def test_the_weights_with_the_lowest_held_out_loss_come_back(tmp_path):
    """Also from a checkpoint in between."""
    train_state = make_train_state(DPO(0.5), tmp_path, patience=2)
    early_stopping, losses, weights = EarlyStopping(), [0.7, 0.5, 0.6, float("nan")], []
    for n, loss in enumerate(losses):
        weights.append([p.detach().clone() for p in train_state.engine.policy.parameters()])
        early_stopping.update(train_state, n, {"loss": loss})
        if n == 2:
            save_checkpoint(
                tmp_path / "checkpoints", n, train_state.engine.state() | early_stopping.state(), early_stopping.meta()
            )
            tensors, meta = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
            early_stopping = EarlyStopping(tensors["best"], **meta["best"])
        step(train_state, n)
    assert (early_stopping.step, early_stopping.loss, early_stopping.evaluations_since) == (1, 0.5, 2)
    early_stopping.restore(train_state)
    assert all(torch.equal(a, b) for a, b in zip(weights[1], train_state.engine.policy.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))


def test_without_patience_nothing_is_kept(tmp_path):
    train_state, early_stopping = make_train_state(DPO(0.5), tmp_path), EarlyStopping()
    early_stopping.update(train_state, 0, {"loss": 1.0})
    early_stopping.update(train_state, 1, {"loss": 2.0})
    assert not early_stopping.weights
    assert early_stopping.state() == early_stopping.meta() == {}
    before = [p.detach().clone() for p in train_state.engine.policy.parameters()]
    early_stopping.restore(train_state)
    assert all(torch.equal(a, b) for a, b in zip(before, train_state.engine.policy.parameters(), strict=True))


@dataclass(frozen=True)
class Misshapen(DPO):
    """DPO with a loss that breaks the contract."""

    fault: str = "mean"

    def losses(self, inputs, chosen, rejected):
        right = super().losses(inputs, chosen, rejected)
        faults = {"mean": right.mean(), "column": right[:, None], "number": 1.0, "whole": (right > 0).long()}
        return faults.get(self.fault, right.detach())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("mean", r"its losses are of shape \(\)\. They must be floating point, of shape \(\d,\)"),
        ("column", r"its losses are of shape \(\d, 1\)"),
        ("number", "its losses are a float"),
        ("whole", "its losses are of torch.int64"),
    ],
)
def test_a_loss_that_is_not_one_number_a_pair_is_refused_before_the_first_step(fault, message, tmp_path):
    train_state = make_train_state(Misshapen(0.1, fault=fault), tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate(train_state, 0)
    with pytest.raises(UserError, match=message):
        step(train_state, 0)


def test_a_loss_without_gradient_is_refused(tmp_path):
    with pytest.raises(UserError, match="no gradient flows through its losses"):
        step(make_train_state(Misshapen(0.1, fault="detached"), tmp_path), 0)


def test_a_layers_own_dropout_is_found_in_the_first_training_step(tmp_path):
    """It is inert in evaluation mode, so the check before the first step passes."""
    train_state = make_train_state(DPO(0.1), tmp_path)
    attention = train_state.engine.policy.model.layers[0].self_attn
    attention.attention_dropout, forward = 0.5, attention.forward

    def drops(hidden_states, **others):  # as layers do that call F.dropout, in training mode alone
        training = train_state.engine.policy.model.layers[0].training
        return forward(torch.nn.functional.dropout(hidden_states, attention.attention_dropout, training), **others)

    attention.forward = drops
    evaluate(train_state, 0)
    with pytest.raises(UserError, match="in the first training step the policy differs from the reference"):
        step(train_state, 0)


def test_step_0_of_weighted_pairs_is_log_2_times_their_mean_weight(tmp_path):
    train_state = make_train_state(DPO(0.1), tmp_path)
    train_state.train_pairs = [replace(p, weight=1.5 + i % 2) for i, p in enumerate(train_state.train_pairs)]
    metrics = step(train_state, 0)
    mean = sum(p.weight for m in train_state.step_micro_batches(0) for p in m.pairs) / 8
    assert metrics["loss"] == pytest.approx(mean * 0.693147, abs=1e-6)
