"""The tables of the MMPO paper, from our records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.results import PAPER_JUDGES, SUITES
from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import Point, best_points, points_of, sft_accuracy, spreads
from prefopt.reporting.differences import comparison_notes
from prefopt.reporting.evaluated import Evaluated, Metric, flatten_value, metric_of, model_names, read_evaluated
from prefopt.reporting.figures import draw_paths, draw_spread
from prefopt.reporting.paper_common import (
    Figure,
    Made,
    describe_metrics,
    policies_table,
    provenance_notes,
)
from prefopt.reporting.published import (
    join_published,
    normalize_model_name,
    published_points,
    published_table,
    read_csv,
)
from prefopt.reporting.tables import Column, Tabular, format_rows
from prefopt.tracking.archive import Record

# Sentences below the tables and figures.
PAPER_METRICS = (
    "Paper: length-controlled win rate of AlpacaEval 2 against the SFT model of the same size, mean of two judges; "
    "LM accuracy, mean of ten tasks; standard errors are not known."
)
PEAKS_ARE_HIGH = (
    "A peak is the highest of all β and epochs, and for that reason alone too high by a part of its standard "
    "error, which is that of the one point."
)
SPREAD_DEFINITION = (
    "Spread: the highest less the lowest win rate of all β at the last epoch; s.e. as if the two were independent. "
    "The last column is the spread that equal win rates would show on average if their errors were independent: an "
    "upper estimate, because all β share their questions."
)
PUBLISHED_SPREAD = (
    "Length-controlled win rates by gpt-4o-mini alone, SimPO without length normalization. β = 1 is not in the paper's "
    "grid."
)
SPREAD_CAPTION = (
    "Win rates of all β at the last epoch, a bar from the lowest to the highest; hollow where they are published "
    "ones beside ours. A short bar near 0 % is no merit."
)
PATHS_CAPTION = "One path for each method and β, larger β darker."
PATHS_WITH_ACCURACY = (
    "Above, LM accuracy against win rate, an arrow for each step between evaluated epochs. Below, the win rate by "
    "epoch."
)
PATHS_BY_EPOCH = "Win rate by epoch."
PUBLISHED_RUNS = (
    "the published runs, length-controlled and by gpt-4o-mini alone, SimPO without length normalization. Their "
    "accuracies by epoch are not known, so"
)

# By which judges: of the paper's tables, and of its win rates by epoch.
CONTROLLED = "length_controlled_win_rate"
TABLES_METRIC, PUBLISHED_METRIC = (CONTROLLED, tuple(sorted(PAPER_JUDGES))), (CONTROLLED, (PAPER_JUDGES[0],))

SPREAD_COLUMNS = [
    Column("model", "model", text=True),
    Column("method", "method", text=True),
    Column("betas", "β"),
    Column("epoch", "epoch"),
    Column("lowest", "lowest, %", 2),
    Column("highest", "highest, %", 2),
    Column("spread", "spread", 2),
    Column("se", "s.e.", 2),
    Column("noise", "by noise alone", 2),
]


def peak_tables(
    points: Sequence[Point], published: str, by: str, same_metric: set[str], notes: list[str], origin: list[str]
) -> list[Tabular]:
    """MMPO's table 1 (`by` accuracy: the win rate where LM accuracy peaks) or 2 (`by` win_rate: the reverse), ours and
    as published.

    `same_metric`: which of the two is measured as the paper does. Beside these stand the paper's figures for the same
    model and method, and the differences.
    """
    if by == "accuracy":
        name, title, selected = "mmpo_table_1", "Win rate at peak LM accuracy", "peak_lm_accuracy"
    else:
        name, title, selected = "mmpo_table_2", "LM accuracy at peak win rate", "peak_win_rate"
    theirs = [row for row in read_csv(published, "mmpo_tables_1_2.csv") if row["selected_by"] == selected]
    rows_of_paper = [{key: value for key, value in row.items() if key != "selected_by"} for row in theirs]
    as_published = published_table(f"{name}_published", title, rows_of_paper, [PAPER_METRICS])
    if not points:
        return [as_published]

    columns = [
        Column("model", "model", text=True),
        Column("method", "method", text=True),
        Column("beta", "β"),
        Column("epoch", "epoch"),
        Column("seeds", "seeds"),
    ]
    keys = {"accuracy": ("lm_accuracy", "LM accuracy"), "win_rate": ("lc_win_rate", "win rate")}
    for key, (_, heading) in keys.items():
        columns.append(Column(key, f"{heading}, %", 2, error=True))
        if key in same_metric:
            columns.append(Column(f"paper_{key}", f"paper: {heading}"))
            columns.append(Column(f"{key}_difference", "difference", 2, signed=True))

    ours = [vars(point) for point in best_points(points, by)]
    rows = []
    for row, paper in join_published(ours, theirs)[: len(ours)]:
        numbers: dict[str, Any] = {key: row[key] for key in ("model", "method", "beta", "epoch", "seeds")}
        for key, (column, _) in keys.items():
            value, printed = row[key], paper.get(column)
            numbers |= flatten_value(key, value)
            if key in same_metric:
                difference = value[0] - float(printed) if value and printed else None
                numbers |= {f"paper_{key}": printed, f"{key}_difference": difference}
        rows.append(numbers)
    notes = [*notes, PEAKS_ARE_HIGH, *([PAPER_METRICS] if same_metric else [])]
    return [Tabular(name, columns, format_rows(columns, rows), rows, notes, title, origin), as_published]


def spread_table(points: Sequence[Point], source: str, notes: list[str], origin: Sequence[str] = ()) -> list[Tabular]:
    """The `spreads` of our points or the published ones; none where no method has several β."""
    rows = spreads(points, source)
    if not rows:
        return []
    title = "Spread of the win rate over β at the last epoch"
    name = "mmpo_spread" if source == "ours" else "mmpo_spread_published"
    title = title if source == "ours" else f"As published: {title}"
    notes = [SPREAD_DEFINITION, *notes]
    return [Tabular(name, SPREAD_COLUMNS, format_rows(SPREAD_COLUMNS, rows), rows, notes, title, list(origin))]


def mmpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 1 and 2 and figures 1 to 3 of the paper, and its claim that the choice of beta matters little.

    Raises UserError if there are records, but no evaluated policies.
    """
    policies = read_evaluated(records, config)
    metric = metric_of(policies)
    models = model_names(records)
    points = points_of(policies, metric, models)
    if records and not points:
        raise UserError(
            f"no policy in {config.runs_dir} has been evaluated. Evaluate them first: python -m prefopt.harness and "
            "python -m prefopt.alpaca with run=RUN checkpoints=all"
        )
    points = _in_order_of_size(points, config.published)
    published = published_points(config.published)
    same_metric = as_published(metric, policies)

    origin, shared = provenance_notes(records, config), comparison_notes(records)
    metrics = [*describe_metrics(metric, policies), *shared]
    tables = [
        table
        for by in ("accuracy", "win_rate")
        for table in peak_tables(points, config.published, by, same_metric, metrics, origin)
    ]
    tables += spread_table(points, "ours", [*describe_metrics(metric, []), *shared], origin)
    tables += spread_table(published, "published", [PUBLISHED_SPREAD])
    tables += policies_table("mmpo", policies, metric, models, metrics, origin)

    # A figure shows one metric: the published win rates have no place beside ours of another kind.
    drawn = {"ours": points}
    if not points or (metric is not None and (metric.key, metric.judges) == PUBLISHED_METRIC):
        drawn["published"] = published
    output, name = Path(config.output), metric.name if metric else "length-controlled win rate"
    errors = f"Bars: ± 1 standard error over {metric.questions} questions" if metric and points else ""
    errors += " and the seeds." if any(point.seeds > 1 for point in points) else "." * bool(errors)
    note = " ".join([errors, *shared])
    paths = draw_paths(points, sft_accuracy(policies, models), drawn.get("published", []), name, output, note)
    spread = draw_spread(drawn, output, " ".join(["A mark for each β, a bar from the lowest to the highest.", *shared]))
    return tables, [
        Figure("Through the epochs", _paths_caption(points, "published" in drawn), paths),
        Figure("Spread over β", SPREAD_CAPTION, spread),
    ]


def _in_order_of_size(points: Sequence[Point], published: str) -> list[Point]:
    """The points in the order of the paper's models, which is by size; other models come last."""
    models = [normalize_model_name(row["model"]) for row in read_csv(published, "mmpo_tables_1_2.csv")]

    def place(point: Point) -> int:
        name = normalize_model_name(point.model)
        return models.index(name) if name in models else len(models)

    return sorted(points, key=place)


def _paths_caption(points: Sequence[Point], with_published: bool) -> str:
    has_accuracy = any(point.accuracy and point.win_rate for point in points)
    parts = [PATHS_CAPTION, PATHS_WITH_ACCURACY if has_accuracy else PATHS_BY_EPOCH]
    if not points:
        parts.append(f"These are {PUBLISHED_RUNS} the paper's figures with accuracy cannot be drawn from them.")
    elif with_published:
        parts.append(f"Faint: {PUBLISHED_RUNS} they have no place in a panel with accuracy.")
    return " ".join(parts)


def as_published(metric: Metric | None, policies: Sequence[Evaluated]) -> set[str]:
    """Which of accuracy and win_rate is the paper's metric: the mean of its ten tasks in full, zero-shot; the
    length-controlled win rate, mean of its two judges."""
    results = [result for policy in policies for result in policy.harness]
    in_full = all(r["settings"]["limit"] is None and not r["settings"]["num_fewshot"] for r in results)
    same = set()
    if in_full and {r["task"] for r in results} == set(SUITES["mmpo"]):
        same.add("accuracy")
    if metric is not None and (metric.key, metric.judges) == TABLES_METRIC:
        same.add("win_rate")
    return same
