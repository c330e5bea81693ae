"""Write rewards beside the rows of a file.

    python -m prefopt.score input=samples.jsonl.gz output=scored.jsonl.gz scorer=vader
    python -m prefopt.score input=pairs.jsonl output=scored.jsonl scorer=reward_model scorer.path=runs/RUN/policy

A row with `responses` (prefopt.sample's) gets the lists `rewards` and `rewards_01`; a pair gets `chosen_reward`,
`rejected_reward`, `chosen_reward_01` and `rejected_reward_01`: the reward r, and the same on [0, 1] (sigma(r), where
r is not there already). All other fields are carried over.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import ScoreConfig, build, check_hardware, parse, resolve_hardware
from prefopt.data.formats import as_messages, completion, messages, responses_of
from prefopt.data.sources import Row, read_rows, write_rows
from prefopt.paths import check_output
from prefopt.program import program
from prefopt.progress import say
from prefopt.scorers import Request, RewardScorer


def requests_of(where: str, row: Row) -> list[Request]:
    """What there is to score in a row. Raises UserError for a row that holds no responses."""
    try:
        if "responses" in row:
            prompt, (responses, finished) = as_messages(row["prompt"]), responses_of(row)
            return [
                Request(row, i, prompt, response, done, where)
                for i, (response, done) in enumerate(zip(responses, finished, strict=True))
            ]
        found = []
        for side in ("chosen", "rejected"):
            if isinstance(row[side], list) and len(row[side]) > 1:  # a whole conversation
                *prompt, answer = messages(row[side], side)
                text = answer["content"]
            else:
                prompt, text = as_messages(row["prompt"]), completion(row, side)
            found.append(Request(row, side, prompt, text, True, where))
        return found
    except KeyError as error:
        raise UserError(
            f"{where} has no field {error} (its fields: {', '.join(row)}). A row to score has prompt and responses, or "
            "prompt, chosen and rejected."
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}.") from None


def score_rows(
    rows: Sequence[tuple[str, Row]],
    scorer: RewardScorer,
    device: str,
    precision: str,
    name: str = "rewards",
    show: bool = True,
) -> list[Row]:
    """The rows (given with what to call them in a message) with their rewards; `name` is the field of the rewards of
    `responses`."""
    requests = [requests_of(where, row) for where, row in rows]
    rewards = iter(scorer.rewards([r for of_row in requests for r in of_row], device, precision, show))
    scored = []
    for (_, row), of_row in zip(rows, requests, strict=True):
        found = {r.key: next(rewards) for r in of_row}
        if "responses" in row:
            values = list(found.values())
            scored.append(row | {name: values, f"{name}_01": [scorer.probability(v) for v in values]})
        else:
            raw = {f"{side}_reward": value for side, value in found.items()}
            scored.append(row | raw | {f"{key}_01": scorer.probability(value) for key, value in raw.items()})
    return scored


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
    write_rows(output, score_rows(rows, scorer, config.device, config.precision, config.name))
    say(f"wrote {len(rows)} scored rows to {output}")


if __name__ == "__main__":
    main()
