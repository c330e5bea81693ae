"""Where the prompt ends, where the completion ends, and which pairs are dropped."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.config.schema import DatasetConfig
from prefopt.data.collate import Group, padded
from prefopt.data.dataset import load_split
from prefopt.data.formats import Pairs, Steps
from prefopt.data.items import Pair
from prefopt.data.tokenize import encode_completion, encode_prompt, tokenize
from prefopt.errors import UserError
from prefopt.models.logprobs import completion_logps
from tests.helpers.tiny import CHATML, tiny_model, tiny_tokenizer

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


def test_the_next_step_is_learnt_and_not_the_steps_so_far():
    """Step-DPO's rows: the prompt ends with the steps so far, and a step that is not the last has no terminator."""
    tokenizer = tiny_tokenizer()
    row = {"prompt": "What is 2 + 3 + 4?", "initial_reason_steps": "Step 1: 2 + 3 = 5.\nStep 2: "}
    row |= {"chosen": "5 + 4 = 9.", "rejected": "5 + 4 = 8."}
    item = Steps()(row)
    ((pair,), drops, noted) = tokenize(tokenizer, [item], 100, 100)
    assert not drops
    assert (
        tokenizer.decode(pair.prompt)
        == ("<|im_start|>user\nWhat is 2 + 3 + 4?<|im_end|>\n<|im_start|>assistant\nStep 1: 2 + 3 = 5.\nStep 2: ")[
            : len(tokenizer.decode(pair.prompt))
        ]
    )
    shown = [tokenizer.decode(pair.prompt + side) for side in (pair.chosen, pair.rejected)]
    assert [text.rpartition("assistant\n")[2] for text in shown] == [
        row["initial_reason_steps"] + row[side] for side in ("chosen", "rejected")
    ]
    assert tokenizer.eos_token_id not in (pair.chosen[-1], pair.rejected[-1])
    # What is learnt is the step, but for a token that the seam has merged.
    assert tokenizer.decode(pair.chosen).endswith("5 + 4 = 9.")
    assert len(tokenizer.decode(pair.chosen)) <= len("5 + 4 = 9.") + 8 * noted["shrunk_prompts"]
    # Without steps so far it is a pair, whose completions are not finished.
    ((first,), *_) = tokenize(tokenizer, [Steps()(row | {"initial_reason_steps": ""})], 100, 100)
    whole = Pairs()(row)
    ((plain,), *_) = tokenize(tokenizer, [replace(whole, chosen_finished=False, rejected_finished=False)], 100, 100)
    assert (first.prompt, first.chosen, first.rejected) == (plain.prompt, plain.chosen, plain.rejected)


def test_dpo_of_steps_is_that_of_whole_answers():
    """The steps so far are in both, so they cancel in a difference of sums: the boundary moves no gradient of DPO."""
    tokenizer = tiny_tokenizer()
    row = {"prompt": "Count.", "initial_reason_steps": "One, two, ", "chosen": "three.", "rejected": "five."}
    steps = Steps()(row)
    ((short,), *_), ((long,), *_) = (
        tokenize(tokenizer, [item], 100, 100) for item in (steps, replace(steps, opening=""))
    )
    assert short.prompt + short.chosen == long.prompt + long.chosen
    assert len(short.prompt) > len(long.prompt)
    model = tiny_model(len(tokenizer)).eval()
    with torch.no_grad():
        gaps = [completion_logps(model, padded([Group(p.prompt, [p.chosen, p.rejected])])).sums for p in (short, long)]
    assert (gaps[0][0] - gaps[0][1]).item() == pytest.approx((gaps[1][0] - gaps[1][1]).item(), abs=1e-4)


def test_a_template_that_changes_the_steps_so_far_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] | trim)")
    row = {"prompt": "Count.", "initial_reason_steps": "  One, ", "chosen": "two.", "rejected": "five."}
    with pytest.raises(UserError, match="the steps so far, "):
        tokenize(tokenizer, [Steps()(row)], 100, 100)


def test_a_weight_comes_from_the_row_to_the_tokens():
    row = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}
    pairs = [Pairs()(row | {"weight": weight}) for weight in (2, "0.5", None)]
    result = tokenize(tiny_tokenizer(), pairs, 100, 100)
    assert [pair.weight for pair in result.pairs] == [2.0, 0.5, 1.0]
    assert result.noted == {"weighted": 2}
    for bad in (-1, "heavy", float("nan"), True):
        with pytest.raises(ValueError, match="field 'weight' must be a finite number of at least 0"):
            Pairs()(row | {"weight": bad})


def test_token_weights_come_from_the_row_to_each_token():
    """As long as the whole completion with its terminator, and cut with it."""
    tokenizer = tiny_tokenizer()
    row = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}
    ((plain,), *_) = tokenize(tokenizer, [Pairs()(row)], 100, 100)
    assert plain.chosen_token_weights is plain.rejected_token_weights is None
    assert plain.chosen[-1] == tokenizer.eos_token_id
    weights = {
        f"{side}_token_weights": [0.5 * i for i in range(len(getattr(plain, side)))] for side in ("chosen", "rejected")
    }
    for limit in (100, 3):
        ((pair,), _, noted) = tokenize(tokenizer, [Pairs()(row | weights)], 100, limit)
        assert noted["token_weights"] == 1
        for side in ("chosen", "rejected"):
            assert getattr(pair, side) == getattr(plain, side)[:limit]
            assert getattr(pair, f"{side}_token_weights") == weights[f"{side}_token_weights"][:limit]


def test_token_weights_that_do_not_fit_are_refused(tmp_path):
    tokenizer, file = tiny_tokenizer(), tmp_path / "pairs.jsonl"
    row = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}
    ((pair,), *_) = tokenize(tokenizer, [Pairs()(row)], 100, 100)
    n, m = len(pair.chosen), len(pair.rejected)
    fitting = row | {"chosen_token_weights": [1] * n, "rejected_token_weights": [1] * m}
    rows = [fitting | {"prompt": "Name another."}, fitting | {"chosen_token_weights": [1] * (n - 1)}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = DatasetConfig("t", str(file), format={"_target_": "prefopt.data.formats.Pairs"}, heldout_share=0.0)
    expected = rf"pairs.jsonl, row 2: chosen_token_weights holds {n - 1} numbers, and the completion has {n} tokens"
    with pytest.raises(UserError, match=expected):
        tokenize(tokenizer, list(load_split(config, "train")), 100, 100)

    for bad, message in (
        ({"rejected_token_weights": None}, "'rejected_token_weights' is missing"),
        ({"chosen_token_weights": "1 2"}, "'chosen_token_weights' must be a list of numbers"),
        ({"chosen_token_weights": [1] * (n - 1) + [float("nan")]}, "each of 'chosen_token_weights' must be a finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Pairs()(fitting | bad)
