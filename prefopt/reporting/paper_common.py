"""What the papers' pages have in common."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import epoch_of
from prefopt.reporting.evaluated import Evaluated, Metric, accuracy_of, flatten_value, win_rate_of
from prefopt.reporting.labels import labels
from prefopt.reporting.summary import provenance
from prefopt.reporting.tables import MISSING, Column, Tabular, format_rows
from prefopt.tracking.archive import Record


@dataclass(frozen=True)
class Figure:
    """A figure of a page, and its files (PNG, SVG, PDF)."""

    title: str
    caption: str
    files: list[Path]


Made = tuple[list[Tabular], list[Figure]]


def win_rate_heading(metric: Metric | None) -> str:
    """The heading of a column of win rates."""
    return f"{metric.name if metric else 'win rate'}, %"


def policies_table(
    paper: str,
    policies: Sequence[Evaluated],
    metric: Metric | None,
    models: dict[str, str],
    notes: list[str],
    origin: list[str],
) -> list[Tabular]:
    """Every evaluated policy by itself, before means over seeds; none where none was evaluated. The runs' names and the
    commits of their evaluation are in the CSV alone."""
    if not policies:
        return []
    columns = [
        Column("method", "method", text=True),
        Column("model", "model", text=True),
        Column("step", "step"),
        Column("epoch", "epoch"),
        Column("accuracy", "LM accuracy, %", 2, error=True),
        Column("win_rate", win_rate_heading(metric), 2, error=True),
    ]
    runs = list({policy.run["name"]: policy.run for policy in policies}.values())
    methods = dict(zip((run["name"] for run in runs), labels(runs), strict=True))
    rows = []
    for policy in policies:
        name, is_sft = policy.run["name"], policy.run["objective"] == "sft"
        rows.append(
            {
                "run": name,
                "method": methods[name],
                "model": models[name],
                "step": policy.step,
                "epoch": epoch_of(policy.run, policy.step),
                **flatten_value("accuracy", accuracy_of(policy)),
                **flatten_value("win_rate", None if is_sft else win_rate_of(policy, metric)),
                "commit": ", ".join(sorted({commit(t["git"]) for t in [*policy.harness, *policy.alpaca]})),
            }
        )
    return [
        Tabular(f"{paper}_policies", columns, format_rows(columns, rows), rows, notes, "Evaluated policies", origin)
    ]


def limits_note(results: Sequence[dict[str, Any]]) -> str:
    """How many rows of each task these harness records cover, where it is not all."""
    limits = {result["settings"]["limit"] for result in results} - {None}
    return "".join(f"; of each task the first {limit:g} rows" for limit in sorted(limits))


def command(config: PapersConfig) -> str:
    """The command that makes this page, for the notes below its tables."""
    values = {k: v for k, v in vars(config).items() if v is not None}
    texts = {k: f"[{','.join(v)}]" if isinstance(v, list) else v for k, v in values.items()}
    return shlex.join(["python", "-m", "prefopt.papers", *(f"{k}={v}" for k, v in texts.items())])


def provenance_notes(records: Sequence[Record], config: PapersConfig) -> list[str]:
    """Sentences on what a page was made from, and by which command."""
    if not records:
        return [f"Made by `{command(config)}` from the published figures alone."]
    return provenance(records, command(config))


def describe_metrics(metric: Metric | None, policies: Sequence[Evaluated]) -> list[str]:
    """Sentences on how our figures were measured: the win rate, and the tasks of these policies."""
    notes = []
    if metric:
        notes.append(f"{metric.name.capitalize()}, {metric.about}.")
    results = [result for policy in policies for result in policy.harness]
    if results:
        tasks = ", ".join(sorted({result["task"] for result in results}))
        notes.append(f"LM accuracy, the mean acc of {tasks}{limits_note(results)}.")
    simpo = [policy.run["config"]["objective"] for policy in policies if policy.run["objective"] == "simpo"]
    if notes:
        notes.append("± is one standard error over these questions and rows, and over seeds where there are several.")
    if simpo:
        forms = {"with" if objective.get("length_normalize") else "without" for objective in simpo}
        notes.append(f"SimPO {' and '.join(sorted(forms))} length normalization.")
    return notes


def commit(git: dict[str, Any] | None) -> str:
    """The first ten digits of a commit, with a + if there were changes that were not committed."""
    if git is None:
        return MISSING
    return git["commit"][:10] + ("+" if git["dirty"] else "")
