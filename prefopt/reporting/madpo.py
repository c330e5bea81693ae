"""The tables of the MADPO paper, from our records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefopt.reporting.config import PapersConfig, ReportConfig
from prefopt.reporting.figures import draw_sensitivity
from prefopt.reporting.paper_common import Figure, Made, provenance_notes
from prefopt.reporting.published import read_csv
from prefopt.reporting.summary import by_column_table
from prefopt.reporting.tables import Column, Tabular, format_rows
from prefopt.tracking.archive import Record

NAME, TITLE = "madpo_table_1", "Oracle reward by data quality (table 1)"
SENSITIVITY = (
    "Final oracle reward over each hyperparameter that was varied: the mean over seeds, bars of one standard error "
    "(of one seed alone, that over its prompts)."
)


def madpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Table 1 of the paper, and the sensitivity to each hyperparameter that was varied."""
    theirs = read_csv(config.published, f"{NAME}.csv")
    if not records:
        columns = [Column(key, key.replace("_", " "), text=key == "method") for key in theirs[0]]
        notes = ["Paper: mean reward of its own oracle.", *provenance_notes(records, config)]
        return [Tabular(NAME, columns, format_rows(columns, theirs), list(theirs), notes, TITLE)], []

    by_quality = ReportConfig("", "", "dataset.format.quality", str(Path(config.published) / f"{NAME}.csv"))
    table = by_column_table(list(records), by_quality)
    # Its further notes name the command of prefopt.report.
    table = replace(table, name=NAME, title=TITLE, notes=[table.notes[0], *provenance_notes(records, config)])
    files = draw_sensitivity(records, Path(config.output), "madpo_sensitivity")
    return [table], [Figure("Sensitivity", SENSITIVITY, files)]
