"""The proof that a template writes what a row says: the answer's text, the user's words, the tools."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.items import Message
from prefopt.data.rendering import render
from prefopt.errors import UserError


class Defect(Exception):
    """An item that cannot be trained on. `reason` is a field of `PoliciesConfig`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# Fields of a message that hold a part of what is said, beside its content.
SPOKEN_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def locate(text: str, start: int, answer: str, changes: Counter[str]) -> tuple[int, int]:
    """(begin, end) of the answer in `text` from `start` on. The template may change blanks and newlines, which is
    counted in `changes`, and nothing else: raises Defect."""
    if (begin := text.find(answer, start)) >= 0:
        return begin, begin + len(answer)
    changes["whitespace_changed"] += 1
    if (begin := text.find(answer.strip(), start)) >= 0:
        return begin, begin + len(answer.strip())
    places = [i for i in range(start, len(text)) if not text[i].isspace()]
    begin = "".join(text[i] for i in places).find(wanted := squash(answer))
    if begin < 0:
        raise Defect(
            "rewritten_by_template",
            f"the completion {short(answer)} is written as {short(text[start:])}",
        )
    return places[begin], places[begin + len(wanted) - 1] + 1


def check_spelling(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], learnt: str, text: str | None, changes: Counter[str]
) -> None:
    """Count a completion whose tokens `ids` do not spell `learnt`. With `text`, which is all that the template wrote,
    they must spell it up to its end."""
    spelt = squash(str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)))
    wanted = squash(learnt)
    # The first token may reach back into the prompt, so `spelt` may be longer.
    right = wanted in spelt if text is None else spelt.endswith(wanted) and squash(text).endswith(spelt)
    changes["changed_by_tokenizer"] += not right


def check_written(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[dict[str, Any]], text: str
) -> None:
    """Raises Defect where `text`, which the template wrote, lacks the words of a user, the result of a tool, or the
    tools. What a template does with earlier answers (it may leave out their thoughts) is its own affair."""
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "user":
            if content.strip() not in text and squash(content) not in squash(text):
                raise Defect("rewritten_by_template", f"it does not write the user's words {short(content)}")
        elif message["role"] == "tool":
            blank = [*messages[:i], {**message, "content": ""}, *messages[i + 1 :]]
            if content.strip() and not _matters(tokenizer, blank, tools, text):
                raise Defect("rewritten_by_template", f"it does not write the tool's result {short(content)}")
        elif message.get("tool_calls"):
            check_fields(tokenizer, messages, tools, text, i, ("tool_calls",))
    if tools and not _matters(tokenizer, messages, [], text):
        raise Defect("rewritten_by_template", "it does not write the row's `tools`")


def check_fields(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]],
    text: str,
    i: int,
    fields: Sequence[str] = SPOKEN_FIELDS,
) -> None:
    """Raises Defect where `text`, which the template wrote, would be the same without a field of message `i`."""
    for field in fields:
        if messages[i].get(field):
            without = {key: value for key, value in messages[i].items() if key != field}
            if not _matters(tokenizer, [*messages[:i], without, *messages[i + 1 :]], tools, text):
                raise Defect("rewritten_by_template", f"it does not write the field {field!r}")


def _matters(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[dict[str, Any]], text: str
) -> bool:
    """Whether the template writes something else than `text`, or fails, without what was left out of `messages`."""
    try:
        return render(tokenizer, messages, False, tools) != text
    except UserError:
        return True


def squash(text: str) -> str:
    """The text without blanks and newlines."""
    return "".join(text.split())


def short(text: str) -> str:
    return repr(text if len(text) <= 70 else f"{text[:70]}...")
