"""The tables of the MaPPO paper, from our records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.objectives import SIDES
from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import Point, epoch_of, group_by_config, points_of
from prefopt.reporting.differences import comparison_notes
from prefopt.reporting.evaluated import (
    Metric,
    Value,
    aggregate_seeds,
    flatten_value,
    mean_over_seeds,
    metric_of,
    model_names,
    read_evaluated,
)
from prefopt.reporting.figures import draw_drift
from prefopt.reporting.paper_common import (
    Figure,
    Made,
    describe_metrics,
    limits_note,
    policies_table,
    provenance_notes,
    win_rate_heading,
)
from prefopt.reporting.published import join_published, paper_heading, published_table, read_csv
from prefopt.reporting.tables import Column, Tabular, format_rows
from prefopt.tracking.archive import Record, last_step
from prefopt.tracking.metrics import GAPS

# Sentences below the tables and figures.
RESULTS = (
    "Means at the end of the runs ± their standard error over seeds; drifts are changes of the mean held-out log-prob "
    "since the start, in nats."
)
BY_GAP = (
    "The change of the mean held-out chosen log-prob since the start, in nats, in thirds of the pairs by the gap of "
    "their prior rewards (near ties: small), with its standard error over seeds."
)
PAPER_METRICS = (
    "AlpacaEval 2, length-controlled, in percent and Arena-Hard, judged by GPT-4 Turbo (Preview-1106); MT-Bench of 10."
)
PAPER_TASKS = "In percent. Which metric of a task it prints the paper does not say."
DRIFT_CAPTION = (
    "Mean log-prob of the held-out chosen (left) and rejected (right) completions, less its value before training: "
    "the mean over seeds. Where both fall, probability has gone to other texts: the squeezing effect. Full: a base "
    "alone; dashed: with MaPPO."
)
JUDGED = (
    "MT-Bench and Arena-Hard: the paper does not name the judge of both, and its untrained models are not on the "
    "leaderboards' scales (Llama-3-8B-Instruct has 10.2 on Arena-Hard there, and 20.6 on the leaderboard): compare "
    "differences between methods, and not levels."
)
TITLES = {"mappo_table_2": "MaPPO as a plug-in (table 2)", "mappo_table_3": "Main results (table 3)"}

# The paper's win rate: AlpacaEval 2's own, by its judge, against its baseline.
PAPER_METRIC = "length_controlled_win_rate", ("weighted_alpaca_eval_gpt4_turbo",), ("alpaca_eval_gpt4_baseline",)
PAPER_COLUMN = "alpaca_eval_2_lc"
# The paper's columns of judged benchmarks: the kind of our results, their figure, how the metrics begin that are meant,
# and digits.
PAPER_JUDGED = {
    "mt_bench": ("mtbench", "score", "mt_bench (", 2),
    "arena_hard": ("arena", "win_rate", "arena-hard-v0.1 (", 1),
}

# The paper's columns, as lm-eval's tasks and metrics. Which metric of a task it prints it does not say.
ACADEMIC = {
    "ifeval": ("ifeval", "prompt_level_strict_acc"),
    "gpqa": ("gpqa_main_zeroshot", "acc"),
    "mmlu": ("mmlu", "acc"),
    "hellaswag": ("hellaswag", "acc_norm"),
    "truthfulqa": ("truthfulqa_mc2", "acc"),
    "gsm8k": ("gsm8k", "exact_match,strict-match"),
}


def results_table(
    records: Sequence[Record],
    points: Sequence[Point],
    theirs: Sequence[dict[str, str]],
    metric: Metric | None,
    notes: list[str],
    origin: list[str],
) -> Tabular:
    """Final figures of each method over its seeds; beside the win rate that of the MaPPO paper (arXiv 2507.21183) for
    the same model and method, where it is the same metric."""
    models = model_names(records)
    ours: list[dict[str, Any]] = []
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model and r["objective"] != "sft"]
        for (method, beta), seeds in group_by_config(members).items():
            row = {"model": model, "method": method, "beta": beta, "seeds": len(seeds)}
            end = epoch_of(seeds[0], last_step(seeds[0]))
            final = [
                p for p in points
                if (p.model, p.method, p.beta, p.epoch, p.seeds) == (model, method, beta, end, len(seeds))
            ]  # fmt: skip
            row |= flatten_value("win_rate", final[0].win_rate if final else None)
            ours.append(row | _final_figures(seeds) | _judged_figures(seeds))

    judged = {name: _metrics(records, kind, begin) for name, (kind, _, begin, _) in PAPER_JUDGED.items()}
    joined = [pair for pair in join_published(ours, theirs) if pair[0] in ours]
    same = metric is not None and (metric.key, metric.judges, metric.baselines) == PAPER_METRIC
    published = {name: f"paper_{name}" for name, metrics in judged.items() if metrics}
    if same:
        published[PAPER_COLUMN] = "paper"
    ours = [row | {key: paper.get(name) for name, key in published.items()} for row, paper in joined]
    judged_columns = []
    for name, metrics in judged.items():
        for text in metrics:
            judged_columns.append(Column(text, text, PAPER_JUDGED[name][-1], error=True))
        if metrics:
            judged_columns.append(Column(f"paper_{name}", paper_heading(name)))
    if judged_columns:
        notes = [*notes, JUDGED]
    columns = [
        Column("model", "model", text=True),
        Column("method", "method", text=True),
        Column("beta", "β"),
        Column("seeds", "seeds"),
        Column("win_rate", win_rate_heading(metric), 2, error=True),
        *([Column("paper", paper_heading(PAPER_COLUMN))] if same else []),
        *judged_columns,
        Column("oracle_reward", "oracle reward", 3, error=True),
        *(Column(side, f"{side} log-prob drift", 2, error=True) for side in SIDES),
    ]
    return Tabular("mappo_results", columns, format_rows(columns, ours), ours, notes, "Results", origin)


def _metrics(records: Sequence[Record], kind: str, begin: str) -> list[str]:
    """The metrics of the results of a kind for final policies that begin so."""
    names = (result["metric"] for record in records for result in record[kind] if result["checkpoint"] == "final")
    return sorted({name for name in names if name.startswith(begin)})


def _judged_figures(seeds: Sequence[Record]) -> dict[str, float | None]:
    """The figures of the judged benchmarks at the end, by metric, over the seeds."""
    figures: dict[str, float | None] = {}
    for kind, figure, begin, _ in PAPER_JUDGED.values():
        for name in _metrics(seeds, kind, begin):
            of_seeds = [[r for r in seed[kind] if (r["checkpoint"], r["metric"]) == ("final", name)] for seed in seeds]
            values = [(r[0]["figures"][figure], r[0]["figures"]["standard_error"]) if r else None for r in of_seeds]
            figures |= flatten_value(name, aggregate_seeds(values))
    return figures


def _final_figures(seeds: Sequence[Record]) -> dict[str, float | None]:
    """The oracle reward at the end, and the drift of each side since the start, over the seeds that were evaluated;
    None where one of these lacks it."""
    ends = [(seed["evaluations"][0], seed["evaluations"][-1]) for seed in seeds if seed["evaluations"]]
    figures = flatten_value("oracle_reward", mean_over_seeds(last.get("oracle_reward") for _, last in ends))
    for side in SIDES:
        key = f"{side}_logps"
        drifts = [last[key] - first[key] if key in first and key in last else None for first, last in ends]
        figures |= flatten_value(side, mean_over_seeds(drifts))
    return figures


def academic_table(
    records: Sequence[Record], theirs: Sequence[dict[str, str]], notes: list[str], origin: list[str]
) -> Tabular:
    """The MaPPO paper's academic benchmarks, in percent: final policies, mean over seeds, and the models they began
    from (the paper's `it`), which `prefopt.harness checkpoints=initial` evaluates; beside each the paper's figure for
    the same model and method, where ours are of all rows of the tasks. Then `acc` of the tasks that are not among its
    benchmarks."""
    in_paper = {task for task, _ in ACADEMIC.values()}
    others = sorted({t["task"] for r in records for t in r["harness"] if "acc" in t["metrics"]} - in_paper)
    benchmarks = ACADEMIC | {task: (task, "acc") for task in others}

    groups = _results_by_method(records)
    ours: list[dict[str, Any]] = []
    for (model, method), seeds in groups.items():
        figures = {
            column: aggregate_seeds([_percent(results, task, metric) for results in seeds])
            for column, (task, metric) in benchmarks.items()
        }
        if any(figures.values()):
            ours.append({"model": model, "method": method} | figures)

    results = [result for seeds in groups.values() for of_seed in seeds for result in of_seed]
    limits = limits_note(results)
    published = {} if limits else {(row["model"], row["method"]): paper for row, paper in join_published(ours, theirs)}
    papers = [published.get((row["model"], row["method"]), {}) for row in ours]
    columns = [Column("model", "model", text=True), Column("method", "method", text=True)]
    for column in benchmarks:
        if any(row[column] for row in ours):
            columns.append(Column(column, column, 1, error=True))
            if any(paper.get(column) for paper in papers):
                columns.append(Column(f"paper_{column}", "paper"))
    rows = []
    for row, paper in zip(ours, papers, strict=True):
        numbers = {"model": row["model"], "method": row["method"]}
        for column in benchmarks:
            numbers |= flatten_value(column, row[column])
            if paper.get(column):
                numbers[f"paper_{column}"] = paper[column]
        rows.append(numbers)

    shown = {column.key for column in columns}
    what = "; ".join(f"{c}: {m.replace(',', ', ')} of {task}" for c, (task, m) in benchmarks.items() if c in shown)
    error = "± is one standard error over the rows, and over seeds where there are several."
    notes = [f"In percent: {what or 'no task was evaluated'}{limits}.", error, *notes]
    return Tabular("mappo_academic", columns, format_rows(columns, rows), rows, notes, "Academic benchmarks", origin)


def gaps_table(records: Sequence[Record], notes: list[str], origin: list[str]) -> list[Tabular]:
    """The change of the held-out chosen log-prob by the gap of the pair's prior rewards, at the end of the runs: the
    mean over seeds. No table where no run has pairs with rewards."""
    models = model_names(records)
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model and r["evaluations"]]
        for (method, beta), seeds in group_by_config(members).items():
            row = {"model": model, "method": method, "beta": beta, "seeds": len(seeds)}
            for gap in GAPS:
                key = f"{gap}_chosen_logratio"
                row |= flatten_value(gap, mean_over_seeds(seed["evaluations"][-1].get(key) for seed in seeds))
            if any(row.get(gap) is not None for gap in GAPS):
                rows.append(row)
    columns = [
        Column("model", "model", text=True),
        Column("method", "method", text=True),
        Column("beta", "β"),
        Column("seeds", "seeds"),
        *(Column(gap, f"{gap.replace('_', ' ')}", 2, error=True) for gap in GAPS),
    ]
    title = "Chosen log-prob drift by reward gap"
    table = Tabular("mappo_gaps", columns, format_rows(columns, rows), rows, [BY_GAP, *notes], title, origin)
    return [table] if rows else []


def _results_by_method(records: Sequence[Record]) -> dict[tuple[str, str], list[list[Record]]]:
    """By model and method, for each seed the harness records of its final policy; those of each policy that a model's
    runs began from are its method `it`."""
    models = model_names(records)
    groups: dict[tuple[str, str], list[list[Record]]] = {}
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model]
        initial: dict[str, list[Record]] = {}
        for run in members:
            if results := [t for t in run["harness"] if t["step"] == 0]:
                initial.setdefault(run["initial_weights"], []).extend(results)
        if initial:
            groups[model, "it"] = list(initial.values())
        for (method, beta), seeds in group_by_config(members).items():
            name = f"{method} β={beta:g}" if beta else method
            groups[model, name] = [[t for t in r["harness"] if t["checkpoint"] == "final"] for r in seeds]
    return groups


def _percent(results: Sequence[Record], task: str, metric: str) -> Value | None:
    """A metric of a task and its standard error, from the first of these records that has it."""
    for result in results:
        if result["task"] == task and (score := result["metrics"].get(metric)):
            error = score["stderr"]
            return 100 * score["value"], None if error is None else 100 * error
    return None


def mappo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 2 and 3 of the paper, its academic benchmarks, and the squeezing effect."""
    policies = read_evaluated(records, config)
    metric = metric_of(policies)
    models = model_names(records)
    points = points_of(policies, metric, models)

    origin, shared = provenance_notes(records, config), comparison_notes(records)
    theirs = {name: read_csv(config.published, f"{name}.csv") for name in (*TITLES, "mappo_academic")}
    tables = []
    if records:
        both = [row for name in TITLES for row in theirs[name]]
        notes = [RESULTS, *describe_metrics(metric, []), *shared]
        tables = [
            results_table(records, points, both, metric, notes, origin),
            academic_table(records, theirs["mappo_academic"], shared, origin),
            *gaps_table(records, shared, origin),
            *policies_table("mappo", policies, metric, models, [*describe_metrics(metric, policies), *shared], origin),
        ]
    for name, title in TITLES.items():
        tables.append(published_table(f"{name}_published", title, theirs[name], [PAPER_METRICS]))
    title = "academic benchmarks"
    tables.append(published_table("mappo_academic_published", title, theirs["mappo_academic"], [PAPER_TASKS]))
    figure = draw_drift(records, Path(config.output), "mappo_drift")
    return tables, [Figure("Log-prob drift", DRIFT_CAPTION, figure)]
