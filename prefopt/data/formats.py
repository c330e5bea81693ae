"""A row of a data set -> `Pair` or `Chat`. A format is a frozen dataclass that is called on one row.

The `_target_` under `format` in a data set's YAML names it. Error messages quote the first line of its docstring.
"""

import hashlib
import json
import math
import random
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": text, "content": text} and what else a template may read: tool_calls, ...


@dataclass(frozen=True)
class Pair:
    """One preference. `*_finished` is False for a text that was cut off: no terminator is put behind it.

    `*_fields` is what the assistant's message has besides role and content (tool_calls, ...), as the template gets it.
    `tools` describes the functions that the assistant may call.
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_finished: bool = True
    rejected_finished: bool = True
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    source: str = ""
    chosen_fields: Message = field(default_factory=dict)
    rejected_fields: Message = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """A conversation to train on: the loss counts the tokens of every assistant turn. `tools` as in `Pair`."""

    id: str
    messages: list[Message]
    source: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Dropped:
    """A row that gives no item. `reason` is a field of `prefopt.config.schema.PoliciesConfig`."""

    reason: str
    detail: str = ""


Item = Pair | Chat


class Format(ABC):
    @abstractmethod
    def __call__(self, row: dict[str, Any]) -> Item | Dropped | Sequence[Item]:
        """The item or items of a row. Raises KeyError for a missing field and ValueError for a field of the wrong
        kind."""


@dataclass(frozen=True)
class Pairs(Format):
    """{prompt, chosen, rejected} and optionally id, system, chosen_reward, rejected_reward.

    `prompt` is text or messages that end with the user's turn; `chosen` and `rejected` are text, or a list of one
    assistant message. `system` is text that opens the conversation.
    """

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped:
        prompt = as_messages(row["prompt"])
        if row.get("system"):
            prompt = [{"role": "system", "content": text(row, "system")}, *prompt]
        return role_problem(prompt) or _pair(row, prompt, completion(row, "chosen"), completion(row, "rejected"))


@dataclass(frozen=True)
class ImplicitPrompt(Format):
    """{chosen, rejected}: two conversations (or texts) with a common beginning, which is the prompt.

    Conversations are lists of messages that differ in the last one, the assistant's (ultrafeedback_binarized,
    orca_dpo_pairs). A field `prompt` is not read. Conversations that differ earlier are dropped (`sides_part_early`).

    Of two texts, the longest common beginning that ends at a blank becomes the user's turn.
    """

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            start = common_prefix(chosen, rejected)
            # Back to the last blank, so that no word is divided between prompt and completion.
            start = max((m.end() for m in re.finditer(r"\s+", chosen[:start])), default=0)
            if not chosen[:start].strip():
                raise ValueError("chosen and rejected have no common beginning that could be the prompt")
            prompt = [{"role": "user", "content": chosen[:start].strip()}]
            return _pair(row, prompt, chosen[start:], rejected[start:])
        return _part(row, messages(chosen, "chosen"), messages(rejected, "rejected"))


@dataclass(frozen=True)
class Transcripts(Format):
    """{chosen, rejected}: texts "\\n\\nHuman: ... \\n\\nAssistant: ..." with a common beginning (Anthropic hh-rlhf)."""

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped:
        return _part(row, transcript(text(row, "chosen")), transcript(text(row, "rejected")))


@dataclass(frozen=True)
class ScoredResponses(Format):
    """{prompt, responses: [text], rewards: [number], finished: [bool]}: pairs chosen among n scored responses.

    `pairing`:
    * `best_worst`: one pair, the highest reward against the lowest;
    * `best_random`: one pair, the highest against another one, drawn by the row's prompt, so the same in every run;
    * `all`: every two responses with different rewards.

    The rewards of a pair are at least `min_gap` apart. A row without such a pair is dropped (`no_preference`). Of equal
    rewards the first is taken. `finished` (optional) is false for responses that were cut off.
    """

    pairing: str = "best_worst"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.pairing not in ("best_worst", "best_random", "all"):
            raise ValueError(f"pairing must be best_worst, best_random or all, got {self.pairing!r}")
        if self.min_gap < 0:
            raise ValueError(f"min_gap must not be negative, got {self.min_gap}")

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped | list[Item]:
        scored = Scored.read(row)
        rewards = scored.rewards

        def apart(w: int, l: int) -> bool:
            return rewards[w] > rewards[l] and rewards[w] - rewards[l] >= self.min_gap

        order = scored.order
        # Of equal rewards the first: `order` is stable, so its first is; the highest has to be looked up.
        best, worst = rewards.index(rewards[order[-1]]), order[0]
        if problem := role_problem(scored.prompt):
            return problem
        if self.pairing == "all":
            indices = [(w, l) for w in range(len(rewards)) for l in range(len(rewards)) if apart(w, l)]
            return [scored.pair(w, l, f"{scored.name}/{w}-{l}") for w, l in indices] or Dropped("no_preference")
        if self.pairing == "best_random":
            others = [i for i in range(len(rewards)) if apart(best, i)]
            worst = random.Random(content_id(scored.prompt)).choice(others) if others else best
        return scored.pair(best, worst) if apart(best, worst) else Dropped("no_preference")


@dataclass(frozen=True)
class NoisyPreferences(Format):
    """{prompt, responses, rewards, finished}, as `ScoredResponses`: one pair, labelled with noise (arXiv 2510.05342).

    The task of MADPO's experiment. `rewards` are the true ones. Two responses are drawn, and i is preferred to j with
    probability sigma(label_scale (r_i - r_j)). `quality` is the probability that a drawn response is replaced by one of
    the worse half of the row's: 0 (high), 1/2 (medium), 1 (low). All draws are a function of prompt, quality and
    `seed`.

    An objective reads other rewards: those in the field `rewards_QUALITY`, which come from a reward model that was
    trained on this quality. Without that field the pair has no rewards.
    """

    quality: str = "high"
    label_scale: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise ValueError(f"quality must be {', '.join(QUALITIES)}, got {self.quality!r}")
        if self.label_scale <= 0:
            raise ValueError(f"label_scale must be positive, got {self.label_scale}")

    def __call__(self, row: dict[str, Any]) -> Pair | Dropped:
        scored = Scored.read(row)
        if problem := role_problem(scored.prompt):
            return problem
        n = len(scored.rewards)
        if n < 4:
            raise ValueError(f"a row needs at least 4 responses, of which two may be the worse half; this one has {n}")
        draw = random.Random(content_id(self.quality, self.seed, scored.prompt))
        # The number and order of draws is part of the data: one more or less would change every label.
        first, second = draw.sample(range(n), 2)
        worse = draw.sample(scored.order[: n // 2], 2)
        # A replacement is the other one of the worse half where the first one is already in the pair.
        if draw.random() < QUALITIES[self.quality]:
            first = worse[0] if worse[0] != second else worse[1]
        if draw.random() < QUALITIES[self.quality]:
            second = worse[1] if worse[1] != first else worse[0]
        # Beyond 700 the probability is 0 or 1 in float64, and exp would overflow.
        log_odds = max(-700.0, min(700.0, self.label_scale * (scored.rewards[first] - scored.rewards[second])))
        if draw.random() >= 1 / (1 + math.exp(-log_odds)):
            first, second = second, first

        key = f"rewards_{self.quality}"
        prior = listed(row, key, object, "numbers") if row.get(key) is not None else [None] * n
        if len(prior) != n:
            raise ValueError(f"{n} responses have {len(prior)} {key}; each needs one")
        checked = [None if reward is None else finite(reward, f"each of {key!r}") for reward in prior]
        return scored.pair(first, second, rewards=checked)


FLOAT32_MAX = 3.4028234663852886e38
# The probability that `NoisyPreferences` replaces a response by a worse one.
QUALITIES = {"high": 0.0, "medium": 0.5, "low": 1.0}


@dataclass(frozen=True)
class Scored:
    """A row of scored responses: as many rewards and `finished` as responses."""

    name: str
    prompt: list[Message]
    responses: list[str]
    rewards: list[float]
    finished: list[bool]

    @classmethod
    def read(cls, row: dict[str, Any]) -> "Scored":
        """Raises KeyError and ValueError as a `Format` does."""
        prompt = as_messages(row["prompt"])
        responses, finished = responses_of(row)
        rewards = [finite(reward, "each of 'rewards'") for reward in listed(row, "rewards", object, "numbers")]
        if len(rewards) != len(responses):
            raise ValueError(f"{len(responses)} responses have {len(rewards)} rewards; each needs one")
        name = str(row["id"]) if "id" in row else content_id(prompt)
        return cls(name, prompt, responses, rewards, finished)

    @property
    def order(self) -> list[int]:
        """The numbers of the responses, from the lowest reward to the highest."""
        return sorted(range(len(self.rewards)), key=lambda i: self.rewards[i])

    def pair(self, w: int, l: int, name: str | None = None, rewards: Sequence[float | None] | None = None) -> Pair:
        """The pair of responses `w` (chosen) and `l` (rejected), with their own `rewards` unless others are given."""
        rewards = self.rewards if rewards is None else rewards
        return Pair(
            id=name or self.name,
            prompt=self.prompt,
            chosen=self.responses[w],
            rejected=self.responses[l],
            chosen_finished=self.finished[w],
            rejected_finished=self.finished[l],
            chosen_reward=rewards[w],
            rejected_reward=rewards[l],
        )


@dataclass(frozen=True)
class Chats(Format):
    """{messages: [{role, content}]}: conversations for supervised fine-tuning (smol-smoltalk, UltraChat)."""

    def __call__(self, row: dict[str, Any]) -> Chat | Dropped:
        chat = messages(row["messages"], "messages")
        if problem := role_problem(chat[:-1], last=chat[-1]["role"]):
            return problem
        return Chat(str(row["id"]) if "id" in row else content_id(chat), chat)


def _pair(row: dict[str, Any], prompt: list[Message], chosen: str, rejected: str) -> Pair:
    return Pair(
        id=str(row["id"]) if "id" in row else content_id(prompt, chosen, rejected),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_reward=number(row, "chosen_reward") if row.get("chosen_reward") is not None else None,
        rejected_reward=number(row, "rejected_reward") if row.get("rejected_reward") is not None else None,
    )


def _part(row: dict[str, Any], chosen: list[Message], rejected: list[Message]) -> Pair | Dropped:
    """The pair in two whole conversations, which must differ in their last message alone, the assistant's."""
    for side in (chosen, rejected):
        if problem := role_problem(side[:-1], last=side[-1]["role"]):
            return problem
    if chosen[:-1] != rejected[:-1]:
        return Dropped("sides_part_early", f"they share {common_prefix(chosen, rejected)} turns")
    return _pair(row, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def role_problem(prompt: list[Message], last: str = "assistant") -> Dropped | None:
    """Dropped (`wrong_roles`) unless the roles of `prompt` are user and assistant in turn, from user to user, after a
    system message if any, and the role `last` of the message behind it is the assistant. Otherwise None."""
    roles = [m["role"] for m in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))
    ends_with_user = len(turns) % 2 == 1
    if not (in_turn and ends_with_user) or last != "assistant":
        return Dropped("wrong_roles", f"the turns are {', '.join([*roles, last])}")
    return None


def transcript(conversation: str) -> list[Message]:
    """hh-rlhf's text as messages. Raises ValueError where it does not begin with a speaker."""
    parts = re.split(r"\n\n(Human|Assistant): ?", conversation)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("a transcript must begin with '\\n\\nHuman: '")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as chat messages. Raises ValueError where it is neither text nor messages, or empty."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chat = messages(prompt, "prompt")
    if not chat[-1]["content"].strip():
        raise ValueError("'prompt' is empty")
    return chat


def as_prompt(prompt: Any) -> list[Message]:
    """`as_messages` of a prompt that a model will answer. Raises ValueError also where the last turn is not the
    user's."""
    chat = as_messages(prompt)
    if problem := role_problem(chat):
        raise ValueError(f"{problem.detail}, and must be user and assistant in turn, after a system message if any")
    return chat


def messages(value: Any, key: str) -> list[Message]:
    """`value` as messages, without fields other than role and content. Raises ValueError unless it is a list of
    {"role": text, "content": text}. `key`: its field, for messages."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {key!r} must be text or a list of messages")
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise ValueError(f"each message of {key!r} must have the text fields 'role' and 'content'")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def completion(row: dict[str, Any], key: str) -> str:
    """Text, or the content of a list of one assistant message."""
    if isinstance(row[key], list):
        chat = messages(row[key], key)
        if len(chat) != 1 or chat[0]["role"] != "assistant":
            target = f"{ImplicitPrompt.__module__}.{ImplicitPrompt.__qualname__}"
            raise ValueError(
                f"field {key!r} must be text or a single assistant message; for whole conversations use "
                f"dataset.format._target_={target}"
            )
        return chat[0]["content"]
    return text(row, key)


def text(row: dict[str, Any], key: str) -> str:
    """Raises KeyError for a missing field and ValueError for one that is no text."""
    if not isinstance(row[key], str):
        raise ValueError(f"field {key!r} must be text, is {type(row[key]).__name__}")
    return row[key]


def responses_of(row: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """(responses, finished): at least one text, and whether each of them ended by itself (without the field: all)."""
    responses = listed(row, "responses", str, "texts")
    finished = listed(row, "finished", bool, "true and false") if "finished" in row else [True] * len(responses)
    if not responses or len(finished) != len(responses):
        raise ValueError("responses must be a list of texts, and finished, if there, as long")
    return responses, finished


def listed(row: dict[str, Any], key: str, kind: type, name: str) -> list[Any]:
    """Field `key`, a list of `kind`. Raises ValueError for anything else; `name` names the kind in the message."""
    if not isinstance(row[key], list) or not all(isinstance(value, kind) for value in row[key]):
        raise ValueError(f"field {key!r} must be a list of {name}")
    return row[key]


def number(row: dict[str, Any], key: str) -> float:
    return finite(row[key], f"field {key!r}")


def finite(value: Any, what: str) -> float:
    """`value` as a float. Raises ValueError unless float32, in which it is stored, has it as a finite number; `what`
    names it in the message."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared instead of math.isfinite, which raises OverflowError for a huge int. For NaN the comparison is false.
    if not number or not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{what} must be a finite number, is {reprlib.repr(value)}")
    return float(value)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of equal items at the beginning of `a` and `b`."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the usual case, at the speed of C
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def content_id(*parts: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the parts as JSON. A single part is hashed without a list around."""
    value = parts[0] if len(parts) == 1 else parts
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
