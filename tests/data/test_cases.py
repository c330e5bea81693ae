"""Templates and rows that people bring, as they lie beside the repository: what must come out of each."""

import json
from pathlib import Path

import pytest

from prefopt.config.schema import ModelConfig, PoliciesConfig
from prefopt.data.items import Chat, Pair
from prefopt.data.tokenize import encode_prompt, tokenize
from prefopt.errors import UserError
from prefopt.models.load import load_tokenizer
from tests.helpers.tiny import SHARED, tiny_model, tiny_tokenizer

CASES = SHARED.parent / "cases"
pytestmark = pytest.mark.shared
LONG = 10_000
# Of each template: its special tokens, the tokenizer's eos token, and what the model's generation_config names.
TEMPLATES = {
    "gemma2": (["<start_of_turn>", "<end_of_turn>"], "<eos>", ["<eos>", "<end_of_turn>"]),
    "mistral03": (["[INST]", "[/INST]"], "</s>", ["</s>"]),
    "phi3": (["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<eos>", ["<eos>", "<|end|>"]),
    "qwen3": ([], "<|im_end|>", ["<|im_end|>"]),
    "r1distill": (["<｜User｜>", "<｜Assistant｜>"], "<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),
}


def tokenizer(name: str, folder: Path, **settings):
    """The tiny tokenizer with the template and the special tokens of a public model, loaded beside a tiny model."""
    special, eos, stops = TEMPLATES[name]
    made = tiny_tokenizer()
    made.add_special_tokens({"bos_token": "<bos>", "eos_token": eos, "additional_special_tokens": special})
    made.chat_template = (CASES / "templates" / f"{name}.jinja").read_text()
    made.save_pretrained(folder)
    model = tiny_model(len(made))
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(stops)
    model.save_pretrained(folder)
    return load_tokenizer(ModelConfig(name, str(folder), **settings))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (CASES / "rows" / name).read_text().splitlines()]


def pairs(name: str) -> list[Pair]:
    found = []
    for i, row in enumerate(rows(name)):
        system = [{"role": "system", "content": row["system"]}] if "system" in row else []
        prompt = [*system, {"role": "user", "content": row["prompt"]}]
        found.append(Pair(str(i), prompt, row["chosen"], row["rejected"]))
    return found


def learnt(made, result) -> list[str]:
    return [made.decode(pair.chosen) for pair in result.pairs]


@pytest.mark.parametrize(
    ("name", "end"),
    [("gemma2", "<end_of_turn>"), ("mistral03", "</s>"), ("phi3", "<|end|>"), ("r1distill", "<｜end▁of▁sentence｜>")],
)
def test_system_rows_are_learnt_up_to_the_terminator_of_the_turn(name, end, tmp_path):
    made = tokenizer(name, tmp_path)
    assert made.eos_token == end
    items = pairs("with_system.jsonl")
    result = tokenize(made, items, LONG, LONG)
    assert [text.strip() for text in learnt(made, result)] == [item.chosen + end for item in items]
    for pair, item in zip(result.pairs, items, strict=True):
        prompt = made.decode(pair.prompt)
        assert prompt.index("Be short.") < prompt.index(item.prompt[1]["content"])
    assert result.noted["merged_system"] == (len(items) if name in ("gemma2", "mistral03") else 0)


def test_thinking_rows_are_whole_or_refused(tmp_path):
    items = pairs("thinking.jsonl")
    with pytest.raises(UserError, match="rewritten by template"):
        tokenize(tokenizer("r1distill", tmp_path / "r1"), items, LONG, LONG)
    made = tokenizer("qwen3", tmp_path / "qwen3")
    result = tokenize(made, items, LONG, LONG)
    assert learnt(made, result) == [item.chosen + "<|im_end|>" for item in items]
    assert not result.dropped


def test_thinking_can_be_switched_off(tmp_path):
    made = tokenizer("qwen3", tmp_path, chat_template_kwargs={"enable_thinking": False})
    ids = encode_prompt(made, [{"role": "user", "content": "Hi"}])
    assert made.decode(ids).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_word_of_the_user_is_learnt_in_a_chat(name, tmp_path):
    made = tokenizer(name, tmp_path)
    for row in rows("sharegpt_sft.jsonl"):
        roles = {"human": "user", "gpt": "assistant"}
        chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        (found,) = tokenize(made, [Chat("id", chat)], LONG, LONG).pairs
        text = made.decode([t for t, counts in zip(found.chosen, found.mask, strict=True) if counts])
        assert "Hello!" in text
        assert "Good bye!" in text
        assert "Bye" not in text.replace("Good bye!", "")
        assert text.count(made.eos_token) == 2


def test_a_terminator_in_the_text_is_dropped_counted_or_kept_whole(tmp_path):
    made, items = tokenizer("qwen3", tmp_path), pairs("terminator_inside.jsonl")
    assert tokenize(made, items, LONG, LONG).dropped == {"template_in_text": len(items)}
    result = tokenize(made, items, LONG, LONG, PoliciesConfig(template_in_text="keep"))
    assert all(text.endswith(items[0].chosen + "<|im_end|>") for text in learnt(made, result))
    assert result.noted["template_in_text"] == len(items)
