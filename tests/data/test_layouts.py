"""The layouts that people's rows have: what each gives, and that `dataset=PATH` finds it."""

import json
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from prefopt.config.parse import parse, register
from prefopt.data.dataset import Split, check_dataset, load_split
from prefopt.data.dataset_path import replace_path
from prefopt.data.fields import role_problem
from prefopt.data.formats import (
    Chats,
    Completions,
    ImplicitPrompt,
    LabelledCompletions,
    Pairs,
    ScoredCompletions,
    ScoredResponses,
    Transcripts,
    TwoResponses,
)
from prefopt.data.items import Chat, Dropped, Pair, RowDefect
from prefopt.data.overrides import quoted
from prefopt.errors import UserError
from prefopt.training.config import TrainConfig
from tests.helpers.tiny import ROOT

QUESTION = [{"role": "user", "content": "Name a fruit."}]
GOOD, BAD = "A cherry.", "Red."


def said(role: str, content: object, **fields: object) -> dict:
    return {"role": role, "content": content, **fields}


def gpt(value: str) -> dict:
    return {"from": "gpt", "value": value}


def human(value: str) -> dict:
    return {"from": "human", "value": value}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*arguments: str) -> Split:
    """All rows of a command line, as prefopt.train would read them."""
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [*replace_path(arguments, "train"), "dataset.heldout_share=0"]
        config = parse(compose("train", overrides), TrainConfig).dataset
    check_dataset(config)
    return load_split(config, "train")


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather"}}
PARTS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}]
WHOLE = [[*QUESTION, said("assistant", text)] for text in (GOOD, BAD)]

# Every layout with the same preference in it: {name: (row, the format that is found)}.
PREFERENCES = {
    "texts": ({"prompt": "Name a fruit.", "chosen": GOOD, "rejected": BAD}, Pairs),
    "messages": ({"prompt": QUESTION, "chosen": WHOLE[0][1:], "rejected": WHOLE[1][1:]}, Pairs),
    "dicts": ({"prompt": "Name a fruit.", "chosen": WHOLE[0][1], "rejected": WHOLE[1][1]}, Pairs),
    "other names of roles": (
        {"prompt": [said("human", "Name a fruit.")], "chosen": [said("bot", GOOD)], "rejected": [said("model", BAD)]},
        Pairs,
    ),
    "ShareGPT": ({"conversations": [human("Name a fruit.")], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, Pairs),
    "ShareGPT and text": ({"conversations": [human("Name a fruit.")], "chosen": GOOD, "rejected": BAD}, Pairs),
    "content parts": ({"prompt": [said("user", PARTS)], "chosen": GOOD, "rejected": BAD}, Pairs),
    "other names": ({"question": "Name a fruit.", "chosen_response": GOOD, "rejected_response": BAD}, Pairs),
    "OpenAI": (
        {"input": {"messages": QUESTION}, "preferred_output": WHOLE[0][1:], "non_preferred_output": WHOLE[1][1:]},
        Pairs,
    ),
    "Alpaca without input": ({"instruction": "Name a fruit.", "input": "", "chosen": GOOD, "rejected": BAD}, Pairs),
    "whole conversations": ({"chosen": WHOLE[0], "rejected": WHOLE[1]}, ImplicitPrompt),
    "the prompt repeated": ({"prompt": QUESTION, "chosen": WHOLE[0], "rejected": WHOLE[1]}, ImplicitPrompt),
    "argilla": ({"prompt": "Name a fruit.", "chosen": WHOLE[0], "rejected": WHOLE[1], "chosen-rating": 5,
                 "rejected-rating": 2}, ImplicitPrompt),
    "hh-rlhf": ({"chosen": f"\n\nHuman: Name a fruit.\n\nAssistant: {GOOD}",
                 "rejected": f"\n\nHuman: Name a fruit.\n\nAssistant: {BAD}"}, Transcripts),
    "hh-rlhf with its prompt": ({"prompt": "\n\nHuman: Name a fruit.\n\nAssistant:", "chosen": f" {GOOD}",
                                 "rejected": f" {BAD}"}, Transcripts),
    "LLMBar": ({"input": "Name a fruit.", "output_1": BAD, "output_2": GOOD, "label": 2}, TwoResponses),
    "PandaLM": ({"instruction": "Name a fruit.", "input": "", "response1": BAD, "response2": GOOD, "annotator1": 2,
                 "annotator2": 0, "annotator3": 2}, TwoResponses),
    "letters": ({"prompt": "Name a fruit.", "response_a": GOOD, "response_b": BAD, "winner": "A"}, TwoResponses),
    "arena": ({"prompt": "Name a fruit.", "response_a": BAD, "response_b": GOOD, "winner": "model_b"}, TwoResponses),
    "SafeRLHF": ({"prompt": "Name a fruit.", "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
                 TwoResponses),
    "samples": ({"prompt": "Name a fruit.", "responses": [BAD, GOOD], "rewards": [1, 2.5]}, ScoredResponses),
    "UltraFeedback": ({"instruction": "Name a fruit.", "completions": [
        {"response": BAD, "overall_score": 2}, {"response": GOOD, "overall_score": 8.5}]}, ScoredCompletions),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_is_found_in_every_layout(name, tmp_path, caplog):
    row, format_ = PREFERENCES[name]
    caplog.set_level("INFO")
    split = load(f"dataset={write(tmp_path / 'rows.jsonl', [row])}")
    assert [(p.prompt, p.chosen, p.rejected) for p in split.pairs] == [(QUESTION, GOOD, BAD)]
    assert f"rows of {format_.__name__}:" in caplog.text
    assert "python -m prefopt.train dataset=jsonl dataset.train=" in caplog.text


# A transcript in `prompt` is text, which `Pairs` reads as such.
OTHERS = [n for n, (_, format_) in PREFERENCES.items() if format_ is not Pairs and n != "hh-rlhf with its prompt"]


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_another_layout_are_refused_with_the_settings_that_read_them(name, tmp_path):
    file = write(tmp_path / "rows.jsonl", [PREFERENCES[name][0]])
    with pytest.raises(UserError, match="The rows of this file are read by: dataset=jsonl") as error:
        load("dataset=jsonl", f"dataset.train={file}")
    settings = shlex.split(str(error.value).rpartition("are read by: ")[2])
    assert [(p.prompt, p.chosen, p.rejected) for p in load(*settings).pairs] == [(QUESTION, GOOD, BAD)]


def test_step_dpos_rows_are_found(tmp_path):
    row = {"prompt": "Count.", "initial_reason_steps": "One, ", "chosen": "two.", "rejected": "five.", "answer": "2"}
    (pair,) = load(f"dataset={write(tmp_path / 'rows.jsonl', [row])}").pairs
    assert (pair.opening, pair.chosen, pair.chosen_finished) == ("One, ", "One, two.", False)


# {name: (rows, the conversations that they give)}.
ANSWERED = [*QUESTION, said("assistant", GOOD)]
FINE_TUNING = {
    "messages": ([{"messages": ANSWERED}], [ANSWERED]),
    "ShareGPT": ([{"conversations": [human("Name a fruit."), gpt(GOOD)], "system": "Be brief."}],
                 [[said("system", "Be brief."), *ANSWERED]]),
    "prompt and completion": ([{"prompt": "Name a fruit.", "completion": GOOD}], [ANSWERED]),
    "messages of both": ([{"prompt": QUESTION, "completion": [said("assistant", GOOD)]}], [ANSWERED]),
    "Alpaca": ([{"instruction": "Name it.", "input": "x", "output": GOOD}],
               [[said("user", "Name it.\n\nx"), said("assistant", GOOD)]]),
    "Dolly": ([{"instruction": "Name it.", "context": "x", "response": GOOD}],
              [[said("user", "Name it.\n\nx"), said("assistant", GOOD)]]),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE_TUNING)
def test_conversations_are_found_in_every_layout(name, tmp_path, caplog):
    rows, expected = FINE_TUNING[name]
    caplog.set_level("INFO")
    split = load(f"dataset={write(tmp_path / 'rows.jsonl', rows)}", "objective=sft")
    assert [item.messages for item in split] == expected  # type: ignore[union-attr]
    assert split.kind == "chats"
    assert "objective=sft" in caplog.text


def test_alpaca_puts_a_blank_line_between_instruction_and_input(tmp_path):
    row = {"instruction": "Use the past tense.", "input": "They sing.", "output": "x", "chosen": GOOD, "rejected": BAD}
    file = write(tmp_path / "rows.jsonl", [row, row | {"input": None, "history": [["Hi", "Hello!"]]}])
    first, second = load(f"dataset={file}").pairs
    assert first.prompt == [said("user", "Use the past tense.\n\nThey sing.")]
    assert second.prompt == [said("user", "Hi"), said("assistant", "Hello!"), said("user", "Use the past tense.")]
    with pytest.raises(UserError, match=rf"would leave out 'input'.*python -m prefopt\.train dataset={file}"):
        load("dataset=jsonl", f"dataset.train={file}", "+dataset.columns.prompt=instruction")
    with pytest.raises(UserError, match="would leave out 'instruction'"):
        load("dataset=jsonl", f"dataset.train={file}", "+dataset.columns.prompt=input")


def test_a_column_that_nothing_reads_is_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"sys": "Be brief.", "prompt": "a", "chosen": "x", "rejected": "y"}])
    arguments = ["dataset=jsonl", f"dataset.train={file}"]
    with pytest.raises(
        UserError, match=r"columns\.systm=sys: Pairs does not read .*Did you mean .*system=sys"
    ) as error:
        load(*arguments, "+dataset.columns.systm=sys")
    assert "chosen_reward" in str(error.value)  # the names that it reads
    target = "dataset.format._target_=prefopt.data.formats.ImplicitPrompt"
    with pytest.raises(UserError, match="ImplicitPrompt does not read a field 'prompt'"):
        load(*arguments, target, "+dataset.columns.prompt=prompt")
    (pair,) = load(*arguments, "+dataset.columns.system=sys").pairs
    assert pair.prompt == [said("system", "Be brief."), said("user", "a")]


def test_labels_are_put_together_by_prompt():
    """KTO: the i-th good completion of a prompt with its i-th bad one, wherever the rows stand."""
    rows = [("p", "g1", True), ("q", "alone", True), ("p", "b1", False), ("p", "g2", True), ("p", "b2", "False"),
            ("p", "b3", 0), ("r", "x", None)]  # fmt: skip
    read = LabelledCompletions()
    single = ((str(i), read({"prompt": p, "completion": c, "label": l})) for i, (p, c, l) in enumerate(rows))
    made = [item for _, item in read.combine(single)]
    assert [(p.chosen, p.rejected) for p in made if isinstance(p, Pair)] == [("g1", "b1"), ("g2", "b2")]
    assert [d.reason for d in made if isinstance(d, Dropped)] == ["unpaired_label"] * 3
    with pytest.raises(ValueError, match="'label' must be true or false, is 'good'"):
        read({"prompt": "p", "completion": "c", "label": "good"})


def test_labelled_rows_are_found_and_their_leftovers_counted(tmp_path):
    rows = [{"prompt": f"p{i % 3}", "completion": f"c{i}", "label": i < 4} for i in range(8)]
    split = load(f"dataset={write(tmp_path / 'kto.jsonl', rows)}")
    # p0: c0 and c3 are good, c6 is bad; p1: c1 is good, c4 and c7 are bad; p2: c2 is good, c5 is bad.
    assert [(p.chosen, p.rejected) for p in split.pairs] == [("c0", "c6"), ("c1", "c4"), ("c2", "c5")]
    assert split.drops == {"unpaired_label": 2}


@pytest.mark.parametrize(
    ("votes", "side"),
    [((1, 1, 2), 1), ((2, 0, 2), 2), ((0, 0, 1), 0), ((1, 2, 0), 0), ((1, None, None), 1), (("2", 2.0, 1), 2)],
)
def test_more_than_half_of_the_votes_decide(votes, side):
    row = {"prompt": "p", "response_1": "one", "response_2": "two"} | {f"v{i}": vote for i, vote in enumerate(votes)}
    made = TwoResponses(["v0", "v1", "v2"])(row)
    if side == 0:
        assert isinstance(made, Dropped)
        assert made.reason == "no_preference"
    else:
        assert isinstance(made, Pair)
        assert made.chosen == ("one", "two")[side - 1]


def test_labels_that_could_mean_two_things_are_refused_with_both_commands(tmp_path):
    rows = [{"prompt": "p", "response_1": "one", "response_2": "two", "label": i} for i in (0, 1)]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="several layouts fit") as error:
        load(f"dataset={file}")
    commands = [line.split("prefopt.train ")[1] for line in str(error.value).splitlines() if "prefopt.train" in line]
    assert len(commands) == 3
    found = set()
    for command in commands:
        overrides = [word.strip("'") for word in command.split()]
        found.add(tuple(p.chosen for p in load(*overrides).pairs))
    assert found == {("one",), ("one", "two"), ("two", "one")}  # 0 as a tie, as the first, as the second


@pytest.mark.parametrize(
    ("row", "candidates"),
    [
        ({"chosen": "The sky is blue.", "rejected": "The sky is grey."}, ["ImplicitPrompt"]),
        ({"prompt": "Q", "chosen": "Q x", "rejected": "Q y"}, ["dataset.train=", "ImplicitPrompt"]),
        ({"question": "a", "query": "b", "chosen": "x", "rejected": "y"}, ["prompt=question", "prompt=query"]),
        ({"question": "a", "context": "b", "chosen": "x", "rejected": "y"}, ["input=context", "prompt=question"]),
        ({"prompt": "a", "instruction": "b", "chosen": "x", "rejected": "y"}, ["prompt=prompt", "prompt=instruction"]),
        ({"prompt": "a", "completion": "x", "response": "y"}, ["Completions", "completion=response"]),
        ({"prompt": "Other words.", "chosen": WHOLE[0], "rejected": WHOLE[1]}, ["ImplicitPrompt"]),
    ],
)
def test_rows_that_could_mean_two_things_are_refused_with_the_candidates(row, candidates, tmp_path):
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        load(f"dataset={file}", "objective=ipo")
    lines = [line for line in str(error.value).splitlines() if "python -m" in line]
    assert len(lines) == len(candidates)
    for line, candidate in zip(lines, candidates, strict=True):
        assert line.strip().startswith("python -m prefopt.train objective=ipo dataset=jsonl ")
        assert candidate in line
        overrides = [word.strip("'") for word in line.split("prefopt.train ")[1].split()]
        assert len(load(*overrides)) == 1  # it works


def test_rows_of_no_layout_are_refused_with_what_the_layouts_need(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"text": "Hello", "n": 3}])
    with pytest.raises(UserError, match=r"no known layout .*rows\.jsonl\.\nfields: text \(str\), n \(int\)") as error:
        load(f"dataset={file}")
    assert "Pairs: {prompt" in str(error.value)
    assert "+dataset.columns.OURS=YOURS" in str(error.value)


def test_columns_of_scores_are_offered_and_not_used(tmp_path, caplog):
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y", "m": {"score_chosen": 8, "score_rejected": 3}}]
    file = write(tmp_path / "rows.jsonl", rows)
    caplog.set_level("INFO")
    assert load(f"dataset={file}").pairs[0].chosen_reward is None
    offered = ["+dataset.columns.chosen_reward=m.score_chosen", "+dataset.columns.rejected_reward=m.score_rejected"]
    assert " ".join(offered) in caplog.text
    (pair,) = load(f"dataset={file}", *offered).pairs
    assert (pair.chosen_reward, pair.rejected_reward) == (8, 3)


def test_what_the_user_gives_stays(tmp_path):
    file = write(tmp_path / "my rows (1).jsonl", [{"a": "p", "b": "q", "chosen": "x", "rejected": "y", "id": 1}] * 2)
    split = load("dataset.policies.duplicate_prompt=drop", f"dataset={file}", "+dataset.columns.prompt=a")
    assert [p.prompt[0]["content"] for p in split.pairs] == ["p"]
    assert dict(split.sources) == {"my rows _1_.jsonl": 1}  # a run's folder is named by it


@pytest.mark.parametrize(
    "name", ["a b", "a=b,c", "it's", 'say "x"', "ü", "back\\", 'q\\"x', "1", "null", "a:b", "-a", "$x", "#"]
)
def test_fields_of_any_name_can_be_columns(name, tmp_path):
    row = {"prompt": "p", f"chosen {name}": "x", f"rejected {name}": "y"}
    file = write(tmp_path / "rows.jsonl", [row])
    assert [(p.chosen, p.rejected) for p in load(f"dataset={file}").pairs] == [("x", "y")]
    value = OverridesParser.create().parse_override(f"k={quoted(name)}").value()
    assert getattr(value, "text", value) == name


def test_a_sweep_over_files_needs_one_layout(tmp_path):
    row = {"question": "p", "chosen": "x", "rejected": "y"}
    a, b = (write(tmp_path / f"{name}.jsonl", [row]) for name in "ab")
    other = write(tmp_path / "c.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y"}])
    replaced = replace_path(["-m", f"dataset={a},{b}", "objective=dpo,ipo"], "train")
    columns = "+dataset.columns.prompt=question"
    assert replaced == ["-m", "dataset=jsonl", f"dataset.train={a},{b}", columns, "objective=dpo,ipo"]
    with pytest.raises(UserError, match="these files have several") as error:
        replace_path(["-m", f"dataset={a},{other}"], "train")
    assert columns in str(error.value)
    with pytest.raises(UserError, match="nowhere is no file"):
        replace_path(["-m", f"dataset={a},nowhere"], "train")
    for unchanged in (["dataset=samples"], ["dataset=me/pairs"], ["-m", "dataset=samples,jsonl"], ["objective=dpo"]):
        assert replace_path(unchanged, "train") == unchanged


# Nulls and rewards.


def test_nulls_are_as_if_the_field_were_absent():
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    nulls = dict.fromkeys(("id", "system", "tools", "chosen_reward", "rejected_reward"))
    assert Pairs()(row | nulls) == Pairs()(row | dict.fromkeys(nulls, "")) == Pairs()(row)


@pytest.mark.parametrize(
    ("reward", "value"),
    [("4.5", 4.5), (" 2e0 ", 2.0), ("N/A", None), (float("nan"), None), ("inf", None), (True, None)],
)
def test_rewards_of_text_are_numbers_or_a_counted_defect(reward, value, tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "chosen_reward": reward, "rejected_reward": 1}
    file = write(tmp_path / "rows.jsonl", [row, row | {"chosen_reward": 3, "prompt": "q"}])
    split = load(f"dataset={file}")
    assert [p.chosen_reward for p in split.pairs] == ([3.0] if value is None else [value, 3.0])
    assert split.drops == ({"bad_reward": 1} if value is None else {})
    kept = load(f"dataset={file}", "dataset.policies.bad_reward=keep")
    assert [p.chosen_reward for p in kept.pairs] == [value, 3.0]
    if value is None:
        with pytest.raises(UserError, match=r"row 1: bad reward \(field 'chosen_reward' must be a finite number"):
            load(f"dataset={file}", "dataset.policies.bad_reward=fail")


def test_a_response_without_a_reward_costs_the_row_or_is_passed_over(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "rewards": [1, "N/A", "3"]}
    file = write(tmp_path / "rows.jsonl", [row, {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 2]}])
    assert load(f"dataset={file}").drops == {"bad_reward": 1}
    first, _ = load(f"dataset={file}", "dataset.policies.bad_reward=keep").pairs
    assert (first.chosen, first.rejected) == ("c", "a")


def test_a_completion_of_several_turns_is_counted_as_such(tmp_path):
    turns = [said("assistant", "Hello!"), said("user", "Bye"), said("assistant", "Bye!")]
    row = {"prompt": "Hi", "chosen": turns, "rejected": [said("assistant", "What?"), *turns[1:]]}
    file = write(tmp_path / "rows.jsonl", [row, {"prompt": "Hi", "chosen": "x", "rejected": "y"}])
    assert load(f"dataset={file}").drops == {"multi_turn_completion": 1}
    with pytest.raises(UserError, match=r"nothing is left .*multi_turn_completion: 1.*goes on over 3 messages"):
        load(f"dataset={write(tmp_path / 'one.jsonl', [row])}")


# Tools and other fields of messages.


def test_tool_calls_and_tools_are_carried():
    asked = said("assistant", None, tool_calls=[CALL], refusal=None, annotations=[])
    row = {"prompt": "Weather?", "chosen": [asked], "rejected": "No.", "tools": json.dumps([TOOL])}
    pair = Pairs()(row)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.chosen_fields, pair.rejected_fields) == ("", {"tool_calls": [CALL]}, {})
    assert pair.tools == [TOOL]
    assert Pairs()(row | {"tools": [TOOL]}) == pair
    others = [row | {"tools": None}, row | {"chosen": [asked | {"tool_calls": [CALL | {"id": "c2"}]}]}]
    assert len({pair.id, *(Pairs()(other).id for other in others)}) == 3  # type: ignore[union-attr]


def test_sides_that_differ_in_their_calls_are_neither_empty_nor_identical(tmp_path):
    sides = [{"role": "assistant", "content": "", "tool_calls": [CALL | {"id": i}]} for i in ("a", "b")]
    file = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": sides[0], "rejected": sides[1]}])
    split = load(f"dataset={file}")
    assert (len(split), split.drops, split.kept) == (1, {}, {})
    same = write(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": sides[0], "rejected": sides[0]}] * 2)
    with pytest.raises(UserError, match="identical: 2"):
        load(f"dataset={same}")


def test_turns_with_tools():
    user, call = said("user", "?"), said("assistant", "", tool_calls=[CALL])
    result, words = said("tool", "3"), said("assistant", "3")
    for prompt in ([user, call, result], [user, call, result, result], [user, call, result, words, user],
                   [user, call, result, call, result]):  # fmt: skip
        assert role_problem(prompt) is None
    for prompt in ([user, call], [user, call, user], [user, result], [result], [user, call, result, user],
                   [said("system", "x"), said("system", "x"), user]):  # fmt: skip
        assert role_problem(prompt) is not None
    chat = Chats()({"messages": [user, call, result, words], "tools": [TOOL]})
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"] == [CALL]
    assert chat.tools == [TOOL]


def test_sharegpt_calls_of_functions_are_tool_calls():
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    turns = [human("Weather?"), {"from": "function_call", "value": call}, {"from": "observation", "value": "rain"}]
    chat = Chats()({"conversations": None, "messages": [*turns, gpt("Rain.")], "tools": json.dumps([TOOL])})
    assert isinstance(chat, Chat)
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    with pytest.raises(ValueError, match="a function_call of 'messages' must be JSON text"):
        Chats()({"messages": [human("?"), {"from": "function_call", "value": "weather(Oslo)"}]})


def test_messages_that_were_written_as_text_are_refused(tmp_path):
    """As a table of texts does with lists: `str` of Python's, or JSON."""
    for kind in (str, json.dumps):
        row = {"prompt": "p", "chosen": kind(WHOLE[0][1:]), "rejected": kind(WHOLE[1][1:])}
        with pytest.raises(UserError, match="field 'chosen' holds messages that were written as text"):
            load(f"dataset={write(tmp_path / 'rows.jsonl', [row])}")


def test_fields_that_a_template_may_read_stay_and_those_that_choose_what_is_learnt_are_refused():
    answer = said("assistant", "Two.", reasoning_content="1 + 1", thinking="", weight=1, score=3)
    chat = Chats()({"messages": [said("user", "1 + 1?", weight=0), answer]})
    assert isinstance(chat, Chat)
    assert chat.messages == [said("user", "1 + 1?"), said("assistant", "Two.", reasoning_content="1 + 1")]
    for message in (answer | {"weight": 0}, answer | {"train": False}, answer | {"loss_weight": 0.5}):
        with pytest.raises(ValueError, match="would change what is learnt"):
            Chats()({"messages": [said("user", "1 + 1?"), message]})


def test_parts_that_are_no_text_are_refused_by_name(tmp_path):
    image = [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "What is it?"}]
    row = {"prompt": [said("user", image)], "chosen": "x", "rejected": "y"}
    with pytest.raises(RowDefect, match="'prompt' has a part of type 'image_url'; only text is read"):
        Pairs()(row)
    file = write(tmp_path / "rows.jsonl", [row, {"prompt": "p", "chosen": "x", "rejected": "y"}])
    with pytest.raises(UserError, match=r"row 1: not text .*image_url.*set dataset\.policies\.not_text=drop"):
        load("dataset=jsonl", f"dataset.train={file}")
    assert load("dataset=jsonl", f"dataset.train={file}", "dataset.policies.not_text=drop").drops == {"not_text": 1}


def test_a_message_of_a_parquet_file_has_the_nulls_of_all_others():
    nulls = {"from": None, "value": None, "tool_calls": None, "name": None}
    assert Pairs()({"prompt": [said("user", "p") | nulls], "chosen": "x", "rejected": "y"}) == Pairs()(
        {"prompt": "p", "chosen": "x", "rejected": "y"}
    )


def test_earlier_answers_of_a_prompt_are_not_learnt_unasked():
    prompt = [*QUESTION, said("assistant", GOOD), said("user", "Another.")]
    with pytest.raises(ValueError, match="turns of the assistant, which would be learnt"):
        Completions()({"prompt": prompt, "completion": "A pear."})


def test_the_system_column_opens_the_conversation_once():
    opened = [said("system", "Be brief."), *QUESTION]
    row = {"system": "Be brief.", "prompt": opened, "chosen": "x", "rejected": "y"}
    assert Pairs()(row).prompt == opened  # type: ignore[union-attr]
    assert isinstance(Pairs()(row | {"system": "Be long."}), Dropped)
    whole = {"system": "Be brief.", "chosen": WHOLE[0], "rejected": WHOLE[1]}
    assert ImplicitPrompt()(whole).prompt == opened  # type: ignore[union-attr]
