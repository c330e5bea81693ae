"""Runs whose data set has no oracle: tables without a reward, a sentence for the figure, and the accuracy instead."""

import copy
import json
import math

import pytest

from prefopt.errors import UserError
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.curves import sensitivity
from prefopt.reporting.evaluated import main_measure
from prefopt.reporting.summary import by_column, by_column_table, main_table, measured, over_seeds_table, table_rows
from prefopt.tracking.archive import read_records
from prefopt.tracking.status import inspect_runs, status_table
from prefopt.utils.console import console
from tests.helpers.tiny import run_program

CONFIG = ReportConfig("runs", "out")


@pytest.fixture(scope="module")
def unrewarded(grid, tmp_path_factory):
    """The folder of the grid's four runs as they would be without an oracle, and one more of another seed."""
    runs = tmp_path_factory.mktemp("unrewarded")
    template = None
    for n, record in enumerate(read_records(grid[0])):
        record = {key: value for key, value in record.items() if key not in ("folder", "harness", "alpaca")}
        for row in record["evaluations"]:
            del row["oracle_reward"], row["oracle_reward_se"]
            row["n"] = 25
        record["evaluations"][-1] |= {"accuracy": 0.5 + n / 10, "tie_rate": 0.0}
        template = template or copy.deepcopy(record)
        write(runs, record)
    assert template
    template["config"]["seed"], template["name"] = 1, template["name"] + "x"
    template["evaluations"][-1]["accuracy"] = 0.7
    write(runs, template)
    return runs


def write(runs, record) -> None:
    (runs / record["name"]).mkdir()
    (runs / record["name"] / "record.json").write_text(json.dumps(record))


def test_tables_have_no_column_of_rewards_and_nothing_else_is_missing(unrewarded):
    records = read_records(unrewarded)
    table = main_table(table_rows(records), records, CONFIG)
    assert not any("reward" in heading for heading in table.headings)
    assert {"held-out accuracy ± s.e.", "KL to reference ± s.e. (nats)", "length (tokens)"} <= set(table.headings)
    place = table.headings.index("held-out accuracy ± s.e.")
    assert table.texts[0][place] == "–"  # the initial policy
    assert f"0.60 ± {math.sqrt(0.6 * 0.4 / 25):.2f}" in [cells[place] for cells in table.texts]
    assert "KL over 6 responses" in measured(records)[0]
    assert "reward" not in measured(records)[0]
    seeds = over_seeds_table(records, CONFIG)
    assert seeds
    assert not any("reward" in heading for heading in seeds.headings)


def test_where_some_run_has_a_reward_the_others_have_dashes(unrewarded, grid):
    records = [*read_records(unrewarded)[:1], *read_records(grid[0])[1:]]
    table = main_table(table_rows(records), records, CONFIG)
    cells = [texts[table.headings.index("oracle reward ± s.e.")] for texts in table.texts[-4:]]
    assert cells[0] == "–"
    assert all("±" in cell for cell in cells[1:])
    with pytest.raises(UserError, match="has no oracle reward: it fits no column"):
        by_column(records, "objective.beta")


def test_the_accuracy_stands_for_the_reward(unrewarded):
    records = read_records(unrewarded)
    assert main_measure(records) == ("accuracy", "held-out accuracy")
    (pooled,) = (row for row in by_column(records, "objective.beta") if row["n"] == 2)
    assert pooled["method"].startswith("dpo")
    assert pooled["mean"] == pytest.approx(0.6)
    errors = [math.sqrt(share * (1 - share) / 25) for share in (0.5, 0.7)]
    assert pooled["over_prompts"] == pytest.approx(sum(errors) / 2)
    table = by_column_table(records, "objective.beta", "command")
    assert table.title == "Final held-out accuracy by objective.beta"
    assert "25 held-out pairs" in table.notes[0]
    curves = sensitivity(records, "objective.beta")
    assert [value for value, *_ in curves["mmpo"]] == [0.05, 0.5]


def test_the_program_says_why_there_is_no_figure(unrewarded, tmp_path):
    process = run_program(f"runs_dir={unrewarded}", f"output={tmp_path}", program="report")
    assert process.returncode == 0, process.stderr
    assert "No figure of reward over KL: no run has a reward" in process.stdout
    assert not list(tmp_path.glob("reward_kl*"))


def test_runs_shows_rewards_only_where_there_are_some(unrewarded, grid):
    def shown(*folders) -> str:
        screen = console()
        with screen.capture() as captured:
            screen.print(status_table(inspect_runs(list(folders))))
        return captured.get()

    ours, theirs = (sorted(f.parent for f in runs.glob("*/record.json")) for runs in (unrewarded, grid[0]))
    assert "reward" not in shown(*ours)
    assert "reward" in shown(*ours, *theirs)
