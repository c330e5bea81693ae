"""What `prefopt score` writes: the rows of its input, with their rewards."""

import logging
from pathlib import Path

from prefopt.config.hardware import check_hardware, resolve_hardware
from prefopt.config.parse import build
from prefopt.data.sources import read_rows, write_rows
from prefopt.errors import UserError
from prefopt.rewards.config import ScoreConfig
from prefopt.rewards.rows import score_rows
from prefopt.rewards.scorers import RewardScorer
from prefopt.tracking.process import output_lock
from prefopt.utils.distributed import is_main_process, process_group
from prefopt.utils.files import check_output

log = logging.getLogger(__name__)


def run_pending(config: ScoreConfig, **_: str) -> None:
    """A job of a sweep: `score`, unless the output is there."""
    if Path(config.output).is_file():
        log.info(f"{config.output} is there, skipped (remove it to score again)")
    else:
        score(config)


def check_score(config: ScoreConfig) -> RewardScorer:
    """The scorer. Raises UserError for what cannot be scored."""
    check_hardware(config)
    if config.name in ("", "prompt", "responses", "finished"):
        raise UserError(f"name={config.name} cannot be the field of the rewards. Give another, such as rewards.")
    check_output(config.output, config.input)
    return build(config.scorer, RewardScorer, "scorer")


def score(config: ScoreConfig) -> None:
    """Write the output. Raises UserError for what cannot be scored."""
    scorer = check_score(config)
    output = check_output(config.output, config.input)
    resolve_hardware(config)
    rows = list(read_rows(config.input, config.split))
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of scoring
    with process_group(config.device), output_lock(output):
        scored = score_rows(rows, scorer, config.device, config.precision, config.name)
        if is_main_process():
            write_rows(output, scored)
    log.info(f"wrote {len(rows)} scored rows to {output}")
