"""The tables of the MADPO paper, from our records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefopt.reporting.config import PapersConfig, ReportConfig
from prefopt.reporting.figures import draw_sensitivity
from prefopt.reporting.paper_common import Figure, Made, provenance_notes
from prefopt.reporting.published import read_csv
from prefopt.reporting.summary import by_column_table
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record


def madpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Table 1 of the paper, and the sensitivity to each hyperparameter that was varied."""
    name, title = "madpo_table_1", "Oracle reward by data quality (table 1)"
    theirs = read_csv(config.published, f"{name}.csv")
    if not records:
        texts = [list(row.values()) for row in theirs]
        notes = ["Paper: mean reward of its own oracle.", *provenance_notes(records, config)]
        return [Tabular(name, [key.replace("_", " ") for key in theirs[0]], texts, list(theirs), notes, title)], []
    asked = ReportConfig("", "", "dataset.format.quality", str(Path(config.published) / f"{name}.csv"))
    table = by_column_table(list(records), asked)
    table = replace(table, name=name, title=title, notes=[table.notes[0], *provenance_notes(records, config)])
    caption = (
        "Final oracle reward over each hyperparameter that was varied: the mean over seeds, bars of one standard error "
        "(of one seed alone, that over its prompts)."
    )
    files = draw_sensitivity(records, Path(config.output), "madpo_sensitivity")
    return [table], [Figure("Sensitivity", caption, files)]
