"""The tables of the MaPPO paper, from our records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import Point, epoch_of, group_by_config, points_of
from prefopt.reporting.evaluated import SIDES, Metric, Value, aggregate_seeds, metric_of, model_names, read_evaluated
from prefopt.reporting.figures import draw_drift
from prefopt.reporting.paper_common import (
    Figure,
    Made,
    describe_metrics,
    format_value,
    limits_note,
    policies_table,
    provenance_notes,
)
from prefopt.reporting.published import join_published, read_csv
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record, last_step
from prefopt.utils.stats import mean_and_error


def results_table(
    name: str,
    title: str,
    records: Sequence[Record],
    points: Sequence[Point],
    theirs: list[dict[str, str]],
    metric: Metric | None,
    notes: list[str],
) -> Tabular:
    """Final figures of each method over its seeds, beside a table of the MaPPO paper (arXiv 2507.21183)."""
    columns = [c for c in theirs[0] if c not in ("model", "method")]
    models = model_names(records)
    ours: list[dict[str, Any]] = []
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model and r["objective"] != "sft"]
        for (method, value), seeds in group_by_config(members).items():
            own = [p for p in points if (p.model, p.method, p.beta) == (model, method, value)]
            ends = [(r["evaluations"][0], r["evaluations"][-1]) for r in seeds if r["evaluations"]]
            row: dict[str, Any] = {"model": model, "method": method, "beta": value, "seeds": len(seeds)}
            last = [p for p in own if p.epoch == epoch_of(seeds[0], last_step(seeds[0])) and p.seeds == len(seeds)]
            row["win_rate"] = last[0].win_rate if last else None
            row["oracle_reward"] = mean_over_seeds(ends, lambda first, last: last["oracle_reward"])
            for side in SIDES:
                row[side] = mean_over_seeds(ends, lambda first, last, key=f"{side}_logps": last[key] - first[key])
            ours.append(row)
    shown = {f"{metric.name if metric else 'win rate'}, %": "win_rate", "oracle reward": "oracle_reward"}
    shown |= {f"{side} log-prob drift": side for side in SIDES}
    texts, rows = [], []
    for row, paper in join_published(ours, theirs):
        start = [
            row["model"],
            row["method"],
            f"{row['beta']:g}" if row.get("beta") else "–",
            str(row.get("seeds", "–")),
        ]
        numbers: dict[str, Any] = {k: row.get(k) for k in ("model", "method", "beta", "seeds")}
        for key in shown.values():
            numbers |= dict(zip((key, f"{key}_se"), row.get(key) or (None, None), strict=True))
        figures = [format_value(row.get(key), 3 if key == "oracle_reward" else 2) for key in shown.values()]
        texts.append([*start, *figures, *(paper.get(c, "–") for c in columns)])
        rows.append(numbers | {f"paper_{c}": paper.get(c) for c in columns})
    heads = [f"paper: {c.replace('_', ' ')}" for c in columns]
    return Tabular(name, ["model", "method", "β", "seeds", *shown, *heads], texts, rows, notes, title)


def mean_over_seeds(ends: Sequence[tuple[Record, Record]], figure: Callable[..., float]) -> Value | None:
    """Mean and standard error over seeds of a figure of the first and last evaluations; None where one lacks it."""
    try:
        mean, error = mean_and_error([figure(first, last) for first, last in ends])
    except (KeyError, ZeroDivisionError):
        return None
    return mean, error if len(ends) > 1 else None


# The paper's columns, as lm-eval's tasks and metrics. Which metric of a task it prints it does not say.
ACADEMIC = {
    "ifeval": ("ifeval", "prompt_level_strict_acc"),
    "gpqa": ("gpqa_main_zeroshot", "acc"),
    "mmlu": ("mmlu", "acc"),
    "hellaswag": ("hellaswag", "acc_norm"),
    "truthfulqa": ("truthfulqa_mc2", "acc"),
    "gsm8k": ("gsm8k", "exact_match,strict-match"),
}


def academic_table(records: Sequence[Record], published: str, notes: list[str]) -> Tabular:
    """The MaPPO paper's academic benchmarks, in percent: final policies, mean over seeds, and the models they began
    from (the paper's `it`), which `prefopt.harness checkpoints=initial` evaluates. Then `acc` of the tasks that are not
    among its benchmarks."""
    models = model_names(records)
    theirs = {task for task, _ in ACADEMIC.values()}
    others = sorted({t["task"] for r in records for t in r["harness"] if "acc" in t["metrics"]} - theirs)
    benchmarks = ACADEMIC | {task: (task, "acc") for task in others}
    groups: dict[tuple[str, str], list[list[Record]]] = {}
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model]
        if initial := [t for r in members for t in r["harness"] if t["step"] == 0]:
            groups[model, "it"] = [initial]
        for (method, value), seeds in group_by_config(members).items():
            name = f"{method} β={value:g}" if value else method
            groups[model, name] = [[t for t in r["harness"] if t["checkpoint"] == "final"] for r in seeds]
    ours: list[dict[str, Any]] = []
    for (model, method), policies in groups.items():
        row: dict[str, Any] = {"model": model, "method": method}
        for column, (task, metric) in benchmarks.items():
            scores = [
                [(100 * m["value"], m["stderr"] and 100 * m["stderr"]) for t in told if t["task"] == task
                 for m in [t["metrics"].get(metric)] if m]
                for told in policies
            ]  # fmt: skip
            row[column] = aggregate_seeds([own[0] if own else None for own in scores])
        if any(row[column] for column in benchmarks):
            ours.append(row)
    texts, rows = [], []
    for row, paper in join_published(ours, read_csv(published, "mappo_academic.csv")):
        texts.append([row["model"], row["method"]])
        numbers: dict[str, Any] = {key: row[key] for key in ("model", "method")}
        for column in benchmarks:
            value = row.get(column)
            texts[-1] += [format_value(value, 1)] + [paper.get(column, "–")] * (column in ACADEMIC)
            numbers |= {column: value and value[0], f"{column}_se": value and value[1]}
            numbers |= {f"paper_{column}": paper.get(column)} if column in ACADEMIC else {}
        rows.append(numbers)
    headers = ["model", "method", *(h for column in ACADEMIC for h in (column, "paper")), *others]
    what = "; ".join(f"{c}: {metric.replace(',', ', ')} of {task}" for c, (task, metric) in benchmarks.items())
    what += limits_note([t for policies in groups.values() for told in policies for t in told])
    return Tabular(
        "mappo_academic", headers, texts, rows, [f"Ours, in percent: {what}.", *notes], "Academic benchmarks"
    )


def mappo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 2 and 3 of the paper, and the squeezing effect."""
    found = read_evaluated(records, config)
    metric = metric_of(found)
    models = model_names(records)
    points = points_of(found, metric, models)
    notes = [
        "Ours: means at the end of the runs ± their standard error over seeds; drifts are changes of the mean held-out "
        "log-prob since the start, in nats. The paper's figures stand beside ours where model and method are the same.",
        *describe_metrics(metric, []),
        *provenance_notes(records, config),
    ]
    titles = {"mappo_table_2": "MaPPO as a plug-in (table 2)", "mappo_table_3": "Main results (table 3)"}
    tables = [
        results_table(name, title, records, points, read_csv(config.published, f"{name}.csv"), metric, notes)
        for name, title in titles.items()
    ]
    tables.append(academic_table(records, config.published, provenance_notes(records, config)))
    tables += policies_table(
        "mappo", found, metric, models, [*describe_metrics(metric, found), *provenance_notes(records, config)]
    )
    caption = (
        "Mean log-prob of the held-out chosen (left) and rejected (right) completions, less its value before training: "
        "the mean over seeds, with a band of one standard error. Where both fall, probability has gone to other texts: "
        "the squeezing effect. Full: a base alone; dashed: with MaPPO."
    )
    return tables, [Figure("Log-prob drift", caption, draw_drift(records, Path(config.output), "mappo_drift"))]
