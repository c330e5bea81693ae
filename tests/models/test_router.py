"""The load-balancing loss of a mixture of experts: transformers' own, over the micro-batches of a step."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from prefopt.data.collate import LAYOUTS
from prefopt.errors import UserError
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.lora import checkpoint_activations, train_mode
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import Resident
from prefopt.models.router import RouterLoss
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.dpo import DPO
from prefopt.training.engine import Engine
from prefopt.training.step import accumulate_gradients
from tests.helpers.tiny import SMALL, records, run_program, tiny_model, tiny_tokenizer
from tests.training.test_loop import make_train_state

SIZES = SMALL | {"vocab_size": 320, "max_position_embeddings": 512, "initializer_range": 0.2}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}


def experts(name: str = "mixtral"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_padded_rows_is_the_models_own(name, tmp_path):
    model = experts(name)
    pairs = make_train_state(DPO(0.1), tmp_path).train_pairs[:4]
    batch = LAYOUTS["padded"].collate(pairs)
    assert not batch.attention_mask.all()  # there is padding
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True).aux_loss
    loss = RouterLoss(model, 0.5)
    LogprobComputer("float32")(model, batch)
    found = loss(batch, 2 * batch.tokens)
    assert found.item() == pytest.approx(0.5 * expected.item() / 2, rel=1e-6)
    assert loss.total.item() == pytest.approx(expected.item() / 2, rel=1e-6)
    theirs = torch.autograd.grad(expected, model.get_input_embeddings().weight)[0]
    ours = torch.autograd.grad(found, model.get_input_embeddings().weight)[0]
    assert torch.allclose(ours, theirs / 4, atol=1e-6)
    assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
def test_padding_does_not_count_and_every_other_token_does_once(layout, tmp_path):
    model = experts()
    pairs = make_train_state(DPO(0.1), tmp_path).train_pairs[:3]
    if layout == "packed":
        enable_packed_attention(model)
    loss = RouterLoss(model, 1.0)
    batch = LAYOUTS[layout].collate(pairs)
    LogprobComputer("float32")(model, batch)
    counts, probabilities, rows = torch.zeros(4), torch.zeros(4), 0
    for logits in loss._logits:
        real, start = [], 0
        for owner, tokens in batch.spans:
            real += range(start, start + tokens) if owner is not None else []
            start += tokens
        shares = logits[real].softmax(-1)
        counts += torch.bincount(shares.topk(2, -1).indices.flatten(), minlength=4)
        probabilities += shares.sum(0)
        rows += len(real)
    expected = 4 * (counts / rows * probabilities / rows).sum()
    assert rows == 2 * sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert loss(batch, batch.tokens).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [DPO(0.5), BetaDPO(0.5)], ids=["pair", "step"])
def test_the_gradient_of_a_step_is_that_of_both_losses(objective, checkpointing, tmp_path):
    """Over several micro-batches, in one pass and in two, with activations recomputed and without."""
    found = {}
    for coef in (0.0, 0.7):
        train_state = make_train_state(objective, tmp_path, micro_batch_tokens=300)
        model = experts()
        train_state.reference = Resident.copy_of(model, train_state.score)
        train_state.engine = Engine(model, train_state.config.optimizer)
        if checkpointing:
            checkpoint_activations(model)
        if coef:
            train_state.router_loss = RouterLoss(model, coef)
        micro_batches = train_state.step_micro_batches(0)
        assert len(micro_batches) > 1
        with train_mode(model):
            accumulate_gradients(train_state, 0, micro_batches)
        found[coef] = {n: p.grad.clone() for n, p in train_state.engine.parameters.items() if p.grad is not None}

    model, tokens = experts(), sum(m.batch.tokens for m in micro_batches)
    total = 0.0
    for micro_batch in micro_batches:
        batch = micro_batch.batch
        rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        loss = model(**rows, output_router_logits=True).aux_loss * batch.tokens / tokens
        (0.7 * loss).backward()
        total += loss.item()
    assert float(train_state.router_loss.total) == pytest.approx(total, rel=1e-5)
    added = dict(model.named_parameters())
    for name, gradient in found[0.7].items():
        extra = added[name].grad
        expected = found[0.0][name] + (0 if extra is None else extra)
        assert torch.allclose(gradient, expected, atol=1e-5), name


def test_a_model_without_a_load_balancing_loss_is_refused():
    with pytest.raises(UserError, match="llama is no mixture of experts: set it to 0"):
        RouterLoss(tiny_model(50), 0.1)


@pytest.mark.parametrize("coef", ["0", "0.02"])
def test_a_run_says_whether_it_balances_the_load(coef, overrides, tmp_path):
    experts().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = [f"model.path={tmp_path / 'model'}", f"model.router_aux_loss_coef={coef}", "steps=2"]
    command = [*overrides(tmp_path / "runs"), *options, "peft=lora_attention"]
    process = run_program(*command, "reference=adapter_off", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    said = "none (model.router_aux_loss_coef=0)" if coef == "0" else "added, times model.router_aux_loss_coef=0.02"
    assert f"mixture of experts: load-balancing loss {said}" in process.stderr
    assert "an adapter on 8 layers (k_proj, o_proj, q_proj, v_proj)" in process.stderr
    (record,) = records(tmp_path / "runs")
    logged = (tmp_path / "runs" / record["name"] / "metrics.jsonl").read_text()
    assert ("router_aux_loss" in logged) == (coef != "0")
    refused = run_program(*overrides(tmp_path / "others"), "model.router_aux_loss_coef=0.1")
    assert refused.returncode == 2
    assert "llama is no mixture of experts" in refused.stderr
