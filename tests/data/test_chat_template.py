"""Templates of the structure of public models': what is learnt, where a turn ends, and what is refused."""

import json

import pytest

from prefopt.config.schema import ModelConfig, PoliciesConfig
from prefopt.data.chat_template import markup, merges_system, resolve, writes_system
from prefopt.data.items import Chat, Pair
from prefopt.data.tokenize import encode_prompt, tokenize
from prefopt.errors import UserError
from prefopt.models.load import load_tokenizer
from tests.helpers.tiny import CHATML, save_tiny, tiny_tokenizer

LONG = 10_000
# Refuses system messages, calls the assistant "model", trims, and closes turns with another token than eos.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start>' + role + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
# Writes the system message before the last user's turn, so not any more once that is answered.
LATE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Closes an unanswered conversation, so it is no beginning of the answered one.
CLOSED = (
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Removes the thoughts of every answer, and opens them in the generation prompt.
UNTHOUGHT = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}{{ '<start>' + m.role + '\n' + c + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n<think>\n' }}{% endif %}"
)
# Writes thoughts of the last answer alone, in its own layout, and can open an empty thought.
QWEN3 = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and loop.last %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in c else '' %}"
    "{% set c = '<think>\n' + t + '\n</think>\n\n' + c.split('</think>')[-1].lstrip() %}"
    "{% elif m.role == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<start>' + m.role + '\n' + c + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The last turn ends with eos, inner ones with a token of their own; roles have channels; today's date (gpt-oss).
CHANNELS = (
    "{{ '<start>system\nToday is ' + strftime_now('%Y-%m-%d') + '<end>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start>assistant final\n' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}{{ '<return>' }}{% else %}{{ '<end>' }}{% endif %}"
    "{% else %}{{ '<start>' + m.role + '\n' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<start>tools\n' + tools | tojson + '<end>' }}{% endif %}"
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson }}{% endfor %}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


def tokenizer(template: str, eos: str = "<end>", stops: tuple[str, ...] = (), **settings):
    """The tiny tokenizer with a template, resolved as `load_tokenizer` does."""
    made = tiny_tokenizer()
    made.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<start>", "<end>", "<return>"]})
    made.eos_token = eos
    made.chat_template = template
    resolve(made, ModelConfig("m", "p", **settings), set(made.convert_tokens_to_ids(list(stops))))
    return made


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def says(content: str) -> dict:
    return {"role": "assistant", "content": content}


def pair(chosen: str, rejected: str = "Bad.", prompt: list[dict] | None = None, **more) -> Pair:
    return Pair("id", prompt or [user("Is it?")], chosen, rejected, **more)


def learnt(made, item: Pair | Chat) -> str:
    """The text of the tokens that the loss counts, of a pair's chosen side."""
    (found,) = tokenize(made, [item], LONG, LONG).pairs
    return made.decode([t for t, counts in zip(found.chosen, found.mask, strict=True) if counts])


def turns(made, chat: list[dict]) -> list[str]:
    """The texts of the stretches of a chat that the loss counts."""
    (found,) = tokenize(made, [Chat("id", chat)], LONG, LONG).pairs
    stretches, before = [], False
    for token, counts in zip(found.chosen, found.mask, strict=True):
        if counts and not before:
            stretches.append([])
        if counts:
            stretches[-1].append(token)
        before = counts
    return [made.decode(s) for s in stretches]


def test_the_terminator_is_what_the_template_writes_and_the_model_knows():
    made = tokenizer(GEMMA, eos="<|endoftext|>", stops=("<|endoftext|>", "<end>"))
    assert made.eos_token == "<end>"
    assert learnt(made, pair(" Good. ")) == "Good.<end>"
    assert tokenize(made, [pair(" Good. ")], LONG, LONG).noted["whitespace_changed"] == 1


def test_a_terminator_that_nobody_knows_is_named_with_the_key_that_sets_it():
    with pytest.raises(UserError, match=r"it writes '<end>\\n'.*model.eos_token='<end>'"):
        tokenizer(GEMMA, eos="<|endoftext|>")
    assert learnt(tokenizer(GEMMA, eos="<|endoftext|>", eos_token="<end>"), pair("Good.")) == "Good.<end>"
    with pytest.raises(UserError, match="does not write this token behind an answer"):
        tokenizer(GEMMA, eos_token="<return>")


def test_another_terminator_does_not_change_what_the_template_writes():
    """The template's variable eos_token is the tokenizer's own, as before."""
    made = tokenizer(CLOSED, eos="<|endoftext|>", stops=("<end>",))
    assert made.eos_token == "<end>"
    chat = [user("Hi"), says("Yo")]
    expected = "<start>user\nHi<end>\n<start>assistant\nYo<end>\n<|endoftext|>"
    assert made.apply_chat_template(chat, tokenize=False) == expected


def test_a_template_that_closes_an_unanswered_conversation_works():
    made = tokenizer(CLOSED, eos="<|endoftext|>", stops=("<end>",))
    (found,) = tokenize(made, [pair("Good.")], LONG, LONG).pairs
    assert found.prompt == encode_prompt(made, [user("Is it?")])
    assert made.decode(found.chosen) == "Good.<end>"
    assert turns(made, [user("Hi"), says("Yo"), user("Bye"), says("Bye!")]) == ["Yo<end>", "Bye!<end>"]
    # Without knowing <end>, the terminator is eos, which stands behind the last turn alone.
    made = tokenizer(CLOSED, eos="<|endoftext|>")
    assert learnt(made, pair("Good.")) == "Good.<end>\n<|endoftext|>"


@pytest.mark.parametrize("template", [GEMMA, LATE_SYSTEM])
def test_system_messages_that_the_template_cannot_write_follow_the_policy(template):
    chat = [{"role": "system", "content": "Be brief."}, user("Is it?")]
    made = tokenizer(template)
    assert merges_system(made)
    assert "Be brief.\n\nIs it?" in made.apply_chat_template(chat, tokenize=False)
    result = tokenize(made, [pair("Good.", prompt=chat)], LONG, LONG)
    assert result.noted["merged_system"] == 1
    assert "Be brief.\n\nIs it?" in made.decode(result.pairs[0].prompt)
    dropped = tokenizer(template, system_message="drop")
    assert dropped.apply_chat_template(chat, tokenize=False) == dropped.apply_chat_template(chat[1:], tokenize=False)
    with pytest.raises(UserError, match=r"model\.system_message"):
        tokenize(tokenizer(template, system_message="fail"), [pair("Good.", prompt=chat)], LONG, LONG)
    assert writes_system(tokenizer(CLOSED, eos="<|endoftext|>"))


def test_a_template_that_deletes_a_part_of_the_answer_is_refused_and_says_so():
    made = tokenizer(UNTHOUGHT)
    thought = pair("<think>\nAdd.\n</think>\n\nTwo.", "<think>\nGuess.\n</think>\n\nThree.")
    with pytest.raises(UserError, match=r"rewritten by template.*'<think>.*policies.rewritten_by_template=drop"):
        tokenize(made, [thought], LONG, LONG)
    policies = PoliciesConfig(rewritten_by_template="drop")
    result = tokenize(made, [thought, pair("Two.")], LONG, LONG, policies)
    assert result.dropped == {"rewritten_by_template": 1}
    assert [made.decode(p.chosen) for p in result.pairs] == ["Two.<end>"]


def test_thoughts_that_the_template_writes_in_its_own_layout_are_learnt_and_counted():
    made = tokenizer(QWEN3)
    result = tokenize(made, [pair("<think>Add.</think>Two.", "Three.")], LONG, LONG)
    assert made.decode(result.pairs[0].chosen) == "<think>\nAdd.\n</think>\n\nTwo.<end>"
    assert result.noted["whitespace_changed"] == 1
    chat = [user("Hi"), says("<think>Hm.</think>Yo"), user("Bye"), says("Bye!")]
    with pytest.raises(UserError, match="rewritten by template"):  # the thoughts of an inner turn are lost
        tokenize(made, [Chat("id", chat)], LONG, LONG)
    assert turns(made, [user("Hi"), says("Yo"), user("Bye"), says("Bye!")]) == [
        "Yo<end>",
        "<think>\n\n</think>\n\nBye!<end>",
    ]


def test_variables_are_a_part_of_the_template():
    made = tokenizer(QWEN3, chat_template_kwargs={"enable_thinking": False})
    assert made.decode(encode_prompt(made, [user("Hi")])).endswith("<start>assistant\n<think>\n\n</think>\n\n")
    assert learnt(made, pair("Good.")) == "Good.<end>"
    with pytest.raises(UserError, match=r"does not read thinking\. It reads:.*enable_thinking"):
        tokenizer(QWEN3, chat_template_kwargs={"thinking": False})


def test_inner_turns_that_end_otherwise_are_learnt_up_to_their_words():
    made = tokenizer(CHANNELS, eos="<return>")
    chat = [user("Hi"), says("Yo"), user("Bye"), says("Bye!")]
    assert turns(made, chat) == [" final\nYo", " final\nBye!<return>"]
    assert tokenize(made, [Chat("id", chat)], LONG, LONG).noted["inner_turns_without_terminator"] == 1


def test_the_date_is_fixed_in_the_template():
    made = tokenizer(CHANNELS, eos="<return>", date="2025-02-03")
    assert "Today is 2025-02-03<end>" in made.decode(encode_prompt(made, [user("Hi")]))
    before = made.chat_template
    resolve(made, ModelConfig("m", "p", date="2030-01-01"), set())  # as an exported policy is loaded again
    assert made.chat_template == before
    words = tokenizer("{{ strftime_now('%d %b %Y') + strftime_now('%A, %B %-d') }}" + CLOSED, date="2025-02-03")
    assert words.apply_chat_template([user("Hi")], tokenize=False).startswith("03 Feb 2025Monday, February 3<start>")
    with pytest.raises(UserError, match=r"model\.date must be a date"):
        tokenizer(CHANNELS, eos="<return>", date="tomorrow")


@pytest.mark.parametrize(
    ("template", "text"),
    [(CLOSED, "It writes <end> and goes on."), (CLOSED, "<start>user\nHi"), (LATE_SYSTEM, "[INST] Is it?[/INST]")],
)
def test_markup_in_the_text_is_counted_under_a_policy(template, text):
    made = tokenizer(template)
    item = pair("Good.", prompt=[user(text)])
    assert tokenize(made, [item], LONG, LONG).dropped == {"template_in_text": 1}
    with pytest.raises(UserError, match="template in text"):
        tokenize(made, [item], LONG, LONG, PoliciesConfig(template_in_text="fail"))
    assert tokenize(made, [item], LONG, LONG, PoliciesConfig(template_in_text="keep")).noted["template_in_text"] == 1
    assert not markup(made).search("A user starts, [and] the assistant ends.")


def test_a_kept_terminator_inside_does_not_end_the_completion():
    made = tokenizer(CLOSED)
    item = pair("It writes <end> and goes on.")
    (found,) = tokenize(made, [item], LONG, LONG, PoliciesConfig(template_in_text="keep")).pairs
    assert made.decode(found.chosen) == "It writes <end> and goes on.<end>"


CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}
TOOL = [{"type": "function", "function": {"name": "weather"}}]


def test_tool_calls_and_tools_are_what_the_template_writes():
    made = tokenizer(TOOLS)
    item = pair("", "I cannot know.", chosen_fields=CALL, tools=TOOL)
    (found,) = tokenize(made, [item], LONG, LONG).pairs
    messages = [*item.prompt, {**says(""), **CALL}]
    whole = made.apply_chat_template(messages, tools=TOOL, tokenize=False)
    assert made.decode(found.prompt + found.chosen) == whole
    assert made.decode(found.chosen).startswith('<call>{"name": "weather"')
    assert "<start>tools" in made.decode(found.prompt)


@pytest.mark.parametrize(("fields", "what"), [({"chosen_fields": CALL}, "tool_calls"), ({"tools": TOOL}, "tools")])
def test_what_the_template_does_not_write_is_refused_by_name(fields, what):
    with pytest.raises(UserError, match=rf"rewritten by template \(it does not write the .*{what}"):
        tokenize(tokenizer(CLOSED), [pair("Let me look.", **fields)], LONG, LONG)


def test_a_tools_answer_that_the_template_leaves_out_is_refused():
    prompt = [user("Weather?"), {**says(""), **CALL}, {"role": "tool", "content": "12 degrees"}]
    no_tool = TOOLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    tokenize(tokenizer(TOOLS), [pair("It is 12 degrees.", prompt=prompt)], LONG, LONG)
    with pytest.raises(UserError, match="it does not write the tool's result '12 degrees'"):
        tokenize(tokenizer(no_tool), [pair("It is 12 degrees.", prompt=prompt)], LONG, LONG)


def test_characters_that_the_tokenizer_cannot_spell_are_counted():
    made = tokenizer(CLOSED)
    backend = json.loads(made.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Lowercase"}
    from tokenizers import Tokenizer

    made._tokenizer = Tokenizer.from_str(json.dumps(backend))
    assert tokenize(made, [pair("GOOD.")], LONG, LONG).noted["changed_by_tokenizer"] == 2  # and "Bad."


def test_a_template_from_a_file_and_what_is_wrong_with_it(tmp_path):
    folder, file = save_tiny(tmp_path / "model"), tmp_path / "template.jinja"
    file.write_text(CHATML.replace("assistant\n", "assistant: \n"))
    config = ModelConfig("m", str(folder), chat_template=str(file))
    made = load_tokenizer(config)
    assert made.decode(encode_prompt(made, [user("Hi")])).endswith("<|im_start|>assistant: \n")
    file.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="is no Jinja"):
        load_tokenizer(config)
    with pytest.raises(UserError, match=r"model\.chat_template=nowhere\.jinja cannot be read"):
        load_tokenizer(ModelConfig("m", str(folder), chat_template="nowhere.jinja"))


def test_tokenizers_without_template_are_refused():
    made = tiny_tokenizer()
    made.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*model\.chat_template=FILE"):
        resolve(made, ModelConfig("m", "p"), set())
    made = tiny_tokenizer()
    made.eos_token = None
    with pytest.raises(UserError, match=r"the tokenizer has none.*model.eos_token='<\|im_end\|>'"):
        resolve(made, ModelConfig("m", "p"), set())
