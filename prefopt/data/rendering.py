"""What a chat template writes of a conversation, and the ids of that text."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.fields import common_prefix
from prefopt.data.items import Message
from prefopt.errors import UserError

log = logging.getLogger(__name__)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a template that opens with two BOS. Say it if a finished turn begins otherwise than the
    generation prompt."""
    prompt = [{"role": "user", "content": "Hello"}]
    _, opened, closed = render_answers(tokenizer, prompt, [{"role": "assistant", "content": "Hi"}])
    if encode(tokenizer, [closed])[0][:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(f"the chat template of {tokenizer.name_or_path} opens with two BOS tokens: {closed[:60]!r}.")
    if not closed.startswith(opened) or not closed[len(opened) :].lstrip().startswith("Hi"):
        at = common_prefix(opened, closed)
        log.info(
            f"  chat template of {tokenizer.name_or_path}: a finished turn begins otherwise than the generation "
            f"prompt: after {opened[max(0, at - 20) : at]!r} comes {closed[at : at + 40]!r}, not "
            f"{opened[at : at + 40]!r}. The difference counts as part of the completion."
        )


def render_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answers: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
) -> list[str]:
    """Texts: the prompt; the prompt with its generation prompt; then, for every answer, the whole conversation.

    Raises UserError where the template writes the prompt otherwise in one of them: the difference would count as part
    of the completion.
    """
    alone, opened = (render(tokenizer, prompt, generation_prompt, tools) for generation_prompt in (False, True))
    texts = [render(tokenizer, [*prompt, answer], False, tools) for answer in answers]
    # A template may close an unanswered conversation (Phi-3 writes its eos token); then the opened one tells.
    if not all(text.startswith(opened) for text in texts):
        for text in (opened, *texts):
            if not text.startswith(alone):
                at = common_prefix(alone, text)
                raise UserError(
                    f"the chat template of {tokenizer.name_or_path} writes this prompt otherwise once it is answered: "
                    f"after {alone[max(0, at - 40) : at]!r} comes {text[at : at + 40]!r}, not "
                    f"{alone[at : at + 40]!r}. Use a template that does not: model.chat_template=FILE."
                )
    return [alone, opened, *texts]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The conversation as the template writes it. Raises UserError where the template fails, refuses the messages, or
    does something that jinja2's sandbox forbids."""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=[*tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template is somebody's program, and may refuse turns that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot write {', '.join(m['role'] for m in messages)}: "
            f"{reason}. Use a model with another template, or leave out rows with such turns."
        ) from None
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of templated texts, without added special tokens. Many texts in one call are encoded on all cores."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
