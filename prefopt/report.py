"""Read the records of finished runs; write a table (Markdown, CSV, LaTeX) and a figure (PNG,
SVG, PDF).

    python -m prefopt.report runs_dir=runs output=results/mine
    python -m prefopt.report runs_dir=runs/lab/madpo/methods output=results/mine columns=dataset.format.quality
    python -m prefopt.report runs_dir=runs 'compare=["dpo β=0.1","mmpo β=0.1"]'       # or two runs, by folder or id

Where runs differ in their seed alone there is also a table of their means over seeds; with `columns` one with a column
for each value of that key, and with `compare` one of the paired differences of two methods. curves/ has a figure for
each run whose metrics.jsonl is there, but for those with logger.curves=false.

All else comes from record.json files, nothing from names or logs.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.differences import print_table
from prefopt.reporting.figures import draw
from prefopt.reporting.labels import sort_by_label
from prefopt.reporting.paired import paired_table
from prefopt.reporting.run_curves import draw_run_curves
from prefopt.reporting.summary import by_column_table, command, main_table, over_seeds_table, table_rows
from prefopt.tracking.archive import expand_glob, read_records, write_archive_once
from prefopt.utils.files import check_folder


@program("report", ReportConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, ReportConfig)
    check_folder("output", config.output)
    records = sort_by_label(read_records(*expand_glob(config.runs_dir)))
    runs = main_table(table_rows(records), records, config)
    over_seeds = over_seeds_table(records, config)
    by_column = by_column_table(records, config.columns, command(config)) if config.columns else None
    tables = [runs, over_seeds, by_column, paired_table(records, config) if config.compare else None]

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for table in filter(None, tables):
        print_table(table)
    files = [file for table in filter(None, tables) for file in table.write(output)]
    if not (figures := draw(records, output)):
        print("No figure of reward over KL: no run has a reward of its samples, which dataset.oracle gives them.")
    files += figures + draw_run_curves(records, output)
    for file in files + write_archive_once(records, config.runs_dir, output):
        print(file)


if __name__ == "__main__":
    main()
