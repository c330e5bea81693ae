"""The figures of a harness record: read from what lm-eval returns, and shown as a table."""

import math
from typing import Any

from rich.table import Table

from prefopt.evaluation.results import lm_accuracy
from prefopt.utils.console import folding_table


def metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value", "stderr"}} from lm-eval's {"acc,none", "acc_stderr,none"}. A filter other than none stays in
    the name: "exact_match,strict-match". `stderr` is None where lm-eval has none, `value` where it is not finite."""
    by_name: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr"):  # not a metric: the task's alias, or an error, which is read below
            continue
        error = values.get(f"{name}_stderr,{filter_}")
        by_name[name if filter_ == "none" else key] = {"value": _finite(value), "stderr": _finite(error)}
    return by_name


def _finite(value: Any) -> float | None:
    """A number as Python's float; None for NaN, infinities and the text that lm-eval writes for no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def shown(name: str, by_name: dict[str, Any], children: dict[str, list[str]]) -> list[str]:
    """The names under which a task's figures stand: its own, or those of a group's parts where the group has none."""
    if by_name.get(name):
        return [name]
    return [part for child in children.get(name, []) for part in shown(child, by_name, children)]


def format_results(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    """A row per checkpoint: the first metric of every task, or of each part of a group, and the means over tasks.
    `rows` are records, each with the name of its checkpoint."""
    columns = list(dict.fromkeys(part for _, record in rows for part in record["shown"]))
    table = folding_table("checkpoint", *columns, "mean acc", "mean acc_norm")
    for name in dict.fromkeys(name for name, _ in rows):
        mine = [record for label, record in rows if label == name]
        by_part = {part: format_metric(r, part) for r in mine for part in r["shown"]}
        means = lm_accuracy(mine)
        cells = [by_part.get(part, "–") for part in columns]
        cells += [f"{100 * means[key]:.1f}" if means else "–" for key in ("mean acc", "mean acc_norm")]
        table.add_row(name, *cells)
    return table


def format_metric(record: dict[str, Any], part: str) -> str:
    """The first metric of a task or of a group's part: accuracies and exact matches in percent, others as they are."""
    values = record["metrics"] if part == record["task"] else record["subtasks"][part]
    metric, numbers = next(iter(values.items()))
    base = metric.partition(",")[0]
    lower = (record["higher_is_better"].get(part) or {}).get(base) is False
    what = f"({metric}, lower is better)" if lower else f"({metric})"
    value, error = numbers["value"], numbers["stderr"]
    if value is None:
        return f"not finite {what}"
    if "acc" in base.split("_") or base == "exact_match":
        return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + f" % {what}"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}") + f" {what}"


def said_of_lengths(record: dict[str, Any]) -> str | None:
    """A line about requests that were longer than the model; None where there were none."""
    n, cut, longest = (record["requests"][key] for key in ("n", "cut_from_the_left", "max_length"))
    if not cut:
        return None
    return f"{cut} of {n} requests were cut from the left to the {longest} tokens that the model reads"


def said_of_unused(record: dict[str, Any]) -> str | None:
    """A line about settings that lm-eval ignored in a part of the task; None where it used all."""
    parts = [f"{key} changed nothing in {', '.join(tasks)}" for key, tasks in record["unused"].items()]
    return "; ".join(parts) or None
