"""What the rows of a data set are read as: preferences, conversations, and what gives neither."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": text, "content": text} and what else a template may read: tool_calls, ...
Row = dict[str, Any]


@dataclass(frozen=True)
class Response:
    """One more response of a group, beside the best and the worst. The fields are those of a side of `Pair`."""

    text: str
    reward: float
    finished: bool = True
    fields: Message = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One preference. `*_finished` is False for a text that was cut off: no terminator is put behind it. `weight`
    multiplies the pair's loss. `opening`: the text with which both completions begin and that is a part of the prompt.
    `*_token_weights`: a number for each token of the completion, on both sides or on none. `where`: its file and row.

    `*_fields` is what the assistant's message has besides role and content (tool_calls, ...), as the template gets it.
    `tools` describes the functions that the assistant may call. `defects`: those that the format noticed in the row, by
    reason (a field of `prefopt.config.schema.PoliciesConfig`), with a detail for messages.

    With `others`, from the highest reward to the lowest, it is a group: all scored responses to a prompt, of which
    `chosen` is the best and `rejected` the worst. These may be equal, in reward and in text. None: a pair.
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_finished: bool = True
    rejected_finished: bool = True
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    weight: float = 1.0
    chosen_token_weights: list[float] | None = None
    rejected_token_weights: list[float] | None = None
    opening: str = ""
    source: str = ""
    chosen_fields: Message = field(default_factory=dict)
    rejected_fields: Message = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    defects: dict[str, str] = field(default_factory=dict)
    others: list[Response] | None = None
    where: str = field(default="", compare=False)

    @property
    def answers(self) -> list[Message]:
        """Its responses as messages: chosen, rejected, others."""
        sides = [(self.chosen, self.chosen_fields), (self.rejected, self.rejected_fields)]
        sides += [(response.text, response.fields) for response in self.others or []]
        return [{"role": "assistant", "content": text, **fields} for text, fields in sides]


@dataclass(frozen=True)
class Chat:
    """A conversation to train on: the loss counts the tokens of every assistant turn. `tools` and `where` as in
    `Pair`."""

    id: str
    messages: list[Message]
    source: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    where: str = field(default="", compare=False)


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
