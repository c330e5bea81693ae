"""Samples at evaluations: which prompts get one, their KL and length without an oracle, and any scorer as oracle."""

import gc
import json
import math
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import prefopt.training.evaluate
from prefopt.config.schema import EvaluationSamplingConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.tokenize import encode_completion
from prefopt.errors import UserError
from prefopt.models import load
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import AdapterOff, LoadedOnce, Resident
from prefopt.objectives.dpo import DPO
from prefopt.objectives.reward import Reward
from prefopt.objectives.sft import SFT
from prefopt.rewards.reward_model import RewardModel
from prefopt.rewards.scorers import Columns, Function, Vader
from prefopt.tracking.record import heldout_accuracy
from prefopt.training.build import build_reference, sample_prompts
from prefopt.training.evaluate import evaluate, format_evaluation
from tests.helpers.rewards import rewards_of
from tests.helpers.tiny import records, run_program, tiny_model, tiny_tokenizer
from tests.integration.test_runs import timeless
from tests.training.test_loop import make_train_state

PROMPTS = [[{"role": "user", "content": f"Review the {thing}."}] for thing in ("kettle", "old train", "soup")]
SAMPLING = EvaluationSamplingConfig(1.0, 1.0, 8, 2, prompts=None)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A run of DPO that samples from three prompts, and whose reference is another model."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    found = make_train_state(DPO(0.1), tmp_path, sampling=SAMPLING, device="cpu")
    found.prompts = PROMPTS
    found.run = SimpleNamespace(folder=tmp_path, record={"initial_weights": "x", "versions": {}})  # type: ignore[assignment]
    return found


def lines(folder, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples" / f"step_{step:07d}.jsonl").read_text().splitlines()]


def test_without_an_oracle_there_are_samples_kl_and_length_and_no_reward(state, tmp_path, monkeypatch):
    drawn: list = []
    draw = prefopt.training.evaluate.sample
    monkeypatch.setattr(prefopt.training.evaluate, "sample", lambda *a: drawn.extend(draw(*a)) or drawn)
    other = tiny_model(len(state.tokenizer), seed=7).eval()
    state.reference = Resident(other, LogprobComputer("float32"))
    metrics = evaluate(state, 2)
    assert metrics["samples"] == 3
    assert not any("reward" in key for key in metrics)
    rows = lines(tmp_path, 2)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(set(row) == {"prompt", "response", "finished", "length", "logratio"} for row in rows)
    assert metrics["sample_length"] == sum(row["length"] for row in rows) / 3
    for row, (one,) in zip(rows, drawn, strict=True):  # by the models' own forward pass
        assert (row["response"], row["length"]) == (one.text, len(one.tokens))
        ids, first = torch.tensor([one.prompt_tokens + one.tokens]), len(one.prompt_tokens) - 1
        with torch.no_grad():
            logps = [
                model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[first:].sum().item()
                for model in (state.engine.policy, other)
            ]
        assert row["logratio"] == pytest.approx(logps[0] - logps[1], abs=1e-3)
    logratios = [row["logratio"] for row in rows]
    assert metrics["kl"] == pytest.approx(sum(logratios) / 3)
    assert metrics["kl_se"] == pytest.approx(torch.tensor(logratios).std().item() / math.sqrt(3), rel=1e-5)


def test_sampling_changes_nothing_of_the_training(overrides, tmp_path):
    """SimPO: no oracle, and the objective does not read the reference either."""
    arguments = ["objective=simpo", "steps=3", "eval_every=1"]
    found = []
    for name, changes in (("without", []), ("with", ["sampling.prompts=2", "sampling.max_new_tokens=3"])):
        process = run_program(*overrides(tmp_path / name), *arguments, *changes)
        assert process.returncode == 0, process.stderr
        (record,) = records(tmp_path / name)
        rows = timeless(tmp_path / name / record["name"] / "metrics.jsonl")
        drawn = [{key: row.pop(key) for key in list(row) if key.startswith(("sample", "kl"))} for row in rows]
        found.append((record["final_weights"], rows, [d for d in drawn if d]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == []
    assert [set(d) for d in found[1][2]] == [{"kl", "kl_se", "sample_length", "sample_finished", "samples"}] * 4
    assert {d["samples"] for d in found[1][2]} == {2}
    assert found[1][2][0]["kl"] == pytest.approx(0, abs=1e-4)
    assert "KL 0.00 ± 0.00, length " in process.stderr


def test_the_first_different_prompts_that_leave_room_are_taken(caplog):
    caplog.set_level("INFO")
    tokenizer, policy = tiny_tokenizer(), tiny_model(320, max_position_embeddings=64)
    long = [{"role": "user", "content": "word " * 80}]
    prompts = [PROMPTS[0], PROMPTS[0], long, PROMPTS[1], PROMPTS[2]]

    def chosen(n: int | None, objective=DPO(0.1)) -> list:  # noqa: B008
        config = SimpleNamespace(sampling=replace(SAMPLING, prompts=n))
        return sample_prompts(config, objective, policy, tokenizer, prompts)  # type: ignore[arg-type]

    assert chosen(None) == PROMPTS
    assert "1 held-out prompts get none" in caplog.text
    assert chosen(2) == PROMPTS[:2]
    assert chosen(0) == []
    assert chosen(None, Reward()) == []
    with pytest.raises(ValueError, match="prompts must not be negative"):
        replace(SAMPLING, prompts=-1)


@pytest.mark.parametrize(
    ("layers", "other", "expected"),
    [(["q_proj"], None, AdapterOff), ([], None, LoadedOnce), (["q_proj"], "another/model", LoadedOnce)],
)
def test_the_reference_of_samples_is_the_policy_without_its_adapter_where_it_has_one(layers, other, expected):
    config = SimpleNamespace(
        reference_sync=SimpleNamespace(every=None),
        multi_reference=SimpleNamespace(models=[]),
        precision="float32", logits="tiled", reference="cached", reference_model=None, device="cpu",
        peft=SimpleNamespace(target_modules=layers),
    )  # fmt: skip
    policy = tiny_model(40)
    with pytest.MonkeyPatch.context() as patch:
        if other:
            config.reference_model = other
            patch.setattr("prefopt.training.build.load_initial", lambda *_: policy)
        found = build_reference(config, SFT(), policy, "x", LAYOUTS["padded"], [], [])  # type: ignore[arg-type]
    assert type(found.samples) is expected  # type: ignore[union-attr]


def test_a_model_that_cannot_generate_is_told_the_way_out(state, monkeypatch):
    def fails(*_, **__):
        raise IndexError("index out of range")

    monkeypatch.setattr(prefopt.training.evaluate, "sample", fails)
    with pytest.raises(UserError, match=r"the llama cannot generate \(index out of range\). With sampling\.prompts=0"):
        evaluate(state, 2)


def test_initial_samples_are_shared_and_their_rewards_are_not(state, tmp_path, monkeypatch):
    drawn = []
    draw = prefopt.training.evaluate.draw_samples
    monkeypatch.setattr(prefopt.training.evaluate, "draw_samples", lambda *a: drawn.append(1) or draw(*a))
    assert "oracle_reward" not in evaluate(state, 0)
    state.oracle = Vader()
    first = evaluate(state, 0)
    assert drawn == [1]
    responses = [row["response"] for row in lines(tmp_path, 0)]
    assert first["oracle_reward"] == pytest.approx(sum(rewards_of(Vader(), *responses)) / 3)
    assert [row["reward"] for row in lines(tmp_path, 0)] == rewards_of(Vader(), *responses)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(length=lambda _, texts: [len(t) for t in texts]))
    state.oracle = Function("mine.length")
    assert evaluate(state, 0)["oracle_reward"] == pytest.approx(sum(map(len, responses)) / 3)
    assert drawn == [1]


def test_a_function_is_called_once_for_all_and_its_answer_is_checked(monkeypatch):
    calls: list = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return torch.tensor([float(len(r)) for r in responses])

    mine = SimpleNamespace(reward=reward, short=lambda p, r: [1.0], nan=lambda p, r: [1.0, math.nan], value=3)
    monkeypatch.setitem(sys.modules, "mine", mine)
    function = Function("mine.reward")
    assert rewards_of(function, "a", "bcd") == [1.0, 3.0]
    assert calls == [([[], []], ["a", "bcd"])]
    assert function.label == "reward"
    assert function.probability(0.0) == 0.5
    with pytest.raises(UserError, match=r"mine\.short returned 1 rewards for 2 responses"):
        rewards_of(Function("mine.short"), "a", "b")
    with pytest.raises(UserError, match=r"mine\.nan's reward of text 1 must be a finite number, is nan"):
        rewards_of(Function("mine.nan"), "a", "b")
    for name, why in (("mine.none", "cannot import 'mine.none'"), ("reward", "cannot"), ("mine.value", "no function")):
        with pytest.raises(ValueError, match=why):
            Function(name)


def test_a_reward_model_scores_the_samples_and_is_released(state, tmp_path, monkeypatch):
    tokenizer = state.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    loaded: list = []
    original = load.load_trained_reward_model

    def remember(*arguments):
        found = original(*arguments)
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(load, "load_trained_reward_model", remember)
    state.oracle = RewardModel(str(tmp_path / "reward"), "terminator")
    assert set(state.oracle.model_files()) == {"weights", "config", "tokenizer and template"}
    metrics = evaluate(state, 2)
    gc.collect()
    assert [reference() for reference in loaded] == [None]
    rows = lines(tmp_path, 2)
    for row in rows:
        prompt, response = encode_completion(tokenizer, row["prompt"], row["response"], row["finished"])
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        assert row["reward"] == pytest.approx(model.score(hidden).item(), abs=1e-4)
    assert metrics["oracle_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 3)


def test_which_scorers_read_rows():
    assert Columns().reads_rows
    assert not Vader().reads_rows
    assert Vader().model is None
    assert Vader().model_files() == {}


def test_accuracy_has_its_binomial_error_and_none_where_all_pairs_tie(state):
    row = {"accuracy": 0.75, "tie_rate": 0.0, "n": 48}
    assert heldout_accuracy(row) == (0.75, pytest.approx(0.0625))
    assert format_evaluation(row) == "held-out accuracy 0.750 ± 0.062 (ties 0.00, n 48)"
    tied = {"accuracy": 0.0, "tie_rate": 1.0, "n": 48}
    assert heldout_accuracy(tied) is heldout_accuracy({}) is None
    assert format_evaluation(tied) == "held-out accuracy – (ties 1.00, n 48)"
    state.reference = Resident(tiny_model(len(state.tokenizer), seed=7).eval(), LogprobComputer("float32"))
    metrics = evaluate(state, 2)
    share, n = metrics["accuracy"], metrics["n"]
    assert metrics["accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / n))
