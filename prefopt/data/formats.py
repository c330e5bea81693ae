"""A row of a data set -> `Pair` or `Chat`. A format is a frozen dataclass that is called on one row.

The `_target_` under `format` in a data set's YAML names it. Error messages quote the first line of its docstring.

All formats read prompts, completions and messages by the same functions, so what one of them accepts, all do: text,
{"role", "content"} or ShareGPT's {"from", "value"}, content as a list of text parts, tool calls.
"""

import hashlib
import json
import math
import random
import re
import reprlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": text, "content": text} and what else a template may read: tool_calls, ...
Row = dict[str, Any]

# Other tools' names of the roles.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system",
         "observation": "tool"}  # fmt: skip
# What a chat template may read of a message besides role and content. Other fields are ignored.
TEMPLATE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# Fields by which other tools choose what is learnt. Here the loss decides that, so only the same choice is accepted.
LEARNING_FIELDS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask", "train_detail")
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a message's content

# The fields that every format reads for the prompt; see `read_prompt`.
PROMPT_FIELDS = ("id", "prompt", "instruction", "input", "history", "system", "tools")
SIDE_FIELDS = ("chosen", "rejected", "chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class Pair:
    """One preference. `*_finished` is False for a text that was cut off: no terminator is put behind it.

    `*_fields` is what the assistant's message has besides role and content (tool_calls, ...), as the template gets it.
    `tools` describes the functions that the assistant may call. `defects`: those that the format noticed in the row, by
    reason (a field of `prefopt.config.schema.PoliciesConfig`), with a detail for messages.
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
    defects: dict[str, str] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Labelled:
    """A completion and whether it is a good one: half of a pair, which `LabelledCompletions.combine` looks for."""

    prompt: list[Message]
    completion: Message
    is_good: bool
    tools: list[dict[str, Any]]


Item = Pair | Chat


class RowDefect(ValueError):
    """A row that gives no item, raised where a field is read. `reason` as in `Dropped`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.dropped = Dropped(reason, detail)


class Format(ABC):
    @abstractmethod
    def __call__(self, row: Row) -> Item | Dropped | Labelled | Sequence[Item]:
        """The item or items of a row. Raises KeyError for a missing field and ValueError for a field of the wrong
        kind; of these, a `RowDefect` costs the row alone if its policy is to drop."""

    def fields(self) -> tuple[str, ...] | None:
        """The fields that the format reads: the names that `dataset.columns` may have. None: not declared."""
        return None

    def combine(
        self, items: Iterable[tuple[str, Item | Dropped | Labelled]]
    ) -> Iterator[tuple[str, Item | Dropped | Labelled]]:
        """What the rows give together, from ("file, row n", what one row gives) of all rows. Most formats look at one
        row at a time."""
        yield from items


@dataclass(frozen=True)
class Pairs(Format):
    """{prompt (or instruction and input), chosen, rejected}, and optionally id, system, tools and rewards.

    `prompt` is text or messages that end with the user's turn; or it is put together from Alpaca's `instruction` and
    `input`, with a blank line between them. The rewards are `chosen_reward` and `rejected_reward`. `chosen` and
    `rejected` are text, a message, or a list of one message. `system` is text that opens the conversation.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        prompt, chosen, rejected = read_prompt(row), answer(row, "chosen"), answer(row, "rejected")
        return role_problem(prompt) or _pair(row, prompt, chosen, rejected)

    def fields(self) -> tuple[str, ...]:
        return PROMPT_FIELDS + SIDE_FIELDS


@dataclass(frozen=True)
class ImplicitPrompt(Format):
    """{chosen, rejected}: two conversations (or texts) with a common beginning, which is the prompt.

    Conversations are lists of messages that differ in the last one, the assistant's (ultrafeedback_binarized,
    orca_dpo_pairs). A field `prompt` is not read. Conversations that differ earlier are dropped (`sides_part_early`).

    Of two texts, the longest common beginning that ends at a blank becomes the user's turn.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            start = common_prefix(chosen, rejected)
            # Back to the last blank, so that no word is divided between prompt and completion.
            start = max((m.end() for m in re.finditer(r"\s+", chosen[:start])), default=0)
            if not chosen[:start].strip():
                raise ValueError("chosen and rejected have no common beginning that could be the prompt")
            prompt = with_system(row, [{"role": "user", "content": chosen[:start].strip()}])
            sides = [{"role": "assistant", "content": side[start:]} for side in (chosen, rejected)]
            return _pair(row, prompt, *sides)
        return _part(row, *(with_system(row, messages(row[side], side)) for side in ("chosen", "rejected")))

    def fields(self) -> tuple[str, ...]:
        return ("id", "system", "tools", *SIDE_FIELDS)


@dataclass(frozen=True)
class Transcripts(Format):
    """{chosen, rejected}: texts "\\n\\nHuman: ... \\n\\nAssistant: ..." with a common beginning (Anthropic hh-rlhf).

    Where a `prompt` is such a text and the sides only go on from there, they are read together.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        sides = [text(row, side) for side in ("chosen", "rejected")]
        if row.get("prompt") is not None and not all(TRANSCRIPT.match(side) for side in sides):
            sides = [text(row, "prompt") + side for side in sides]
        return _part(row, *(with_system(row, transcript(side)) for side in sides))

    def fields(self) -> tuple[str, ...]:
        return ("id", "prompt", "system", "tools", *SIDE_FIELDS)


@dataclass(frozen=True)
class ScoredResponses(Format):
    """{prompt, responses: [text], rewards: [number], finished: [bool]}: pairs chosen among n scored responses.

    `pairing`:
    * `best_worst`: one pair, the highest reward against the lowest;
    * `best_random`: one pair, the highest against another one, drawn by the row's prompt, so the same in every run;
    * `all`: every two responses with different rewards.

    The rewards of a pair are at least `min_gap` apart. A row without such a pair is dropped (`no_preference`). Of equal
    rewards the first is taken. `finished` (optional) is false for responses that were cut off. Responses without a
    usable reward are passed over if the policy `bad_reward` is to keep; otherwise the row is dropped.
    """

    pairing: str = "best_worst"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.pairing not in ("best_worst", "best_random", "all"):
            raise ValueError(f"pairing must be best_worst, best_random or all, got {self.pairing!r}")
        if self.min_gap < 0:
            raise ValueError(f"min_gap must not be negative, got {self.min_gap}")

    def __call__(self, row: Row) -> Pair | Dropped | list[Item]:
        scored = Scored.read(row)
        rewards = scored.rewards

        def apart(w: int, l: int) -> bool:
            return rewards[w] > rewards[l] and rewards[w] - rewards[l] >= self.min_gap

        if len(rewards) < 2 and scored.defects:
            return Dropped("bad_reward", scored.defects["bad_reward"])
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

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "responses", "rewards", "finished")


@dataclass(frozen=True)
class ScoredCompletions(ScoredResponses):
    """{prompt, completions: [{response, overall_score}]}: pairs chosen among n scored completions (UltraFeedback).

    `response` and `score` name the fields of a completion; a name may lead into a nested object
    ("annotations.honesty.Rating"). `pairing` and `min_gap` as in `ScoredResponses`.
    """

    response: str = "response"
    score: str = "overall_score"

    def __call__(self, row: Row) -> Pair | Dropped | list[Item]:
        completions = listed(row, "completions", dict, "objects")
        found = {
            "responses": [nested(completion, self.response) for completion in completions],
            "rewards": [nested(completion, self.score) for completion in completions],
        }
        return super().__call__({key: row[key] for key in PROMPT_FIELDS if key in row} | found)

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "completions")


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

    def __call__(self, row: Row) -> Pair | Dropped:
        scored = Scored.read(row)
        if scored.defects:
            return Dropped("bad_reward", scored.defects["bad_reward"])
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
        numbers = [as_number(reward) for reward in prior]
        if bad := [value for value, reward in zip(prior, numbers, strict=True) if value is not None and reward is None]:
            return Dropped("bad_reward", f"{key!r} holds {reprlib.repr(bad[0])}, which is no finite number")
        return scored.pair(first, second, rewards=numbers)

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "responses", "rewards", "finished", f"rewards_{self.quality}")


# The probability that `NoisyPreferences` replaces a response by a worse one.
QUALITIES = {"high": 0.0, "medium": 0.5, "low": 1.0}


@dataclass(frozen=True)
class Scored:
    """A row of scored responses: as many rewards and `finished` as responses, those without a usable reward left out
    (`defects` has the reason then)."""

    name: str
    prompt: list[Message]
    responses: list[Message]
    rewards: list[float]
    finished: list[bool]
    tools: list[dict[str, Any]]
    defects: dict[str, str]

    @classmethod
    def read(cls, row: Row) -> "Scored":
        """Raises KeyError and ValueError as a `Format` does."""
        prompt = read_prompt(row)
        responses, finished = responses_of(row)
        values = listed(row, "rewards", object, "numbers")
        if len(values) != len(responses):
            raise ValueError(f"{len(responses)} responses have {len(values)} rewards; each needs one")
        rewards = [as_number(value) for value in values]
        bad = [value for value, reward in zip(values, rewards, strict=True) if reward is None]
        defects = {"bad_reward": f"'rewards' holds {reprlib.repr(bad[0])}, which is no finite number"} if bad else {}
        used = [(m, r, f) for m, r, f in zip(responses, rewards, finished, strict=True) if r is not None]
        return cls(
            name=name_of(row, prompt),
            prompt=prompt,
            responses=[message for message, _, _ in used],
            rewards=[reward for _, reward, _ in used],
            finished=[is_finished for _, _, is_finished in used],
            tools=tools_of(row),
            defects=defects,
        )

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
            chosen=self.responses[w]["content"],
            rejected=self.responses[l]["content"],
            chosen_finished=self.finished[w],
            rejected_finished=self.finished[l],
            chosen_reward=rewards[w],
            rejected_reward=rewards[l],
            chosen_fields=extra_fields(self.responses[w]),
            rejected_fields=extra_fields(self.responses[l]),
            tools=self.tools,
            defects=self.defects,
        )


@dataclass(frozen=True)
class TwoResponses(Format):
    """{prompt, response_1, response_2, label}: two responses and which is better, by a label or by votes.

    `labels` are the fields that hold the label or the votes (PandaLM: [annotator1, annotator2, annotator3]). A vote is
    `first`, `second` or one of `ties`, compared as text without regard to case. More than half of the votes decide;
    without such a majority, and with a majority of ties, the row is dropped (`no_preference`). A null is no vote.
    """

    labels: list[str] = field(default_factory=lambda: ["label"])
    first: str = "1"
    second: str = "2"
    ties: list[str] = field(default_factory=lambda: ["0"])

    def __post_init__(self) -> None:
        names = [name.lower() for name in (self.first, self.second, *self.ties)]
        if len(set(names)) < len(names):
            raise ValueError(f"first, second and ties must be different labels, got {names}")
        if not self.labels:
            raise ValueError("labels must name at least one field")

    def __call__(self, row: Row) -> Pair | Dropped:
        known = {self.first.lower(): "first", self.second.lower(): "second"}
        known |= {name.lower(): "tie" for name in self.ties}
        votes = Counter[str]()
        for name in self.labels:
            vote = label_text(row[name])
            if vote is None:
                continue
            if vote not in known:
                raise ValueError(
                    f"field {name!r} must be {self.first} (the first response is better), {self.second} (the second) "
                    f"or {' or '.join(self.ties)} (a tie), is {reprlib.repr(row[name])}; dataset.format.first, .second "
                    "and .ties set other labels"
                )
            votes[known[vote]] += 1
        prompt, first, second = read_prompt(row), answer(row, "response_1"), answer(row, "response_2")
        if problem := role_problem(prompt):
            return problem
        if votes["first"] * 2 > votes.total():
            return _pair(row, prompt, first, second)
        if votes["second"] * 2 > votes.total():
            return _pair(row, prompt, second, first)
        return Dropped("no_preference", f"the votes are {dict(votes) or 'missing'}")

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "response_1", "response_2", *self.labels)


@dataclass(frozen=True)
class LabelledCompletions(Format):
    """{prompt, completion, label: true or false}: a completion and whether it is good (KTO); pairs of a prompt's two.

    The rows of one prompt are put together, wherever they stand: its first good completion with its first bad one, the
    second with the second, and so on. So no completion is used twice. What is left over, and the completions of a
    prompt with labels of one kind alone, are dropped (`unpaired_label`). The rows of a source are held in memory.
    `label` may also be 1 and 0, or their names as text. Without a prompt, `messages` is the whole conversation.
    """

    def __call__(self, row: Row) -> Labelled | Dropped:
        label = label_text(row["label"])
        if label is None:
            return Dropped("unpaired_label", "field 'label' is null")
        if label not in ("true", "1", "false", "0"):
            raise ValueError(f"field 'label' must be true or false, is {reprlib.repr(row['label'])}")
        if "messages" in row and not {"prompt", "instruction"} & set(row):
            *prompt, completion = with_system(row, messages(row["messages"], "messages"))
        else:
            prompt, completion = read_prompt(row), answer(row, "completion")
        if problem := role_problem(prompt, completion["role"]):
            return problem
        return Labelled(prompt, completion, label in ("true", "1"), tools_of(row))

    def combine(
        self, items: Iterable[tuple[str, Item | Dropped | Labelled]]
    ) -> Iterator[tuple[str, Item | Dropped | Labelled]]:
        by_prompt: dict[str, tuple[list[tuple[str, Labelled]], list[tuple[str, Labelled]]]] = {}
        for where, item in items:
            if isinstance(item, Labelled):
                sides = by_prompt.setdefault(content_id(item.prompt, item.tools), ([], []))
                sides[0 if item.is_good else 1].append((where, item))
            else:
                yield where, item
        for good, bad in by_prompt.values():
            for (where, chosen), (_, rejected) in zip(good, bad, strict=False):
                row = {"tools": chosen.tools}
                yield where, _pair(row, chosen.prompt, chosen.completion, rejected.completion)
            for where, _ in good[len(bad) :] + bad[len(good) :]:
                yield where, Dropped("unpaired_label", "the prompt has no completion with the other label for it")

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "messages", "completion", "label")


@dataclass(frozen=True)
class Chats(Format):
    """{messages: [{role, content}]}: conversations for supervised fine-tuning (smol-smoltalk, UltraChat, ShareGPT)."""

    def __call__(self, row: Row) -> Chat | Dropped:
        return _chat(row, with_system(row, messages(row["messages"], "messages")))

    def fields(self) -> tuple[str, ...]:
        return ("id", "messages", "system", "tools")


@dataclass(frozen=True)
class Completions(Format):
    """{prompt (or instruction and input), completion}: a prompt and its answer, for supervised fine-tuning.

    Read as a `Chat`, of which every turn of the assistant is learnt; so a prompt may hold none.
    """

    def __call__(self, row: Row) -> Chat | Dropped:
        prompt, completion = read_prompt(row), answer(row, "completion")
        if any(message["role"] == "assistant" for message in prompt):
            raise ValueError(
                "'prompt' holds turns of the assistant, which would be learnt, too. If they shall be, give the whole "
                "conversation in 'messages', for dataset.format._target_=prefopt.data.formats.Chats"
            )
        return _chat(row, [*prompt, completion])

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "completion")


def _pair(row: Row, prompt: list[Message], chosen: Message, rejected: Message) -> Pair:
    tools, fields = tools_of(row), (extra_fields(chosen), extra_fields(rejected))
    texts = chosen["content"], rejected["content"]
    rewards, defects = [], {}
    for key in ("chosen_reward", "rejected_reward"):
        value = row.get(key)
        rewards.append(as_number(value))
        if rewards[-1] is None and not is_absent(value):
            defects["bad_reward"] = f"field {key!r} must be a finite number, is {reprlib.repr(value)}"
    more = (*fields, tools) if any(fields) or tools else ()  # so that the ids of pairs of text alone stay
    return Pair(
        id=name_of(row, prompt, *texts, *more),
        prompt=prompt,
        chosen=texts[0],
        rejected=texts[1],
        chosen_reward=rewards[0],
        rejected_reward=rewards[1],
        chosen_fields=fields[0],
        rejected_fields=fields[1],
        tools=tools,
        defects=defects,
    )


def _part(row: Row, chosen: list[Message], rejected: list[Message]) -> Pair | Dropped:
    """The pair in two whole conversations, which must differ in their last message alone, the assistant's."""
    for side in (chosen, rejected):
        if problem := role_problem(side[:-1], last=side[-1]["role"]):
            return problem
    if chosen[:-1] != rejected[:-1]:
        return Dropped("sides_part_early", f"they share {common_prefix(chosen, rejected)} turns")
    return _pair(row, chosen[:-1], chosen[-1], rejected[-1])


def _chat(row: Row, chat: list[Message]) -> Chat | Dropped:
    if problem := role_problem(chat[:-1], last=chat[-1]["role"]):
        return problem
    tools = tools_of(row)
    return Chat(name_of(row, chat, *([tools] if tools else [])), chat, tools=tools)


def role_problem(prompt: list[Message], last: str = "assistant") -> Dropped | None:
    """Dropped (`wrong_roles`) unless the roles of `prompt` are user and assistant in turn, from user to user, after a
    system message if any, and the role `last` of the message behind it is the assistant. Otherwise None.

    Between an assistant's message and its next one, the results of tools may stand instead of the user.
    """
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    allowed = ["user"]  # the roles that the next message may have
    in_turn = True
    for message in turns:
        in_turn = in_turn and message["role"] in allowed
        if message["role"] == "assistant":
            allowed = ["tool"] if message.get("tool_calls") else ["user", "tool"]
        else:
            allowed = ["assistant", "tool"] if message["role"] == "tool" else ["assistant"]
    if not in_turn or "assistant" not in allowed or last != "assistant":
        roles = [message["role"] for message in prompt]
        return Dropped("wrong_roles", f"the turns are {', '.join([*roles, last])}")
    return None


TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")


def transcript(conversation: str) -> list[Message]:
    """hh-rlhf's text as messages. Raises ValueError where it does not begin with a speaker."""
    if TRANSCRIPT.match(conversation):  # the blank lines at the beginning may have been stripped off
        conversation = "\n\n" + conversation.lstrip()
    parts = re.split(r"\n\n(Human|Assistant): ?", conversation)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError("a transcript must begin with '\\n\\nHuman: '")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def read_prompt(row: Row) -> list[Message]:
    """The prompt of a row: its field `prompt` (text or messages), or Alpaca's `instruction`, after a blank line `input`
    unless it is empty, and `history` [[question, answer], ...] before. `system` opens it.

    Raises KeyError and ValueError as a `Format` does.
    """
    if "prompt" in row or "instruction" not in row:
        return with_system(row, as_messages(row["prompt"]))
    question = text(row, "instruction")
    if not is_absent(row.get("input")):
        question = f"{question}\n\n{text(row, 'input')}"
    turns = listed(row, "history", list, "[question, answer]") if row.get("history") else []
    if not all(len(turn) == 2 for turn in turns):
        raise ValueError("field 'history' must be a list of [question, answer]")
    history = [as_text(words, "history") for turn in turns for words in turn]
    roles = ("user", "assistant")
    past = [{"role": roles[i % 2], "content": words} for i, words in enumerate(history)]
    return with_system(row, [*past, *as_messages(question)])


def with_system(row: Row, chat: list[Message]) -> list[Message]:
    """The chat after the row's `system` text, unless it opens with that already."""
    if is_absent(row.get("system")):
        return chat
    opening = {"role": "system", "content": text(row, "system")}
    return chat if chat[0] == opening else [opening, *chat]


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as chat messages. Raises ValueError where it is neither text nor messages, or empty."""
    if prompt is None:
        raise RowDefect("missing_text", "'prompt' is null")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chat = messages(prompt, "prompt")
    if not chat[-1]["content"].strip() and chat[-1]["role"] != "tool":  # a tool may have found nothing
        raise RowDefect("missing_text", "'prompt' is empty")
    return chat


def as_prompt(prompt: Any) -> list[Message]:
    """`as_messages` of a prompt that a model will answer. Raises ValueError also where the last turn is not the
    user's."""
    chat = as_messages(prompt)
    if problem := role_problem(chat):
        raise ValueError(f"{problem.detail}, and must be user and assistant in turn, after a system message if any")
    return chat


def messages(value: Any, key: str) -> list[Message]:
    """`value`, a message or a list of them, as `as_message` gives them. `key`: its field, for messages of errors."""
    if value is None:
        raise RowDefect("missing_text", f"field {key!r} is null")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {key!r} must be text or a list of messages")
    return [as_message(message, key) for message in value]


def as_message(value: Any, key: str) -> Message:
    """{"role", "content"} and those of TEMPLATE_FIELDS that are neither null nor empty, from any tool's way of writing
    a message. `key`: the row's field, for messages of errors.

    Raises ValueError for what is no message, and for a field that would change what is learnt.
    """
    names = [(a, b) for a, b in (("role", "content"), ("from", "value")) if isinstance(value, dict) and a in value]
    # Of a Parquet file, every message has all fields that any has; those of the other way of writing are null.
    role, content = next(((a, b) for a, b in names if value[a] is not None), ("role", "content"))
    if not isinstance(value, dict) or not isinstance(value.get(role), str) or content not in value:
        raise ValueError(
            f"each message of {key!r} must have the text fields 'role' and 'content' (or 'from' and 'value')"
        )
    speaker = value[role].strip().lower()
    if speaker == "function_call":  # ShareGPT's: the call is JSON text
        return {"role": "assistant", "content": "", "tool_calls": function_calls(value[content], key)}
    speaker = ROLES.get(speaker, speaker)
    for name in LEARNING_FIELDS:
        # The assistant's turns are learnt and no others, which a flag may say again, but not otherwise.
        if value.get(name) is not None and value[name] != (speaker == "assistant"):
            raise ValueError(
                f"a message of {key!r} has {name}={reprlib.repr(value[name])}, which would change what is learnt, and "
                "is not supported: leave out the field or the row"
            )
    fields = {name: value[name] for name in TEMPLATE_FIELDS if value.get(name) not in (None, "", [], {})}
    if "tool_calls" in fields:
        fields["tool_calls"] = objects(fields["tool_calls"], "tool_calls")
    words = value[content]
    if words is None and "tool_calls" in fields:
        words = ""
    return {"role": speaker, "content": as_text(words, key), **fields}


def function_calls(value: Any, key: str) -> list[dict[str, Any]]:
    """ShareGPT's JSON text {"name", "arguments"}, or a list of them, as `tool_calls`. Raises ValueError for another."""
    try:
        parsed = json.loads(value)
        calls = parsed if isinstance(parsed, list) else [parsed]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"a function_call of {key!r} must be JSON text {{name, arguments}}, is {reprlib.repr(value)}"
        ) from None
    return [{"type": "function", "function": function} for function in functions]


def extra_fields(message: Message) -> Message:
    """What a message has besides role and content."""
    return {name: value for name, value in message.items() if name not in ("role", "content")}


def answer(row: Row, key: str) -> Message:
    """The assistant's message in field `key`: text, a message, or a list of one. Raises KeyError and ValueError as a
    `Format` does."""
    return as_answer(row[key], key)


def as_answer(value: Any, key: str) -> Message:
    """`answer` of the value of a field `key`."""
    if not isinstance(value, dict | list) or is_parts(value):
        return {"role": "assistant", "content": as_text(value, key)}
    chat = messages(value, key)
    if chat[0]["role"] == "assistant" and len(chat) > 1:
        raise RowDefect(
            "multi_turn_completion",
            f"field {key!r} goes on over {len(chat)} messages, and the loss of a pair covers one turn",
        )
    if chat[0]["role"] != "assistant":
        target = f"{ImplicitPrompt.__module__}.{ImplicitPrompt.__qualname__}"
        raise ValueError(
            f"field {key!r} must be text or a single assistant message; for whole conversations use "
            f"dataset.format._target_={target}"
        )
    return chat[0]


def is_parts(value: Any) -> bool:
    """Whether `value` is a message's content as a list of parts {"type", ...}."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and "type" in part and not {"role", "from"} & set(part) for part in value)
    )


def as_text(value: Any, key: str) -> str:
    """Text, or the text of a list of text parts, put together. `key`: the field, for messages.

    Raises RowDefect for null (`missing_text`) and for anything else (`not_text`).
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise RowDefect("missing_text", f"field {key!r} is null")
    if not is_parts(value):
        raise RowDefect("not_text", f"field {key!r} must be text, is {type(value).__name__}")
    for part in value:
        if part["type"] not in TEXT_PARTS:
            raise RowDefect("not_text", f"field {key!r} has a part of type {part['type']!r}; only text is read")
        if not isinstance(part.get("text"), str):
            raise RowDefect("not_text", f"field {key!r} has a text part without 'text'")
    return "".join(part["text"] for part in value)


def text(row: Row, key: str) -> str:
    """Raises KeyError for a missing field and RowDefect for one that is no text."""
    return as_text(row[key], key)


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The descriptions of functions in the field `tools`: a list, or JSON text of one. None where it is absent."""
    return [] if is_absent(row.get("tools")) else objects(row["tools"], "tools")


def objects(value: Any, key: str) -> list[dict[str, Any]]:
    """A list of objects, or JSON text of one. Raises ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"field {key!r} must be a list or JSON text of one: {error}") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"field {key!r} must be a list of objects")
    return value


def responses_of(row: Row) -> tuple[list[Message], list[bool]]:
    """(responses, finished): at least one message, and whether each ended by itself (without the field: all)."""
    responses = [as_answer(value, "responses") for value in listed(row, "responses", object, "texts")]
    has_finished = row.get("finished") is not None
    finished = listed(row, "finished", bool, "true and false") if has_finished else [True] * len(responses)
    if not responses or len(finished) != len(responses):
        raise ValueError("responses must be a list of texts, and finished, if there, as long")
    return responses, finished


def listed(row: Row, key: str, kind: type, name: str) -> list[Any]:
    """Field `key`, a list of `kind`. Raises ValueError for anything else; `name` names the kind in the message."""
    if not isinstance(row[key], list) or not all(isinstance(value, kind) for value in row[key]):
        raise ValueError(f"field {key!r} must be a list of {name}")
    return row[key]


def nested(row: Row, path: str) -> Any:
    """The value at a dotted path of keys. Raises KeyError with the whole path where there is none."""
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def is_absent(value: Any) -> bool:
    """Whether an optional field has no value: null, nothing in it, or blanks."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def name_of(row: Row, *content: Any) -> str:
    """The id of a row, or a digest of its content where it has none."""
    return content_id(*content) if is_absent(row.get("id")) else str(row["id"])


def label_text(value: Any) -> str | None:
    """A label in lower case, a whole number without its decimals; None for null."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if is_absent(value) else str(value).strip().lower()


def as_number(value: Any) -> float | None:
    """A number, or text of one, as a float; None for anything else, for NaN and for infinities."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared instead of math.isfinite, which raises OverflowError for a huge int. For NaN the comparison is false.
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def finite(value: Any, what: str) -> float:
    """`value` as a float. Raises ValueError unless it is a finite number; `what` names it in the message."""
    number = None if isinstance(value, str) else as_number(value)
    if number is None:
        raise ValueError(f"{what} must be a finite number, is {reprlib.repr(value)}")
    return number


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of equal items at the beginning of `a` and `b`."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the usual case, at the speed of C
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def content_id(*parts: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the parts as JSON. A single part is hashed without a list around."""
    value = parts[0] if len(parts) == 1 else parts
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
