"""The value head beside the policy: read at the last token in every layout, trained, resumed, and not exported."""

import json
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt.data.collate import LAYOUTS, Group
from prefopt.models.frozen import VALUE_HEAD
from prefopt.models.logprobs import completion_logps
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import Following
from prefopt.models.value_head import add_value_head, without_value_head
from prefopt.objectives.svpo import SVPO
from prefopt.training.checkpoint import load_checkpoint
from prefopt.training.loop import EarlyStopping, resume, save
from prefopt.training.state import TrainState
from tests.helpers.tiny import records, run_program, tiny_model, tiny_overrides
from tests.training.test_loop import make_train_state, step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tiled", [True, False])
def test_it_reads_the_last_token_of_each_completion(layout, tiled):
    model = tiny_model(50).eval()
    groups = [Group([5, 6], [[7, 2], [8]]), Group([9], [[3], [4, 2, 11]])]
    enable_packed_attention(model)
    add_value_head(model)
    assert completion_logps(model, LAYOUTS[layout].make(groups), tiled=tiled).values is None
    assert completion_logps(model, LAYOUTS[layout].make(groups), tiled=tiled, values=True).values.tolist() == [0.0] * 4
    torch.nn.init.normal_(model.value_head.weight, std=0.3)
    torch.nn.init.constant_(model.value_head.bias, 0.1)
    result = completion_logps(model, LAYOUTS[layout].make(groups), tiled=tiled, values=True)
    expected = []
    for k in (0, 1):
        for group in groups:
            row = torch.tensor([group.prompt + group.completions[k]])
            hidden = model.model(input_ids=row).last_hidden_state[0, -1]
            expected.append(torch.tanh(model.value_head.weight[0] @ hidden + 0.1).item())
    assert result.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    result.values.sum().backward()
    assert model.value_head.weight.grad.abs().max() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_the_policy_without_it_is_the_same_model():
    model = tiny_model(50).eval()
    assert without_value_head(model) is model
    names = [name for name, _ in model.named_parameters()]
    add_value_head(model)
    other = without_value_head(model)
    assert [name for name, _ in other.named_parameters()] == names
    assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=False))
    assert hasattr(model, VALUE_HEAD)


def test_it_learns_the_q_values_and_a_resumed_run_is_the_same(tmp_path):
    """After 3 of 6 steps, with a reference that follows the policy, which has no head."""

    def state() -> TrainState:
        train_state = make_train_state(SVPO(0.5), tmp_path)
        (tmp_path / "metrics.jsonl").touch()
        train_state.run = SimpleNamespace(
            folder=tmp_path, checkpoints=tmp_path / "checkpoints", metrics_file=tmp_path / "metrics.jsonl"
        )
        policy = without_value_head(train_state.engine.policy)
        train_state.reference = Following.starting_at(policy, train_state.score, 2, 0.6)
        return train_state

    def advance(train_state: TrainState, steps: range) -> list[dict]:
        rows = []
        for n in steps:
            rows.append(step(train_state, n))
            train_state.reference.follow(train_state.engine.policy, n + 1)
        return rows

    whole, first, second = state(), state(), state()
    rows = advance(whole, range(6))
    assert rows[0]["svpo/value_error"] == pytest.approx((0.9 + 0.2) / 2)
    assert rows[-1]["svpo/value_error"] < rows[0]["svpo/value_error"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    advance(first, range(3))
    save(first, EarlyStopping(), SimpleNamespace(vouch=lambda: {"length": 0, "sha256": sha256().hexdigest()}), 3)
    done, *_ = resume(second)
    assert done == 3
    assert [row["loss"] for row in advance(second, range(3, 6))] == [row["loss"] for row in rows[3:]]
    for a, b in zip(whole.engine.policy.parameters(), second.engine.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.engine.policy.value_head.weight.abs().max() > 0


@pytest.mark.parametrize("more", [[], ["peft=lora_attention"]], ids=["full", "lora"])
def test_steps_with_q_values_train_and_the_policy_is_exported_without_the_head(more, tiny_folder, tmp_path):
    rows = [
        {
            "prompt": f"Count from {i}.",
            "initial_reason_steps": "First step. ",
            "chosen": "It is right.",
            "rejected": "It is wrong" + ", very" * (i % 3) + ".",
            "q_chosen": 0.8,
            "q_rejected": -0.5,
        }
        for i in range(10)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:]))
    columns = ["+dataset.columns.chosen_reward=q_chosen", "+dataset.columns.rejected_reward=q_rejected"]
    common = [*tiny_overrides(tiny_folder / "model", tmp_path, tmp_path / "runs"), "objective=svpo", *columns]
    common += ["dataset.format._target_=prefopt.data.formats.Steps", "keep_checkpoint=true", *more]
    process = run_program(*common, env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    (record,) = records(tmp_path / "runs")
    folder = tmp_path / "runs" / record["name"]
    first, *_, last = record["evaluations"]
    assert last["svpo/value_error"] < first["svpo/value_error"] == pytest.approx(0.65)
    (checkpoint,) = folder.glob("checkpoints/step_*")
    weights = load_checkpoint(checkpoint)[0]["weights"]
    assert weights[f"{VALUE_HEAD}.weight"].abs().max() > 0
    (file,) = (folder / "policy").glob("*.safetensors")
    exported = load_file(file)
    assert not [name for name in exported if VALUE_HEAD in name]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert not hasattr(loaded, VALUE_HEAD)

    refused = run_program(*(option for option in common if option not in columns))
    assert refused.returncode == 2
    assert "objective svpo needs the prior rewards of both completions" in " ".join(refused.stderr.split())
