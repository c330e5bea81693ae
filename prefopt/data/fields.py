"""Fields of a row: prompts, completions, messages, texts, numbers, as people write them.

All formats read them by these functions, so what one of them accepts, all do: text, {"role", "content"} or ShareGPT's
{"from", "value"}, content as a list of text parts, tool calls.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from prefopt.data.items import Dropped, Message, Row, RowDefect

# Other tools' names of the roles.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system",
         "observation": "tool"}  # fmt: skip
# What a chat template may read of a message besides role and content. Other fields are ignored.
TEMPLATE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# Fields by which other tools choose what is learnt. Here the loss decides that, so only the same choice is accepted.
LEARNING_FIELDS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask", "train_detail")
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a message's content

FLOAT32_MAX = 3.4028234663852886e38


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
        raise ValueError(
            f"field {key!r} must be text or a single assistant message; for whole conversations use "
            "dataset.format._target_=prefopt.data.formats.ImplicitPrompt"
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
    """A number, or text of one, as a float; None for anything else and for what is not finite in float32."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared instead of math.isfinite, which raises OverflowError for a huge int. For NaN the comparison is false.
    return float(value) if is_number and abs(value) <= FLOAT32_MAX else None


def weight_of(row: Row) -> float:
    """The weight of a row's pair: its field `weight`, 1 where that is absent. Raises ValueError for another value than
    a number of at least 0."""
    if is_absent(row.get("weight")):
        return 1.0
    weight = as_number(row["weight"])
    if weight is None or weight < 0:
        raise ValueError(f"field 'weight' must be a finite number of at least 0, is {reprlib.repr(row['weight'])}")
    return weight


def token_weights_of(row: Row) -> tuple[list[float] | None, list[float] | None]:
    """The weights of the tokens of a row's chosen and rejected completion: its fields `chosen_token_weights` and
    `rejected_token_weights`, lists of numbers, None where both are absent. Raises ValueError for anything else."""
    keys = "chosen_token_weights", "rejected_token_weights"
    absent = [key for key in keys if is_absent(row.get(key))]
    if len(absent) == 2:
        return None, None
    if absent:
        raise ValueError(f"field {absent[0]!r} is missing, and weights of tokens are those of both completions")
    chosen, rejected = (
        [finite(value, f"each of {key!r}") for value in listed(row, key, object, "numbers")] for key in keys
    )
    return chosen, rejected


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
