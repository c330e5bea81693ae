"""What was read from a row -> `Pair` or `Chat`: ids, rewards, roles, what a row lacks."""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.data.fields import (
    as_number,
    common_prefix,
    extra_fields,
    is_absent,
    listed,
    name_of,
    read_prompt,
    responses_of,
    role_problem,
    token_weights_of,
    tools_of,
    weight_of,
)
from prefopt.data.items import Chat, Dropped, Message, Pair, Response, Row


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
        values = one_each(row, "rewards", len(responses))
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

    def group(self) -> Pair:
        """All responses. There are two at least."""
        # Of equal rewards the first comes first, so that the best of them is that of a pair.
        best, *others, worst = sorted(range(len(self.rewards)), key=lambda i: -self.rewards[i])
        more = [
            Response(self.responses[i]["content"], self.rewards[i], self.finished[i], extra_fields(self.responses[i]))
            for i in others
        ]
        return replace(self.pair(best, worst), others=more)


def one_each(row: Row, key: str, n: int) -> list[Any]:
    """Field `key`, a list with a value for each of n responses. Raises KeyError and ValueError as a `Format` does."""
    values = listed(row, key, object, "numbers")
    if len(values) != n:
        raise ValueError(f"{n} responses have {len(values)} {key}; each needs one")
    return values


def win_rates(rewards: list[float]) -> list[float]:
    """Of each response the mean over all responses j, itself included, of sigma(r_i - r_j).

    >>> [round(rate, 2) for rate in win_rates([0.0, 1000.0])]
    [0.25, 0.75]
    """
    # tanh cannot overflow: sigma(x) = (1 + tanh(x / 2)) / 2.
    return [sum(1 + math.tanh((r - other) / 2) for other in rewards) / (2 * len(rewards)) for r in rewards]


def pair_of(row: Row, prompt: list[Message], chosen: Message, rejected: Message) -> Pair:
    """The pair of two answers, with the row's id, rewards, weights and tools."""
    tools, fields = tools_of(row), (extra_fields(chosen), extra_fields(rejected))
    texts = chosen["content"], rejected["content"]
    rewards, defects = [], {}
    for key in ("chosen_reward", "rejected_reward"):
        value = row.get(key)
        rewards.append(as_number(value))
        if rewards[-1] is None and not is_absent(value):
            defects["bad_reward"] = f"field {key!r} must be a finite number, is {reprlib.repr(value)}"
    more = (*fields, tools) if any(fields) or tools else ()  # so that the ids of pairs of text alone stay
    of_chosen, of_rejected = token_weights_of(row)
    return Pair(
        id=name_of(row, prompt, *texts, *more),
        prompt=prompt,
        chosen=texts[0],
        rejected=texts[1],
        chosen_reward=rewards[0],
        rejected_reward=rewards[1],
        weight=weight_of(row),
        chosen_token_weights=of_chosen,
        rejected_token_weights=of_rejected,
        chosen_fields=fields[0],
        rejected_fields=fields[1],
        tools=tools,
        defects=defects,
    )


def pair_of_chats(row: Row, chosen: list[Message], rejected: list[Message]) -> Pair | Dropped:
    """The pair in two whole conversations, which must differ in their last message alone, the assistant's."""
    for side in (chosen, rejected):
        if problem := role_problem(side[:-1], last=side[-1]["role"]):
            return problem
    if chosen[:-1] != rejected[:-1]:
        return Dropped("sides_part_early", f"they share {common_prefix(chosen, rejected)} turns")
    return pair_of(row, chosen[:-1], chosen[-1], rejected[-1])


def chat_of(row: Row, chat: list[Message]) -> Chat | Dropped:
    """The conversation, with the row's id and tools, unless its roles are wrong."""
    if problem := role_problem(chat[:-1], last=chat[-1]["role"]):
        return problem
    tools = tools_of(row)
    return Chat(name_of(row, chat, *([tools] if tools else [])), chat, tools=tools)
