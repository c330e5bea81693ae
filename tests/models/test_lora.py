"""LoRA: its reference, its dropout, what is saved and what is exported. And gradient checkpointing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt.config.schema import ModelConfig, PeftConfig
from prefopt.data.collate import LAYOUTS
from prefopt.errors import UserError
from prefopt.models.dropout import Noise, PairDropout
from prefopt.models.load import load_model, load_tokenizer, weights_digest
from prefopt.models.logprobs import LogprobComputer, completion_rewards
from prefopt.models.lora import add_adapter, checkpoint_activations, merge, save_adapter, train_mode
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff
from prefopt.models.whole import whole_model
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.reward import Reward
from prefopt.tracking.policies import exported_policies
from prefopt.training import forward, step
from prefopt.training.engine import Engine
from prefopt.training.evaluate import evaluate_pairs
from prefopt.training.export import portable_name
from prefopt.training.forward import forward_policy
from prefopt.training.step import accumulate_gradients, train_step
from tests.helpers.tiny import ROOT, records, run_program, save_tiny, tiny_model
from tests.training.test_loop import make_train_state

MODULES = ["q_proj", "v_proj", "down_proj"]


def lora(dropout: float = 0.0, **changes) -> PeftConfig:
    return PeftConfig(**{"target_modules": MODULES, "r": 4, "alpha": 8, "dropout": dropout} | changes)


def with_lora(objective, tmp_path, dropout: float = 0.0, **changes):
    train_state = make_train_state(objective, tmp_path, **changes)
    train_state.layout = LAYOUTS["packed"]
    for model in (train_state.engine.policy, *([train_state.reference.frozen] if train_state.reference else [])):
        enable_packed_attention(model)
    add_adapter(train_state.engine.policy, lora(dropout), seed=0)
    train_state.engine = Engine(train_state.engine.policy, train_state.config.optimizer)
    return train_state


def steps(train_state, first: int, last: int) -> list[float]:
    return [train_step(train_state, n, train_state.step_micro_batches(n))["loss"] for n in range(first, last)]


def test_only_the_adapter_is_trained_in_float32_and_it_starts_as_the_reference(tmp_path):
    train_state = with_lora(DPO(0.5), tmp_path, dropout=0.5)
    before = {n: p.detach().clone() for n, p in train_state.engine.policy.named_parameters()}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in train_state.engine.parameters.items())
    assert evaluate_pairs(train_state, 0, train_state.heldout_pairs)["chosen_logratio"] == 0
    steps(train_state, 0, 2)
    changed = {n for n, p in train_state.engine.policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(train_state.engine.parameters)
    assert set(train_state.engine.state()["weights"]) == changed
    first, other = (tiny_model(50) for _ in range(2))
    add_adapter(first, lora(), seed=1)
    add_adapter(other, lora(), seed=2)
    names = [n for n, p in first.named_parameters() if "lora_A" in n]
    assert names
    assert not any(torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in names)


def test_a_checkpoint_that_lacks_an_adapter_tensor_is_refused(tmp_path):
    train_state = with_lora(DPO(0.5), tmp_path)
    state = train_state.engine.state()
    state["weights"] = dict(list(state["weights"].items())[1:])
    with pytest.raises(KeyError, match="lora_A"):
        train_state.engine.load_state(state)


@pytest.mark.parametrize("objective", [DPO(0.5), BetaDPO(0.5)], ids=["pair", "step"])
def test_a_run_that_goes_on_draws_the_dropout_it_would_have_drawn(objective, tmp_path):
    whole = with_lora(objective, tmp_path, dropout=0.5)
    losses = steps(whole, 0, 4)
    first = with_lora(objective, tmp_path, dropout=0.5)
    assert steps(first, 0, 2) == losses[:2]
    second = with_lora(objective, tmp_path, dropout=0.5)
    second.engine.load_state(first.engine.state())
    second.objective_state = first.objective_state
    torch.manual_seed(123)  # another process's generator stands anywhere
    assert steps(second, 2, 4) == losses[2:]
    for name, p in whole.engine.parameters.items():
        assert torch.equal(p, second.engine.parameters[name])


def test_dropout_is_drawn_in_training_alone_and_is_the_same_in_both_passes(tmp_path, monkeypatch):
    train_state = with_lora(BetaDPO(0.5), tmp_path, dropout=0.5)
    steps(train_state, 0, 2)  # so that the adapter does something
    assert evaluate_pairs(train_state, 1, train_state.heldout_pairs) == evaluate_pairs(
        train_state, 1, train_state.heldout_pairs
    )
    seen = []
    original = forward_policy
    for module in (forward, step):
        monkeypatch.setattr(module, "forward_policy", lambda *a: (seen.append(found := original(*a)), found)[1])
    micro_batches = train_state.step_micro_batches(2)
    n = len(micro_batches)
    assert n > 1
    with train_mode(train_state.engine.policy):
        accumulate_gradients(train_state, 2, micro_batches)
    accumulate_gradients(train_state, 2, micro_batches)  # as it is evaluated: no dropout
    with train_mode(train_state.engine.policy):
        accumulate_gradients(train_state, 3, micro_batches)
    logps = [tensors["policy_chosen_logps"].detach() for tensors, _ in seen]
    first, second, still, _, other, _ = (logps[i : i + n] for i in range(0, 6 * n, n))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for drawn in (still, other):
        assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(first, drawn, strict=True))


@pytest.mark.parametrize("objective", [DPO(0.5), BetaDPO(0.5), KTO(0.5)], ids=["pair", "step", "mismatched"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_does_not_depend_on_the_micro_batches(layout, objective, tmp_path):
    losses = []
    for tokens in (1, 150, 10_000):
        train_state = with_lora(objective, tmp_path, dropout=0.5, micro_batch_tokens=tokens)
        train_state.layout = LAYOUTS[layout]
        losses.append(steps(train_state, 0, 3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    without = with_lora(objective, tmp_path, micro_batch_tokens=150)
    without.layout = LAYOUTS[layout]
    assert steps(without, 0, 3)[1:] != pytest.approx(losses[0][1:], rel=1e-5)


def test_dropout_drops_the_share_it_is_told_and_keeps_the_mean():
    noise = Noise([(3, 40), (None, 10), (4, 50)])
    layer = PairDropout(0.25, 0, noise).train()
    x = torch.ones(1, 100, 64)
    y = layer(x)[0]
    assert (y[:40] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[40:50] > 1).all()  # padding
    assert torch.equal(layer(x)[0], y)
    assert not torch.equal(PairDropout(0.25, 1, noise).train()(x)[0], y)
    assert torch.equal(layer.eval()(x), x)
    with pytest.raises(UserError, match=r"set peft\.dropout=0"):
        layer.train()(x[:, :99])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout", [None, 0.5], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(layout, dropout, tmp_path):
    found = []
    for on in (False, True):
        train_state = (
            make_train_state(DPO(0.5), tmp_path) if dropout is None else with_lora(DPO(0.5), tmp_path, dropout)
        )
        policy = train_state.engine.policy
        with torch.no_grad():  # B is zero in a fresh adapter: A would have no gradient, and dropout no effect
            for name, p in train_state.engine.parameters.items():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        train_state.layout = LAYOUTS[layout]
        for model in (policy, train_state.reference.frozen):
            enable_packed_attention(model)
        if on:
            checkpoint_activations(policy)
        calls = []
        policy.base_model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        micro_batches = train_state.step_micro_batches(0)
        with train_mode(policy):
            accumulate_gradients(train_state, 0, micro_batches)
        assert len(calls) == len(micro_batches) * (2 if on else 1)
        assert not train_state.engine.without_gradient()
        found.append({n: p.grad for n, p in train_state.engine.parameters.items()})
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, atol=1e-6, rtol=1e-5), name
        assert expected.abs().max() > 0


def test_a_trainable_tensor_without_gradient_stops_a_checkpointed_run(tmp_path):
    train_state = with_lora(DPO(0.5), tmp_path, gradient_checkpointing=True)
    steps(train_state, 0, 1)
    train_state.engine.parameters["unused"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"got no gradient: \['unused'\]"):
        steps(train_state, 1, 2)


def test_a_reward_models_head_is_trained_beside_the_adapter(tmp_path):
    train_state = with_lora(Reward(), tmp_path)
    assert "score.weight" in train_state.engine.parameters
    losses = steps(train_state, 0, 3)
    assert losses[-1] < losses[0]
    save_adapter(train_state.engine.policy, tmp_path / "adapter")
    merge(train_state.engine.policy)
    assert not [n for n, _ in train_state.engine.policy.named_parameters() if "lora" in n]
    # The saved adapter holds the head too: peft makes the same reward model of it.
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for pair in train_state.heldout_pairs:
        row = torch.tensor([pair.prompt + pair.chosen])
        ours = completion_rewards(train_state.engine.policy, LAYOUTS["padded"].collate([pair], ("chosen",)))
        assert loaded(row).logits.item() == pytest.approx(ours.item(), abs=1e-5)
        assert ours.item() != 0


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["nowhere"], r"none with the name nowhere in llama\. .*peft\.target_modules=\[down_proj,gate_proj,k_proj,"),
        (["q_proj", "w1"], "none with the name w1"),
        (["q_proj", "lm_head"], "is the head"),
    ],
)
def test_layers_that_cannot_take_an_adapter_are_named(modules, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_model(50), lora(target_modules=modules), 0)


def test_merging_computes_the_same(tmp_path):
    train_state = with_lora(DPO(0.5), tmp_path)
    policy = train_state.engine.policy
    for p in train_state.engine.parameters.values():
        torch.nn.init.normal_(p, std=0.1)
    batch = train_state.layout.collate(train_state.train_pairs[:4])
    with torch.no_grad():
        expected = LogprobComputer("float32")(policy, batch).sums
        names = {n for n, _ in tiny_model(len(train_state.tokenizer)).named_parameters()}
        merge(policy)
        assert {n for n, _ in policy.named_parameters()} == names
        found = LogprobComputer("float32")(policy, batch).sums
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, train_state.reference.logps([], batch).sums, atol=1e-2)


def logps(model, train_state) -> torch.Tensor:
    with torch.no_grad():
        return LogprobComputer("float32")(model.eval(), LAYOUTS["padded"].collate(train_state.train_pairs)).sums


def policy_of(runs: Path, *others: str) -> tuple[dict, Path]:
    """(record, folder) of the run that is none of `others`."""
    (record,) = [r for r in records(runs) if r["name"] not in others]
    return record, runs / record["name"]


def test_a_runs_policies_are_adapters_and_a_run_that_starts_from_one_is_whole(overrides, tiny_folder, tmp_path):
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    options = ["peft=lora_attention_mlp", "peft.r=4", "objective=beta_dpo", "gradient_checkpointing=true", "steps=3"]
    common = [*overrides(tmp_path / "runs"), *options, "optimizer.lr=1e-2"]
    process = run_program(*common, "peft.dropout=0.3", "reference=adapter_off", "exports=3", env=environment)
    assert process.returncode == 0, process.stderr
    assert "policy = reference" in process.stderr
    record, run = policy_of(tmp_path / "runs")
    assert record["final_weights"] is None
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = [row for row in rows if row["split"] == "heldout"][-1]
    policies = [*(run / "policies").iterdir(), run / "policy"]
    assert len(policies) == 3
    whole = (tiny_folder / "model" / "model.safetensors").stat().st_size
    for folder in policies:
        assert not (folder / "model.safetensors").exists()
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < whole / 2
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft"
        assert "its base" in card.text

    # transformers, peft and prefopt make the same model of it.
    train_state = make_train_state(DPO(0.1), tmp_path)
    model = ModelConfig("tiny", str(tiny_folder / "model"))
    expected = logps(load_model(model.exported(str(run / "policy")), "cpu"), train_state)
    assert not torch.allclose(expected, logps(load_model(model, "cpu"), train_state), atol=1e-2)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32),
        AutoPeftModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32).get_base_model(),
        load_model(ModelConfig("tiny", str(run / "policy")), "cpu"),
    ):
        assert torch.allclose(logps(loaded, train_state), expected, atol=1e-4)
    template = load_tokenizer(model).chat_template
    assert template
    assert load_tokenizer(ModelConfig("tiny", str(run / "policy"))).chat_template == template
    assert AutoTokenizer.from_pretrained(run / "policy").chat_template == template

    # And so does the page's way to merge it.
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    exec(recipe.replace("runs/RUN", str(run)).replace('"merged"', repr(str(tmp_path / "merged"))))
    merged = load_model(ModelConfig("tiny", str(tmp_path / "merged")), "cpu")
    assert torch.allclose(logps(merged, train_state), expected, atol=1e-4)
    assert load_tokenizer(ModelConfig("tiny", str(tmp_path / "merged"))).chat_template == template

    again = run_program(*common, f"model.path={run / 'policy'}", "exports=2", env=environment)
    assert again.returncode == 0, again.stderr
    second, other = policy_of(tmp_path / "runs", record["name"])
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["chosen_logps"] == pytest.approx(final["chosen_logps"], abs=1e-3)
    assert rows[0]["chosen_logratio"] == pytest.approx(0, abs=1e-4)
    # Two adapters lie on the base: neither of them makes the policy.
    for folder in (other / "policy", *(other / "policies").iterdir()):
        assert (folder / "model.safetensors").is_file()
        assert not (folder / "adapter_config.json").exists()
    exported = AutoModelForCausalLM.from_pretrained(other / "policy", dtype=torch.float32)
    assert weights_digest(exported) == second["final_weights"]


def test_the_last_policy_is_whole_where_that_is_asked_for(overrides, tiny_folder, tmp_path):
    common = [*overrides(tmp_path / "runs"), "peft=lora_attention", "peft.r=4", "exports=2"]
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    found = []
    for options in ([], ["merge_adapter=true"]):
        process = run_program(*common, *options, env=environment)
        assert process.returncode == 0, process.stderr
        record, run = policy_of(tmp_path / "runs", *(name for name, _ in found))
        found.append((record["name"], run))
        assert [(p / "adapter_config.json").is_file() for p in (run / "policies").iterdir()] == [True]
    (_, alone), (_, merged) = found
    assert record["final_weights"] == weights_digest(load_model(ModelConfig("tiny", str(merged / "policy")), "cpu"))
    ids = torch.arange(3, 20)[None]
    logits = [
        load_model(policy.model, "cpu")(ids).logits
        for run in (alone, merged)
        for policy in exported_policies(str(run), "all")
    ]
    assert torch.allclose(logits[1], logits[3], atol=1e-5)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_other_programs_get_a_whole_model(tmp_path):
    """lm-eval and vLLM load models themselves: an adapter is merged into a folder for them."""
    base = ModelConfig("tiny", str(save_tiny(tmp_path / "model")))
    model = load_model(base, "cpu")
    add_adapter(model, lora(), 0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    config = replace(base, adapter=str(tmp_path / "adapter"))
    with whole_model(config) as whole:
        loaded = AutoModelForCausalLM.from_pretrained(whole.path, dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(whole.path).chat_template == load_tokenizer(base).chat_template
    assert not Path(whole.path).exists()
    assert (
        weights_digest(loaded) == weights_digest(load_model(config, "cpu")) != weights_digest(load_model(base, "cpu"))
    )
    with whole_model(base) as whole:
        assert whole is base


@pytest.mark.parametrize(
    ("path", "revision", "expected"),
    [
        ("org/name", "v1", ("org/name", "v1")),
        ("CACHE/models--org--some-name/snapshots/abc", None, ("org/some-name", "abc")),
        ("CACHE/mine/policy", None, ("policy", None)),
        ("CACHE/mine/model.gguf", None, ("model.gguf", None)),
    ],
)
def test_the_base_of_an_adapter_has_a_name_for_other_machines(path, revision, expected, tmp_path):
    place = path.replace("CACHE", str(tmp_path))
    if path.startswith("CACHE"):
        Path(place).mkdir(parents=True)
    assert portable_name(place, revision) == expected


def test_every_reference_gives_the_same_run(overrides, tmp_path):
    common = [*overrides(tmp_path / "runs"), "peft=lora_attention", "peft.dropout=0", "peft.r=4", "steps=2"]
    for mode in ("cached", "resident", "adapter_off"):
        process = run_program(*common, f"reference={mode}", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
        assert process.returncode == 0, process.stderr
    first, *others = [record["evaluations"][-1] for record in records(tmp_path / "runs")]
    assert len(others) == 2
    for other in others:
        assert other == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["reference=adapter_off"], "reference=adapter_off is the policy without its adapter, and there is none"),
        (["model.adapter=nowhere"], "model.adapter=nowhere is no adapter"),
        (["peft=lora_attention", "peft.dropout=1"], "peft.dropout must be in"),
        (["peft.quantize=true"], "there is no adapter to train"),
        (["peft=lora_attention", "peft.quantize=true", "model.adapter=x"], "peft.quantize and model.adapter do not go"),
        (["peft=lora_attention", "peft.quantize=true", "reference=resident"], "use reference=cached or adapter_off"),
        (["peft=lora_attention", "peft.quantize=true", "engine=zero2"], "peft.quantize and engine=zero2"),
        (["peft=lora_attention", "peft.quantize=true", "objective=reward"], "cannot be trained on weights of 4 bits"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message, overrides, tmp_path):
    process = run_program(*overrides(tmp_path / "runs"), *options)
    assert process.returncode == 2
    assert message in process.stderr
    assert not Path(tmp_path / "runs").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path, overrides):
    other = tiny_model(50, hidden_size=16)
    other.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "adapter")
    process = run_program(*overrides(tmp_path / "runs"), f"model.adapter={tmp_path / 'adapter'}")
    assert process.returncode == 2, process.stderr
    assert "cannot be loaded into the model" in process.stderr


@pytest.fixture
def quantized(tmp_path):
    """The tiny model with weights of 4 bits, and a dense one that has exactly the rounded weights."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    config = ModelConfig("tiny", str(save_tiny(tmp_path / "four_bits")), None)
    small, dense = load_model(config, "cpu", "float32"), load_model(config, "cpu")
    rounded = {name: p for name, p in small.named_parameters() if hasattr(p, "quant_state")}
    assert len(rounded) == 14  # seven matrices in each of two layers, and neither embedding nor norms
    for name, p in rounded.items():
        values = dequantize_4bit(p.data, p.quant_state)
        assert not torch.allclose(values, dense.get_parameter(name), atol=1e-4)
        dense.get_parameter(name).data.copy_(values)
    return small, dense


def test_an_adapter_on_weights_of_4_bits_is_one_on_the_rounded_weights(quantized, tmp_path):
    """Also after an evaluation, in which bitsandbytes would pack the weights anew."""
    losses, digests = [], []
    for policy in quantized:
        train_state = make_train_state(DPO(0.5), tmp_path)
        train_state.layout = LAYOUTS["packed"]
        enable_packed_attention(policy)
        digests.append(weights_digest(policy))
        add_adapter(policy, lora(), seed=0)
        train_state.engine, train_state.reference = (
            Engine(policy, train_state.config.optimizer),
            AdapterOff(policy, LogprobComputer("float32")),
        )
        assert evaluate_pairs(train_state, 0, train_state.heldout_pairs)["chosen_logratio"] == 0
        losses.append(
            [
                loss
                for n in range(3)
                for loss in (
                    *steps(train_state, n, n + 1),
                    evaluate_pairs(train_state, 1, train_state.heldout_pairs)["loss"],
                )
            ]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert digests[0] == digests[1]


def test_a_run_on_weights_of_4_bits_exports_an_adapter_or_the_merged_whole_weights(overrides, tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["peft=lora_attention", "peft.quantize=true", "optimizer=adamw_8bit", "merge_adapter=true", "exports=2"]
    process = run_program(*overrides(tmp_path), *options)
    assert process.returncode == 0, process.stderr
    assert "policy = reference (largest |log-ratio| 0)" in process.stderr
    (record,) = records(tmp_path)
    folder = tmp_path / record["name"]
    merged = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32)
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (on_the_way,) = (folder / "policies").iterdir()
    base.load_adapter(str(on_the_way))  # of step 2
    ids = torch.tensor([[5, 6, 7, 8]])
    before = load_model(ModelConfig("tiny", str(tiny_folder / "model")), "cpu")(ids).logits
    assert (base(ids).logits - merged(ids).logits).abs().max() < (before - merged(ids).logits).abs().max()
