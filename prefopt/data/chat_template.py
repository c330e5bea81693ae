"""The chat template as prefopt uses it: one text that holds every choice about it, and the token that ends a turn.

`resolve` puts variables, the date and the policy for system messages into the template itself, as a few lines of Jinja
before it. So training, sampling, evaluation and whoever loads the exported policy write the same prompts, and the
template's text is all that caches and identities have to know.
"""

import datetime
import json
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from prefopt.config.schema import ModelConfig
from prefopt.data.fields import common_prefix
from prefopt.data.items import Message
from prefopt.errors import UserError

log = logging.getLogger(__name__)

OPEN, CLOSE = "{#- set by prefopt -#}", '{{- "" }}'  # around the lines before a template
MERGED = "{#- system messages go to the user -#}"
# What the probes below write. Texts of one word each, which no template writes by itself.
SYSTEM, USER, ANSWER = "Qsystem", "Quser", "Qanswer"
# strftime's directives that templates use, longest first.
DIRECTIVES = ["%-d", "%-m", "%-H", "%-I", "%-M", *(f"%{letter}" for letter in "aAbBcdeFHIjmMpSuUwWxXyYT")]


def resolve(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, stops: Collection[int]) -> None:
    """Give `tokenizer` the template and the terminator that `config` asks for (in place).

    * `config.chat_template` takes the place of the tokenizer's own template.
    * The template sees `config.chat_template_kwargs`, and `config.date` in place of today's date.
    * A system message that the template cannot write is treated as `config.system_message` says.
    * `eos_token` becomes the token that the template writes behind an answer: `config.eos_token`, or the first one
      there that is the tokenizer's eos token or among `stops`, the ids that end a generation of the model.

    An exported policy's template has such lines already. They stay, and new ones take effect after them.

    Raises UserError for a file that cannot be read, a template that is no Jinja, a variable that it does not read, and
    a turn that no known token ends.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = _read(config.chat_template)
    _check_template(tokenizer)
    own_eos = tokenizer.eos_token

    _prepend(tokenizer, lambda template: _variables(template, config.chat_template_kwargs, tokenizer.name_or_path))
    _prepend(tokenizer, lambda template: _fixed_date(template, config.date))
    if not writes_system(tokenizer):
        _prepend(tokenizer, lambda template: _system_policy(config.system_message))
    tokenizer.eos_token = terminator(tokenizer, config.eos_token, stops)
    if tokenizer.eos_token != own_eos and own_eos is not None:
        # The template may write the variable eos_token in other places than behind a turn.
        _prepend(tokenizer, lambda t: _set("eos_token", own_eos) if "eos_token" in _reads(t) else "")


def merges_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether system messages become a part of the user's first turn by `resolve`."""
    return any(MERGED in template for template in _templates(tokenizer).values())


def writes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a system message in the same way before and after the answer, and in longer chats."""
    opening = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    answered = [*opening, {"role": "assistant", "content": ANSWER}]
    try:
        prompt = _render(tokenizer, opening, True)
        later = [_render(tokenizer, chat, False) for chat in (answered, [*answered, opening[1]])]
    except TemplateError:
        return False
    prefix = prompt[: prompt.find(USER)] + USER
    return SYSTEM in prefix and all(text.startswith(prefix) for text in later)


def terminator(tokenizer: PreTrainedTokenizerBase, chosen: str | None, stops: Collection[int]) -> str:
    """The token that ends the assistant's turn (see `resolve`). Raises UserError where there is none."""
    chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    try:
        text = _render(tokenizer, chat, False)
    except TemplateError as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} fails on a plain conversation: {error}. Use a model with "
            "another template, or give one: model.chat_template=FILE."
        ) from None
    behind = text.rpartition(ANSWER)[2]
    ids = tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"] if behind else []
    special = [i for i in ids if i in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)]
    if chosen is not None:
        if tokenizer.convert_tokens_to_ids(chosen) not in ids or len(_ids(tokenizer, chosen)) != 1:
            raise UserError(
                f"model.eos_token={chosen!r}: the chat template of {tokenizer.name_or_path} does not write this token "
                f"behind an answer; it writes {behind!r}."
            )
        return chosen
    for token in ids:
        if token == tokenizer.eos_token_id or token in stops:
            return str(tokenizer.convert_ids_to_tokens(token))
    candidates = [str(tokenizer.convert_ids_to_tokens(i)) for i in special]
    eos = f"its eos token {tokenizer.eos_token!r}" if tokenizer.eos_token else "an eos token (the tokenizer has none)"
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} does not close the assistant's turn with {eos}, so the policy "
        f"could not learn to stop; it writes {behind!r}. "
        + (
            f"If that ends a turn, set \"model.eos_token='{candidates[0]}'\"."
            if candidates
            else "Give a template that writes the eos token there: model.chat_template=FILE."
        )
    )


def markup(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What only a template should write: the special tokens, and the words before a user's turn ("[INST]", "USER:").

    Such words count where they hold another sign than letters: "user" behind a special token is an ordinary word.
    """
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    text = _render(tokenizer, [*turns, turns[0]], False)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [re.escape(token) for token in sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)]
    first, second = text.split(USER)[0], text.split(ANSWER)[1].split(USER)[0]
    # Behind the last special token, what both turns have: before it stands what opens the conversation.
    first, second = (re.split("|".join(special), part)[-1] for part in (first, second))
    common = common_prefix(first[::-1], second[::-1])
    words = first[len(first) - common :].strip()
    if len(words) > 3 and not words.isalnum():
        special.append(re.escape(words))
    return re.compile("|".join(special))


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The template, or the templates by name ("default", "tool_use") where there are several."""
    found = tokenizer.chat_template
    return dict(found) if isinstance(found, dict) else {"default": str(found)}


def _prepend(tokenizer: PreTrainedTokenizerBase, lines: Callable[[str], str]) -> None:
    """Put `lines(template)` before each template, behind lines that are there already."""
    resolved = {}
    for name, template in _templates(tokenizer).items():
        there, rest = "", template
        if template.startswith(OPEN):
            there, _, rest = template.removeprefix(OPEN).partition(CLOSE)
        new = lines(template)
        resolved[name] = f"{OPEN}{there}{new}{CLOSE}{rest}" if there or new else rest
    tokenizer.chat_template = resolved if isinstance(tokenizer.chat_template, dict) else resolved["default"]


def _variables(template: str, values: dict[str, Any], name: str) -> str:
    if unknown := sorted(values.keys() - _reads(template)):
        raise UserError(
            f"model.chat_template_kwargs: the chat template of {name} does not read {', '.join(unknown)}. It reads: "
            f"{', '.join(sorted(_reads(template) - {'messages', 'add_generation_prompt'})) or 'nothing'}."
        )
    return "".join(_set(key, value) for key, value in values.items())


def _fixed_date(template: str, date: str) -> str:
    """A macro in place of the function that gives today's date, where the template calls it."""
    if "strftime_now" not in _reads(template):
        return ""
    try:
        day = datetime.datetime.fromisoformat(date)
    except ValueError:
        raise UserError(f"model.date must be a date like 2024-07-26, is {date!r}.") from None
    log.info(f"  the chat template writes today's date: it is {date} here, always (model.date)")
    written = "".join(f"|replace({json.dumps(d)}, {json.dumps(day.strftime(d))})" for d in DIRECTIVES)
    return "{%- macro strftime_now(format) %}{{- format" + written + " }}{%- endmacro %}"


def _system_policy(policy: str) -> str:
    first = "messages and messages[0].role == 'system'"
    if policy == "drop":
        return f"{{%- if {first} %}}{{%- set messages = messages[1:] %}}{{%- endif %}}"
    if policy == "fail":
        message = "it writes no system message; what then happens is set by model.system_message"
        return f"{{%- if {first} %}}{{{{- raise_exception({json.dumps(message)}) }}}}{{%- endif %}}"
    # Into the first user's turn, as a paragraph of its own.
    joined = "messages[0].content ~ '\\n\\n' ~ messages[1].content"
    return (
        f"{MERGED}{{%- if {first} and messages|length > 1 and messages[1].role == 'user' %}}"
        f"{{%- set messages = [{{'role': 'user', 'content': {joined}}}] + messages[2:] %}}{{%- endif %}}"
    )


def _set(name: str, value: Any) -> str:
    return f"{{%- set {name} = {_literal(value)} %}}"


def _literal(value: Any) -> str:
    """`value` as a Jinja expression, which is JSON but for null."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


def _reads(template: str) -> set[str]:
    """The variables that a template reads and does not always set itself."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    # transformers' tag around what the assistant wrote, which jinja2 alone does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    return meta.find_undeclared_variables(environment.parse(plain))


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer without a template, and for a template that is no Jinja."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Use an instruction-tuned model, or give "
            "a template: model.chat_template=FILE, or model.tokenizer=NAME of a model with the same vocabulary."
        )
    for template in _templates(tokenizer).values():
        try:
            _reads(template)
        except TemplateError as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} is no Jinja: {error}. Get the model again, or "
                "give a template: model.chat_template=FILE."
            ) from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={path} cannot be read: {error}") from None


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """Raises TemplateError for whatever goes wrong in the template."""
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False))
    except TemplateError:
        raise
    except Exception as error:  # a template is somebody's program
        raise TemplateError(str(error) or type(error).__name__) from None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
