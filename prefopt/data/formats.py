"""Rows as people keep them -> `Pair`. A format is a frozen dataclass called on one row; a YAML names it."""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prefopt import UserError
from prefopt.config import DatasetConfig, build
from prefopt.paths import resolve_path

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Pair:
    """One preference. `*_finished` is False for a text that was cut off, so it must not get a terminator."""

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_finished: bool = True
    rejected_finished: bool = True
    chosen_reward: float | None = None
    rejected_reward: float | None = None


@dataclass(frozen=True)
class Drop:
    """Why a row gives no pair; counted under `reason`."""

    reason: str


class Format(ABC):
    @abstractmethod
    def __call__(self, row: dict[str, Any]) -> Pair | Drop:
        """Raise KeyError for a missing field and ValueError for a field of the wrong kind."""


@dataclass(frozen=True)
class Pairs(Format):
    """{prompt, chosen, rejected} and optionally id, chosen_reward, rejected_reward. A prompt is text or messages."""

    def __call__(self, row: dict[str, Any]) -> Pair | Drop:
        prompt, chosen, rejected = as_messages(row["prompt"]), text(row, "chosen"), text(row, "rejected")
        if chosen == rejected:
            return Drop("identical")
        return Pair(
            id=str(row["id"]) if "id" in row else content_id(prompt),
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_reward=number(row, "chosen_reward") if "chosen_reward" in row else None,
            rejected_reward=number(row, "rejected_reward") if "rejected_reward" in row else None,
        )


@dataclass(frozen=True)
class ScoredResponses(Format):
    """{prompt, responses: [text], rewards: [number], finished: [bool]}: one pair per prompt, best against worst.

    `finished` (optional) says which responses ended by themselves. Of equal rewards the first is taken; a row whose
    rewards are all equal is a tie.
    """

    pairing: str = "best_worst"

    def __post_init__(self) -> None:
        if self.pairing != "best_worst":
            raise ValueError(f"pairing must be best_worst, got {self.pairing!r}")

    def __call__(self, row: dict[str, Any]) -> Pair | Drop:
        prompt, responses, rewards = as_messages(row["prompt"]), row["responses"], row["rewards"]
        finished = row.get("finished", [True] * len(responses))
        if not responses or not len(responses) == len(rewards) == len(finished):
            raise ValueError("responses, rewards and finished must be lists of one length of at least 1")
        order = sorted(range(len(rewards)), key=lambda i: rewards[i])
        worst, best = order[0], rewards.index(rewards[order[-1]])
        if rewards[best] == rewards[worst]:
            return Drop("tied_rewards")
        return Pair(
            id=str(row["id"]) if "id" in row else content_id(prompt),
            prompt=prompt,
            chosen=responses[best],
            rejected=responses[worst],
            chosen_finished=finished[best],
            rejected_finished=finished[worst],
            chosen_reward=float(rewards[best]),
            rejected_reward=float(rewards[worst]),
        )


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as chat messages that end with the user's turn. Raises ValueError where it is neither text nor that."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("field 'prompt' must be text or a list of messages")
    for message in prompt:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise ValueError("each message of 'prompt' must have the text fields 'role' and 'content'")
    if prompt[-1]["role"] != "user":
        raise ValueError(f"'prompt' must end with the user's turn, ends with role {prompt[-1]['role']!r}")
    if not prompt[-1]["content"].strip():
        raise ValueError("'prompt' is empty")
    return prompt


def text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"field {key!r} must be text, is {type(row[key]).__name__}")
    return row[key]


def number(row: dict[str, Any], key: str) -> float:
    if isinstance(row[key], bool) or not isinstance(row[key], int | float) or row[key] != row[key]:
        raise ValueError(f"field {key!r} must be a number, is {row[key]!r}")
    return float(row[key])


def content_id(prompt: list[Message]) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:12]


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:row", object) for each line of a JSONL file (gzip where the name ends in .gz).

    Raises UserError, naming file and row, for a file that is missing or empty and for a line that is not an object.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise UserError(f"data file {path} does not exist. Give the path of a JSONL file.")
    found = False
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        try:
            for n, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, row {n}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where} is not JSON: {error}. Each line must be one JSON object.") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where} must be a JSON object, is a {type(row).__name__}.")
                found = True
                yield where, row
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"data file {path} cannot be read: {error}. It must be UTF-8 JSONL.") from None
    if not found:
        raise UserError(f"data file {path} is empty. It must hold one JSON object a line.")


@dataclass(frozen=True)
class Split:
    """The pairs of one split in file order, what was dropped and why, and the SHA-256 of the file they came from."""

    pairs: list[Pair]
    digest: str
    drops: Counter[str] = field(default_factory=Counter)


def load_split(dataset: DatasetConfig, split: str) -> Split:
    """Read split "train" or "heldout". Rows that carry a `split` field are used only in the split of that name.

    Raises UserError for unreadable files, for bad rows (file and row number), and where no pair is left.
    """
    path = dataset.train if split == "train" else dataset.heldout
    assert path is not None
    make = build(dataset.format, Format, "dataset.format")
    pairs, drops = [], Counter[str]()
    for where, row in read_rows(path):
        if row.get("split", split) != split:
            continue
        try:
            result = make(row)
        except KeyError as error:
            fields = ", ".join(row) or "none"
            raise UserError(
                f"{where} has no field {error} (its fields: {fields}). "
                f"{type(make).__name__} rows are: {(type(make).__doc__ or '').splitlines()[0]}"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {error}.") from None
        if isinstance(result, Drop):
            drops[result.reason] += 1
        else:
            pairs.append(result)
    if not pairs:
        counts = ", ".join(f"{reason}: {n}" for reason, n in drops.items()) or f"no row has split {split!r}"
        raise UserError(f"no pair is left of {path} for the {split} split ({counts}).")
    return Split(pairs, hashlib.sha256(resolve_path(path).read_bytes()).hexdigest(), drops)
