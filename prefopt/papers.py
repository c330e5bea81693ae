"""A paper's tables and figures from the records of finished runs, with what the paper prints beside them.

    python -m prefopt.papers paper=mmpo                                   # the published figures by themselves
    python -m prefopt.papers paper=mmpo 'runs_dir=runs/paper/mmpo/*'
    python -m prefopt.papers paper=mappo runs_dir=runs/mini/mappo/final
    python -m prefopt.papers paper=madpo runs_dir=results/lab/madpo/methods/records.jsonl

Tables are written as Markdown, CSV and LaTeX (booktabs), figures as PNG, SVG and PDF, and all of it once more as one
HTML page that needs nothing besides. Everything comes from the records that prefopt.train, prefopt.harness and
prefopt.alpaca leave in a run's folder, nothing from names or logs. Records that cannot be compared are refused. They
are written into records.jsonl, from which (runs_dir=FILE) the same tables and figures can be made without the runs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.reporting.config import PapersConfig
from prefopt.reporting.html import page
from prefopt.reporting.labels import sort_by_label
from prefopt.reporting.madpo import madpo
from prefopt.reporting.mappo import mappo
from prefopt.reporting.mmpo import mmpo
from prefopt.reporting.paper_common import Made, provenance_notes
from prefopt.tracking.archive import Record, expand_glob, read_records, write_archive_once
from prefopt.utils.files import atomic_write, check_folder

PAPERS: dict[str, tuple[str, Callable[[Sequence[Record], PapersConfig], Made]]] = {
    "mmpo": ("MMPO, arXiv 2510.22881", mmpo),
    "mappo": ("MaPPO, arXiv 2507.21183", mappo),
    "madpo": ("MADPO, arXiv 2510.05342", madpo),
}


@program("papers", PapersConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, PapersConfig)
    if config.paper not in PAPERS:
        raise UserError(f"paper must be {', '.join(PAPERS)}, is {config.paper!r}")
    check_folder("output", config.output)
    title, make = PAPERS[config.paper]
    records = sort_by_label(read_records(*expand_glob(config.runs_dir))) if config.runs_dir else []
    tables, figures = make(records, config)
    output = Path(config.output)
    files = [file for table in tables for file in table.write(output)]
    files += [file for figure in figures for file in figure.files]
    target = output / f"{config.paper}.html"
    atomic_write(target, page(title, tables, figures, records, provenance_notes(records, config)))
    files.append(target)
    for file in files + write_archive_once(records, config.runs_dir, output):
        print(file)


if __name__ == "__main__":
    main()
