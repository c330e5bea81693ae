"""Loading: dtype, dropout, and checkpoints that are not whole."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PhiConfig

from prefopt.config.schema import ModelConfig
from prefopt.data.collate import Group, padded
from prefopt.errors import UserError
from prefopt.models.load import check_vocabulary, load_model, load_tokenizer, weights_digest
from prefopt.models.logprobs import completion_logps
from prefopt.models.lora import train_mode
from tests.helpers.tiny import tiny_model, tiny_tokenizer


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
    with pytest.raises(UserError, match="they do not belong together"):
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
