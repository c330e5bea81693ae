"""The tables of the MADPO paper, from our records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefopt.reporting.config import PapersConfig
from prefopt.reporting.figures import draw_sensitivity
from prefopt.reporting.paper_common import Figure, Made, command
from prefopt.reporting.published import published_table, read_csv
from prefopt.reporting.summary import by_column_table
from prefopt.tracking.archive import Record

NAME, TITLE = "madpo_table_1", "Oracle reward by data quality (table 1)"
PAPER_METRIC = "Mean reward of the paper's own oracle, on a scale of its own: these do not compare with ours."
SENSITIVITY = "Final oracle reward over each hyperparameter that was varied: the mean over seeds."


def madpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Table 1 of the paper, ours and as published, and the sensitivity to each hyperparameter that was varied."""
    theirs = published_table(f"{NAME}_published", TITLE, read_csv(config.published, f"{NAME}.csv"), [PAPER_METRIC])
    if not records:
        return [theirs], []
    ours = by_column_table(list(records), "dataset.format.quality", command(config))
    files = draw_sensitivity(records, Path(config.output), "madpo_sensitivity")
    return [replace(ours, name=NAME, title=TITLE), theirs], [Figure("Sensitivity", SENSITIVITY, files)]
