"""`dataset=PATH` on real preference files and on the collected cases. They lie outside the repository; the numbers that
are asserted come from another reading of each raw file, here, with nothing of `prefopt.data`."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from prefopt.data.dataset import Split
from prefopt.errors import UserError
from tests.data.test_layouts import load
from tests.helpers.tiny import SHARED, run_program

PREFERENCES = SHARED / "preferences"
CASES = SHARED.parent / "cases" / "rows"
pytestmark = pytest.mark.shared
Sides = tuple[str, str, str]  # the user's last words, chosen, rejected


def raw(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of all files of a folder."""
    if file.is_dir():
        return [row for member in sorted(file.iterdir()) for row in raw(member)]
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix in (".csv", ".tsv"):
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return json.loads(data) if file.suffix == ".json" else [json.loads(line) for line in data.splitlines()]


def pairs_of(split: Split) -> list[Sides]:
    return [(p.prompt[-1]["content"], p.chosen, p.rejected) for p in split.pairs]


def usable(sides: list[Sides]) -> tuple[list[Sides], Counter[str]]:
    """The pairs that can be trained on, and the counts of the others. Of two defects the first counts."""
    empty = [s for s in sides if not s[1].strip() or not s[2].strip()]
    same = [s for s in sides if s not in empty and s[1] == s[2]]
    counts = +Counter(empty_completion=len(empty), identical=len(same))
    return [s for s in sides if s not in empty and s not in same], counts


def question(row: dict[str, Any]) -> str:
    """Alpaca's question."""
    return row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")


def shape(row: dict[str, Any]) -> Sides:
    """Of a row whose fields are known: texts, messages or ShareGPT's."""
    words = []
    for name in ("conversations" if "conversations" in row else "prompt", "chosen", "rejected"):
        value = row[name]
        last = value[-1] if isinstance(value, list) else value
        words.append(last if isinstance(last, str) else last.get("content", last.get("value")))
    return words[0], words[1], words[2]


@pytest.mark.parametrize(
    "name",
    ["alpaca_eval_scored_pairs.jsonl", "ultrafeedback_eval.jsonl", "ultrafeedback_train.jsonl",
     "llamafactory_dpo_en_demo.json"],
)  # fmt: skip
def test_files_of_prompt_chosen_and_rejected(name):
    expected, drops = usable([shape(row) for row in raw(PREFERENCES / name)])
    split = load(f"dataset={PREFERENCES / name}")
    assert pairs_of(split) == expected
    assert split.drops == drops


def test_multi_turn_prompts_of_sharegpt_keep_their_turns():
    rows = raw(PREFERENCES / "llamafactory_dpo_en_demo.json")
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    prompts = [[{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]] for row in rows]
    assert [p.prompt for p in load(f"dataset={PREFERENCES / 'llamafactory_dpo_en_demo.json'}").pairs] == prompts
    assert max(map(len, prompts)) > 10


def test_alpaca_pairs():
    rows = raw(PREFERENCES / "rasbt_instruction_data_with_preference.json")
    expected, drops = usable([(question(row), row["chosen"], row["rejected"]) for row in rows])
    split = load(f"dataset={PREFERENCES / 'rasbt_instruction_data_with_preference.json'}")
    assert (pairs_of(split), split.drops) == (expected, drops)
    assert sum("\n\n" in prompt for prompt, _, _ in expected) > 300


def test_transcripts():
    """By the speakers alone: each must have its turn, and the assistant the last one, which is not empty."""
    counts = Counter[str]()
    for row in raw(PREFERENCES / "hh_rlhf_harmless_base_test.jsonl.gz"):
        speakers = [re.findall(r"\n\n(H|A)(?:uman|ssistant):", row[side]) for side in ("chosen", "rejected")]
        answers = [re.split(r"\n\nAssistant:", row[side])[-1].strip() for side in ("chosen", "rejected")]
        if any("".join(s) != "HA" * (len(s) // 2) for s in speakers):
            counts["wrong_roles"] += 1
        elif not all(answers):
            counts["empty_completion"] += 1
        else:
            counts["used"] += 1
    split = load(f"dataset={PREFERENCES / 'hh_rlhf_harmless_base_test.jsonl.gz'}")
    assert counts.total() == 2312
    assert Counter(used=len(split)) + split.drops == counts


def test_two_responses_and_a_label():
    rows = raw(PREFERENCES / "llmbar.jsonl")
    expected = [(r["input"], r[f"output_{r['label']}"], r[f"output_{3 - r['label']}"]) for r in rows]
    split = load(f"dataset={PREFERENCES / 'llmbar.jsonl'}")
    assert (pairs_of(split), split.drops) == (expected, {})


def test_two_responses_and_votes():
    """Six responses of this file are true or false instead of text: it is read with the policy that the message
    names."""
    path = f"dataset={PREFERENCES / 'pandalm_testset_v1.json'}"
    with pytest.raises(UserError, match="field 'response_1' must be text, is bool") as error:
        load(path)
    policy = str(error.value).rpartition("set ")[2].rstrip(".")
    split = load(path, policy)
    rows = raw(PREFERENCES / "pandalm_testset_v1.json")
    texts = [r for r in rows if isinstance(r["response1"], str) and isinstance(r["response2"], str)]
    sides = []
    for row in texts:
        votes = sorted(row[f"annotator{i}"] for i in (1, 2, 3))
        if votes[1] and votes[1] in (votes[0], votes[2]):  # of three, two agree where the middle one has a twin
            sides.append((question(row), row[f"response{votes[1]}"], row[f"response{3 - votes[1]}"]))
    expected, drops = usable(sides)
    assert pairs_of(split) == expected
    assert split.drops == drops + Counter(not_text=len(rows) - len(texts), no_preference=len(texts) - len(sides))


# Files of the cases whose rows are {prompt or conversations, chosen, rejected} in one of their forms.
@pytest.mark.parametrize(
    "name",
    ["argilla_uf_cleaned.jsonl", "dict_chosen.jsonl", "prompt_repeated.jsonl", "roles_human_gpt.jsonl",
     "sharegpt_pairs.jsonl", "system_column.jsonl", "terminator_inside.jsonl", "thinking.jsonl",
     "tool_completion_text.jsonl", "with_system.jsonl", "pairs.csv", "pairs.tsv", "shards", "shards_columns",
     "null_extras.jsonl"],
)  # fmt: skip
def test_cases_of_pairs(name):
    assert pairs_of(load(f"dataset={CASES / name}")) == [shape(row) for row in raw(CASES / name)]


def test_a_folder_that_datasets_saved():
    with pyarrow.ipc.open_stream(CASES / "std_single" / "data-00000-of-00001.arrow") as stream:
        expected = [shape(row) for row in stream.read_all().to_pylist()]
    assert pairs_of(load(f"dataset={CASES / 'std_single'}")) == expected


def test_cases_of_other_shapes():
    rows = raw(CASES / "trl_uf.parquet")
    expected = [(r["chosen"][0]["content"], r["chosen"][1]["content"], r["rejected"][1]["content"]) for r in rows]
    assert pairs_of(load(f"dataset={CASES / 'trl_uf.parquet'}")) == expected
    rows = raw(CASES / "alpaca_pref.jsonl")
    expected = [(question(row), row["chosen"], row["rejected"]) for row in rows]
    assert pairs_of(load(f"dataset={CASES / 'alpaca_pref.jsonl'}")) == expected
    for name in ("sharegpt_sft.jsonl", "prompt_completion.jsonl"):
        split = load(f"dataset={CASES / name}", "objective=sft")
        assert (len(split), split.kind) == (4, "chats")
    assert [len(item.messages) for item in load(f"dataset={CASES / 'sharegpt_sft.jsonl'}")] == [4] * 4  # type: ignore[union-attr]


def test_cases_of_system_messages():
    for name, field in (("system_column.jsonl", "sys"), ("with_system.jsonl", "system")):
        expected = [row[field] for row in raw(CASES / name)]
        assert [p.prompt[0]["content"] for p in load(f"dataset={CASES / name}").pairs] == expected
    with pytest.raises(UserError, match=r"Did you mean dataset\.columns\.system=sys"):
        load("dataset=jsonl", f"dataset.train={CASES / 'system_column.jsonl'}", "+dataset.columns.systm=sys")


def test_cases_of_nulls_and_texts_for_numbers():
    for name in ("null_rejected.jsonl", "pandas_null.parquet"):
        rows = raw(CASES / name)
        whole = [row for row in rows if None not in (row["chosen"], row["rejected"])]
        split = load(f"dataset={CASES / name}")
        assert pairs_of(split) == [shape(row) for row in whole]
        assert split.drops == {"missing_text": len(rows) - len(whole)}
    split = load(f"dataset={CASES / 'string_rewards.jsonl'}")
    assert [(p.chosen_reward, p.rejected_reward) for p in split.pairs] == [(4.5, 2.0)]
    assert split.drops == {"bad_reward": 1}
    kept = load(f"dataset={CASES / 'string_rewards.jsonl'}", "dataset.policies.bad_reward=keep")
    assert [(p.chosen_reward, p.rejected_reward) for p in kept.pairs] == [(4.5, 2.0), (4.5, None)]


def test_cases_of_tools():
    rows = raw(CASES / "tool_completion.jsonl")
    split = load(f"dataset={CASES / 'tool_completion.jsonl'}")
    assert [p.chosen_fields["tool_calls"] for p in split.pairs] == [r["chosen"][0]["tool_calls"] for r in rows]
    assert [p.tools for p in split.pairs] == [row["tools"] for row in rows]
    split = load(f"dataset={CASES / 'tool_completion_text.jsonl'}")
    assert all(p.chosen_fields["tool_calls"] and not p.rejected_fields for p in split.pairs)


def test_a_completion_of_several_turns_says_what_it_is():
    with pytest.raises(UserError, match=r"multi_turn_completion: 2\).*field 'chosen' goes on over 3 messages"):
        load(f"dataset={CASES / 'multi_turn_completion.jsonl'}")


@pytest.mark.parametrize("name", ["alpaca_pref.jsonl", "trl_uf.parquet"])
def test_the_report_shows_layout_counts_and_command(name, tiny_folder, tmp_path):
    model = ("model=hub", f"model.path={tiny_folder / 'model'}")
    env = {"PREFOPT_CACHE": str(tiny_folder / "cache")}
    process = run_program(
        f"dataset={CASES / name}", *model, f"output={tmp_path / 'out'}", program="data_report", env=env
    )
    assert process.returncode == 0, process.stderr
    with (tmp_path / "out" / "report.csv").open(newline="") as stream:
        values = {(row["row"], row["column"]): row["value"] for row in csv.DictReader(stream)}
    pairs = [int(values[f"{split} / {name}", "pairs"]) for split in ("train", "heldout")]
    assert min(pairs) >= 1  # a share of the prompts is held out
    assert sum(pairs) == len(raw(CASES / name))
    assert f"python -m prefopt.train dataset=jsonl dataset.train={CASES / name}" in process.stdout
