"""Where the prompt ends, where the completion ends, and which pairs are dropped."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.items import Pair
from prefopt.data.tokenize import encode_completion, encode_prompt, tokenize
from prefopt.errors import UserError
from tests.helpers.tiny import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)


def pair(prompt="Review the soup.", chosen="Good soup.", rejected="Bad soup.", **changes) -> Pair:
    return Pair("id", [{"role": "user", "content": prompt}], chosen, rejected, **changes)


def one(pair: Pair, max_prompt=100, max_completion=100, tokenizer=TOKENIZER):
    kept, drops, _ = tokenize(tokenizer, [pair], max_prompt, max_completion)
    return kept[0] if kept else dict(drops)


@given(PLAIN, PLAIN, PLAIN, st.booleans())
@settings(max_examples=150)
def test_prompt_and_completion_make_the_rendered_conversation(prompt, chosen, rejected, finished):
    p = pair(prompt, chosen, rejected, chosen_finished=finished)
    result = one(p, 1000, 1000)
    if isinstance(result, dict):
        assert chosen == rejected
        return
    rendered = TOKENIZER.apply_chat_template([*p.prompt, {"role": "assistant", "content": chosen}], tokenize=False)
    ids = TOKENIZER(rendered, add_special_tokens=False).input_ids
    whole = result.prompt + result.chosen
    assert whole == ids[: len(whole)]
    assert result.chosen.count(EOS) == (1 if finished else 0)
    assert (result.chosen[-1] == EOS) == finished
    assert result.rejected.count(EOS) == 1
    assert result.rejected[-1] == EOS


def test_the_terminator_ends_the_completion_and_the_newline_after_it_is_gone():
    result = one(pair())
    assert TOKENIZER.decode(result.chosen) == "Good soup.<|im_end|>"
    assert TOKENIZER.decode(result.prompt) == "<|im_start|>user\nReview the soup.<|im_end|>\n<|im_start|>assistant\n"


def test_sampling_sees_the_prompt_that_training_sees():
    assert one(pair()).prompt == encode_prompt(TOKENIZER, pair().prompt)


def test_no_terminator_on_a_cut_completion():
    full = one(pair(chosen="Good soup, very good soup indeed."))
    cut = one(pair(chosen="Good soup, very good soup indeed."), max_completion=5)
    assert cut.chosen == full.chosen[:5]
    assert EOS not in cut.chosen


def test_each_side_has_its_own_budget():
    result = one(pair(chosen="Good " * 60, rejected="Bad."), max_completion=10)
    assert len(result.chosen) == 10
    assert result.rejected == one(pair(rejected="Bad.")).rejected


def test_a_terminator_in_an_earlier_turn_stays_in_the_prompt():
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Review the soup."},
    ]
    result = one(Pair("id", messages, "Good.", "Bad."))
    assert result.prompt.count(EOS) == 3
    assert TOKENIZER.decode(result.chosen) == "Good.<|im_end|>"


@pytest.mark.parametrize(
    ("bad", "limits", "reason"),
    [
        (pair(chosen="", chosen_finished=False), {}, "empty_completion"),
        (pair(prompt="soup " * 100), {}, "prompt_too_long"),
        (pair(chosen="Good soup A", rejected="Good soup B"), {"max_completion": 3}, "identical_after_truncation"),
    ],
)
def test_drops_are_counted_by_reason(bad, limits, reason):
    assert one(bad, **limits) == {reason: 1}


def test_completions_that_share_their_beginning_keep_it():
    """Only the prompt is shared by construction; what both answers happen to begin with is theirs."""
    result = one(pair(chosen="The soup is good.", rejected="The soup is bad."))
    assert TOKENIZER.decode(result.chosen).startswith("The soup is good")


def test_a_template_that_rewrites_the_generation_prompt_shortens_the_shared_prompt():
    tokenizer = tiny_tokenizer()
    think = "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    tokenizer.chat_template = CHATML.replace("+ '\n' + m['content']", "+ '\n' }}" + think + "{{ m['content']")
    p = pair()
    result = one(p, tokenizer=tokenizer)
    rendered = tokenizer.apply_chat_template([*p.prompt, {"role": "assistant", "content": p.chosen}], tokenize=False)
    assert tokenizer.decode(result.prompt + result.chosen) == rendered.rstrip("\n")
    assert "<think></think>" in tokenizer.decode(result.chosen)


def test_a_template_without_terminator_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    with pytest.raises(UserError, match="does not close this turn"):
        encode_completion(tokenizer, pair().prompt, "Good.", finished=True)
