"""What the papers' pages have in common."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.reporting.config import PapersConfig
from prefopt.reporting.curves import epoch_of
from prefopt.reporting.evaluated import Evaluated, Metric, Value, accuracy_of, win_rate_of
from prefopt.reporting.summary import provenance
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    files: list[Path]


def format_value(value: Value | None, digits: int = 2) -> str:
    """With its standard error; what was not measured is a dash."""
    if value is None:
        return "–"
    return f"{value[0]:.{digits}f}" + ("" if value[1] is None else f" ± {value[1]:.{digits}f}")


def policies_table(
    paper: str, found: Sequence[Evaluated], metric: Metric | None, models: dict[str, str], notes: list[str]
) -> list[Tabular]:
    """Every evaluated policy by itself, before means over seeds; none where none was evaluated."""
    headers = [
        "run",
        "model",
        "step",
        "epoch",
        "LM accuracy, %",
        f"{metric.name if metric else 'win rate'}, %",
        "commit",
    ]
    texts, rows = [], []
    for policy in found:
        rates = accuracy_of(policy), None if policy.run["objective"] == "sft" else win_rate_of(policy, metric)
        epoch = epoch_of(policy.run, policy.step)
        commits = ", ".join(sorted({commit(t["git"]) for t in [*policy.harness, *policy.alpaca]}))
        row = {"run": policy.run["name"], "model": models[policy.run["name"]], "step": policy.step, "epoch": epoch}
        texts.append([row["run"], row["model"], str(policy.step), f"{epoch:g}", *map(format_value, rates), commits])
        for key, value in zip(("accuracy", "win_rate"), rates, strict=True):
            row |= dict(zip((key, f"{key}_se"), value or (None, None), strict=True))
        rows.append(row | {"commit": commits})
    return [Tabular(f"{paper}_policies", headers, texts, rows, notes, "Evaluated policies")] if found else []


def limits_note(told: Sequence[dict[str, Any]]) -> str:
    """Of how many rows these harness records are, where it is not all."""
    limits = {t["settings"]["limit"] for t in told} - {None}
    return "".join(f"; of each task the first {limit:g} rows" for limit in sorted(limits))


Made = tuple[list[Tabular], list[Figure]]


def command(config: PapersConfig) -> str:
    given = {k: v for k, v in vars(config).items() if v is not None}
    texts = {k: f"[{','.join(v)}]" if isinstance(v, list) else v for k, v in given.items()}
    return shlex.join(["python", "-m", "prefopt.papers", *(f"{k}={v}" for k, v in texts.items())])


def provenance_notes(records: Sequence[Record], config: PapersConfig) -> list[str]:
    if not records:
        return [f"Made by `{command(config)}` from the published figures alone."]
    return provenance(list(records), command(config))


def describe_metrics(metric: Metric | None, found: Sequence[Evaluated]) -> list[str]:
    """What our figures are."""
    normalized = {p.run["config"]["objective"].get("length_normalize") for p in found if p.run["objective"] == "simpo"}
    simpo = {"with" if each else "without" for each in normalized}
    tasks, rows = (
        sorted({t["task"] for p in found for t in p.harness}),
        limits_note([t for p in found for t in p.harness]),
    )
    return [
        *([f"Ours: {metric.name}, {metric.about}."] if metric else []),
        *([f"Ours: LM accuracy, the mean acc of {', '.join(tasks)}{rows}."] if tasks else []),
        *([f"Ours: SimPO {' and '.join(sorted(simpo))} length normalization."] if simpo else []),
    ]


def commit(git: dict[str, Any] | None) -> str:
    return "–" if git is None else git["commit"][:10] + "+" * git["dirty"]
