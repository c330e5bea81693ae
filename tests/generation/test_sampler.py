"""Sampling draws from the policy, and a response depends on its seed alone."""

import pytest
import torch

from prefopt.config.schema import SamplingConfig
from prefopt.data.formats import as_messages
from prefopt.generation.sampler import _GumbelNoise, sample
from prefopt.utils.console import Bar
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(len(TOKENIZER)).eval()
PROMPTS = [as_messages(p) for p in ("Hi", "Review the electric kettle.", "In two sentences, what of the train?")]


def draw(prompts=PROMPTS, batch_size=4, seed=0, n=2, temperature=1.0, top_p=1.0):
    return sample(MODEL, TOKENIZER, prompts, SamplingConfig(temperature, top_p, 12, batch_size), seed, n)


def test_a_response_depends_on_its_seed_and_not_on_its_batch():
    reference = draw()
    assert draw(batch_size=1) == draw(batch_size=3) == reference
    assert draw(PROMPTS[::-1])[::-1] == reference
    assert [s[0] for s in draw(n=1)] == [s[0] for s in reference]
    assert draw(seed=1) != reference
    assert reference[0][0] != reference[0][1]


def test_samples_end_with_the_terminator_or_are_unfinished():
    eos = TOKENIZER.eos_token_id
    samples = [s for responses in draw(n=40, batch_size=64) for s in responses]
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        assert s.tokens.count(eos) == int(s.finished)
        assert len(s.tokens) <= 12
        if not s.finished:
            assert len(s.tokens) == 12


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_noise_samples_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 4000
    noise = _GumbelNoise(temperature, 1.0, range(n), torch.device("cpu"), Bar("", 1, show=False))
    picks = noise(torch.zeros(n, 1, dtype=torch.long), logits.repeat(n, 1)).argmax(-1)
    expected = (logits / temperature).softmax(-1)
    observed = torch.bincount(picks, minlength=4) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((observed - expected).abs() < 4 * error + 1e-9).all()


def test_below_1_top_p_keeps_the_nucleus_alone():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 2000
    noise = _GumbelNoise(1.0, 0.8, range(n), torch.device("cpu"), Bar("", 1, show=False))
    picks = noise(torch.zeros(n, 1, dtype=torch.long), logits.repeat(n, 1)).argmax(-1)
    kept = logits[:2].softmax(-1)  # 0.64 + 0.24 reach 0.8
    observed = torch.bincount(picks, minlength=4) / n
    assert observed[2:].tolist() == [0, 0]
    assert ((observed[:2] - kept).abs() < 4 * (kept * (1 - kept) / n).sqrt()).all()


def test_at_temperature_0_the_most_likely_token_is_taken():
    (responses,) = draw(PROMPTS[:1], temperature=0.0)
    assert responses[0] == responses[1]
    ids = torch.tensor([responses[0].prompt_tokens])
    greedy = MODEL.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                            eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.eos_token_id)  # fmt: skip
    assert responses[0].tokens == greedy[0, ids.shape[1] :].tolist()
