"""Answers side by side: the page, the terminal, and the program on two runs of the tiny model."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefopt.reporting.compare import Answer, Compared, format_answers, page, summarize
from prefopt.reporting.differences import config_differences
from prefopt.tracking.archive import read_records
from prefopt.utils.console import PlainConsole
from tests.helpers.tiny import run_program

BAD = '<script>alert("x")</script> & </pre> "quoted"'
ITEMS = [
    Compared("Same?", [Answer("Yes."), Answer("Yes."), Answer("No.")]),
    Compared("Other?", [Answer("Long and", finished=False), Answer("No."), Answer("No.")]),
]


class Texts(HTMLParser):
    """The texts of a page, and the attributes of its articles."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: list[str] = []
        self.articles: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "article":
            self.articles.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


def test_text_of_models_cannot_become_markup():
    judged = [Compared(BAD, [Answer(f"{BAD}!", reward=1.0), Answer(BAD, reward=0.0)], preference=2.0)]
    text = page([BAD, BAD], {"A": BAD}, judged, None)
    assert text.count("<script>") == text.count("</script>") == 1  # the page's own
    assert text.count("</pre>") == 2
    assert {BAD, f"{BAD}!"} <= set(Texts(text).texts)
    assert text.count(' preferred"') == 1


def test_answers_that_are_equal_or_cut_off_are_marked():
    found = Texts(page(["runs/a", "runs/b", "chosen"], {}, ITEMS, None))
    assert [article["data-marks"] for article in found.articles] == ["equal", "cut differ"]
    assert [found.texts.count(mark) for mark in ("equal", "cut off")] == [2, 1]
    assert summarize(ITEMS, ["runs/a", "runs/b", "chosen"]) == {
        "A": "runs/a",
        "B": "runs/b",
        "C": "chosen",
        "prompts": "2, of which 1 with equal answers of A and B",
        "mean length": "A 6, B 4, C 3 characters",
        "cut off": "A 1, B 0, C 0",
    }
    assert "side" not in found.articles[0]  # no judge, no preference to filter by
    judged = [Compared(item.prompt, item.answers, 2 - i) for i, item in enumerate(ITEMS)]
    assert summarize(judged, ["a", "b", "c"])["preferred"] == "A 1, B 1, neither 0"


def test_a_terminal_shows_the_answers_that_differ_in_columns(capsys):
    console = PlainConsole(width=80)
    with console.capture() as capture:
        console.print(format_answers(ITEMS, 3))
    lines = capture.get().splitlines()
    assert lines[0].strip() == "Other?"
    assert "Same?" not in capture.get()
    assert [word for word in lines if "A, cut off" in word and "B" in word and "C" in word]
    assert max(map(len, lines)) <= 80


@pytest.fixture(scope="module")
def compared(grid, tiny_folder) -> tuple[list[dict], list[str]]:
    """The records of two runs of the grid, and what prefopt.compare prints of them in a terminal of 80 columns."""
    a, b = (r for r in read_records(grid[0]) if r["objective"] == "dpo")
    arguments = ["device=cpu", "precision=float32", "sampling.max_new_tokens=4", "third=chosen", "limit=5"]
    process = run_program(
        f"run={a['folder']}", f"run={b['folder']}", *arguments, program="compare",
        env={"PREFOPT_CACHE": str(tiny_folder / "cache"), "COLUMNS": "80"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return [a, b], process.stdout.splitlines()


def test_the_program_shows_what_differs_then_the_answers(compared):
    (a, b), lines = compared
    assert lines[:2] == [f"A: {a['folder']}", f"B: {b['folder']}"]
    assert [line.split() for line in lines if line.startswith(" objective.beta")] == [["objective.beta", "0.05", "0.5"]]
    assert "C: the data's chosen completions" in lines
    assert "cut off: A 5, B 5, C 0" in lines  # four tokens end no answer of this model
    assert max(len(line) for line in lines if a["folder"] not in line and b["folder"] not in line) <= 80


def test_the_page_has_the_held_out_prompts_with_their_chosen_completions(compared, tiny_folder):
    (a, b), lines = compared
    text = Path(lines[-1]).read_text()
    found = Texts(text)
    pairs = [json.loads(line) for line in (tiny_folder / "heldout.jsonl").read_text().splitlines()][:5]
    assert len(found.articles) == 5
    assert {pair[key] for pair in pairs for key in ("prompt", "chosen")} <= set(found.texts)
    assert found.texts.count("cut off") == 11  # of ten answers, and in the list of facts
    assert config_differences(a, b).texts == [["objective.beta", "0.05", "0.5"]]
    assert {"objective.beta", "0.05", "0.5"} <= set(found.texts)
    assert "http" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["third=best"], "third must be initial, chosen or null, is 'best'"),
        (["third=chosen", "instructions=x.jsonl"], "third=chosen shows the data's chosen completions"),
        (["limit=0"], "limit must be at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(grid, arguments, message):
    run = read_records(grid[0])[0]["folder"]
    process = run_program(f"run={run}", f"run={run}", *arguments, program="compare")
    assert process.returncode == 2
    assert message in process.stderr


@pytest.mark.slow
def test_a_judges_preferences_and_the_initial_policy_stand_on_the_page(grid, tiny_folder):
    a, b = (r for r in read_records(grid[0]) if r["objective"] == "mmpo")
    arguments = ["device=cpu", "precision=float32", "sampling.max_new_tokens=12", "third=initial", "judge=reward_model"]
    process = run_program(
        f"run={a['folder']}", f"run={b['folder']}", *arguments, program="compare",
        env={"PREFOPT_CACHE": str(tiny_folder / "cache")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    text = Path(process.stdout.splitlines()[-1]).read_text()
    (file,) = Path(a["folder"]).glob("alpaca/*/annotations.json")
    rows = json.loads(file.read_text())
    assert text.count("<article ") == len(rows)
    assert text.count(' preferred"') == sum(row["preference"] != 1.5 for row in rows)
    assert "the model that A began from" in text
    told = json.loads((file.parent / "record.json").read_text())
    assert told["unfinished"]["model"] == sum(not row["finished_2"] for row in rows)
