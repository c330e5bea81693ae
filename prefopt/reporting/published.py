"""Published figures, and which of ours they belong to."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.reporting.curves import Point
from prefopt.reporting.tables import Column, Tabular, format_rows


def matches_published(ours: tuple[str, str], theirs: dict[str, str]) -> bool:
    """Whether a row of a published table is about this model and method of ours."""
    return _our_key(*ours) == _published_key(theirs)


def join_published(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, str]]
) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Our rows with the published one of the same model and method, then the published rows that none of ours has;
    what is missing is empty."""
    by_key = {_published_key(row): row for row in reversed(theirs)}  # of several the first
    pairs = [(row, by_key.get(_our_key(row["model"], row["method"]), {})) for row in ours]
    used = [theirs_of_ours for _, theirs_of_ours in pairs]
    return pairs + [({"model": t["model"], "method": t["method"]}, t) for t in theirs if t not in used]


def _our_key(model: str, method: str) -> tuple[str, str]:
    # A method of ours is an objective, with the keys in which its runs differ: "mmpo margin=0.8".
    return normalize_model_name(model), method.split(" ")[0]


def _published_key(row: dict[str, str]) -> tuple[str, str]:
    return normalize_model_name(row["model"]), from_published_name(row["method"])


def normalize_model_name(model: str) -> str:
    """The name of a model without case, hyphens, underscores and blanks, which differ from place to place."""
    return re.sub(r"[-_ ]", "", model.lower())


def published_points(folder: str) -> list[Point]:
    """The win rates of the published MMPO runs (arXiv 2510.22881) by epoch, for gpt-4o-mini alone, as its plots have
    them: without length normalization, SimPO too, and MMPO without the entropy bonus."""
    return [
        Point(
            row["model"],
            row["method"],
            float(row["beta"]),
            float(row["epoch"]),
            None,
            (float(row["lc_win_rate"]), None),
        )
        for row in read_csv(folder, "mmpo_epochs_gpt4o_mini.csv")
        if row["length_normalized"] == "no" and row["entropy"] != "yes"
    ]


def read_csv(folder: str, name: str) -> list[dict[str, str]]:
    """The rows of a file in the folder of published figures. Raises UserError where the file is not there."""
    file = Path(folder) / name
    if not file.is_file():
        raise UserError(f"published={folder} holds no {name}; the repository has it in results/published")
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def paper_heading(column: str) -> str:
    """The heading of a published column beside ours."""
    return f"paper: {column.replace('_', ' ')}"


def published_table(name: str, title: str, rows: Sequence[dict[str, str]], notes: list[str]) -> Tabular:
    """A paper's figures by themselves: they stand beside ours only where both are the same metric."""
    columns = [Column(key, key.replace("_", " "), text=key in ("model", "method")) for key in rows[0]]
    return Tabular(name, columns, format_rows(columns, rows), list(rows), notes, f"As published: {title}")


def from_published_name(published: str) -> str:
    """What the papers' tables call X+mappo is our mappo_X, their i-X (iterative) our online-X, beta-dpo beta_dpo."""
    base, plus, wrapper = published.partition("+")
    online = "online-" if base.startswith("i-") else ""
    name = base.removeprefix("i-").replace("-", "_")
    return online + (f"{wrapper}_{name}" if plus else name)
