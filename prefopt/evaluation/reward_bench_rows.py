"""The rows of RewardBench 1 and 2, of LLMBar, and of any other file of pairs, for `prefopt.reward_bench`."""

from dataclasses import dataclass
from typing import Any, Literal

from prefopt.data.hub import Data, is_on_hub
from prefopt.data.items import Row
from prefopt.data.sources import read_rows
from prefopt.errors import MissingAssetError, UserError
from prefopt.rewards.rows import requests_of
from prefopt.rewards.scorers import Request

# LLMBar's names of its subsets -> RewardBench's, whose Chat Hard they are but for MT-Bench's hard pairs.
LLMBAR = {
    "Natural": "llmbar-natural",
    "Adversarial/Neighbor": "llmbar-adver-neighbor",
    "Adversarial/GPTInst": "llmbar-adver-GPTInst",
    "Adversarial/GPTOut": "llmbar-adver-GPTOut",
    "Adversarial/Manual": "llmbar-adver-manual",
}
WITHOUT_SUBSET = "all"  # the subset of rows that name none


@dataclass(frozen=True)
class Item:
    """A prompt with right and wrong responses. `requests`: first the `num_correct` right ones. `kind`: `pair`, one of
    each; `best_of`, which of several is the best; `ties`, one of RewardBench 2's prompts with several right ones."""

    id: str
    subset: str
    kind: Literal["pair", "best_of", "ties"]
    requests: list[Request]
    num_correct: int


def check_rows(path: str, split: str | None) -> None:
    """Raise UserError where the hub is switched off and this machine lacks the data set `path`."""
    item = Data(path, splits=(split,) if split else ())
    try:
        if is_on_hub(item) and item.offline():
            item.there()
    except MissingAssetError as error:
        raise UserError(
            f"rows={path}: the hub is switched off, and {error}.\nFetch it on a machine with network: {item.command}; "
            "or give a file: rows=FILE.jsonl"
        ) from None


def read_items(path: str, split: str | None) -> list[Item]:
    """The items of a file, a folder or a data set on the hub. Raises UserError for a row that is none."""
    return [_item(where, row) for where, row in read_rows(path, split)]


def _item(where: str, row: Row) -> Item:
    subset = row.get("subset")
    subset = WITHOUT_SUBSET if subset is None else str(subset)
    name = str(row.get("id", where.rpartition(" ")[2]))
    if "output_1" in row:
        return Item(name, LLMBAR.get(subset, subset), "pair", requests_of(where, _llmbar_pair(where, row)), 1)
    if not (_is_texts(row.get("chosen")) and _is_texts(row.get("rejected"))):
        return Item(name, subset, "pair", requests_of(where, row), 1)

    requests = requests_of(where, {"prompt": row.get("prompt"), "responses": [*row["chosen"], *row["rejected"]]})
    if subset.lower() != "ties":
        return Item(name, subset, "best_of", requests, len(row["chosen"]))
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not number:
        raise UserError(f"{where}: the id of a row of subset {subset} must be ref:NUMBER or tied:NUMBER, is {name!r}.")
    return Item(name, subset, "ties", requests, len(row["chosen"]))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _llmbar_pair(where: str, row: Row) -> Row:
    """A row {input, output_1, output_2, label} as a pair."""
    label = row.get("label")
    if label not in (1, 2):
        raise UserError(f"{where}: label must be 1 or 2, the number of the better output, is {label!r}.")
    sides = {"chosen": row.get(f"output_{label}"), "rejected": row.get(f"output_{3 - label}")}
    return {"prompt": row.get("input"), **sides}
