"""Add the rewards of their responses to rows."""

from collections.abc import Sequence

from prefopt.data.fields import answer, messages, read_prompt, responses_of
from prefopt.data.sources import Row
from prefopt.errors import UserError
from prefopt.rewards.scorers import Request, RewardScorer, rewards_shared


def requests_of(where: str, row: Row) -> list[Request]:
    """The responses of a row that get a reward: those of `responses`, or `chosen` and `rejected`. `where` names the row
    in messages. Raises UserError for a row without responses."""
    try:
        if "responses" in row:
            prompt, (responses, finished) = read_prompt(row), responses_of(row)
            return [
                Request(row, i, prompt, response["content"], done, where)
                for i, (response, done) in enumerate(zip(responses, finished, strict=True))
            ]

        requests = []
        for side in ("chosen", "rejected"):
            if isinstance(row[side], list) and len(row[side]) > 1:  # a whole conversation, with the prompt in it
                *prompt, last = messages(row[side], side)
            else:
                prompt, last = read_prompt(row), answer(row, side)
            requests.append(Request(row, side, prompt, last["content"], True, where))
        return requests
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
    """Copies of the rows with their rewards, and with their rewards on [0, 1].

    `rows` are (name in messages, row). A row with `responses` gets the lists `name` and `name`_01; a pair gets
    `chosen_reward`, `rejected_reward`, `chosen_reward_01` and `rejected_reward_01`. A collective.

    Raises UserError for a row without responses, and where the scorer does.
    """
    requests = [requests_of(where, row) for where, row in rows]
    # One call for all rows, so that the scorer can batch their responses.
    all_requests = [request for of_row in requests for request in of_row]
    rewards = iter(rewards_shared(scorer, all_requests, device, precision, show))

    scored = []
    for (_, row), of_row in zip(rows, requests, strict=True):
        by_key = {request.key: next(rewards) for request in of_row}
        if "responses" in row:
            values = list(by_key.values())
            scored.append(row | {name: values, f"{name}_01": [scorer.probability(v) for v in values]})
        else:
            raw = {f"{side}_reward": value for side, value in by_key.items()}
            scored.append(row | raw | {f"{key}_01": scorer.probability(value) for key, value in raw.items()})
    return scored
