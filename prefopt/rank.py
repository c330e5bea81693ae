"""Rank the responses of each row by a judge: the winner of n - 1 comparisons.

    python -m prefopt.rank input=samples.jsonl.gz output=ranked.jsonl.gz judge=gpt41
    python -m prefopt.rank input=samples.jsonl output=ranked.jsonl judge=local judge.base_url=URL judge.model=NAME

Each response in turn is compared with the best one before it (iterative pairwise ranking, arXiv 2411.05875). The rows
get `rewards`: 1 for the winner, 0 for each that was beaten, null without a verdict. With
dataset.format.pairing=all each beaten one makes a pair with the winner, with best_worst the first of them.

The judge's replies are kept in OUTPUT.replies. The same command continues a stopped one, and pays for nothing twice.
"""

import logging

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.data.sources import write_rows
from prefopt.evaluation.config import RankConfig
from prefopt.evaluation.ranking import rank
from prefopt.tracking.process import output_lock
from prefopt.utils import signals
from prefopt.utils.files import check_output

log = logging.getLogger("prefopt.rank")


@program("rank", RankConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, RankConfig)
    output = check_output(config.output, config.input)
    signals.install_handlers()
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the judge was paid
    with output_lock(output):
        rows = rank(config, output.with_name(f"{output.name}.replies"))
        write_rows(output, rows)
    log.info(f"wrote {len(rows)} ranked rows to {output}")


if __name__ == "__main__":
    main()
