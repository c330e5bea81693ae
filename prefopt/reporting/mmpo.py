"""The tables of the MMPO paper, from our records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.results import SUITES
from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import Point, best_points, points_of, sft_accuracy, spreads
from prefopt.reporting.evaluated import Evaluated, Metric, metric_of, model_names, read_evaluated
from prefopt.reporting.figures import draw_paths, draw_spread
from prefopt.reporting.paper_common import (
    Figure,
    Made,
    describe_metrics,
    format_value,
    policies_table,
    provenance_notes,
)
from prefopt.reporting.published import join_published, normalize_model_name, published_points, read_csv
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record


def peak_table(points: Sequence[Point], published: str, by: str, like: set[str], notes: list[str]) -> Tabular:
    """MMPO's table 1 (`by` accuracy: the win rate where LM accuracy peaks) or 2 (`by` win_rate: the reverse). `like`:
    which of the two is measured as the paper does, so that a difference means something."""
    selected = "peak_lm_accuracy" if by == "accuracy" else "peak_win_rate"
    theirs = [r for r in read_csv(published, "mmpo_tables_1_2.csv") if r["selected_by"] == selected]
    ours = [vars(p) for p in best_points(points, by)]
    headers, texts, rows = ["model", "method", "β", "epoch", "seeds"], [], []
    for heading in ("LM accuracy", "win rate"):
        headers += [f"{heading}, %", f"paper: {heading}", "difference"]
    for row, paper in join_published(ours, theirs):
        numbers: dict[str, Any] = {key: row.get(key) for key in ("model", "method", "beta", "epoch", "seeds")}
        cells = [
            row["model"],
            row["method"],
            *("–" if numbers[k] is None else f"{numbers[k]:g}" for k in ("beta", "epoch", "seeds")),
        ]
        for key, column in (("accuracy", "lm_accuracy"), ("win_rate", "lc_win_rate")):
            value, printed = row.get(key), paper.get(column)
            difference = value[0] - float(printed) if value and printed and key in like else None
            cells += [format_value(value), printed or "–", "–" if difference is None else f"{difference:+.2f}"]
            numbers |= {key: value and value[0], f"{key}_se": value and value[1]}
            numbers |= {f"paper_{key}": printed, f"{key}_difference": difference}
        texts.append(cells)
        rows.append(numbers)
    name, what = (
        ("table_1", "Win rate at peak LM accuracy") if by == "accuracy" else ("table_2", "LM accuracy at peak win rate")
    )
    return Tabular(f"mmpo_{name}", headers, texts, rows, notes, what)


def spread_table(rows: list[dict[str, Any]], notes: list[str]) -> Tabular:
    def cell(value: Any) -> str:
        return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"

    keys = {
        "source": "source", "model": "model", "method": "method", "betas": "β", "epoch": "epoch", "lowest": "lowest, %",
        "highest": "highest, %", "spread": "spread", "se": "s.e.", "noise": "by noise alone",
    }  # fmt: skip
    texts = [[f"{r[k]:g}" if k == "epoch" else cell(r[k]) for k in keys] for r in rows]
    return Tabular(
        "mmpo_spread", list(keys.values()), texts, rows, notes, "Spread of the win rate over β at the last epoch"
    )


def mmpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 1 and 2 and figures 1 to 3 of the paper, and its claim that the choice of beta matters little."""
    found = read_evaluated(records, config)
    metric = metric_of(found)
    models = model_names(records)
    points = points_of(found, metric, models)
    if records and not points:
        raise UserError(
            f"no policy in {config.runs_dir} has been evaluated. Evaluate them first: python -m prefopt.harness and "
            "python -m prefopt.alpaca with run=RUN checkpoints=all"
        )
    published, sft = published_points(config.published), sft_accuracy(found, models)
    order = [normalize_model_name(row["model"]) for row in read_csv(config.published, "mmpo_tables_1_2.csv")]  # by size
    points.sort(
        key=lambda p: (
            order.index(normalize_model_name(p.model)) if normalize_model_name(p.model) in order else len(order)
        )
    )
    by_source = {"ours": points, "published": published}
    like = as_published(metric, found)
    drawn = {"ours": points} | ({"published": published} if not points or "win_rate" in like else {})  # one metric
    notes = [
        "Paper: length-controlled win rate of AlpacaEval 2 against the SFT model of the same size, mean of two judges; "
        "LM accuracy, mean of ten tasks; standard errors are not known. Differences are "
        "given where ours is the same metric.",
        *describe_metrics(metric, found),
        "A peak is the highest of all β and epochs, and for that reason alone too high by a part of its standard "
        "error, which is that of the one point.",
        *provenance_notes(records, config),
    ]
    notes_of_spread = [
        "Spread: the highest less the lowest win rate of all β at the last epoch; s.e. as if the two were independent. "
        "The last column is the spread that equal win rates would show on average if their errors were independent: an "
        "upper estimate, because all β share their questions.",
        "Published: length-controlled win rates by gpt-4o-mini alone, SimPO without length normalization. β = 1 is not "
        "in the paper's grid.",
        *describe_metrics(metric, []),
        *provenance_notes(records, config),
    ]
    both = any(p.accuracy and p.win_rate for p in points)
    caption = "One path for each method and β, larger β darker; dashed, 50 %. " + (
        "Bars: one standard error. Above, LM accuracy against win rate, an arrow for each step between evaluated "
        "epochs; dotted, the accuracy of the SFT model. Below, the win rate by epoch. "
        if both
        else "Win rate by epoch. "
    )
    alone = (
        "the published runs, length-controlled and by gpt-4o-mini alone, SimPO without length normalization. Their "
        "accuracies by epoch are not known, so "
    )
    if not points:
        caption += f"These are {alone}the paper's figures with accuracy cannot be drawn from them."
    elif "published" in drawn:
        caption += f"Faint: {alone}they have no place in a panel with accuracy."
    output, name = Path(config.output), metric.name if metric else "length-controlled win rate"
    spread = [row for source, own in by_source.items() for row in spreads(own, source)]
    tables = [peak_table(points, config.published, by, like, notes) for by in ("accuracy", "win_rate")]
    spread_caption = (
        "Win rates of all β at the last epoch, a bar from the lowest to the highest; hollow where they are published "
        "ones beside ours. A short bar near 0 % is no merit."
    )
    tables += [spread_table(spread, notes_of_spread)]
    tables += policies_table(
        "mmpo", found, metric, models, [*describe_metrics(metric, found), *provenance_notes(records, config)]
    )
    return tables, [
        Figure("Through the epochs", caption, draw_paths(points, sft, drawn.get("published", []), name, output)),
        Figure("Spread over β", spread_caption, draw_spread(drawn, output)),
    ]


def as_published(metric: Metric | None, found: Sequence[Evaluated]) -> set[str]:
    """Which of accuracy and win_rate is the paper's metric: the mean of its ten tasks in full, zero-shot; the
    length-controlled win rate, whoever the judge is."""
    told = [t for policy in found for t in policy.harness]
    whole = all(t["settings"]["limit"] is None and not t["settings"]["num_fewshot"] for t in told)
    accuracy = whole and {t["task"] for t in told} == set(SUITES["mmpo"])
    controlled = metric is not None and metric.key == "length_controlled_win_rate"
    return {name for name, holds in (("accuracy", accuracy), ("win_rate", controlled)) if holds}
