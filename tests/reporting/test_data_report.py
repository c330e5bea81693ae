"""The data report, its numbers against ones counted by hand."""

import csv
import json

import numpy as np
import pytest

from prefopt.config.schema import DatasetConfig
from prefopt.data import cache
from prefopt.data.cache import Limits, prepare_dataset
from prefopt.reporting.data import bin_edges, fenced, learnt_counts, marked, prompt_key, shortened
from tests.helpers.tiny import SHARED, run_program, tiny_tokenizer

REAL = SHARED / "preferences" / "ultrafeedback_eval.jsonl"
# One letter is one token of the tiny tokenizer, and so is each special token. A user's turn of n letters, with what
# opens the answer, is n tokens more than that of none; an answer of n letters is n + 1 with its terminator.
TRAIN = [
    ("QQQQ", "XXXX", "ZZ", 1.0, 0.0),  # chosen is longer by 2
    ("QQ", "XX", "ZZ", 0.5, 0.5),  # tied, and equally long
    ("QQQ", "X", "ZZZ", 0.8, 0.4),  # shorter by 2
    ("Q  Q\nQ", "XXXXXXX", "Z", 0.2, 0.4),  # longer by 6; rewards contradict
    ("QQQQQ", "XX", "XX", 1.0, 0.0),  # identical: dropped
    ("QQQQQQ", " ", "XX", 1.0, 0.0),  # empty: dropped
    ("QKQK", "XXX", "Z", 1.0, 0.0),  # held out as it is: dropped
    ("QKQKQK", "XXX", "Z", 1.0, 0.0),  # so is it, too
]
HELDOUT = [("QKQK", "XX", "Z", 0.9, 0.1), ("QKQKQK", "X", "Z", 0.9, 0.1), ("Q Q Q", "X", "ZZ", 0.9, 0.1)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(rows):
    names = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward")
    return [dict(zip(names, row, strict=True)) for row in rows]


def numbers(folder):
    """{(table, row, column): text} of report.csv."""
    with (folder / "report.csv").open() as file:
        return {(r["table"], r["row"], r["column"]): r["value"] for r in csv.DictReader(file)}


def report(tiny_folder, output, *overrides):
    arguments = ["model=hub", f"model.path={tiny_folder / 'model'}", "dataset=jsonl", f"output={output}"]
    arguments += ["dataset.heldout_share=0", *overrides]
    env = {"PREFOPT_CACHE": str(tiny_folder / "cache")}
    return run_program(*arguments, program="data_report", env=env)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """(output folder, the process) for TRAIN and HELDOUT."""
    folder = tmp_path_factory.mktemp("data_report")
    train, heldout = write(folder / "train.jsonl", pairs(TRAIN)), write(folder / "heldout.jsonl", pairs(HELDOUT))
    evaluation = folder / "evaluation.json"
    evaluation.write_text(json.dumps([{"instruction": "QQ"}, {"prompt": "Q\tQ Q"}, {"prompt": "nowhere"}]))
    process = report(
        tiny_folder, folder / "out", "dataset.name=letters", f"dataset.train={train}", f"dataset.heldout={heldout}",
        f"evaluation_prompts=[{evaluation}]", "max_completion_tokens=4",
        "dataset.policies.contradicting_rewards=keep",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder / "out", process


def test_a_path_is_reported_with_its_layout_and_the_command_that_trains(tiny_folder, tmp_path):
    """The rows are {question, chosen, rejected}; the report's own keys are not in the training command."""
    file = write(tmp_path / "mine.jsonl", [{"question": "Q", "chosen": "X", "rejected": "Z"}] * 2)
    model = ("model=hub", f"model.path={tiny_folder / 'model'}")
    env = {"PREFOPT_CACHE": str(tiny_folder / "cache")}
    out = tmp_path / "out"
    process = run_program(f"dataset={file}", *model, f"output={out}", program="data_report", env=env)
    assert process.returncode == 0, process.stderr
    assert "Layout of the rows" in process.stdout
    dataset = f"dataset=jsonl dataset.train={file} +dataset.columns.prompt=question"
    assert f"\n  python -m prefopt.train {dataset} {' '.join(model)}\n" in process.stdout
    assert f"python -m prefopt.data_report {dataset} " in process.stderr
    assert numbers(out)["Counts", "train / mine.jsonl", "pairs"] == "2"
    assert "| mine.jsonl | Pairs |" in (out / "report.md").read_text()


def test_counts_and_defects(finished):
    found = numbers(finished[0])
    assert found["Counts", "train / letters", "pairs"] == "4"
    assert found["Counts", "train / all, within the length limits", "pairs"] == "4"
    assert found["Counts", "heldout / letters", "pairs"] == "3"
    defects = {row.split(" / ")[0]: int(n) for (t, row, c), n in found.items() if t[:7] == "Defects" and c == "train"}
    expected = {"identical": 1, "empty_completion": 1, "prompt_in_heldout": 2, "tied_rewards": 1, "cut_completions": 2}
    expected["contradicting_rewards"] = 1
    assert {reason: n for reason, n in defects.items() if n} == expected


def test_lengths_are_measured_before_anything_is_cut(finished):
    found = numbers(finished[0])

    def row(part):
        columns = ("median", "p90", "max", "limit", "share over the limit")
        return [float(found["Lengths in tokens", f"train / {part}", c]) for c in columns]

    base = len(tiny_tokenizer()("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    # Prompts of 4, 2, 3 and 6 letters; chosen 5, 3, 2, 8 tokens, rejected 3, 3, 4, 2, the terminators with them.
    assert row("prompt") == pytest.approx([base + 3.5, base + 5.4, base + 6, 1800, 0])
    assert row("chosen") == pytest.approx([4, 7.1, 8, 4, 0.5])
    assert row("rejected") == pytest.approx([3, 3.7, 4, 4, 0])


def test_the_two_sides_and_what_sharing_the_prompt_saves(finished):
    found = {c: float(n) for (t, row, c), n in numbers(finished[0]).items() if "two sides" in t and row == "train"}
    base = len(tiny_tokenizer()("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    prompt, chosen, rejected = 4 * base + 4 + 2 + 3 + 6, 4 + 3 + 2 + 4, 3 + 3 + 4 + 2  # within the limit of 4
    assert found == pytest.approx(
        {
            "share chosen longer": 0.5,
            "share equally long": 0.25,
            "mean difference": 1.5,
            "share saved": prompt / (2 * prompt + chosen + rejected),
        }
    )


def test_reward_gaps(finished):
    found = {c: float(n) for (t, row, c), n in numbers(finished[0]).items() if "Reward" in t and row == "train"}
    gaps = [-0.2, 0.0, 0.4, 1.0]
    assert found == pytest.approx(
        {
            "pairs": 4, "min": -0.2, "p10": np.quantile(gaps, 0.1), "median": 0.2, "p90": np.quantile(gaps, 0.9),
            "max": 1.0, "share tied": 0.25, "share chosen is worse": 0.25,
        }
    )  # fmt: skip


def test_overlaps_are_counted_before_the_policy_drops_them_and_whatever_the_whitespace(finished):
    folder, _ = finished
    rows = {row: n for (t, row, c), n in numbers(folder).items() if t[:7] == "Overlap" and c == "rows in both"}
    found = {(row.split(" / ")[0], row.split(" / ")[1].split("/")[-1]): n for row, n in rows.items()}
    # "Q  Q\nQ" is held out as "Q Q Q".
    assert found == {
        ("train", "heldout"): "3",
        ("train", "evaluation.json"): "2",
        ("heldout", "evaluation.json"): "1",
    }
    text = (folder / "report.md").read_text()
    assert "prompt_in_heldout (policy drop) counted 2 of train" in text
    assert "evaluation.json: “QQ”; “Q Q Q”" in text


def test_the_learnt_part_is_marked(finished):
    text = (finished[0] / "report.md").read_text()
    assert "<|im_start|>user\nQQQQ<|im_end|>\n<|im_start|>assistant\n⟦XXXX⟧\n" in text  # cut: no terminator
    assert "⟦ZZ<|im_end|>⟧" in text
    assert "<|im_start|>user\nQQQ<|im_end|>\n<|im_start|>assistant\n⟦X<|im_end|>⟧\n" in text
    assert text.count("Rejected, after the same prompt") == 3


def test_it_prints_the_tables_and_last_the_paths(finished):
    folder, process = finished
    figures = [f"{figure}.{suffix}" for figure in ("lengths", "reward_gaps") for suffix in ("png", "svg", "pdf")]
    names = ["report.md", "report.csv", *figures]
    assert process.stdout.splitlines()[-8:] == [str(folder / name) for name in names]
    for part in ("⟦XXXX⟧", "Lengths in tokens", "prompt_in_heldout", "share chosen longer", "50.0 %"):
        assert part in process.stdout
    for name in ("lengths", "reward_gaps"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_the_markdown_says_where_it_comes_from(finished):
    text = (finished[0] / "report.md").read_text()
    for part in ("python -m prefopt.data_report model=hub", "Digests of the data: train ", "![lengths](lengths.png)"):
        assert part in text
    assert text.count("\n## ") == 9


def test_chats_count_what_the_assistant_wrote(tiny_folder, tmp_path):
    def chat(*turns):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}

    train = write(tmp_path / "chats.jsonl", [chat("QQ", "XXX", "QKQ", "Z"), chat("Q", "X"), chat("K", " ")])
    overrides = (f"dataset.train={train}", "dataset.format._target_=prefopt.data.formats.Chats")
    process = report(tiny_folder, tmp_path / "out", *overrides)
    assert process.returncode == 0, process.stderr
    found = numbers(tmp_path / "out")
    assert found["Counts", "train / chats.jsonl", "chats"] == "2"
    assert float(found["Lengths in tokens", "train / learnt", "median"]) == (6 + 2) / 2
    assert found["Lengths in tokens", "train / learnt", "max"] == "6"  # XXX and Z with their terminators
    assert found["Lengths in tokens", "train / whole chat", "limit"] == str(1800 + 1024)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "⟦XXX<|im_end|>⟧\n<|im_start|>user\nQKQ<|im_end|>\n<|im_start|>assistant\n⟦Z<|im_end|>⟧" in text
    assert "Reward gap" not in text
    assert not (tmp_path / "out" / "reward_gaps.png").exists()


def test_what_is_learnt_is_summed_over_the_chunks_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "CHUNK", 2)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "X"}]
    rows = [{"messages": [{"role": "user", "content": "Q" * i}, messages[1], *messages] * i} for i in range(1, 6)]
    file = write(tmp_path / "chats.jsonl", rows)
    dataset = DatasetConfig("chats", str(file), format={"_target_": "prefopt.data.formats.Chats"}, heldout_share=0.0)
    data = prepare_dataset(dataset, tiny_tokenizer(), Limits(60, 100), lambda split, rewards: None)["train"].pairs
    assert data.table["loss_mask"].num_chunks == 3
    assert learnt_counts(data.table).tolist() == [pair.num_loss_tokens for pair in data]


def test_small_parts():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab<|im_end|>")["input_ids"]
    assert marked(tokenizer, ids, [False, True, True]) == "a⟦b<|im_end|>⟧"
    assert marked(tokenizer, ids, [True, False, True]) == "⟦a⟧b⟦<|im_end|>⟧"
    assert shortened("abcdefgh", 4) == "ab […] gh"
    assert fenced("a ```` b").splitlines()[0] == "`````text"
    system = {"role": "system", "content": "Be brief."}
    assert prompt_key([system, {"role": "user", "content": " a\n b "}]) == "a b"


@pytest.mark.parametrize("values", [[3.0], [1, 2, 2, 5], list(range(1000)), [-0.5, 0, 0.5, 4], [0.1, 0.35, 0.7123]])
def test_bars_are_few_and_hold_everything(values):
    edges = bin_edges(np.array(values))
    assert 2 <= len(edges) <= 35
    assert edges[0] < min(values)
    assert max(values) < edges[-1]
    assert np.histogram(values, edges)[0].sum() == len(values)
    assert np.diff(edges) == pytest.approx(edges[1] - edges[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_prompt_tokens=0"], "max_prompt_tokens must be at least 1, is 0"),
        (["dataset.train=no.jsonl"], "data file no.jsonl does not exist"),
        (["evaluation_prompts=[no.json]"], "data file no.json does not exist"),
        (["evaluation_prompts=[FOLDER/odd.jsonl]"], "odd.jsonl, row 1 has no field 'prompt' or 'instruction' (its"),
        (["evaluation_prompts=[FOLDER/empty.jsonl]"], "empty.jsonl, row 1: 'prompt' is empty"),
        (["max_prompt_tokens=3"], "nothing is left of the train split"),
    ],
)
def test_bad_input_ends_in_one_message(overrides, message, tiny_folder, tmp_path):
    write(tmp_path / "odd.jsonl", [{"question": "Q"}])
    write(tmp_path / "empty.jsonl", [{"prompt": " "}])
    overrides = [o.replace("FOLDER", str(tmp_path)) for o in overrides]
    process = report(tiny_folder, tmp_path / "out", f"dataset.train={tiny_folder / 'train.jsonl'}", *overrides)
    assert process.returncode == 2, process.stderr
    assert f"error: {message}" in process.stderr or message in process.stderr.partition("error: ")[2]
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.shared
def test_real_text(tiny_folder, tmp_path):
    """Tokenized by bytes almost, and against what a loop over the file's rows finds."""
    columns = "{chosen_reward: metadata.score_chosen, rejected_reward: metadata.score_rejected}"
    process = report(
        tiny_folder, tmp_path / "out", f"dataset.train={REAL}", f"++dataset.columns={columns}",
        f"evaluation_prompts=[{REAL}]", "max_prompt_tokens=100000", "max_completion_tokens=100000",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    found, name = numbers(tmp_path / "out"), REAL.name
    assert found["Counts", f"train / {name}", "pairs"] == str(len(rows))
    gaps = [row["metadata"]["score_chosen"] - row["metadata"]["score_rejected"] for row in rows]
    assert float(found["Reward gap: chosen − rejected", "train", "median"]) == np.median(gaps)
    assert float(found["Reward gap: chosen − rejected", "train", "share tied"]) == gaps.count(0) / len(gaps)
    assert found["Overlap of prompts", f"train / {REAL}", "rows in both"] == str(len(rows))
    tokenizer = tiny_tokenizer()
    chosen = [len(tokenizer(row["chosen"])["input_ids"]) + 1 for row in rows]
    assert float(found["Lengths in tokens", "train / chosen", "median"]) == pytest.approx(np.median(chosen), abs=2)
