"""Tables, figures and pages of the papers from records that the tests write."""

import csv
import html
import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.evaluation.results import PAPER_JUDGES
from prefopt.reporting.config import PapersConfig, ReportConfig
from prefopt.reporting.curves import (
    Point,
    best_points,
    drift,
    normal_range,
    paths,
    points_of,
    sensitive_keys,
    sensitivity,
    sft_accuracy,
    spreads,
)
from prefopt.reporting.differences import settings_note
from prefopt.reporting.evaluated import aggregate_seeds, metric_of, model_names, read_evaluated
from prefopt.reporting.figures import draw_drift
from prefopt.reporting.html import page
from prefopt.reporting.labels import labels
from prefopt.reporting.mappo import academic_table, gaps_table, mappo
from prefopt.reporting.mmpo import as_published, mmpo, peak_tables
from prefopt.reporting.paired import paired_table
from prefopt.reporting.published import join_published, matches_published, published_points, read_csv
from prefopt.reporting.summary import evaluation_columns, main_table, table_rows
from prefopt.reporting.tables import Column, Tabular
from prefopt.tracking.archive import MACHINE_KEYS, read_records, write_archive
from prefopt.tracking.metrics import GAPS
from prefopt.utils.store import format_sealed_line
from tests.helpers.tiny import ROOT, run_program

PUBLISHED = str(ROOT / "results" / "published")
SFT = "5f" * 32
GPT, HAIKU = PAPER_JUDGES


def write(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def train(runs: Path, objective: str, beta: float | None = 0.1, seed: int = 0, **changes) -> Path:
    """A finished run of 20 steps of 8 over 32 pairs: 5 epochs. Its held-out log-probs fall by a nat a step, times
    1 + seed, on the chosen side, and by twice that on the rejected one."""
    config = {
        "model": {"name": "policy", "path": "runs/sft/policy", "revision": None},
        "dataset": {"name": "pairs", "format": {"quality": changes.pop("quality", "high")}},
        "objective": {"beta": beta, **changes.pop("hyperparameters", {})} if beta is not None else {},
        "steps": 20,
        "batch_size": 8,
        "seed": seed,
        "precision": "float32",
    }
    folder = runs / (changes.get("name") or f"{objective}-{beta}-{seed}-{len(list(runs.glob('*')))}")
    fall = 1 + seed
    rows = [
        {
            "step": step,
            "n": 16,
            "chosen_logps": -50 - fall * step,
            "rejected_logps": -40 - 2 * fall * step,
            "samples": 4,
        }
        | {"oracle_reward": 0.5 + step / 100 + seed / 10, "oracle_reward_se": 0.01, "kl": step, "kl_se": 0.1}
        for step in (0, 10, 20)
    ]
    record = {
        "name": folder.name,
        "objective": objective,
        "status": "finished",
        "config": config,
        "command": f"python -m prefopt.train objective={objective}",
        "git": {"commit": "c0ffee" * 7, "dirty": False},
        "versions": {"torch": "2", "transformers": "5"},
        "machine": {"processor": "P", "instructions": "I", "cores": 2, "memory_gib": 8, "gpus": []},
        "initial_weights": SFT,
        "final_weights": "ff" * 32,
        "data": {"train": {"items": 32}},
        "evaluations": rows,
        "seconds": 60.0,
    }
    write(folder / "record.json", record | changes)
    return folder


def sft(runs: Path) -> Path:
    model = {"name": "SmolLM2-135M", "path": "hub", "revision": None}
    folder = train(runs, "sft", None, initial_weights="00" * 32, final_weights=SFT)
    record = json.loads((folder / "record.json").read_text())
    record["config"]["model"] = model
    write(folder / "record.json", record)
    return folder


def harness(
    folder: Path, step: int, acc: float, task: str = "arc_easy", stderr: float | None = 0.03, **settings
) -> None:
    how = {"chat_template": False, "num_fewshot": None, "limit": None, "batch_size": 1} | settings
    name = "final" if step == 20 else f"step_{step:07d}"
    told = {"checkpoint": name, "step": step, "task": task, "settings": how, "git": None, "weights": "aa"}
    digest = abs(hash(json.dumps(how)))
    metrics = {"acc": {"value": acc, "stderr": stderr}}
    write(folder / "harness" / f"{name}-{task}-{digest}.json", told | {"metrics": metrics})


def alpaca(
    folder: Path, step: int, rate: float, judge: str = GPT, error: float = 1.5, lc: float | None = None, **changes
) -> None:
    name = "final" if step == 20 else f"step_{step:07d}"
    figures = {"n": 805, "win_rate": rate, "standard_error": error}
    if lc is not None:
        figures |= {"length_controlled_win_rate": lc, "lc_standard_error": error}
    base = {"name": "policy-initial", "path": "initial", "weights": changes.get("weights", SFT)}
    settings = {
        "revision": None,
        "instructions": changes.get("questions", "ab" * 32),
        "sampling": {"temperature": changes.get("temperature", 0.0), "batch_size": changes.get("batch_size", 8)},
    }
    told = {"checkpoint": name, "step": step, "judge": {"name": judge}, "baseline": base, "figures": figures}
    where = f"{name}-policy-initial-{judge}-{changes.get('questions', '')[:4]}"
    write(folder / "alpaca" / where / "record.json", told | {"settings": settings, "git": None})


def judged(folder: Path, kind: str, figure: float, metric: str, rows: list[dict], **settings) -> None:
    """A result of prefopt.mtbench or prefopt.arena for a run's final policy."""
    key = {"mtbench": "score", "arena": "win_rate"}[kind]
    figures = {"n": len(rows), "missing": 0, key: figure, "standard_error": 0.25}
    told = {"checkpoint": "final", "step": 20, "metric": metric, "judge": {"name": "j"}, "figures": figures}
    settings = {"judge": {"name": "j"}, "version": "v0.1"} | settings
    place = folder / kind / f"final-j-{abs(hash(metric))}"
    write(place / "record.json", told | {"baseline": {"name": "b"}, "settings": settings, "git": None})
    (place / "judgments.jsonl").write_text("".join(map(format_sealed_line, rows)))


def ratings(*scores: int) -> list[dict]:
    return [{"question_id": 81 + i, "turn": turn, "score": s} for i, s in enumerate(scores) for turn in (1, 2)]


def games(*verdicts: str | None) -> list[dict]:
    return [{"uid": str(i), "games": [{"score": v}, {"score": "A=B"}]} for i, v in enumerate(verdicts)]


def config(runs: Path | None, output: Path, **changes) -> PapersConfig:
    fields = {"paper": "mmpo", "runs_dir": runs and str(runs), "output": str(output), "published": PUBLISHED}
    return PapersConfig(**fields | changes)


def points(runs: Path, **changes) -> list[Point]:
    records = read_records(runs)
    found = read_evaluated(records, config(runs, runs, **changes))
    return points_of(found, metric_of(found), model_names(records))


@pytest.fixture
def grid(tmp_path) -> Path:
    """SFT, and DPO and MMPO at two betas, evaluated at epochs 2.5 and 5 on two tasks and by one judge."""
    runs = tmp_path / "runs"
    start = sft(runs)
    harness(start, 20, 0.30, "arc_easy")
    harness(start, 20, 0.40, "piqa", stderr=0.04)
    rates = {("dpo", 0.1): (60, 40), ("dpo", 0.5): (50, 20), ("mmpo", 0.1): (55, 65), ("mmpo", 0.5): (56, 66)}
    for (method, beta), both in rates.items():
        folder = train(runs, method, beta)
        for step, rate in zip((10, 20), both, strict=True):
            alpaca(folder, step, rate - 1, lc=rate)
            harness(folder, step, rate / 100 - 0.1)
            harness(folder, step, rate / 100, "piqa", stderr=0.04)
    return runs


def test_points_are_the_records_figures(grid):
    found = points(grid)
    assert len(found) == 8
    assert {p.model for p in found} == {"SmolLM2-135M"}  # that of the SFT run whose weights they began from
    assert [(p.method, p.beta, p.epoch, p.win_rate) for p in found[:3]] == [
        ("dpo", 0.1, 2.5, (60, 1.5)),
        ("dpo", 0.1, 5.0, (40, 1.5)),
        ("dpo", 0.5, 2.5, (50, 1.5)),
    ]
    assert found[0].accuracy == pytest.approx((55, 2.5))  # errors of 3 and 4 over two tasks: 5 / 2
    assert [p.accuracy[0] for p in points(grid, tasks="piqa")[:2]] == pytest.approx([60, 40])


def test_paths_go_through_the_epochs(grid):
    found = paths(reversed(points(grid)))
    assert set(found) == {("SmolLM2-135M", method, beta) for method in ("dpo", "mmpo") for beta in (0.1, 0.5)}
    assert [(p.epoch, p.win_rate[0]) for p in found["SmolLM2-135M", "mmpo", 0.5]] == [(2.5, 56), (5.0, 66)]


def test_the_sft_accuracy_is_that_of_the_run_they_began_from(grid):
    records = read_records(grid)
    found = sft_accuracy(read_evaluated(records, config(grid, grid)), model_names(records))
    assert found == {"SmolLM2-135M": pytest.approx((35, 2.5))}
    others = [r | {"initial_weights": "11" * 32} for r in records]
    assert sft_accuracy(read_evaluated(others, config(grid, grid)), model_names(others)) == {}
    assert set(model_names(others).values()) == {"policy", "SmolLM2-135M"}
    named = [r | {"config": r["config"] | {"model": {"name": "mine", "path": "runs/sft/policy"}}} for r in records]
    assert set(model_names(named).values()) == {"mine"}  # a name that was given stays


def test_a_pattern_reads_several_folders_and_each_run_once(tmp_path):
    for part in ("a", "b"):
        alpaca(train(tmp_path / part, "dpo", 0.1 if part == "a" else 0.5), 20, 50)
        alpaca(train(tmp_path / part, "dpo", 0.9, name="the same"), 20, 60)
    process = run_program("paper=mmpo", f"runs_dir={tmp_path}/*", f"output={tmp_path / 'out'}", program="papers")
    assert process.returncode == 0, process.stderr
    with (tmp_path / "out" / "mmpo_policies.csv").open() as stream:
        assert [r["win_rate"] for r in csv.DictReader(stream)] == ["50", "50", "60"]


def test_seeds_are_pooled(tmp_path):
    for seed, rate in enumerate((50, 54)):
        folder = train(tmp_path, "dpo", seed=seed)
        alpaca(folder, 20, rate)
        if seed:
            alpaca(folder, 10, rate)  # the other seed lacks it
    (point,) = points(tmp_path)
    assert (point.epoch, point.seeds, point.accuracy) == (5.0, 2, None)
    assert point.win_rate == pytest.approx((52, math.hypot(2, 1.5)))  # sd of 50, 54 over the root of 2; their own
    assert aggregate_seeds([(50, None), (54, None)]) == pytest.approx((52, 2))
    assert aggregate_seeds([(50, 1.5)]) == (50, 1.5)
    assert aggregate_seeds([(50, 1.5), None]) is None


def test_a_policy_for_each_seed_is_a_part_of_the_seed(tmp_path):
    """Seeds that begin with a policy and data of their own are one method's, judged against their own policies."""
    for method, rates in {"dpo": (50, 54), "ipo": (60, 66)}.items():
        for seed, rate in enumerate(rates):
            of_seed = {"initial_weights": f"{seed}0" * 32}
            folder = train(tmp_path, method, seed=seed, name=f"{method}-{seed}", **of_seed)
            record = json.loads((folder / "record.json").read_text())
            record["config"]["model"]["path"] = f"runs/seeds/{seed}/policy"
            record["config"]["dataset"]["train"] = f"runs/seeds/{seed}/scored.jsonl"
            write(folder / "record.json", record)
            alpaca(folder, 20, rate, weights=of_seed["initial_weights"])
            harness(folder, 0, 0.3 + seed / 10, stderr=None)
    assert [(p.method, p.seeds, p.win_rate[0]) for p in points(tmp_path) if p.epoch == 5] == [
        ("dpo", 2, 52),
        ("ipo", 2, 63),
    ]
    records = read_records(tmp_path)
    assert labels(records) == [f"{method} β=0.1 seed={seed}" for method in ("dpo", "ipo") for seed in (0, 1)]
    assert settings_note(records[:3]) == ""  # a method with fewer seeds does not differ in its paths
    found = sft_accuracy(read_evaluated(records, config(tmp_path, tmp_path)), model_names(records))
    assert found == {"policy": (pytest.approx(35), pytest.approx(5))}  # of 30 and 40

    folder = tmp_path / "ipo-1"  # but not where one of the seed's methods was judged against another policy
    shutil.rmtree(folder / "alpaca")
    alpaca(folder, 20, 66, weights="ee" * 32)
    with pytest.raises(UserError, match="baseline of policy at seed 1"):
        points(tmp_path)


def test_a_path_that_names_no_seed_tells_runs_apart(tmp_path):
    for seed, path in enumerate(("runs/a/policy", "runs/b/policy")):
        record = json.loads((train(tmp_path, "dpo", seed=seed) / "record.json").read_text())
        record["config"]["model"]["path"] = path
        write(tmp_path / record["name"] / "record.json", record)
    found = labels(read_records(tmp_path), without=("seed",))
    assert found == ["dpo β=0.1 model.path=runs/a/policy", "dpo β=0.1 model.path=runs/b/policy"]


def test_two_judges_of_the_paper_have_a_mean(tmp_path):
    folder = train(tmp_path, "dpo")
    alpaca(folder, 20, 40, GPT, lc=44, error=1.0)
    alpaca(folder, 20, 60, HAIKU, lc=66, error=2.0)
    assert points(tmp_path)[0].win_rate == (55, 1.5)
    assert points(tmp_path, judge_name=HAIKU)[0].win_rate == (66, 2.0)
    alpaca(folder, 20, 60, "another", lc=66)
    with pytest.raises(UserError, match="Choose one: judge_name=NAME"):
        points(tmp_path)


def test_length_control_is_for_all_or_for_none(tmp_path):
    for seed, lc in enumerate((44.0, None)):
        alpaca(train(tmp_path, "dpo", seed=seed), 20, 40, lc=lc)
    metric = metric_of(read_evaluated(read_records(tmp_path), config(tmp_path, tmp_path)))
    assert metric.name == "win rate"
    assert GPT in metric.about
    assert "805 questions" in metric.about
    assert points(tmp_path)[0].win_rate[0] == 40


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: alpaca(f, 20, 50, HAIKU), f"judges: {GPT} (.*); {HAIKU} "),
        (lambda f: alpaca(f, 20, 50, weights="11" * 32), r"baseline of policy: weights 5f.*; weights 11"),
        (lambda f: alpaca(f, 20, 50, questions="cd" * 32), r"questions: abab.*; cdcd"),
        (lambda f: alpaca(f, 20, 50, temperature=1.0), r"sampling: temperature 0.0 .*; temperature 1.0"),
        (lambda f: (alpaca(f, 20, 50), harness(f, 20, 0.5, "piqa")), r"tasks: arc_easy .*; piqa"),
        (lambda f: (alpaca(f, 20, 50), harness(f, 20, 0.5, limit=10)), r"limit: None .*; 10 "),
        (lambda f: (alpaca(f, 20, 50), harness(f, 20, 0.5, chat_template=True)), r"chat_template: False .*; True "),
        (lambda f: (alpaca(f, 20, 50), alpaca(f, 20, 51, questions="ab" * 32)), "two records of one policy"),
        (lambda f: (harness(f, 20, 0.5), harness(f, 20, 0.6, batch_size=2)), "task arc_easy has two records"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, change, named):
    first, second = train(tmp_path, "dpo"), train(tmp_path, "mmpo")
    alpaca(first, 20, 40)
    harness(first, 20, 0.4)
    change(second)
    with pytest.raises(UserError, match="cannot share a figure") as refused:
        points(tmp_path)
    assert re.search(named, str(refused.value)), refused.value
    assert str(second) in str(refused.value)


def test_other_batches_of_answers_are_the_same_comparison(tmp_path):
    alpaca(train(tmp_path, "dpo"), 20, 40)
    alpaca(train(tmp_path, "mmpo"), 20, 50, batch_size=32)
    assert len(points(tmp_path)) == 2


def test_what_is_asked_for_and_missing_is_named(tmp_path):
    first = train(tmp_path, "dpo")
    harness(first, 20, 0.5)
    harness(first, 20, 0.5, "piqa")
    harness(train(tmp_path, "ipo"), 20, 0.5)
    alpaca(first, 20, 50)
    with pytest.raises(UserError, match=r"no record of piqa beside .*ipo.*, 1 such"):
        points(tmp_path, tasks=["arc_easy", "piqa"])
    with pytest.raises(UserError, match=r"tasks: no record in .* has race. There is arc_easy, piqa"):
        points(tmp_path, tasks=["arc_easy", "race"])
    with pytest.raises(UserError, match=f"judge_name: .* has {HAIKU}. There is {GPT}"):
        points(tmp_path, judge_name=HAIKU)
    with pytest.raises(UserError, match=r"baseline_name: .* has gpt4. There is policy-initial"):
        points(tmp_path, baseline_name="gpt4")


def test_of_equal_peaks_the_earliest_and_of_the_smallest_beta():
    def point(beta, epoch, accuracy, rate):
        return Point("m", "dpo", beta, epoch, (accuracy, None), rate and (rate, None))

    made = [point(0.1, 2, 30, 50), point(0.5, 1, 30, 50), point(0.1, 1, 30, 50), point(0.1, 3, 29, 49)]
    for by in ("accuracy", "win_rate"):
        (found,) = best_points(made, by)
        assert (found.beta, found.epoch) == (0.1, 1)
    (found,) = best_points([*made, point(0.5, 5, 99, None), point(0.5, 4, 28, 51)], "accuracy")
    assert found.accuracy[0] == 30  # the best one has no win rate to show
    (found,) = best_points([*made, point(0.5, 4, 28, 51)], "win_rate")
    assert found.epoch == 4


def test_the_peak_tables_hold_ours_and_where_the_metric_is_the_same_theirs_and_the_difference(grid):
    both = {"accuracy", "win_rate"}
    (one, _), (two, published) = (
        peak_tables(points(grid), PUBLISHED, by, both, [], []) for by in ("accuracy", "win_rate")
    )
    theirs = {(r["method"], r["selected_by"]): r for r in read_csv(PUBLISHED, "mmpo_tables_1_2.csv")[::-1]
              if r["model"] == "smollm2-135m"}  # fmt: skip
    for table, selected in ((one, "peak_lm_accuracy"), (two, "peak_win_rate")):
        assert [r["method"] for r in table.rows] == ["dpo", "mmpo"]
        row = table.rows[1]
        paper = theirs["mmpo", selected]
        assert (row["model"], row["beta"], row["epoch"]) == ("SmolLM2-135M", 0.5, 5.0)
        assert (row["paper_accuracy"], row["paper_win_rate"]) == (paper["lm_accuracy"], paper["lc_win_rate"])
        assert row["win_rate_difference"] == pytest.approx(66 - float(paper["lc_win_rate"]))
        assert (row["accuracy_se"], row["win_rate_se"]) == pytest.approx((2.5, 1.5))
    assert (
        "| SmolLM2-135M | mmpo | 0.5 | 5 | 1 | 61.00 ± 2.50 | 34.08 | +26.92 | 66.00 ± 1.50 | 68.09 | -2.09 |"
        in two.markdown()
    )
    assert published.headings == ["model", "method", "lm accuracy", "lc win rate"]
    ours, _ = peak_tables(points(grid), PUBLISHED, "win_rate", {"win_rate"}, [], [])
    assert "paper: LM accuracy" not in ours.headings
    assert "paper: win rate" in ours.headings
    ours, _ = peak_tables(points(grid), PUBLISHED, "win_rate", set(), [], [])
    assert not any("paper" in text or "Paper" in text for text in [*ours.headings, *ours.notes])


def test_a_metric_is_the_papers_where_tasks_judges_and_length_control_are(grid):
    """One judge alone is not the mean of two, nor are two tasks the paper's ten."""
    for judges, same in (((GPT,), set()), ((GPT, HAIKU), {"win_rate"})):
        for folder in grid.glob("[!s]*") if HAIKU in judges else ():
            for step in (10, 20):
                alpaca(folder, step, 50, HAIKU, lc=50)
        records = read_records(grid)
        found = read_evaluated(records, config(grid, grid))
        assert as_published(metric_of(found), found) == same


def test_the_published_values_arrive_unchanged():
    with (Path(PUBLISHED) / "mmpo_epochs_gpt4o_mini.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = published_points(PUBLISHED)
    assert len(found) == 220  # 3 models, 3 methods, 5 betas (one cell of 4), 5 epochs
    for point in found:
        own = [
            r for r in rows
            if (r["model"], r["method"], float(r["beta"]), float(r["epoch"]))
            == (point.model, point.method, point.beta, point.epoch)
            and (r["length_normalized"], r["entropy"]) in (("no", "no"), ("no", ""))
        ]  # fmt: skip
        assert [(float(r["lc_win_rate"]), None) for r in own] == [point.win_rate]
    (table,) = peak_tables([], PUBLISHED, "win_rate", set(), [], [])
    given = [r for r in read_csv(PUBLISHED, "mmpo_tables_1_2.csv") if r["selected_by"] == "peak_win_rate"]
    assert [r["lc_win_rate"] for r in table.rows] == [r["lc_win_rate"] for r in given]
    assert [line[2] for line in table.texts] == [r["lm_accuracy"] for r in given]


def test_the_spread_is_the_range_over_beta_at_the_last_shared_epoch(grid):
    rows = {r["method"]: r for r in spreads(points(grid), "ours")}
    assert (rows["dpo"]["spread"], rows["mmpo"]["spread"]) == (20, 1)
    assert rows["dpo"]["se"] == pytest.approx(1.5 * math.sqrt(2))
    assert rows["dpo"]["noise"] == pytest.approx(1.5 * 2 / math.sqrt(math.pi), rel=1e-4)
    longer = [*points(grid), Point("SmolLM2-135M", "dpo", 0.1, 9.0, None, (99.0, None))]
    assert {r["method"]: r["epoch"] for r in spreads(longer, "ours")}["dpo"] == 5
    published = {(r["model"], r["method"]): r["spread"] for r in spreads(published_points(PUBLISHED), "published")}
    assert published["smollm2-135m", "mmpo"] == pytest.approx(68.80 - 66.36)
    assert [normal_range(n) for n in (1, 2, 3)] == pytest.approx([0, 2 / math.pi**0.5, 3 / math.pi**0.5], abs=1e-4)


def test_published_rows_are_matched_by_model_and_method():
    assert matches_published(("SmolLM2-135M", "mmpo margin=0.8"), {"model": "smollm2-135m", "method": "mmpo"})
    assert matches_published(("Llama-3.2-1B", "mappo_dpo"), {"model": "llama3.2-1b", "method": "dpo+mappo"})
    assert not matches_published(("SmolLM2-135M-Instruct", "mmpo"), {"model": "smollm2-135m", "method": "mmpo"})
    assert not matches_published(("m", "dpo"), {"model": "m", "method": "dpo+mappo"})
    ours, theirs = [{"model": "m", "method": "dpo"}], [{"model": "m", "method": "ipo"}, {"model": "m", "method": "dpo"}]
    assert join_published(ours, theirs) == [(ours[0], theirs[1]), ({"model": "m", "method": "ipo"}, theirs[0])]


def test_the_drift_is_the_change_since_the_start_over_seeds(tmp_path):
    for seed in (0, 1, 2):
        train(tmp_path, "mappo_dpo", seed=seed)
    train(tmp_path, "dpo", seed=0)
    found = drift(read_records(tmp_path), "rejected")
    assert found["mappo_dpo β=0.1"][0] == (0, 0, 0)
    step, mean, error = found["mappo_dpo β=0.1"][-1]
    assert (step, mean) == (20, -80)  # 20, 40 and 60 nats, twice
    assert error == pytest.approx(40 / math.sqrt(3))
    assert found["dpo β=0.1"] == [(0, 0, None), (10, -20, None), (20, -40, None)]
    assert len(draw_drift(read_records(tmp_path), tmp_path, "drift")) == 3


def test_the_sensitivity_is_over_what_was_varied(tmp_path):
    for c_max in (2, 4):
        for seed in (0, 1):
            train(tmp_path, "madpo", seed=seed, hyperparameters={"c_max": c_max, "tau": 6.9, "c_min": None})
    train(tmp_path, "dpo")
    records = read_records(tmp_path)
    assert sensitive_keys(records) == ["objective.c_max"]
    found = sensitivity(records, "objective.c_max")
    assert found == {
        "madpo β=0.1": [(2, pytest.approx(0.75), pytest.approx(0.05)), (4, pytest.approx(0.75), pytest.approx(0.05))]
    }
    for beta in (0.2, 0.3):
        train(tmp_path, "dpo", beta)
    assert [v for v, *_ in sensitivity(read_records(tmp_path), "objective.beta")["dpo"]] == [0.1, 0.2, 0.3]


def test_markdown_and_csv_have_every_row():
    table = Tabular(
        "t",
        [Column("method", "method", text=True), Column("x", "x")],
        [["a|b", "1"]],
        [{"x": 0.1, "y": None}, {"x": 2, "z": "q,r"}],
    )
    assert table.markdown().splitlines()[:3] == ["| method | x |", "| --- | ---: |", "| a\\|b | 1 |"]
    titled = Tabular("t", table.columns, table.texts, table.rows, ["n 3."], "A <title>", ["Made."])
    assert titled.markdown().splitlines()[::2][:2] == ["**A &lt;title&gt;**", "| method | x |"]
    assert titled.markdown().splitlines()[-2:] == ["n 3.", "Made."]
    assert list(csv.reader(table.csv().splitlines())) == [["x", "y", "z"], ["0.1", "", ""], ["2", "", "q,r"]]


class Page(HTMLParser):
    """Tags with their attributes, and whether they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_refers_to_nothing_outside(grid, tmp_path):
    evil = '<script>alert("x")</script>'
    folder = train(grid, "dpo", 0.9, name="evil", command=f"python {evil}")
    alpaca(folder, 20, 50, lc=50)
    harness(folder, 20, 0.5)
    harness(folder, 20, 0.5, "piqa")
    records = read_records(grid)
    tables, figures = mmpo(records, config(grid, tmp_path / "out"))
    tables[2].notes.append(evil)
    text = page(f"MMPO {evil}", tables, figures, records, ["made & so"])
    found = Page(text)
    assert found.open == []
    names = [tag for tag, _ in found.tags]
    assert names.count("svg") == 2
    assert names.count("table") == len(tables) + 1
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    references = [v for _, attrs in found.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert references
    assert all(v.startswith("#") for v in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http" not in text
    assert text.count("&lt;script&gt;") == 4  # title, heading, note, command
    for part in ("evil", "c0ffeec0ff", GPT, "arc_easy, piqa", "made &amp; so"):
        assert part in text


def test_mappo_shows_near_ties_apart(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        train(runs, "dpo", seed=seed)
    records = read_records(runs)
    assert "mappo_gaps" not in [table.name for table in mappo(records, config(runs, tmp_path, paper="mappo"))[0]]
    for record, drift_of_ties in zip(records, (-4.0, -2.0), strict=True):
        record["evaluations"][-1] |= {f"{gap}_chosen_logratio": drift_of_ties for gap in GAPS}
    (table,) = gaps_table(records, [], [])
    assert (table.rows[0]["small_gap"], table.rows[0]["small_gap_se"]) == (-3, 1)
    assert table.texts[0][-1] == "-3.00 ± 1.00"


def test_mappo_shows_a_win_rate_only_where_all_seeds_have_one(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        folder = train(runs, "dpo", seed=seed)
        train(runs, "mappo_dpo", seed=seed)
    alpaca(folder, 20, 50)
    table = mappo(read_records(runs), config(runs, tmp_path, paper="mappo"))[0][0]
    assert [r["win_rate"] for r in table.rows[:2]] == [None, None]
    alpaca(next(runs.glob("dpo-0.1-0-*")), 20, 60)
    table = mappo(read_records(runs), config(runs, tmp_path, paper="mappo"))[0][0]
    row = table.rows[0]
    assert (row["method"], row["seeds"], row["win_rate"]) == ("dpo", 2, 55)
    assert row["chosen"] == -30
    assert row["oracle_reward"] == pytest.approx(0.75)
    assert table.headings[4:6] == ["win rate, %", "oracle reward"]
    tables = {table.name: table for table in mappo(read_records(runs), config(runs, tmp_path, paper="mappo"))[0]}
    assert tables["mappo_table_2_published"].rows[0]["arena_hard"] == "45.5"


def test_the_papers_win_rate_stands_beside_the_same_metric_alone(tmp_path):
    runs = tmp_path / "runs"
    folder = train(runs, "mappo_dpo")
    record = json.loads((folder / "record.json").read_text())
    record["config"]["model"] |= {"name": "Qwen2.5-7B-Instruct"}
    write(folder / "record.json", record)
    alpaca(folder, 20, 40, "weighted_alpaca_eval_gpt4_turbo", lc=41)
    table = mappo(read_records(runs), config(runs, tmp_path, paper="mappo"))[0][0]
    assert not any("paper" in heading for heading in table.headings)  # another baseline than AlpacaEval 2's
    (file,) = (folder / "alpaca").glob("*/record.json")
    result = json.loads(file.read_text())
    result["baseline"]["name"] = "alpaca_eval_gpt4_baseline"
    write(file, result)
    table = mappo(read_records(runs), config(runs, tmp_path, paper="mappo"))[0][0]
    assert table.headings[4:6] == ["length-controlled win rate, %", "paper: alpaca eval 2 lc"]
    assert (table.rows[0]["win_rate"], table.rows[0]["paper"]) == (41, "38.24")


def test_judged_benchmarks_have_columns_by_their_metrics_and_the_papers_figures_beside_the_published_scales(tmp_path):
    runs = tmp_path / "runs"
    for seed, score in enumerate((7.0, 7.5)):
        folder = train(runs, "mappo_dpo", seed=seed)
        record = json.loads((folder / "record.json").read_text())
        record["config"]["model"] |= {"name": "Qwen2.5-7B-Instruct"}
        write(folder / "record.json", record)
        judged(folder, "mtbench", score, "mt_bench (gpt-4-0613, gpt-4 references)", ratings(7, 8))
        judged(folder, "arena", 30.0, "arena-hard-v0.1 (m, against gpt-4-0314)", games("B>A", "A>>B"))
        judged(folder, "arena", 60.0, "arena-hard-v0.1 questions (m, against SFT)", games("B>A", "B>>A"))
    read = read_records(runs)
    columns = evaluation_columns(read[0])
    assert columns["mt_bench (gpt-4-0613, gpt-4 references)"] == (7.0, 0.25)
    assert columns["arena-hard-v0.1 questions (m, against SFT)"] == (60.0, 0.25)
    table = main_table(table_rows(read), read, ReportConfig(str(runs), str(tmp_path), None, []))
    headings = {h for h in table.headings if "m" in h and "(" in h}
    assert {"mt_bench (gpt-4-0613, gpt-4 references), of 10", "arena-hard-v0.1 (m, against gpt-4-0314), %"} <= headings

    table = mappo(read, config(runs, tmp_path, paper="mappo"))[0][0]
    (row,) = table.rows
    assert row["mt_bench (gpt-4-0613, gpt-4 references)"] == pytest.approx(7.25)
    assert (row["paper_mt_bench"], row["paper_arena_hard"]) == ("8.79", "59.2")
    assert "arena-hard-v0.1 questions (m, against SFT)" not in table.headings
    assert any("compare differences between methods, and not levels" in note for note in table.notes)

    write_archive(read, tmp_path / "records.jsonl")
    assert evaluation_columns(read_records(tmp_path / "records.jsonl")[0]) == columns


def test_judged_benchmarks_are_compared_question_by_question(tmp_path):
    runs = tmp_path / "runs"
    for objective, rows, verdicts in (("dpo", (7, 8, 9), ("B>A", "B>A")), ("mmpo", (5, 8, 6), ("A>B", "B>A"))):
        folder = train(runs, objective)
        judged(folder, "mtbench", 8.0, "mt_bench (j, gpt-4 references)", ratings(*rows))
        judged(folder, "arena", 50.0, "arena-hard-v0.1 (j, against b)", games(*verdicts))
    read = read_records(runs)
    table = paired_table(read, ReportConfig(str(runs), str(tmp_path), None, ["dpo", "mmpo"]))
    rows = {row["measure"]: row for row in table.rows}
    rating = rows["mt_bench (j, gpt-4 references)"]
    assert (rating["n"], rating["difference"]) == (3, pytest.approx(5 / 3))
    rate = rows["arena-hard-v0.1 (j, against b), %"]
    assert (rate["n"], rate["a"], rate["b"]) == (2, pytest.approx(75), pytest.approx(50))


def test_answers_of_other_token_limits_are_not_compared(tmp_path):
    runs = tmp_path / "runs"
    for objective, limit in (("dpo", 256), ("mmpo", 1024)):
        folder = train(runs, objective)
        judged(folder, "mtbench", 8.0, "mt_bench (j, gpt-4 references)", ratings(7, 8), max_new_tokens=limit)
        judged(folder, "arena", 50.0, "arena-hard-v0.1 (j, against b)", games("B>A", "A>B"), max_new_tokens=256)
    read = read_records(runs)
    table = paired_table(read, ReportConfig(str(runs), str(tmp_path), None, ["dpo", "mmpo"]))
    assert [row["measure"] for row in table.rows] == ["arena-hard-v0.1 (j, against b), %"]


@pytest.mark.parametrize(("version", "n"), [("v0.1", 3), ("v2.0", 2)])
def test_a_question_of_which_one_game_has_no_verdict_is_compared_where_the_version_counts_it(tmp_path, version, n):
    runs = tmp_path / "runs"
    for objective, verdicts in (("dpo", ("B>A", "B>A", None)), ("mmpo", ("A>B", "B>A", "A>B"))):
        judged(train(runs, objective), "arena", 50.0, "arena-hard (j, against b)", games(*verdicts), version=version)
    read = read_records(runs)
    (row,) = [
        row
        for row in paired_table(read, ReportConfig(str(runs), str(tmp_path), None, ["dpo", "mmpo"])).rows
        if row["measure"].startswith("arena")
    ]
    assert row["n"] == n


def test_runs_without_evaluations_say_how_to_get_them(tmp_path):
    train(tmp_path, "dpo")
    with pytest.raises(UserError, match=r"prefopt\.harness"):
        mmpo(read_records(tmp_path), config(tmp_path, tmp_path))


def test_the_program_writes_every_form_and_prints_the_paths(grid, tmp_path):
    process = run_program("paper=mmpo", f"runs_dir={grid}", f"output={tmp_path / 'out'}", program="papers")
    assert process.returncode == 0, process.stderr
    tables = ["mmpo_table_1", "mmpo_table_1_published", "mmpo_table_2", "mmpo_table_2_published", "mmpo_spread"]
    tables += ["mmpo_spread_published", "mmpo_policies"]
    names = [f"{t}.{s}" for t in tables for s in ("md", "csv", "tex")]
    names += [f"{f}.{s}" for f in ("mmpo_paths", "mmpo_spread") for s in ("png", "svg", "pdf")]
    written = [*names, "mmpo.html", "records.jsonl"]
    assert process.stdout.splitlines() == [str(tmp_path / "out" / name) for name in written]
    for name in names:
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert (tmp_path / "out" / "mmpo_paths.pdf").read_bytes()[:4] == b"%PDF"
    selected = [f"runs_dir={grid}", f"output={tmp_path / 'b'}", "tasks=[piqa]", f"judge_name={GPT}"]
    process = run_program("paper=mmpo", *selected, "baseline_name=policy-initial", program="papers")
    assert process.returncode == 0, process.stderr
    text = html.unescape((tmp_path / "b" / "mmpo.html").read_text())
    assert f"'tasks=[piqa]' judge_name={GPT} baseline_name=policy-initial`" in text
    process = run_program("paper=mnpo", f"output={tmp_path}", program="papers")
    assert process.returncode == 2
    assert "paper must be mmpo, mappo, madpo" in process.stderr


@pytest.mark.parametrize(
    ("paper", "folder"),
    [
        ("mmpo", "lab/mmpo/methods"),
        ("mappo", "mini/mappo"),
        ("mappo", "lab/objectives"),
        ("madpo", "lab/madpo/methods"),
        ("madpo", "lab/madpo/variants"),
    ],
)
def test_the_tables_in_the_repository_are_what_their_records_give(paper, folder, tmp_path):
    """Every number can be computed again, without a run. Only the words that say from where differ."""
    folder = ROOT / "results" / folder
    process = run_program(
        f"paper={paper}", f"runs_dir={folder / 'records.jsonl'}", f"output={tmp_path}", program="papers"
    )
    assert process.returncode == 0, process.stderr
    made = {file.name for file in tmp_path.glob("*.csv")}
    assert made
    for name in made:
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    assert not (tmp_path / "records.jsonl").exists()


ARCHIVES = sorted((ROOT / "results").rglob("records.jsonl"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda file: str(file.parent.relative_to(ROOT / "results")))
def test_so_is_the_table_of_their_runs(archive, tmp_path):
    process = run_program(f"runs_dir={archive}", f"output={tmp_path}", program="report")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "table.csv").read_text() == archive.with_name("table.csv").read_text()


def test_the_laboratorys_page_has_the_means_of_its_records():
    """Its table of all objectives, which no program writes."""
    by_objective: dict[str, list] = {}
    for line in (ROOT / "results/lab/family/records.jsonl").read_text().splitlines():
        by_objective.setdefault((record := json.loads(line))["objective"], []).append(record)
    text = (ROOT / "docs/laboratory.md").read_text().partition("## All objectives")[2].partition("\n## ")[0]
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    shown = shown[2:]
    assert {row[0] for row in shown} == set(by_objective)
    for name, rate, *cells in shown:
        assert {float(rate)} == {record["config"]["optimizer"]["lr"] for record in by_objective[name]}
        ends = [record["evaluations"][-1] for record in by_objective[name]]
        keys = ("sample_grammatical_reward", "oracle_reward", "sample_grammatical", "kl")
        columns = [[end[key] for end in ends] for key in keys]
        choices = [[h for h in r["harness"] if h["task"].startswith("lab_choice")] for r in by_objective[name]]
        columns.append([100 * choice["metrics"]["acc"]["value"] for (choice,) in choices])
        for cell, values in zip(cells, columns, strict=True):
            digits = len(cell.split()[0].partition(".")[2])
            error = statistics.stdev(values) / len(values) ** 0.5
            assert cell == f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}", name


def test_an_archive_of_records_is_their_runs(grid, tmp_path):
    """Without what is the machine's own; and another file is refused by its name."""
    archive = tmp_path / "records.jsonl"
    write_archive(read_records(grid), archive)
    gone = {*MACHINE_KEYS, "harness", "alpaca"}
    before, after = ([{k: v for k, v in r.items() if k not in gone} for r in read_records(f)] for f in (grid, archive))
    assert before == after
    assert points(archive) == points(grid)
    archive.write_text("{}")
    with pytest.raises(UserError, match=r"records\.jsonl is no archive"):
        read_records(archive)


def test_the_academic_table_has_each_tasks_own_metric(tmp_path):
    """Final policies over seeds, beside the model they began from; the paper's `it` and X+mappo are found."""
    runs, name = tmp_path / "runs", "Llama-3-8B-Instruct"
    for seed, value in enumerate((0.5, 0.7)):
        folder = train(runs, "mappo_dpo", seed=seed)
        record = json.loads((folder / "record.json").read_text())
        record["config"]["model"] = {"name": name, "path": f"lab/{name}x", "revision": None}
        write(folder / "record.json", record)
        settings = {"limit": None, "num_fewshot": None, "chat_template": False}
        told = {"checkpoint": "final", "step": 20, "task": "gsm8k", "settings": settings, "git": None}
        metric = {"exact_match,strict-match": {"value": value, "stderr": 0.03}}
        write(folder / "harness" / "final-gsm8k.json", told | {"metrics": metric})
    told |= {
        "checkpoint": "initial",
        "step": 0,
        "metrics": {"exact_match,strict-match": {"value": 0.4, "stderr": 0.02}},
    }
    write(folder / "harness" / "initial-gsm8k.json", told)
    table = academic_table(read_records(runs), read_csv(PUBLISHED, "mappo_academic.csv"), [], [])
    ours = {row["method"]: row for row in table.rows if row["model"] == name}
    assert ours["it"]["gsm8k"] == pytest.approx(40)
    assert (ours["it"]["gsm8k_se"], ours["it"]["paper_gsm8k"]) == (pytest.approx(2), "73.4")
    mean = ours["mappo_dpo β=0.1"]
    assert mean["gsm8k"] == pytest.approx(60)
    assert mean["gsm8k_se"] == pytest.approx(math.hypot(10, 3))
    assert mean["paper_gsm8k"] == "79.5"
    assert mean["mmlu"] is None
    assert table.headings == ["model", "method", "gsm8k", "paper"]  # of the others nothing was measured
    assert table.notes[0].endswith("exact_match, strict-match of gsm8k.")


def test_the_academic_table_has_the_tasks_too_that_the_paper_does_not(tmp_path):
    folder = train(tmp_path, "dpo")
    told = {
        "checkpoint": "final",
        "step": 20,
        "task": "piqa",
        "settings": {"limit": 50, "num_fewshot": None, "chat_template": False},
        "git": None,
    }
    metrics = {"acc": {"value": 0.6, "stderr": 0.07}}
    write(folder / "harness" / "final-piqa.json", told | {"metrics": metrics})
    table = academic_table(read_records(tmp_path), read_csv(PUBLISHED, "mappo_academic.csv"), [], [])
    assert table.headings == ["model", "method", "piqa"]
    assert table.texts == [["policy", "dpo β=0.1", "60.0 ± 7.0"]]
    assert table.notes[0].endswith("acc of piqa; of each task the first 50 rows.")


def test_madpo_has_its_table_by_quality_and_the_published_ones_alone(tmp_path):
    runs = tmp_path / "runs"
    for quality in ("high", "low"):
        for c_max in (2, 4):
            train(runs, "madpo", quality=quality, hyperparameters={"c_max": c_max})
    process = run_program("paper=madpo", f"runs_dir={runs}", f"output={tmp_path / 'a'}", program="papers")
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "a" / "madpo_table_1.md").read_text()
    assert "paper" not in text.partition("Made by")[0]  # another oracle's rewards
    assert "| madpo β=0.1 c_max=4 | 0.700 (n 1) | 0.700 (n 1) |" in text
    assert "| madpo | 2.23 | 2.23 | 1.95 |" in (tmp_path / "a" / "madpo_table_1_published.md").read_text()
    assert "python -m prefopt.papers paper=madpo" in text
    assert (tmp_path / "a" / "madpo_sensitivity.svg").is_file()
    process = run_program("paper=madpo", f"output={tmp_path / 'b'}", program="papers")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "b" / "madpo_table_1_published.csv").read_text().split() == (
        Path(PUBLISHED) / "madpo_table_1.csv"
    ).read_text().split()
