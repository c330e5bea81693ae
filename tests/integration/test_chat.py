"""Talk with a policy: what it says is what is sampled, and each answer follows those before it."""

from dataclasses import replace

import pytest

from prefopt.chat import HINT, talk
from prefopt.config.schema import SamplingConfig
from prefopt.generation.config import ChatConfig
from prefopt.generation.sampler import sample
from tests.helpers.tiny import tiny_model, tiny_tokenizer

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=5, batch_size=1)
CONFIG = ChatConfig(sampling=GREEDY, system=None, seed=0)


@pytest.fixture(scope="module")
def policy():
    """With large weights, so that every word of a prompt changes its answer."""
    tokenizer = tiny_tokenizer()
    return tiny_model(len(tokenizer), seed=1, initializer_range=0.5).eval(), tokenizer


def sampled(policy, *texts: str, system: str | None = None) -> list[str]:
    """The most likely answers to `texts`, each after those before it."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        (((found,)),) = sample(*policy, [messages], GREEDY, seed=0)
        answers.append(found.text)
        messages.append({"role": "assistant", "content": found.text})
    return answers


def test_answers_are_the_samplers_and_follow_each_other(policy, capsys):
    talk(*policy, CONFIG, ["Hello", "", "And then?", "/new", "And then?", "/exit", "not read"])
    first, second = sampled(policy, "Hello", "And then?")
    (anew,) = sampled(policy, "And then?")
    assert second != anew
    cut = "(cut off after 5 tokens)"
    assert capsys.readouterr().out == "\n".join([first, cut, HINT, second, cut, anew, cut, ""])


def test_a_system_message_opens_every_conversation(policy, capsys):
    talk(*policy, replace(CONFIG, system="Be brief."), ["Hello", "/new", "Hello"])
    (said,) = sampled(policy, "Hello", system="Be brief.")
    assert capsys.readouterr().out.count(f"{said}\n(cut off") == 2
    assert said != sampled(policy, "Hello")[0]


def test_a_seed_gives_the_same_conversation(policy, capsys):
    config = replace(CONFIG, sampling=replace(GREEDY, temperature=1.0))
    said = []
    for seed in (1, 1, 2):
        talk(*policy, replace(config, seed=seed), ["Hello", "More"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_conversation_that_fills_the_model_says_so_and_goes_on(policy, capsys):
    talk(*policy, CONFIG, ["word " * 600, "/new", "Hello"])
    out = capsys.readouterr().out
    assert "and the model reads 512: begin another one" in out
    assert sampled(policy, "Hello")[0] in out
