"""Layouts are equivalent: the same log-probs and gradients, and no completion sees another."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prefopt.data.layout import LAYOUTS, padded_pairs, prefix_shared
from prefopt.data.tokenize import TokenizedPair
from prefopt.logps import completion_logps
from prefopt.models.probe import choose_layout

PAIRS = [
    TokenizedPair("a", [1, 2, 3, 4, 5], [6, 7, 8, 2], [9, 2]),
    TokenizedPair("b", [3], [4, 2], [5, 6, 7, 8, 9, 10, 2]),
    TokenizedPair("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], [2], [11, 12, 2]),
]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}


def model(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64).eval()


def logps_and_gradients(name: str, layout):
    m = model(name)
    result = completion_logps(m, layout(PAIRS), entropies=True)
    (result.sums * torch.arange(1, 7) + 0.1 * result.entropies).sum().backward()
    return result, {n: p.grad for n, p in m.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prefixes_give_the_numbers_of_the_padded_layout(name):
    expected, expected_gradients = logps_and_gradients(name, padded_pairs)
    result, gradients = logps_and_gradients(name, prefix_shared)
    for field in ("sums", "lengths", "entropies"):
        assert torch.allclose(getattr(result, field), getattr(expected, field), atol=2e-5), field
    for n, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[n], atol=1e-4, rtol=1e-4), n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_completion_sees_another(layout):
    """Changing the chosen completion of one pair moves its own log-prob and no other."""
    m = model("llama")
    before = completion_logps(m, LAYOUTS[layout](PAIRS)).sums
    changed = [dataclasses.replace(PAIRS[0], chosen=[20, 21, 22, 23]), *PAIRS[1:]]
    after = completion_logps(m, LAYOUTS[layout](changed)).sums
    assert (after - before).abs()[0] > 1e-3
    assert torch.allclose(after[1:], before[1:], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_probe_takes_models_that_can_share(name, capsys):
    assert choose_layout("prefix_shared", model(name), PAIRS) is prefix_shared
    assert choose_layout("padded", model(name), PAIRS) is padded_pairs
    assert capsys.readouterr().err == ""


def test_the_probe_sends_sliding_windows_to_the_padded_layout(capsys):
    torch.manual_seed(0)
    # Large weights, so that a wrong window shows.
    config = MistralConfig(**SMALL, sliding_window=4, initializer_range=0.5)
    m = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    assert choose_layout("prefix_shared", m, PAIRS) is padded_pairs
    assert "layout: padded, because mistral cannot share prefixes" in capsys.readouterr().err
