"""Frozen weights in bfloat16: they compute the same, to the bit, and a run with them is the same run."""

import copy

import pytest
import torch

from prefopt.config.schema import ModelConfig
from prefopt.data.collate import LAYOUTS
from prefopt.models.frozen import freeze
from prefopt.models.load import load_model, load_reward_model, weights_digest
from prefopt.models.logprobs import LogprobComputer, autocast, completion_rewards
from prefopt.models.lora import add_adapter
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff, Resident
from prefopt.objectives.dpo import DPO
from prefopt.training.engine import Engine
from prefopt.training.step import train_step
from tests.helpers.tiny import records, run_program, save_tiny, tiny_model
from tests.models.test_lora import lora
from tests.training.test_export import ARCHITECTURES, saved
from tests.training.test_loop import make_train_state

SCORE = LogprobComputer("bfloat16")


def rounded(model):
    """`model` with weights that bfloat16 holds exactly, as those of a checkpoint in bfloat16 are."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def bytes_of(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("exact", [True, False], ids=["bfloat16-checkpoint", "float32-checkpoint"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama-untied"])
def test_a_frozen_model_computes_the_same_to_the_bit(name, exact, tmp_path):
    model = load_model(saved(name.removesuffix("-untied"), tmp_path, "untied" not in name), "cpu")
    if exact:
        rounded(model)
    frozen = freeze(copy.deepcopy(model), "bfloat16")
    state = make_train_state(DPO(0.1), tmp_path)
    batch = state.layout.collate(state.train_pairs[:3])
    with torch.no_grad():
        expected, found = (SCORE(m, batch).sums for m in (model, frozen))
        with autocast(model.device, "bfloat16"):  # as it is sampled
            whole = [m(input_ids=batch.input_ids).logits for m in (model, frozen)]
    assert torch.equal(found, expected)
    assert torch.equal(*whole)
    assert not any(p.requires_grad for p in frozen.parameters())
    names = {n for n, p in frozen.named_parameters() if p.dtype == torch.bfloat16}
    assert any("layers.0" in n or "h.0" in n for n in names)
    # Gemma's embeddings are scaled by a number in the type of their weight.
    is_half = frozen.get_input_embeddings().weight.dtype == torch.bfloat16
    assert is_half == (exact and "gemma" not in name)
    if name == "llama" and exact:
        vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
        assert bytes_of(frozen) == 2 * sum(p.numel() for p in model.parameters()) + 2 * vectors


def test_a_frozen_reward_model_gives_the_same_rewards_and_keeps_its_head_in_float32(tmp_path):
    model = load_reward_model(ModelConfig("tiny", str(save_tiny(tmp_path))), "cpu")
    torch.nn.init.normal_(model.score.weight)
    frozen = freeze(copy.deepcopy(model), "bfloat16")
    assert frozen.score.weight.dtype == torch.float32 != frozen.model.layers[0].mlp.up_proj.weight.dtype
    state = make_train_state(DPO(0.1), tmp_path)
    batch = state.layout.collate(state.train_pairs[:3])
    with torch.no_grad(), autocast(model.device, "bfloat16"):
        assert torch.equal(completion_rewards(frozen, batch), completion_rewards(model, batch))


def test_in_float32_nothing_is_rounded():
    model = tiny_model(50)
    before = weights_digest(model)
    assert weights_digest(freeze(model, "float32")) == before
    assert not any(p.requires_grad for p in model.parameters())


def test_an_adapter_trains_the_same_on_a_frozen_base(tmp_path):
    losses, adapters = [], []
    for precision in ("float32", "bfloat16"):  # of the base alone
        state = make_train_state(DPO(0.5), tmp_path, precision="bfloat16")
        state.layout = LAYOUTS["packed"]
        policy = freeze(state.engine.policy, precision)
        enable_packed_attention(policy)
        add_adapter(policy, lora(dropout=0.1), seed=0)
        assert any(p.dtype == torch.bfloat16 for p in policy.parameters()) == (precision == "bfloat16")
        state.engine, state.reference = Engine(policy, state.config.optimizer), AdapterOff(policy, SCORE)
        steps = [train_step(state, n, state.step_micro_batches(n)) for n in range(4)]
        losses.append([(step["loss"], step["gradient_norm"]) for step in steps])
        adapters.append(state.engine.parameters)
    assert losses[0] == losses[1]
    assert losses[0][0][0] > losses[0][-1][0]
    for name, p in adapters[0].items():
        assert torch.equal(p, adapters[1][name])


def test_a_resident_reference_takes_half_and_says_the_same(tmp_path):
    policy = rounded(tiny_model(50)).eval()
    reference = Resident.copy_of(policy, SCORE)
    assert bytes_of(reference.frozen) < 0.55 * bytes_of(policy)
    state = make_train_state(DPO(0.5), tmp_path, precision="bfloat16")
    state.reference = Resident.copy_of(state.engine.policy, SCORE)
    assert train_step(state, 0, state.step_micro_batches(0))["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("reference", ["cached", "resident"])
def test_a_run_records_the_weights_as_they_were_read_and_exports_them_unrounded(
    reference, overrides, tiny_folder, tmp_path
):
    options = ["peft=lora_attention", "peft.r=4", "precision=bfloat16", f"reference={reference}", "merge_adapter=true"]
    options += ["sampling.prompts=2", "sampling.max_new_tokens=4", "steps=2"]
    process = run_program(*overrides(tmp_path / "runs"), *options, env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    assert "policy = reference (largest |log-ratio| 0)" in process.stderr
    (record,) = records(tmp_path / "runs")
    base = load_model(ModelConfig("tiny", str(tiny_folder / "model")), "cpu")
    assert record["initial_weights"] == weights_digest(base)
    policy = load_model(ModelConfig("tiny", str(tmp_path / "runs" / record["name"] / "policy")), "cpu")
    assert record["final_weights"] == weights_digest(policy)
    for name, p in policy.named_parameters():
        assert torch.equal(p, base.get_parameter(name)) == ("self_attn" not in name), name
