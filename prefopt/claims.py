"""The papers' claims beside what our runs say of them: effects over seeds, their intervals, and verdicts.

    python -m prefopt.claims
    python -m prefopt.claims scales.lab=runs/lab output=claims

Claims are data: results/published/claims_*.yaml. A verdict is computed from the records of finished runs and of
prefopt.harness and prefopt.alpaca. Written as Markdown, CSV, LaTeX and one HTML page; claims_runs.csv names every run
that a verdict came from. A claim whose runs are not there has no verdict.
"""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.reporting.claims import answers, claims_table, read_claims, shares_table
from prefopt.reporting.config import ClaimsConfig
from prefopt.reporting.html import page
from prefopt.utils.files import atomic_write, check_folder


@program("claims", ClaimsConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, ClaimsConfig)
    check_folder("output", config.output)
    found = answers(read_claims(config.published), config.scales)
    chosen = [f"scales.{name}={folder}" for name, folder in config.scales.items() if folder]
    made_by = shlex.join(["python", "-m", "prefopt.claims", *chosen])
    table, shares = claims_table(found, made_by), shares_table(found)

    output = Path(config.output)
    files = table.write(output)
    atomic_write(output / "claims_runs.csv", shares.csv())
    atomic_write(output / "claims.html", page("The papers' claims", [table, shares], [], [], []))
    for file in [*files, output / "claims_runs.csv", output / "claims.html"]:
        print(file)


if __name__ == "__main__":
    main()
