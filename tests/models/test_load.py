"""Loading: dtype, dropout, and checkpoints that are not whole."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PhiConfig, PreTrainedModel

from prefopt.config.schema import ModelConfig
from prefopt.data.collate import Group, padded
from prefopt.errors import UserError
from prefopt.models import gguf
from prefopt.models.load import (
    check_model,
    check_trainable,
    check_vocabulary,
    load_model,
    load_reward_model,
    load_tokenizer,
    load_trained_reward_model,
    weights_digest,
)
from prefopt.models.logprobs import completion_logps
from prefopt.models.lora import save_adapter, train_mode
from tests.helpers.harm import HARMS
from tests.helpers.tiny import run_program, save_tiny, tiny_model, tiny_tokenizer


def saved(folder, **changes) -> ModelConfig:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig("tiny", str(folder))


def test_weights_are_float32_whatever_the_checkpoint_holds(tmp_path):
    config = saved(tmp_path)
    tiny_model(len(tiny_tokenizer())).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(config, "cpu").parameters()} == {torch.float32}


def test_dropout_is_off_even_in_training_mode(tmp_path):
    model = load_model(saved(tmp_path, attention_dropout=0.5), "cpu").train()
    batch = padded([Group([1, 2, 3], [[4, 5, 2]])])
    assert torch.equal(completion_logps(model, batch).sums, completion_logps(model, batch).sums)
    fresh = tiny_model(len(tiny_tokenizer()), attention_dropout=0.5).train()
    assert not torch.equal(completion_logps(fresh, batch).sums, completion_logps(fresh, batch).sums)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
        GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        PhiConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  resid_pdrop=0.5, embd_pdrop=0.5),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_no_layer_drops_anything_however_it_keeps_its_probability(config, tmp_path):
    """As a module, as an attribute that it passes to F.dropout, or in its configuration."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig("tiny", str(tmp_path)), "cpu").train()
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    with train_mode(model.eval()):
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    config = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its model's weights.*layers\.1\.mlp\.up_proj"):
        load_model(config, "cpu")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    config = saved(tmp_path)
    tokenizer = load_tokenizer(config)
    check_vocabulary(load_model(config, "cpu"), tokenizer)
    with pytest.raises(UserError, match=r"has 320 tokens and the model 100 embeddings.*model\.resize_embeddings=true"):
        check_vocabulary(tiny_model(100), tokenizer)


def test_a_base_model_takes_the_tokenizer_of_another(tmp_path):
    config = saved(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="template"):
        load_tokenizer(config)
    saved(tmp_path / "instruct")
    config.tokenizer = str(tmp_path / "instruct")
    assert load_tokenizer(config).chat_template == tiny_tokenizer().chat_template
    config.tokenizer = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from model\.tokenizer="):
        load_tokenizer(config)


def test_the_digest_is_of_values_and_names():
    a, b = tiny_model(50), tiny_model(50)
    assert weights_digest(a) == weights_digest(b)
    with torch.no_grad():
        b.get_input_embeddings().weight[0, 0] += 1e-6
    assert weights_digest(a) != weights_digest(b)


def test_a_quantized_checkpoint_is_refused_from_its_configuration(tmp_path):
    """Of whatever method, and where the configuration of the text model holds it."""
    config = saved(tmp_path)
    check_trainable(config)
    values = json.loads((tmp_path / "config.json").read_text())
    for method in ("bitsandbytes", "gptq", "awq", "mxfp4", "fp8", "compressed-tensors"):
        quantization = {"quant_method": method, "bits": 4, "load_in_4bit": method == "bitsandbytes"}
        (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
        with pytest.raises(UserError, match=rf"quantized weights \({method}\).*Give the unquantized model"):
            check_trainable(config)


def test_a_quantized_checkpoint_is_refused_before_data_are_read(overrides, tmp_path):
    saved(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    (tmp_path / "broken.jsonl").write_text("no rows\n")
    options = [f"model.path={tmp_path / 'model'}", f"dataset.train={tmp_path / 'broken.jsonl'}"]
    process = run_program(*overrides(tmp_path / "runs"), *options)
    assert process.returncode == 2
    assert "holds quantized weights (bitsandbytes)" in process.stderr
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_an_adapter_is_its_base_and_the_adapter(tmp_path):
    model = tiny_model(50)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="org/base"))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    save_adapter(model, tmp_path / "adapter")
    config = ModelConfig("tiny", str(tmp_path / "adapter"))
    assert (config.path, config.adapter) == ("org/base", str(tmp_path / "adapter"))
    for read in (check_model, check_trainable, lambda config: load_model(config, "cpu")):
        with pytest.raises(UserError, match=r"no model can be loaded from model\.path=org/base"):
            read(config)
    with pytest.raises(UserError, match=r"is an adapter, not a reward model"):
        load_trained_reward_model(config, "cpu")
    for said in ("{}", "[]", "no JSON", '{"base_model_name_or_path": 3}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(said)
        with pytest.raises(ValueError, match=r"is an adapter that names no base: give path=BASE and adapter="):
            ModelConfig("tiny", str(tmp_path / "adapter"))
    # transformers would put an adapter that lies beside a model into it, unmerged.
    save_adapter(model, tmp_path / "both")
    saved(tmp_path / "both")
    with pytest.raises(UserError, match="holds an adapter beside a model"):
        load_model(ModelConfig("tiny", str(tmp_path / "both")), "cpu")


def test_a_model_of_foreign_code_is_refused_with_the_reason(tmp_path):
    config = saved(tmp_path)
    values = {"model_type": "their_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="code in its repository, which prefopt does not run"):
        check_model(config)


def grown(folder, tokens: int = 5):
    """A saved model, and the folder of its tokenizer with `tokens` tokens more."""
    config = saved(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new{i}|>" for i in range(tokens)]})
    tokenizer.save_pretrained(folder / "tokenizer")
    config.tokenizer = str(folder / "tokenizer")
    return config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_get_the_mean_of_the_old_embeddings(tied, tmp_path):
    config = grown(tmp_path)
    rows = len(tiny_tokenizer())
    tiny_model(rows, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    config.resize_embeddings = True
    model = load_model(config, "cpu")
    check_vocabulary(model, load_tokenizer(config))
    assert model.config.vocab_size == rows + 5
    before = load_model(ModelConfig("tiny", config.path), "cpu")
    for of in (PreTrainedModel.get_input_embeddings, PreTrainedModel.get_output_embeddings):
        new, old = of(model).weight, of(before).weight
        assert torch.equal(new[:rows], old)
        assert torch.allclose(new[rows:], old.mean(0).expand(5, -1), atol=1e-7)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    # As transformers' own, whose noise is a billionth of the covariance.
    theirs = load_model(ModelConfig("tiny", config.path), "cpu")
    theirs.resize_token_embeddings(rows + 5, mean_resizing=True)
    assert torch.allclose(theirs.get_input_embeddings().weight, model.get_input_embeddings().weight, atol=1e-4)
    assert weights_digest(load_model(config, "cpu")) == weights_digest(model)  # in every process and later run
    assert load_reward_model(config, "cpu").get_input_embeddings().num_embeddings == rows + 5


@pytest.mark.parametrize("options", [[], ["peft=lora_attention", "exports=2"]], ids=["full", "lora"])
def test_a_run_with_new_tokens_trains_and_exports_them(options, overrides, tmp_path):
    config = grown(tmp_path)
    rows = len(tiny_tokenizer())
    command = [*overrides(tmp_path / "runs"), f"model.path={config.path}", f"model.tokenizer={config.tokenizer}"]
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    refused = run_program(*command, *options, env=environment)
    assert refused.returncode == 2
    assert "model.resize_embeddings=true gives them embeddings" in refused.stderr
    process = run_program(*command, *options, "model.resize_embeddings=true", env=environment)
    assert process.returncode == 0, process.stderr
    assert f"5 new embeddings, the mean of the {rows} old ones" in process.stderr
    for policy in [*tmp_path.glob("runs/*/policy"), *tmp_path.glob("runs/*/policies/*")]:
        exported = AutoModelForCausalLM.from_pretrained(policy)
        assert exported.get_input_embeddings().num_embeddings == rows + 5
        assert len(load_tokenizer(ModelConfig("tiny", str(policy)))) == rows + 5
    if options:
        assert "the new embeddings are frozen" in process.stderr


def test_weights_that_the_model_does_not_take_are_said(tmp_path, caplog):
    folder = save_tiny(tmp_path / "model")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.tower.weight": torch.zeros(2)}, file, {"format": "pt"})
    load_model(ModelConfig("tiny", str(folder)), "cpu")
    assert "1 weights of" in caplog.text
    assert "are no part of LlamaForCausalLM: model.tower.weight" in caplog.text


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_conversion_of_a_gguf_file_is_made_anew(harm, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", lambda file, folder: save_tiny(folder))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    expected = weights_digest(load_model(ModelConfig("m", str(file)), "cpu"))
    (weights,) = (tmp_path / "cache" / "models").rglob("model.safetensors")
    harm(weights)
    assert weights_digest(load_model(ModelConfig("m", str(file)), "cpu")) == expected
    assert f"{weights.parent} is damaged: model.safetensors has the checksum" in caplog.text
