"""Add rewards to the rows of a file.

    python -m prefopt.score input=samples.jsonl.gz output=scored.jsonl.gz scorer=vader
    python -m prefopt.score input=pairs.jsonl output=scored.jsonl scorer=reward_model scorer.path=runs/RUN/policy

A row with `responses`, as prefopt.sample writes it, gets the lists `rewards` and `rewards_01`. A pair gets
`chosen_reward`, `rejected_reward`, `chosen_reward_01` and `rejected_reward_01`. The fields with _01 hold the reward on
[0, 1]: sigma(r), or r itself where the scorer's rewards are on [0, 1] already. All other fields are carried over.
Under torchrun the processes share the responses of a reward model.
"""

import logging

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.hardware import check_hardware, resolve_hardware
from prefopt.config.parse import build, parse
from prefopt.data.sources import read_rows, write_rows
from prefopt.errors import UserError
from prefopt.rewards.config import ScoreConfig
from prefopt.rewards.rows import score_rows
from prefopt.rewards.scorers import RewardScorer
from prefopt.tracking.process import output_lock
from prefopt.utils.distributed import is_main_process, process_group
from prefopt.utils.files import check_output

log = logging.getLogger("prefopt.score")


@program("score", ScoreConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, ScoreConfig)
    check_hardware(config)
    if config.name in ("", "prompt", "responses", "finished"):
        raise UserError(f"name={config.name} cannot be the field of the rewards. Give another, such as rewards.")
    output = check_output(config.output, config.input)
    resolve_hardware(config)
    scorer = build(config.scorer, RewardScorer, "scorer")
    rows = list(read_rows(config.input, config.split))
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of scoring
    with process_group(config.device), output_lock(output):
        scored = score_rows(rows, scorer, config.device, config.precision, config.name)
        if is_main_process():
            write_rows(output, scored)
    log.info(f"wrote {len(rows)} scored rows to {output}")


if __name__ == "__main__":
    main()
