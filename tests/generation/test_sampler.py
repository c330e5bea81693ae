"""Sampling draws from the policy, and a response depends on its seed alone."""

import json
import logging
import warnings

import pytest
import torch
from transformers import GenerationConfig

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.fields import as_messages
from prefopt.generation.sampler import _GumbelNoise, sample
from prefopt.models.generation_config import stop_tokens
from prefopt.models.load import load_model
from prefopt.utils.console import Bar
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

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


# What models bring along; each by itself changes the tokens, or how many there are.
FOREIGN = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(60, 200)),
    "begin_suppress_tokens": list(range(200)),
    "bad_words_ids": [[i] for i in range(60, 200)],
    "sequence_bias": [[[70], 50.0]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [1, 9.0],
    "max_new_tokens": 3,
    "max_length": 4,
    "min_new_tokens": 11,
    "num_beams": 3,
    "num_return_sequences": 2,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "guidance_scale": 3.0,
    "stop_strings": ["e"],
    "cache_implementation": "static",
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("key", [*FOREIGN, "all"])
def test_the_generation_config_of_the_model_has_no_effect(key, monkeypatch, caplog):
    settings = {k: v for k, v in FOREIGN.items() if key in (k, "all")}
    expected = draw(), draw(temperature=0.0)
    own = GenerationConfig()
    for name, value in settings.items():  # its constructor refuses some, which are in models' files nonetheless
        setattr(own, name, value)
    monkeypatch.setattr(MODEL, "generation_config", own)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert (draw(), draw(temperature=0.0)) == expected
    assert MODEL.generation_config is own  # the export writes it
    assert not [record for record in caplog.records if "generation" in record.getMessage().lower()]


def test_with_a_repetition_penalty_in_the_folder_every_greedy_token_is_the_argmax(tmp_path):
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 3.0, "eos_token_id": 2}))
    model = load_model(ModelConfig("tiny", str(folder)), "cpu")
    assert model.generation_config.repetition_penalty == 3.0
    ((greedy,),) = sample(model, TOKENIZER, PROMPTS[:1], SamplingConfig(0.0, 1.0, 24, 1), 0)
    ids = torch.tensor([greedy.prompt_tokens + greedy.tokens])
    with torch.no_grad():
        likely = model(ids).logits[0].argmax(-1)
    start = len(greedy.prompt_tokens)
    assert greedy.tokens == likely[start - 1 : -1].tolist()


def test_a_response_ends_at_every_stop_token_of_model_and_tokenizer(monkeypatch):
    first, second, third = 2, 71, 90
    monkeypatch.setattr(MODEL.config, "eos_token_id", [second])
    monkeypatch.setattr(MODEL, "generation_config", GenerationConfig(eos_token_id=[third, second]))
    stops = stop_tokens(TOKENIZER, MODEL.config, MODEL.generation_config)
    assert stops == [first, second, third]
    assert TOKENIZER.eos_token_id == first
    samples = [s for responses in draw(n=60, batch_size=64) for s in responses]
    endings = {s.tokens[-1] for s in samples if s.finished}
    assert endings == set(stops)
    for s in samples:
        body = s.tokens[:-1] if s.finished else s.tokens
        assert not set(body) & set(stops)
        assert s.finished or len(s.tokens) == 12
        assert s.text == TOKENIZER.decode(body, skip_special_tokens=True)


@pytest.mark.parametrize("own", [None, 7, [7, 2]])
def test_stop_tokens_are_each_listed_once(own):
    config = tiny_model(40).config
    config.eos_token_id = own
    expected = [TOKENIZER.eos_token_id] if own is None else [TOKENIZER.eos_token_id, 7]
    assert stop_tokens(TOKENIZER, config, None) == expected
    assert stop_tokens(TOKENIZER, config, GenerationConfig(eos_token_id=own)) == expected
