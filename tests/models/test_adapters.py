"""Adapters of other tools: merged as peft merges them, or refused by the names of their tensors."""

import copy
import json

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from prefopt.errors import UserError
from prefopt.models.lora import merge_adapter
from tests.helpers.tiny import SMALL, tiny_model

IDS = torch.arange(3, 15)[None]
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def base(layers: int = 2, tied: bool = True):
    return tiny_model(50, num_hidden_layers=layers, attention_bias=True, tie_word_embeddings=tied)


def trained(model, config, folder):
    """An adapter on `model` whose tensors are random, written by peft into `folder`."""
    adapter = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, p in adapter.named_parameters():
        if p.requires_grad:
            scales = 1 if "magnitude" in name or "ia3" in name else 0
            p.data = scales + 0.2 * torch.randn(p.shape, generator=generator)
    adapter.save_pretrained(folder)
    return folder


ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(**LORA, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5}),
    "bias": LoraConfig(**LORA, bias="all"),
    "bias of its layers": LoraConfig(**LORA, bias="lora_only"),
    "bias of B": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "some layers": LoraConfig(**LORA, layers_to_transform=[1]),
    "head whole": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embeddings whole": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "both whole": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[1, 2]),
    "on the head": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "on the embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "for a task": LoraConfig(**LORA, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(kind, tied, tmp_path, caplog):
    folder = trained(base(tied=tied), copy.deepcopy(ADAPTERS[kind]), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base(tied=tied), folder).eval()
    alone = theirs(IDS).logits
    merged = theirs.merge_and_unload()
    model = base(tied=tied)
    merge_adapter(model, str(folder))
    assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, base(tied=tied)(IDS).logits, atol=1e-4)
    # On one of two tied matrices peft's merge changes both, which is not what the adapter by itself computes.
    both = tied and kind.startswith("on the")
    assert torch.allclose(model(IDS).logits, alone, atol=1e-5) != both
    assert ("which are one matrix in this model" in caplog.text) == both
    weights = dict(merged.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.allclose(p, weights[name], atol=1e-5), name
    # And what is exported is what was merged, with embeddings and head tied or not.
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_an_adapter_of_single_experts_is_merged_into_the_fused_ones(tmp_path):
    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
        return AutoModelForCausalLM.from_config(config).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    folder = trained(mixtral(), config, tmp_path)
    theirs = PeftModel.from_pretrained(mixtral(), folder).merge_and_unload()
    model = mixtral()
    names = dict(model.named_parameters()).keys()
    merge_adapter(model, str(folder))
    assert dict(model.named_parameters()).keys() == names
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, mixtral()(IDS).logits, atol=1e-3)


def edited(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, {"format": "pt"})
    return str(folder)


def test_an_adapter_that_lacks_a_layer_is_refused(tmp_path):
    folder = trained(base(), LoraConfig(**LORA), tmp_path)
    path = edited(folder, lambda tensors: {k: v for k, v in tensors.items() if ".layers.1." not in k})
    with pytest.raises(UserError, match=r"lacks 4 tensors of its layers \(base_model.model.model.layers.1.mlp"):
        merge_adapter(base(), path)


def test_an_adapter_of_a_model_with_more_or_fewer_layers_is_refused(tmp_path):
    folder = trained(base(2), LoraConfig(**LORA), tmp_path)
    with pytest.raises(UserError, match=r"lacks 4 tensors.*layers\.2\."):
        merge_adapter(base(3), str(folder))
    with pytest.raises(UserError, match=r"no place for 4 of its tensors \(base_model.model.model.layers.1"):
        merge_adapter(base(1), str(folder))


@pytest.mark.parametrize(
    ("config", "key"),
    [(LoraConfig(**LORA, use_dora=True), "magnitude"), (LoraConfig(**LORA, modules_to_save=["lm_head"]), "lm_head")],
    ids=["dora", "whole"],
)
def test_an_adapter_that_lacks_one_tensor_is_refused(config, key, tmp_path):
    folder = trained(base(), config, tmp_path)
    removed = next(name for name in load_file(folder / "adapter_model.safetensors") if key in name)
    with pytest.raises(UserError, match="lacks .*" + removed.removesuffix(".weight")):
        merge_adapter(base(), edited(folder, lambda tensors: {k: v for k, v in tensors.items() if k != removed}))


def test_tensors_that_the_config_does_not_name_are_refused(tmp_path):
    """A DoRA adapter whose config does not say so would be merged as LoRA."""
    folder = trained(base(), LoraConfig(**LORA, use_dora=True), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(UserError, match=r"no place for 4 of its tensors .*magnitude"):
        merge_adapter(base(), str(folder))


def test_an_adapter_that_is_no_change_of_weights_is_refused(tmp_path):
    folder = trained(base(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), tmp_path)
    with pytest.raises(UserError, match="PREFIX_TUNING adapter, which cannot be merged"):
        merge_adapter(base(), str(folder))


def test_an_adapter_with_added_tokens_fits_the_grown_model_alone(tmp_path):
    grown = base()
    grown.resize_token_embeddings(60, mean_resizing=False)
    folder = trained(grown, LoraConfig(**LORA, modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"size mismatch for .*embed_tokens"):
        merge_adapter(base(), str(folder))
    model = base()
    model.resize_token_embeddings(60, mean_resizing=False)
    merge_adapter(model, str(folder))
    saved = load_file(folder / "adapter_model.safetensors")
    (embeddings,) = (tensor for name, tensor in saved.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_an_adapter_on_experts_of_their_own_is_merged_into_the_fused_ones(tmp_path):
    """As transformers 4 stored them: peft brings the file into the fused form."""
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    targets = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(targets))
    sizes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    tensors, changes = {}, {}
    for layer in range(2):
        for expert in range(2):
            for name, (rows, columns) in sizes.items():
                a, b = torch.randn(2, columns), torch.randn(rows, 2)
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                changes[layer, expert, name] = 2 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    before = copy.deepcopy(model)
    merge_adapter(model, str(tmp_path))
    for layer in range(2):
        new, old = (m.model.layers[layer].mlp.experts for m in (model, before))
        for expert in range(2):
            w1, w2, w3 = (changes[layer, expert, name] for name in sizes)
            assert torch.allclose(new.gate_up_proj[expert] - old.gate_up_proj[expert], torch.cat([w1, w3]), atol=1e-5)
            assert torch.allclose(new.down_proj[expert] - old.down_proj[expert], w2, atol=1e-5)
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(fewer, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 4 tensors of its layers \(.*layers\.1\.mlp\.experts"):
        merge_adapter(before, str(tmp_path))
