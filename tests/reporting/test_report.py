"""Tables and figures from the records of the tiny grid."""

import csv
import json
import math

import pytest

from prefopt.reporting.config import ReportConfig
from prefopt.reporting.labels import labels
from prefopt.reporting.summary import main_table, over_seeds, table_rows
from prefopt.tracking.archive import read_records
from tests.helpers.tiny import records, run_program


@pytest.fixture(scope="module")
def report(grid, tmp_path_factory):
    runs, _ = grid
    output = tmp_path_factory.mktemp("report")
    return runs, output, run_program(f"runs_dir={runs}", f"output={output}", program="report")


def test_it_prints_the_table_and_last_the_paths(report):
    _, output, process = report
    assert process.returncode == 0, process.stderr
    names = ["table.md", "table.csv", "table.tex", "reward_kl.png", "reward_kl.svg", "reward_kl.pdf", "records.jsonl"]
    assert process.stdout.splitlines()[-7:] == [str(output / name) for name in names]
    assert "oracle reward" in process.stdout
    assert process.stderr == ""


def test_the_csv_holds_the_records_numbers(report):
    runs, output, _ = report
    with (output / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["objective"], r["beta"]) for r in rows[1:]] == [
        ("dpo", "0.05"), ("dpo", "0.5"), ("mmpo", "0.05"), ("mmpo", "0.5")
    ]  # fmt: skip
    by_name = {r["name"]: r["evaluations"] for r in records(runs)}
    for row in rows[1:]:
        first, last = by_name[row["run"]][0], by_name[row["run"]][-1]
        assert float(row["oracle_reward"]) == last["oracle_reward"]
        assert float(row["kl_se"]) == last["kl_se"]
        assert float(row["chosen_logps_drift"]) == pytest.approx(last["chosen_logps"] - first["chosen_logps"])
    assert rows[0]["objective"] == "initial policy (model)"
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-4)


def test_the_markdown_says_where_it_comes_from(report):
    _, output, _ = report
    text = (output / "table.md").read_text()
    assert text.startswith("**The runs at their end**")
    assert text.count("\n| ") == 7
    for part in ("python -m prefopt.report", "Machine: ", "Commit: ", "torch ", "± "):
        assert part in text


def test_the_figure_has_its_labels(report):
    _, output, _ = report
    assert (output / "reward_kl.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (output / "reward_kl.svg").read_text()


def test_a_pattern_takes_the_runs_of_several_folders(grid, tmp_path):
    runs, _ = grid
    folders = sorted(file.parent for file in runs.glob("*/record.json"))
    for place, taken in (("one", folders[:2]), ("only", folders[2:]), ("two", folders[:1])):
        (tmp_path / place).mkdir()
        for folder in taken:
            (tmp_path / place / folder.name).symlink_to(folder)
    output = tmp_path / "report"
    process = run_program(f"runs_dir={tmp_path}/o*", f"output={output}", program="report")
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((output / "table.csv").open()))
    assert {row["run"] for row in rows if row["run"]} >= {folder.name for folder in folders}
    assert f"'runs_dir={tmp_path}/o*'" in (output / "table.md").read_text()


def test_runs_that_differ_elsewhere_are_told_apart(grid, tmp_path):
    runs, _ = grid
    for seed, record in enumerate(records(runs)[:2]):
        record["config"]["seed"], record["config"]["objective"]["beta"] = seed, 0.1
        record["name"] += str(seed)
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "record.json").write_text(json.dumps(record))
    found = read_records(tmp_path)
    assert labels(found) == ["dpo β=0.1 seed=0", "dpo β=0.1 seed=1"]
    assert [row["objective"] for row in table_rows(found)][-2:] == ["dpo seed=0", "dpo seed=1"]


def test_a_whole_number_is_the_same_value_however_it_is_written(grid):
    runs, _ = grid
    found = read_records(runs)[:2]
    for record, steps in zip(found, (2, 2.0), strict=True):
        record["config"]["objective"]["beta"], record["config"]["steps"] = 0.1, steps
    assert labels(found) == ["dpo β=0.1", "dpo β=0.1"]


def test_unfinished_runs_are_left_out_and_named(grid, tmp_path, capsys):
    runs, _ = grid
    for i, status in enumerate(["finished", "failed"]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "record.json").write_text(json.dumps(records(runs)[0] | {"status": status}))
    assert len(read_records(tmp_path)) == 1
    assert "is failed" in capsys.readouterr().err.replace("\n", "")


def test_runs_without_evaluation_have_dashes(grid):
    runs, _ = grid
    record = read_records(runs)[0] | {"evaluations": []}
    (row,) = table_rows([record])
    assert row["oracle_reward"] is None
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())


def test_reward_models_have_their_loss_and_calibration_and_no_columns_of_a_policys(grid, tmp_path):
    runs, _ = grid
    record = json.loads(json.dumps(records(runs)[0])) | {"objective": "reward", "name": "reward-0"}
    record["config"]["objective"].pop("beta")
    ends = [{"step": s, "loss": loss, "accuracy": a, "n": 64, "calibration_error": 0.1} for s, loss, a in
            ((0, 0.6931, 0.0), (8, 0.6637, 0.656))]  # fmt: skip
    record["evaluations"] = ends
    (tmp_path / "reward-0").mkdir()
    (tmp_path / "reward-0" / "record.json").write_text(json.dumps(record))
    found = read_records(tmp_path)
    table = main_table(table_rows(found), found, ReportConfig(str(tmp_path), "out"))
    assert table.headings == ["objective", "held-out accuracy ± s.e.", "held-out loss", "calibration error"]
    assert table.texts == [
        ["initial policy (model)", "–", "0.693", "0.100"],
        ["reward", "0.66 ± 0.06", "0.664", "0.100"],
    ]
    assert table.notes == [
        "Accuracy over 64 held-out pairs, where a tie is not right. ± is one standard error over these. One training "
        "seed per run."
    ]
    # An initial policy of which nothing was measured is no row.
    found[0]["evaluations"] = [{k: v for k, v in e.items() if k in ("step", "accuracy", "n")} for e in ends]
    table = main_table(table_rows(found), found, ReportConfig(str(tmp_path), "out"))
    assert (table.headings, table.texts) == (
        ["objective", "held-out accuracy ± s.e."],
        [["reward", "0.66 ± 0.06"]],
    )


def test_a_table_with_a_column_for_each_value_of_a_key(grid, tmp_path):
    """Runs that differ in their seed alone are one cell."""
    runs, _ = grid
    template = records(runs)[0]
    rewards = {("dpo", 1): [0.5, 0.7, 0.9], ("dpo", 2): [0.6], ("beta_dpo", 1): [0.2, 0.4]}
    for (name, steps), values in rewards.items():
        for seed, value in enumerate(values):
            record = json.loads(json.dumps(template)) | {"objective": name, "name": f"{name}-{steps}-{seed}"}
            record["config"] |= {"seed": seed, "steps": steps}
            record["config"]["objective"]["beta"] = 0.1
            record["evaluations"][-1]["oracle_reward"] = value
            (tmp_path / record["name"]).mkdir()
            (tmp_path / record["name"] / "record.json").write_text(json.dumps(record))
    for row in over_seeds(read_records(tmp_path)):
        if row["method"] == "dpo β=0.1 steps=1":
            assert (row["n"], row["oracle_reward"]) == (3, pytest.approx(0.7))
            assert row["oracle_reward_se"] == pytest.approx(0.2 / 3**0.5)
            assert row["kl_se"] == 0
        elif row["method"] == "dpo β=0.1 steps=2":
            assert (row["n"], row["oracle_reward_se"]) == (1, None)
        else:
            assert (row["method"], row["n"]) == ("beta_dpo β=0.1", 2)
    command = [f"runs_dir={tmp_path}", f"output={tmp_path / 'out'}", "columns=steps"]
    process = run_program(*command, program="report", env={"COLUMNS": "80"})
    assert process.returncode == 0, process.stderr
    assert max(map(len, process.stdout.partition(str(tmp_path))[0].splitlines())) <= 80
    assert "0.700 ± 0.115 (n 3)" in process.stdout  # a number stays in one line
    assert "| dpo β=0.1 steps=1 | 3 | " in (tmp_path / "out" / "over_seeds.md").read_text()
    lines = (tmp_path / "out" / "by_column.md").read_text().splitlines()
    assert lines[:3] == ["**Final oracle reward by steps**", "", "| method | 1 | 2 |"]
    assert lines[4:6] == [
        "| beta_dpo β=0.1 | 0.300 ± 0.100 (n 2) | – |",
        "| dpo β=0.1 | 0.700 ± 0.115 (n 3) | 0.600 (n 1) |",
    ]
    assert f"output={tmp_path / 'out'} columns=steps`" in lines[-3]
    with (tmp_path / "out" / "by_column.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["steps"]) for r in rows] == [
        ("beta_dpo β=0.1", "1"),
        ("dpo β=0.1", "1"),
        ("dpo β=0.1", "2"),
    ]
    assert [float(r["mean"]) for r in rows] == pytest.approx([0.3, 0.7, 0.6])
    process = run_program(*command[:2], "columns=dataset.format.quality", program="report")
    assert process.returncode == 2
    assert "has no dataset.format.quality" in process.stderr
