"""What the methods of a table do not share, and paired differences of two of them."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from prefopt.errors import UserError
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.differences import config_differences, continued_note, print_table, settings_note, sides_differ
from prefopt.reporting.paired import paired_table
from prefopt.reporting.summary import main_table, table_rows
from prefopt.tracking.archive import read_records
from prefopt.utils.files import ROOT
from prefopt.utils.stats import paired_difference
from tests.helpers.tiny import run_program


def test_a_table_says_what_its_methods_do_not_share():
    """MaPPO's small reproduction: each method has the learning rate that was best for it."""
    found = read_records(ROOT / "results" / "mini" / "mappo" / "records.jsonl")
    note = (
        "Not the same for all methods: objective.length_normalize: ipo, mappo_ipo False; mappo_simpo, simpo True. "
        "objective.nll_weight: cpo, mappo_cpo 0.2; dpo, ipo, mappo_dpo, mappo_ipo, mappo_simpo, simpo 0. "
        "optimizer.lr: cpo, mappo_cpo 2e-5; mappo_dpo, mappo_simpo 5e-5; dpo, ipo, mappo_ipo, simpo 1e-4."
    )
    assert settings_note(found) == note
    assert note in main_table(table_rows(found), found, ReportConfig("runs", "out")).markdown()


def test_what_was_swept_alike_or_changes_no_number_is_no_difference(grid):
    found = copy.deepcopy(read_records(grid[0]))
    assert "not the same" not in settings_note(found).lower().replace("length_normalize", "")
    for record in found:
        record["config"]["runs_dir"] = record["name"]
        record["config"]["optimizer"]["lr"] = record["config"]["objective"]["beta"]  # two values, the same for both
    assert settings_note(found) == settings_note(read_records(grid[0]))
    for record in found:
        record["config"]["optimizer"]["lr"] = 3e-4 if record["objective"] == "dpo" else 0.001
    assert "optimizer.lr: dpo 3e-4; mmpo 0.001" in settings_note(found)
    assert settings_note([r for r in found if r["objective"] == "dpo"]) == ""


def test_a_run_that_went_on_from_another_is_named_below_the_table(grid):
    found = copy.deepcopy(read_records(grid[0]))
    assert continued_note(found) == ""
    a, b, c, *_ = found
    a["continued_from"] = {"run": b["name"], "step": 2, "same_as_from_the_start": True}
    c["continued_from"] = {"run": "elsewhere", "step": 4, "same_as_from_the_start": False}
    note = (
        f"Not independent runs: {a['name']} goes on from {b['name']} after step 2; {c['name']} goes on from elsewhere "
        "after step 4, with another learning rate until there."
    )
    assert continued_note(found) == note
    assert note in main_table(table_rows(found), found, ReportConfig("runs", "out")).notes


def test_diff_shows_the_settings_of_both_in_eighty_columns(grid):
    found = read_records(grid[0])
    a, b = (r for r in found if r["objective"] == "dpo")
    assert config_differences(a, b).texts == [["objective.beta", "0.05", "0.5"]]
    assert config_differences(a, a).rows == []
    process = run_program(a["folder"], b["folder"], program="diff", env={"COLUMNS": "80"})
    assert process.returncode == 0, process.stderr
    assert "objective.beta" in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 80
    process = run_program(a["folder"], "nothing", program="diff")
    assert process.returncode == 2
    assert "nothing is no run's folder" in process.stderr


def test_runs_that_differ_among_themselves_are_named_whatever_their_seed(grid):
    """A method named by its objective may hold a seed with another setting; the first seed alone does not show it."""
    a = copy.deepcopy(read_records(grid[0])[:1])[0]
    runs = [json.loads(json.dumps(a)) for _ in range(4)]
    for seed, run in enumerate(runs):
        run["config"]["seed"] = seed % 2
    assert sides_differ(runs[:2], runs[2:]) == "A and B differ in no setting but the seed."
    runs[1]["config"]["optimizer"]["lr"] = 1e-4
    assert sides_differ(runs[:2], runs[2:]) == "A and B differ in optimizer.lr: A 0.001 and 1e-4, B 0.001."
    del runs[3]["config"]["sampling"]["top_p"]
    assert "sampling.top_p: A 1, B 1 and –" in sides_differ(runs[:2], runs[2:])


def test_the_held_out_pairs_are_paired_too(grid):
    """Each run keeps its margins and log-probs; margins of one objective with two β are on two scales."""
    found = read_records(grid[0])
    table = paired_table(found, ReportConfig(str(grid[0]), "out", compare=["dpo β=0.05", "dpo β=0.5"]))
    rows = {row["measure"]: row for row in table.rows}
    assert "margin" not in rows
    ends = [next(r for r in found if r["objective"] == "dpo" and r["config"]["objective"]["beta"] == b)
            ["evaluations"][-1] for b in (0.05, 0.5)]  # fmt: skip
    accuracy = rows["held-out accuracy"]
    assert (accuracy["a"], accuracy["b"]) == pytest.approx(tuple(end["accuracy"] for end in ends))
    logps = rows["log-prob, chosen less rejected (nats)"]
    expected = tuple(end["chosen_logps"] - end["rejected_logps"] for end in ends)
    assert (logps["a"], logps["b"]) == pytest.approx(expected, abs=1e-4)
    assert accuracy["n"] == logps["n"] == ends[0]["n"]
    for end, record in zip(ends, (r for r in found if r["objective"] == "dpo"), strict=True):
        lines = (Path(record["folder"]) / "heldout" / f"step_{end['step']:07d}.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["margin"] for line in lines) / len(lines) == pytest.approx(end["margin"], abs=1e-5)


def test_a_paired_difference_is_the_exact_test_of_signs():
    """Of three positive differences 2 of the 8 choices of signs are as far from 0."""
    mean, low, high, p = paired_difference(np.array([1.0, 2.0, 3.0]))
    assert (mean, p) == (2.0, 0.25)
    assert 1 <= low <= mean <= high <= 3
    drawn = np.random.default_rng(0).normal(0.5, 1, 400)
    mean, low, high, p = paired_difference(drawn)
    half = 1.96 * drawn.std(ddof=1) / 20
    assert (low, high) == (pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    assert p < 0.001
    assert paired_difference(np.zeros(3)) == (0, 0, 0, 1)
    assert math.isnan(paired_difference(np.ones(1))[3])


def test_the_report_pairs_prompts_and_seeds(grid, tmp_path):
    """A difference of 0.25 for all prompts but their own noise is seen, which the errors of the two means hide."""
    runs, template = tmp_path / "runs", json.loads(json.dumps(read_records(grid[0])[0]))
    for objective, gain in (("dpo", 0.25), ("ipo", 0.0)):
        for seed in (0, 1):
            folder = runs / f"{objective}-{seed}"
            (folder / "samples").mkdir(parents=True)
            record = template | {"objective": objective, "name": folder.name}
            record["config"] = template["config"] | {"seed": seed}
            record = {k: v for k, v in record.items() if k not in ("harness", "alpaca", "folder", "metrics")}
            (folder / "record.json").write_text(json.dumps(record))
            lines = [{"prompt": f"p{i}", "reward": i + seed + gain, "finished": True} for i in range(8)]
            lines = lines[:: 1 if gain else -1]  # another order: the prompt pairs them
            step = record["evaluations"][-1]["step"]
            (folder / "samples" / f"step_{step:07d}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = read_records(runs)
    table = paired_table(found, ReportConfig(str(runs), "out", compare=["dpo", "ipo"]))
    reward = table.rows[0]
    assert (reward["measure"], reward["n"], reward["seeds"]) == ("oracle reward", 8, 2)
    assert (reward["a"], reward["b"], reward["difference"]) == (4.25, 4.0, 0.25)
    assert (reward["low"], reward["high"], reward["p_value"]) == (0.25, 0.25, 2 / 2**8)
    assert "p 0.008" in f"p {reward['p']}"
    one = paired_table(found, ReportConfig(str(runs), "out", compare=["dpo-0", "ipo-0"]))
    assert one.rows[0]["seeds"] == 1
    for names, message in (
        (["dpo", "dpo"], "both name the same runs"), (["dpo"], "two methods or runs"),
        (["dpo", "no"], "no run or method no"), (["dpo-0", "ipo-1"], "no seed in common"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            paired_table(found, ReportConfig(str(runs), "out", compare=names))
    archived = [{k: v for k, v in record.items() if k != "folder"} for record in found]
    with pytest.raises(UserError, match="An archive"):
        paired_table(archived, ReportConfig(str(runs), "out", compare=["dpo", "ipo"]))


def test_in_a_narrow_terminal_every_block_of_a_table_names_its_rows(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    found = read_records(ROOT / "results" / "mini" / "mmpo" / "records.jsonl")
    print_table(main_table(table_rows(found), found, ReportConfig("runs", "out")))
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    betas = [line[1] for line in shown if line and line[0] in ("dpo", "mmpo", "simpo")]
    assert betas == ["0.01", "0.05", "0.1", "0.5"] * 6  # three objectives in two blocks
