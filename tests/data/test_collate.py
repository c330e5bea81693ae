"""Layouts are equivalent: the same log-probs and gradients, and no completion sees another."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from prefopt.data.collate import LAYOUTS, Group, packed
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models import layout_check
from prefopt.models.layout_check import choose_layout
from prefopt.models.logprobs import LogprobComputer, completion_logps
from prefopt.models.packed_attention import enable_packed_attention
from tests.helpers.tiny import SMALL

PAIRS = [
    TokenizedPair("a", [1, 2, 3, 4, 5], [6, 7, 8, 2], [9, 2]),
    TokenizedPair("b", [3], [4, 2], [5, 6, 7, 8, 9, 10, 2]),
    TokenizedPair("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], [2], [11, 12, 2]),
]
FULL = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}
# Windows of 4 positions, shorter than most of the sequences; Gemma 2 also soft-caps attention and logits.
WINDOWS = {
    "mistral-window": MistralConfig(**SMALL, sliding_window=4),
    "qwen2-one-layer": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, sliding_window_pattern=2),
}


def model(config):
    torch.manual_seed(0)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # sdpa cannot soft-cap, and ours can
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention).eval()


def logps_and_gradients(config, name: str | None):
    """In a layout, or without one: every completion in a forward pass of its own."""
    m = model(config)
    if name == "packed":
        enable_packed_attention(m)
    if name:
        result = completion_logps(m, LAYOUTS[name].collate(PAIRS), entropies=True)
        sums, entropies = result.sums, result.entropies
    else:
        alone = [Group(p.prompt, [c]) for side in ("chosen", "rejected") for p in PAIRS for c in [getattr(p, side)]]
        results = [completion_logps(m, LAYOUTS["padded"].make([group]), entropies=True) for group in alone]
        sums, entropies = torch.cat([r.sums for r in results]), torch.cat([r.entropies for r in results])
    (sums * torch.arange(1, 7) + 0.1 * entropies).sum().backward()
    return sums, entropies, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "name"),
    [pytest.param(c, name, id=f"{k}-{name}") for k, c in FULL.items() for name in ("padded", "prefix_shared")]
    + [pytest.param(c, "packed", id=f"{k}-packed") for k, c in (FULL | WINDOWS).items()],
)
def test_every_layout_gives_the_numbers_of_completions_by_themselves(config, name):
    *expected, expected_gradients = logps_and_gradients(config, None)
    *found, gradients = logps_and_gradients(config, name)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for n, gradient in gradients.items():
        scale = expected_gradients[n].abs().max()
        assert torch.allclose(gradient, expected_gradients[n], atol=1e-5 * scale.item(), rtol=1e-4), n


@pytest.mark.parametrize("config", [pytest.param(c, id=k) for k, c in WINDOWS.items()])
def test_the_windows_are_short_enough_to_matter(config):
    """Otherwise the test above would not see them."""
    wide = type(config)(**config.to_dict() | {"sliding_window": 64})
    narrow, whole = (logps_and_gradients(c, None)[0] for c in (config, wide))
    assert (narrow - whole).abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_completion_sees_another(layout):
    """Changing the chosen completion of one pair moves its own log-prob and no other."""
    m = model(FULL["llama"])
    enable_packed_attention(m)
    before = completion_logps(m, LAYOUTS[layout].collate(PAIRS)).sums
    changed = [dataclasses.replace(PAIRS[0], chosen=[20, 21, 22, 23]), *PAIRS[1:]]
    after = completion_logps(m, LAYOUTS[layout].collate(changed)).sums
    assert (after - before).abs()[0] > 1e-3
    assert torch.allclose(after[1:], before[1:], atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_in_a_packed_row_a_pair_gives_the_same_bits_whatever_is_beside_it(precision):
    """What lets the reference be scored once, in other rows than the policy."""
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.float32).eval()
    enable_packed_attention(m)
    score = LogprobComputer(precision)
    with torch.no_grad():
        together = score(m, LAYOUTS["packed"].collate(PAIRS)).sums.view(2, -1)
        for order in ([0], [1], [2], [2, 0], [1, 2], [2, 1, 0]):
            other = score(m, LAYOUTS["packed"].collate([PAIRS[i] for i in order])).sums.view(2, -1)
            assert torch.equal(other, together[:, order]), order


def test_a_prompt_may_have_any_number_of_completions():
    m = model(FULL["llama"])
    enable_packed_attention(m)
    groups = [Group([1, 2, 3], [[4, 2], [5, 6, 2], [7], [8, 9]]), Group([5], [[6, 2], [7, 8, 2], [3, 3], [2]])]
    expected = completion_logps(m, LAYOUTS["padded"].make(groups)).sums
    for name in ("packed", "prefix_shared"):
        assert torch.allclose(completion_logps(m, LAYOUTS[name].make(groups)).sums, expected, atol=1e-5), name


LENGTHS = st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=12)


@pytest.mark.parametrize("name", LAYOUTS)
@given(LENGTHS, st.integers(1, 80))
def test_micro_batches_hold_every_pair_once_within_the_budget(name, lengths, budget):
    layout = LAYOUTS[name]
    pairs = [TokenizedPair(str(i), [1] * p, [2] * c, [3] * r) for i, (p, c, r) in enumerate(lengths)]
    parts = layout.micro_batches(pairs, budget, None, ("chosen", "rejected"))
    assert sorted(int(p.id) for part in parts for p in part) == list(range(len(pairs)))
    for part in parts:
        held = layout.collate(part).input_ids.numel()
        assert held == layout.tokens([Group(p.prompt, [p.chosen, p.rejected]) for p in part])
        assert held <= budget or len(part) == 1
    fixed = layout.micro_batches(pairs, budget, 2, ("chosen", "rejected"))
    assert [p for part in fixed for p in part] == pairs
    assert {len(part) for part in fixed[:-1]} <= {2}


def test_a_packed_row_holds_no_padding():
    batch = LAYOUTS["packed"].collate(PAIRS)
    assert batch.input_ids.numel() == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in PAIRS)
    assert batch.position_ids is not None
    assert batch.position_ids.max() == max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in PAIRS) - 1


@pytest.mark.parametrize("config", [pytest.param(c, id=k) for k, c in (FULL | WINDOWS).items()])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_probe_finds_the_fastest_layout_that_is_right(name, config, capsys):
    chosen = choose_layout(name, model(config), PAIRS).name
    windows = config in WINDOWS.values()
    assert chosen == ("padded" if name == "prefix_shared" and windows else name)
    said = capsys.readouterr().err
    assert (f"layout: padded, because {config.model_type}" in said) == (chosen != name)


def test_what_the_probe_has_found_is_known_until_something_that_decides_it_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    asked = []
    original = layout_check.check_layouts
    monkeypatch.setattr(layout_check, "check_layouts", lambda *given: asked.append(1) or original(*given))

    def found(config, name="packed", weights="a", pairs=PAIRS, precision="float32") -> tuple[str, str, bool]:
        asked.clear()
        m = model(config)
        layout = layout_check.known_layout(name, m, weights, pairs, precision).name
        return layout, m.config._attn_implementation, bool(asked)

    llama, window = FULL["llama"], next(iter(WINDOWS.values()))
    attention = found(llama)[1]
    assert attention != model(llama).config._attn_implementation
    assert found(llama) == ("packed", attention, False)
    longer = dataclasses.replace(PAIRS[0], prompt=[1] * 20)
    changes = [{"weights": "b"}, {"pairs": [*PAIRS, longer]}, {"precision": "bfloat16"}, {"name": "padded"}]
    assert all(found(llama, **change)[2] for change in changes)
    for is_new in (True, False):
        assert found(window, "prefix_shared")[::2] == ("padded", is_new)
        assert f"layout: padded, because {window.model_type}" in capsys.readouterr().err
    for file in tmp_path.glob("layout/*"):
        file.write_text(file.read_text().replace("packed", "padded"))
    assert found(llama)[::2] == ("packed", True)
    assert "is damaged" in capsys.readouterr().err


def test_the_probe_restores_the_attention_of_a_model_that_cannot_be_packed(capsys):
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4), dtype=torch.float32
    ).eval()
    assert choose_layout("packed", mamba, PAIRS).name == "padded"
    assert "layout: padded, because mamba" in capsys.readouterr().err


def test_a_model_whose_logits_prefopt_does_not_compute_is_refused():
    m = model(FULL["llama"])
    m.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UserError, match="may change its logits"):
        choose_layout("packed", m, PAIRS)


def test_a_model_that_does_not_know_packed_rows_is_refused():
    with pytest.raises(ValueError, match="does not know packed rows"):
        completion_logps(model(FULL["llama"]), LAYOUTS["packed"].collate(PAIRS))


def test_a_soft_capped_model_that_knows_packed_rows_still_samples_from_padded_batches():
    m = model(WINDOWS["gemma2"])
    short, long = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[8, 9, 10, 11, 12, 13, 14]])
    both = torch.cat([torch.cat([torch.tensor([[1, 2]]), short], 1), long])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])

    def greedy(ids, mask=None):
        return m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]

    with torch.no_grad():
        # Without padding, for transformers' eager attention makes NaN of it in a layer with a window.
        alone, grown = [m(ids).logits[0, -1] for ids in (short, long)], [greedy(ids) for ids in (short, long)]
        enable_packed_attention(m)
        # transformers' eager softmax is in float32
        torch.testing.assert_close(m(both, attention_mask=mask).logits[:, -1], torch.stack(alone), rtol=0, atol=1e-5)
        assert greedy(both, mask).equal(torch.cat(grown))


def test_a_row_with_attention_that_is_not_computed_is_refused():
    m = model(FULL["llama"])
    enable_packed_attention(m)
    for module in m.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    m.train()
    with pytest.raises(ValueError, match="dropout"):
        completion_logps(m, packed([Group([1, 2], [[3], [4]])]))
