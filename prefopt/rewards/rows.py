"""Rewards for the responses in rows."""

from collections.abc import Sequence

from prefopt.data.formats import as_messages, completion, messages, responses_of
from prefopt.data.sources import Row
from prefopt.errors import UserError
from prefopt.rewards.scorers import Request, RewardScorer


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
