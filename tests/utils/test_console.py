"""Tables fit the terminal, and nothing that tells two rows apart is cut."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from prefopt.cli.multirun import Point
from prefopt.launch.sweep import validate_points
from prefopt.reporting.labels import labels
from prefopt.utils.console import console, echo, folding_table, live, rows_table, without_common
from tests.helpers.tiny import run_program

HEADINGS = ("run", "status", "step", "accuracy", "oracle reward", "KL", "host", "age")


def shown(monkeypatch, rows, width: int = 80, headings=HEADINGS, title: str = "") -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    Console(width=width, file=out).print(rows_table(headings, rows, title))
    return out.getvalue()


def column(text: str, number: int = 0) -> str:
    """What stands in a column, its lines put together."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return "".join(line.split("│")[number + 1].strip() for line in lines)


def heads(text: str) -> list[str]:
    """The headings, their lines put together."""
    lines = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in text.splitlines() if line.startswith("┃")]
    return ["".join(cells) for cells in zip(*lines, strict=True)]


def run(objective: str, id_: str, **changes: str) -> list[str]:
    row = dict(zip(HEADINGS, ("", "finished", "8/8", "0.750", "0.612", "0.021", "a-machine", "2 h"), strict=True))
    return list((row | {"run": f"{objective}-smollm2-135m-sentiment-{id_}"} | changes).values())


def test_what_is_the_same_in_all_rows_stands_above(monkeypatch):
    rows = [run("dpo", "ab12cd34"), run("mmpo", "ffffffff", accuracy="0.812"), run("mappo_dpo", "01234567", KL="0.5")]
    text = shown(monkeypatch, rows, title="3 runs")
    head, _, body = text.partition("┏")
    assert head.splitlines() == [
        "3 runs",
        "status: finished",
        "step: 8/8",
        "oracle reward: 0.612",
        "host: a-machine",
        "age: 2 h",
    ]
    assert max(map(len, text.splitlines())) <= 80
    for name in ("dpo-smollm2-135m-sentiment-ab12cd34", "mappo_dpo-smollm2-135m-sentiment-01234567"):
        assert name in body


def test_names_that_do_not_fit_say_their_common_part_once(monkeypatch):
    rows = [
        run("dpo", "ab12cd34", status="died", step="3/8", age="3 h", host="other-machine"),
        run("mmpo", "ffffffff", **{"oracle reward": "0.1", "accuracy": "0.8", "KL": "0.5"}),
    ]
    text = shown(monkeypatch, rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "run: … is smollm2-135m-sentiment\n" in text
    assert "dpo-…-ab12cd34" in column(text)
    assert "mmpo-…-ffffffff" in column(text)
    for number, heading in enumerate(HEADINGS):
        assert heading.replace(" ", "") in heads(text)[number].replace(" ", "")


@pytest.mark.parametrize("width", [40, 60, 80, 240])
def test_nothing_is_cut(width, monkeypatch):
    labels = [f"objective=dpo objective.beta={i} optimizer.lr=1e-{i} dataset.format.pairing=best_worst" for i in (1, 2)]
    rows = [[label, f"x{i}" * 30, "from the start"] for i, label in enumerate(labels)]
    text = shown(monkeypatch, rows, width, ("job", "run folder", "what happens"))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "what happens: from the start\n" in text
    for label in labels:
        assert label.replace(" ", "") in column(text).replace(" ", "")
    for row in rows:
        assert row[1] in column(text, 1)


def test_one_row_and_none(monkeypatch):
    text = shown(monkeypatch, [run("dpo", "ab12cd34")])
    assert text.startswith("run: dpo-smollm2-135m-sentiment-ab12cd34\n")
    assert "status" in text
    assert "│ dpo-smollm2-135m-sentiment-ab12cd34 " in shown(monkeypatch, [run("dpo", "ab12cd34")], 240)
    assert "run" in shown(monkeypatch, [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dpo-m-1-d-aa", "mmpo-m-1-d-bb"], (["dpo-…-aa", "mmpo-…-bb"], "m-1-d")),
        (["dpo-m-d-aa", "mmpo-n-d-bb"], (["dpo-m-…-aa", "mmpo-n-…-bb"], "d")),
        (["dpo-m-d-aa"], (["dpo-m-d-aa"], "")),
        (["a-x", "b-y"], (["a-x", "b-y"], "")),
        (["a b-c-d", "e b-c-f"], (["a b-c-d", "e b-c-f"], "")),
        (["", ""], (["", ""], "")),
    ],
)
def test_common_parts_of_names(names, expected):
    assert without_common(names) == expected


def test_a_narrow_terminal_is_asked_for_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    assert console().width == 77


@pytest.mark.slow
def test_the_dry_run_and_the_list_of_runs_fit(overrides, grid, tmp_path):
    runs, _ = grid
    dry = run_program(
        *("-m", *overrides(tmp_path / "r"), "objective=dpo,ipo", "objective.beta=0.1,0.2", "--dry-run"),
        env={"COLUMNS": "80"},
    )
    assert dry.returncode == 0, dry.stderr
    listed = run_program(f"runs_dir={runs}", program="runs", env={"COLUMNS": "80"})
    assert listed.returncode == 0, listed.stderr
    table = [line for line in dry.stdout.splitlines() + listed.stdout.splitlines() if line.startswith(("│", "┃"))]
    assert table
    assert max(map(len, table)) <= 80
    for folder in runs.glob("*/record.json"):
        assert folder.parent.name.rpartition("-")[2] in listed.stdout
    for words in ("objective=dpo", "objective=ipo", "objective.beta=0.1", "objective.beta=0.2"):
        assert words in column(dry.stdout)
    assert "what happens: from the start" in dry.stdout


def test_a_table_of_figures_goes_on_in_the_next_line_and_cuts_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = folding_table("objective", "oracle reward ± s.e.")
    table.add_row("initial policy (a-model-with-a-long-name)", "0.550 ± 0.016")
    with (shown := console()).capture() as printed:
        shown.print(table)
    assert "…" not in printed.get()
    assert max(map(len, printed.get().splitlines())) <= 40


# What rich would take for markup, a closing tag without its opening one, and a picture.
MARKUP = [
    "[q_proj]",
    "[q_proj,v_proj]",
    "[bold]",
    "/data/[/x]/a.jsonl",
    "[link=file:///x]y[/link]",
    ":bug:",
    "[[a]]",
    "\\[b]",
]


def printed(monkeypatch, *renderables) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    terminal = console()
    assert terminal.width == 80
    terminal.file = out
    for renderable in renderables:
        terminal.print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("text", MARKUP)
def test_text_in_tables_lines_and_bars_is_text(text, monkeypatch, capsys):
    table = folding_table(text, "figure", title=f"title {text}")
    table.add_row(text, "1")
    page = printed(monkeypatch, table, rows_table((text, "b"), [(text, "1"), ("x", "2")], text, text), text)
    assert page.count(text) == 8
    echo(f"a line {text}")
    assert f"a line {text}" in capsys.readouterr().err

    out = io.StringIO()
    task = live.open_bar(f"bar {text}", 3, 0)
    try:
        live.progress.console.file = out
        live.progress.console.width = 120
        live.update_bar(task, 1, f"note {text}")
        live.progress.console.print(live.progress.make_tasks_table(live.progress.tasks))
    finally:
        live.close_bar(task)
    assert f"bar {text}" in out.getvalue()
    assert f"note {text}" in out.getvalue()


def test_two_points_of_a_sweep_have_two_labels(monkeypatch):
    values = ["[q_proj]", "[q_proj,v_proj]", "[q_proj, v_proj]", "/data/[/x]", "[/x]"]
    monkeypatch.setattr("prefopt.launch.sweep.parse", lambda cfg, schema: SimpleNamespace(launcher={}))
    monkeypatch.setattr("prefopt.launch.sweep.build", lambda *_: None)
    points = [Point(["seed=0", f"peft.target_modules={value}"], None) for value in values]
    _, found = validate_points(points, None, lambda point, label, config, launcher: label)
    assert found == [f"peft.target_modules={value}" for value in values]
    table = rows_table(("job", "folder"), [(label, str(i)) for i, label in enumerate(found)], f"5 jobs in {values[3]}")
    page = printed(monkeypatch, table)
    lines = [line for line in page.splitlines() if line.startswith("│")]
    shown_labels = [line.split("│")[1].strip() for line in lines]
    assert shown_labels == found
    assert f"5 jobs in {values[3]}" in page


@pytest.mark.parametrize(
    "configs",
    [
        [{"a": ["q_proj"]}, {"a": ["q_proj", "v_proj"]}, {"a": "['q_proj']"}],
        [{"a": "x b=y", "b": None}, {"a": "x", "b": "y"}],
        [{"a": 1}, {"a": "1"}, {"a": "None"}, {"a": None}],
    ],
)
def test_two_configs_have_two_labels(configs):
    records = [{"objective": "dpo", "config": {"objective": {"beta": 0.1}, **config}} for config in configs]
    assert len(set(labels(records))) == len(configs), labels(records)
