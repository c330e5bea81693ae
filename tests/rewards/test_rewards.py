"""Reward models and what else gives rewards: the right token, the same scores everywhere, computed once."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig
from prefopt.data.sources import read_rows
from prefopt.errors import UserError
from prefopt.models.load import load_reward_model
from prefopt.rewards.reward_model import CustomRewardModel, RewardModel
from prefopt.rewards.rows import requests_of, score_rows
from prefopt.rewards.scorers import Columns, RewardScorer, Vader
from prefopt.training.metrics import calibration
from prefopt.utils import tensor_store
from prefopt.utils.files import atomic_write
from tests.helpers.rewards import rewards_of
from tests.helpers.tiny import records, run_program, save_tiny, write_pairs

ROW = {
    "prompt": [
        {"role": "user", "content": "Review the kettle."},
        {"role": "assistant", "content": "Good."},  # its terminator, which is also the pad token, stands inside
        {"role": "user", "content": "And the train?"},
    ],
    "responses": ["The ride was lovely.", "Terrible", "It was good and bad and quick and loud and long."],
    "finished": [True, True, False],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny reward model as `objective=reward` exports it."""
    base = save_tiny(tmp_path_factory.mktemp("base"))
    model = load_reward_model(ModelConfig("tiny", str(base)), "cpu")
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    target = tmp_path_factory.mktemp("reward")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def rewards(scorer: RewardScorer, row=ROW) -> list[float]:
    return scorer.rewards(requests_of("row 1", row), "cpu", "float32", show=False)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many texts each forward pass is spent on."""
    found: list[int] = []
    compute = RewardModel._compute
    monkeypatch.setattr(RewardModel, "_compute", lambda *a: (found.append(len(a[2])), compute(*a))[1])
    return found


def by_transformers(folder, texts: list[str]) -> list[float]:
    """The loaded export's own logits, one unpadded text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]])).logits.item() for t in texts]


def texts(ends_with: str) -> list[str]:
    opened = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in ROW["prompt"])
    ends = {"terminator": ["<|im_end|>", "<|im_end|>", ""], "template": ["<|im_end|>\n"] * 3}[ends_with]
    return [opened + f"<|im_start|>assistant\n{r}{end}" for r, end in zip(ROW["responses"], ends, strict=True)]


@pytest.mark.parametrize("ends_with", ["terminator", "template"])
def test_the_head_reads_the_last_token_and_the_export_scores_alike(folder, ends_with):
    found = rewards(RewardModel(str(folder), ends_with))
    assert found == pytest.approx(by_transformers(folder, texts(ends_with)), abs=1e-5)
    assert len({round(r, 4) for r in found}) == 3


def test_a_score_does_not_depend_on_what_is_scored_beside_it(folder):
    together = rewards(RewardModel(str(folder), "terminator"))
    for i, reward in enumerate(together):
        one = ROW | {"responses": [ROW["responses"][i]], "finished": [ROW["finished"][i]]}
        assert rewards(RewardModel(str(folder), "terminator"), one) == pytest.approx([reward], abs=1e-5)


def test_scores_are_computed_once_per_weights_and_texts(folder, computed, cache, tmp_path):
    first = rewards(RewardModel(str(folder), "terminator"))
    assert rewards(RewardModel(str(folder), "terminator")) == first
    assert computed == [3]
    # With another text beside them they are computed anew, whatever the cache holds: their last bits may differ.
    more = ROW | {"responses": [*ROW["responses"], "Loud"], "finished": [*ROW["finished"], True]}
    assert rewards(RewardModel(str(folder), "terminator"), more)[:3] == pytest.approx(first, abs=1e-5)
    assert computed == [3, 4]
    # Other weights under the same path are another model.
    other = shutil.copytree(folder, tmp_path / "other")
    changed = AutoModelForSequenceClassification.from_pretrained(other, dtype=torch.float32)
    torch.nn.init.ones_(changed.score.weight)
    changed.save_pretrained(other)
    assert rewards(RewardModel(str(other), "terminator")) != first
    assert computed == [3, 4, 3]
    assert len(list(cache.iterdir())) == 3


def test_what_was_scored_before_a_failure_is_kept(folder, computed, monkeypatch):
    monkeypatch.setattr(tensor_store, "SHARD_ROWS", 1)
    write, written = atomic_write, []

    def fail_at_the_third(*args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*args))

    monkeypatch.setattr(tensor_store, "atomic_write", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        rewards(RewardModel(str(folder), "terminator"))
    monkeypatch.setattr(tensor_store, "atomic_write", write)
    computed.clear()
    rewards(RewardModel(str(folder), "terminator"))
    assert computed == [1]


def test_a_model_without_a_trained_head_of_one_output_is_refused(tmp_path):
    causal = save_tiny(tmp_path / "causal")
    with pytest.raises(UserError, match=r"no reward model.*lacks score\.weight"):
        rewards(RewardModel(str(causal), "terminator"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    two = LlamaForSequenceClassification(LlamaConfig(vocab_size=320, num_labels=2, **small))
    two.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(causal).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has no linear head `score` of one output"):
        rewards(RewardModel(str(tmp_path / "two"), "terminator"))


def test_a_text_that_is_too_long_for_the_model_is_named(folder):
    with pytest.raises(UserError, match=r"row 1: response 1 and its prompt have \d+ tokens, .* reads 512"):
        rewards(RewardModel(str(folder), "terminator"), ROW | {"responses": ["x", "y " * 600, "z"]})


def test_rows_get_r_and_r_on_0_to_1():
    pair = {"prompt": "Hi", "chosen": "lovely", "rejected": [{"role": "assistant", "content": "terrible"}], "id": "a"}
    raw = Columns(chosen="a.x", rejected="y", responses="z")
    (scored,) = score_rows([("row 1", pair | {"a": {"x": 2.0}, "y": -1})], raw, "cpu", "float32")
    assert (scored["chosen_reward"], scored["rejected_reward"], scored["id"]) == (2.0, -1.0, "a")
    assert scored["chosen_reward_01"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert scored["rejected_reward_01"] == pytest.approx(1 / (1 + math.exp(1)))
    (scored,) = score_rows([("row 1", ROW | {"z": [1, 800.0, -800.0]})], raw, "cpu", "float32", "model")
    assert scored["model"] == [1.0, 800.0, -800.0]
    assert scored["model_01"] == pytest.approx([1 / (1 + math.exp(-1)), 1.0, 0.0])
    (scored,) = score_rows([("row 1", pair)], Vader(), "cpu", "float32")
    (lovely,) = rewards_of(Vader(), "lovely")
    assert scored["chosen_reward"] == scored["chosen_reward_01"] == lovely > 0.5 > scored["rejected_reward"]


def test_whole_conversations_are_pairs_too():
    turns = [{"role": "user", "content": "Hi"}]
    sides = {s: [*turns, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}
    requests = requests_of("row 1", {"prompt": "Hi", **sides})
    assert [(r.prompt, r.response, r.key) for r in requests] == [(turns, s, s) for s in sides]


def test_scores_on_a_known_scale():
    row = {"prompt": "Hi", "chosen": "x", "rejected": "y", "score_chosen": 8.5, "score_rejected": 1}
    (scored,) = score_rows([("row 1", row)], Columns(scale=[1, 10]), "cpu", "float32")
    assert (scored["chosen_reward"], scored["chosen_reward_01"], scored["rejected_reward_01"]) == (8.5, 7.5 / 9, 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "x", "rejected": "y"}, "row 1 has no field 'prompt'"),
        ({"prompt": "Hi", "chosen": "x"}, "row 1 has no field 'rejected'"),
        ({"prompt": "Hi", "responses": []}, "responses must be a list of texts"),
        ({"prompt": "Hi", "responses": ["x", 3]}, "'responses' must be text, is int"),
        ({"prompt": "Hi", "responses": ["x"], "finished": []}, "and finished, if there, as long"),
        ({"prompt": "Hi", "chosen": "x", "rejected": "y"}, "row 1 has no number 'score_chosen'"),
        ({"prompt": "Hi", "chosen": "x", "rejected": "y", "score_chosen": math.nan}, "must be a finite number"),
        ({"prompt": "Hi", "chosen": "x", "rejected": "y", "score_chosen": 11}, "score_chosen 11 is outside"),
        ({"prompt": "Hi", "responses": ["x", "y"], "scores": [1]}, "has no number 'scores'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored(row, message):
    with pytest.raises(UserError, match=message):
        score_rows([("row 1", row)], Columns(scale=[1, 10]), "cpu", "float32")


CUSTOM = """
from types import SimpleNamespace

import torch
from transformers import LlamaForCausalLM


class Gated(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **others):
        return SimpleNamespace(score=self.gate(self.model(input_ids, attention_mask=attention_mask)[0][:, -1]))
"""


def test_code_that_comes_with_a_model_runs_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    node = {"_target_": "prefopt.rewards.reward_model.CustomRewardModel", "path": str(tmp_path / "custom")}
    with pytest.raises(UserError, match=r"scorer\.trust_remote_code: .*set scorer\.trust_remote_code=true"):
        build(node, RewardScorer, "scorer")
    folder = save_tiny(tmp_path / "custom")
    (folder / "modeling_gated.py").write_text(CUSTOM)
    weights = load_file(folder / "model.safetensors")
    gate = {"gate.weight": torch.randn(1, 32), "gate.bias": torch.randn(1)}
    from safetensors.torch import save_file

    save_file(weights | gate, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoModelForSequenceClassification": "modeling_gated.Gated"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    found = rewards(CustomRewardModel(str(folder), trust_remote_code=True))
    assert len({round(r, 4) for r in found}) == 3
    # Its code decides the rewards as its weights do.
    (folder / "modeling_gated.py").write_text(CUSTOM.replace("score=self", "score=-self"))
    assert rewards(CustomRewardModel(str(folder), trust_remote_code=True)) == pytest.approx([-r for r in found])


def test_the_reliability_table():
    """Log-odds 2 (0.88), right three times of four; 0.1 (0.525), right once of two; a tie."""
    margins = torch.tensor([2.0, 2.0, 2.0, -2.0, 0.1, -0.1, 0.0])
    found = calibration(margins)
    low, high = found["reliability"]
    assert (low["n"], high["n"]) == (3, 4)
    assert low["accuracy"] == 0.5
    assert low["confidence"] == pytest.approx((2 / (1 + math.exp(-0.1)) + 0.5) / 3, abs=1e-6)
    assert high["accuracy"] == 0.75
    assert high["confidence"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)
    expected = (3 * abs(low["confidence"] - 0.5) + 4 * abs(high["confidence"] - 0.75)) / 7
    assert found["calibration_error"] == pytest.approx(expected)
    assert calibration(torch.tensor([1e4, 1e4]))["calibration_error"] == 0


@pytest.mark.slow
def test_from_a_reward_model_to_mappo_on_the_command_line(overrides, tiny_folder, tmp_path):
    """Train it, score pairs with it, train on the rewards: raw ones are refused with the way out, which works."""
    environment = {"PREFOPT_CACHE": str(tiny_folder / "cache")}
    trained = run_program(*overrides(tmp_path / "reward"), "objective=reward", env=environment)
    assert trained.returncode == 0, trained.stderr
    assert "calibration error" in trained.stderr
    assert "    confidence 0.5 to 0.6: " in trained.stderr
    (record,) = records(tmp_path / "reward")
    assert sum(row["n"] for row in record["evaluations"][-1]["reliability"]) == 6
    scored = tmp_path / "scored.jsonl"
    command = ["scorer=reward_model", f"scorer.path={tmp_path / 'reward' / record['name'] / 'policy'}", "device=cpu"]
    process = run_program(
        f"input={write_pairs(tmp_path / 'pairs.jsonl', 12)}", f"output={scored}", "precision=float32", *command,
        program="score", env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = [row for _, row in read_rows(str(scored))]
    assert len(rows) == 12
    assert any(row["rejected_reward"] < 0 for row in rows)
    assert all(row["chosen_reward_01"] == pytest.approx(1 / (1 + math.exp(-row["chosen_reward"]))) for row in rows)
    soft = ["objective=reward", "objective.labels=soft", "objective.gamma=2.2"]
    taken = run_program(
        *overrides(tmp_path / "soft"), *soft, f"dataset.train={scored}", "dataset.heldout=null", env=environment
    )
    assert taken.returncode == 0, taken.stderr
    mappo = [*overrides(tmp_path / "mappo"), "objective=mappo", f"dataset.train={scored}", "dataset.heldout=null"]
    refused = run_program(*mappo, env=environment)
    assert refused.returncode == 2
    assert "needs rewards in [0, 1]" in refused.stderr
    assert "+dataset.columns.chosen_reward=chosen_reward_01" in refused.stderr
    columns = [f"+dataset.columns.{side}_reward={side}_reward_01" for side in ("chosen", "rejected")]
    taken = run_program(*mappo, *columns, env=environment)
    assert taken.returncode == 0, taken.stderr
