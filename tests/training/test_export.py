"""The export is tried before the first step: what passes exports, and what would fail is refused."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from prefopt.config.schema import ModelConfig, PeftConfig
from prefopt.errors import UserError
from prefopt.models.load import load_model, load_reward_model, weights_digest
from prefopt.models.lora import adapter_layers, add_adapter, freeze_unreached
from prefopt.training.config import TrainConfig
from prefopt.training.export import PolicyExporter, collect_weights
from tests.helpers.tiny import SMALL, VISION, run_program, tiny_tokenizer

SIZES = SMALL | {"vocab_size": 320, "initializer_range": 0.1, "max_position_embeddings": 512}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def config_of(name: str, tied: bool):
    same = {"tie_word_embeddings": tied}
    if name == "gpt2":
        return GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, **same)
    if name == "gemma3":
        return Gemma3TextConfig(**SIZES, head_dim=8, **same)
    if name == "gemma3-vision":
        text = SIZES | {"head_dim": 8, **same}
        return Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1, **same)
    if name == "phi3":
        return Phi3Config(**SIZES, pad_token_id=0, **same)
    if name == "qwen3-moe":
        return Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, **same)
    if name == "mixtral":
        return MixtralConfig(**SIZES, num_local_experts=4, **same)
    if name == "deepseek3":
        heads = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        return DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, **EXPERTS, **heads, **groups, **same)
    return LlamaConfig(**SIZES, **same)


ARCHITECTURES = ["llama", "gemma3", "gemma3-vision", "phi3", "gpt2", "qwen3-moe", "mixtral", "deepseek3"]


def saved(name: str, folder: Path, tied: bool = True) -> ModelConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(name, tied)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelConfig("tiny", str(folder))


def all_layers(model) -> list[str]:
    with pytest.raises(UserError, match=r"peft\.target_modules=") as error:
        adapter_layers(model, PeftConfig(["nothing"], 2, 2, 0.0, False))
    return str(error.value).rpartition("=[")[2][:-1].split(",")


def exporter(policy, model: ModelConfig, targets: list[str], merge: bool = True) -> PolicyExporter:
    config = TrainConfig(model=model, peft=PeftConfig(targets, 2, 2, 0.0, False), seed=0)
    config.merge_adapter = merge
    return PolicyExporter(config, tiny_tokenizer(), lambda rows: f"{len(rows)} evaluations")


@pytest.mark.parametrize("kind", ["full", "full-untied", "lora", "untied-lora", "reward", "reward-lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_passes_the_check_is_exported_as_it_is(name, kind, tmp_path):
    model = saved(name, tmp_path / "model", "untied" not in kind)
    reward = kind.startswith("reward")
    policy = load_reward_model(model, "cpu") if reward else load_model(model, "cpu")
    freeze_unreached(policy)
    targets = all_layers(policy) if kind.endswith("lora") else []
    export = exporter(policy, model, targets)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    export.check(policy)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())  # and by the same names

    if targets:
        add_adapter(policy, export.config.peft, 0)
        for parameter, p in policy.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(p, std=0.1)
    if reward:
        torch.nn.init.normal_(policy.score.weight)
    ids = torch.arange(3, 20)[None]

    def outputs(model):
        hidden = model.base_model(input_ids=ids).last_hidden_state
        return model.score(hidden) if reward else model.get_output_embeddings()(hidden)

    expected = outputs(policy).detach()
    export(policy, tmp_path / "during", [{}])
    export.final(policy, tmp_path / "final", [{}, {}])
    alone = bool(targets) and not reward
    assert (tmp_path / "during" / "adapter_config.json").is_file() == alone
    if alone:
        assert torch.allclose(outputs(load_model(model.exported(str(tmp_path / "during")), "cpu")), expected, atol=1e-4)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    for n, folder in enumerate(["during", "final"], start=1):
        assert (tmp_path / folder / "README.md").read_text() == f"{n} evaluations"
        if n == 2 or not alone:
            loaded, info = auto.from_pretrained(tmp_path / folder, dtype=torch.float32, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert torch.allclose(outputs(loaded), expected, atol=1e-4)


def test_a_vision_tower_is_frozen_and_gets_no_adapter(tmp_path, caplog):
    policy = load_model(saved("gemma3-vision", tmp_path), "cpu")
    with caplog.at_level("INFO"):
        freeze_unreached(policy)
    assert "does not reach it: model.multi_modal_projector, model.vision_tower" in caplog.text
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in policy.named_parameters() if "vision_tower" in n or "multi_modal" in n}
    targets = adapter_layers(policy, PeftConfig(["q_proj"], 2, 2, 0.0, False))
    assert targets == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize("options", [["gradient_checkpointing=true"], ["objective=reward"], ["peft=lora_attention"]])
def test_a_checkpoint_with_a_vision_tower_trains(options, overrides, tmp_path):
    saved("gemma3-vision", tmp_path / "model")
    command = [*overrides(tmp_path / "runs"), f"model.path={tmp_path / 'model'}", "steps=2", *options]
    process = run_program(*command, env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    (policy,) = tmp_path.glob("runs/*/policy")
    model = ModelConfig("tiny", str(tmp_path / "model"))
    before = load_model(model, "cpu")
    if "reward" in options[0]:
        loaded = AutoModelForSequenceClassification.from_pretrained(policy, dtype=torch.float32)
    else:
        loaded = load_model(model.exported(str(policy)), "cpu")
    names = [n for n, _ in before.named_parameters() if "vision_tower" in n]
    assert names
    for name in names:
        assert torch.equal(loaded.get_parameter(name), before.get_parameter(name))


def test_a_name_that_means_fused_experts_is_refused_with_the_layers_that_do_not(tmp_path):
    """Shared experts have layers of their own by the names that peft takes for the routed ones."""
    policy = load_model(saved("deepseek3", tmp_path), "cpu")
    with pytest.raises(UserError, match=r"peft takes gate_proj for the fused experts.*\[kv_a_proj_with_mqa,"):
        adapter_layers(policy, PeftConfig(["o_proj", "gate_proj"], 2, 2, 0.0, False))


def test_weights_that_would_not_be_read_again_are_refused_before_the_first_step(tmp_path):
    model = saved("llama", tmp_path / "model", tied=False)
    policy = load_model(model, "cpu")
    policy.lm_head.weight = policy.model.embed_tokens.weight  # tied, and its configuration does not say so
    with pytest.raises(UserError, match=r"could not be exported after its training: .*lm_head"):
        exporter(policy, model, []).check(policy)
    policy = load_model(model, "cpu")
    policy.model.layers[0].mlp.gate = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"1?\d weights would not be read again \(model.layers.0.mlp.gate"):
        exporter(policy, model, []).check(policy)


def test_a_generation_config_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    model = saved("llama", tmp_path / "model")
    policy = load_model(model, "cpu")
    policy.generation_config.max_new_tokens = -1
    with pytest.raises(UserError, match="could not be exported"):
        exporter(policy, model, []).check(policy)


def test_nothing_is_written_while_weights_are_collected(tmp_path):
    policy = load_model(saved("llama", tmp_path / "model"), "cpu")
    with collect_weights() as files:
        policy.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.safetensors"))
    assert "model.embed_tokens.weight" in files["model.safetensors"]
    policy.save_pretrained(tmp_path / "copy")
    assert list((tmp_path / "copy").glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["full", "lora", "reward"])
def test_weights_in_bfloat16_are_the_trained_ones_rounded(kind, tmp_path):
    model = saved("llama", tmp_path / "model")
    policy = load_reward_model(model, "cpu") if kind == "reward" else load_model(model, "cpu")
    freeze_unreached(policy)
    export = exporter(policy, model, all_layers(policy) if kind == "lora" else [])
    export.config.export_dtype = "bfloat16"
    if kind == "lora":
        add_adapter(policy, export.config.peft, 0)
    export(policy, tmp_path / "during", [])
    assert all(p.dtype == torch.float32 for p in policy.parameters())  # it is trained on
    digest = export.final(policy, tmp_path / "final", [])
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "final")  # as users load it: in the type of its configuration
    assert loaded.dtype == torch.bfloat16
    trained = load_model(model, "cpu") if kind == "lora" else policy  # a new adapter changes nothing
    expected = {name: p.bfloat16() for name, p in trained.named_parameters()}
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
    if kind != "reward":  # of which no run begins
        assert weights_digest(load_model(ModelConfig("tiny", str(tmp_path / "final")), "cpu")) == digest
