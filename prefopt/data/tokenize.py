"""Conversations -> token ids, for training, reward models, sampling and evaluation alike.

A chat template writes every special token itself, so the tokenizer must not add a second BOS. The boundary between
prompt and completion is decided by tokens, not by characters: a token across the boundary belongs to the completion.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from prefopt.config.schema import PoliciesConfig
from prefopt.data.formats import Chat, Item, Message, Pair, common_prefix
from prefopt.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair: both completions follow the same prompt and hold at least one token.

    Of a chat, `chosen` is everything behind the first prompt and `rejected` is empty; `loss_mask`, as long as `chosen`,
    is True for tokens that the assistant wrote. Of a pair, `loss_mask` is None. `mismatched` is no part of the data:
    `prefopt.data.mismatch` fills it for the pairs of a step.
    """

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    loss_mask: list[bool] | None = None
    source: str = ""
    mismatched: "TokenizedPair | None" = None

    @property
    def mask(self) -> list[bool]:
        """For each token of `chosen`, whether the loss counts it."""
        return [True] * len(self.chosen) if self.loss_mask is None else self.loss_mask

    @property
    def num_loss_tokens(self) -> int:
        """The number of chosen tokens that the loss counts."""
        return sum(self.mask)


class Tokenized(NamedTuple):
    """`pairs`: what can be trained on. `dropped`: items that cannot, by reason. `noted`: changes to those that can:

    * `cut_prompts`: prompts that lost their beginning;
    * `cut_completions`: completions that lost their end (chosen and rejected are counted separately);
    * `shrunk_prompts`: prompts whose end counts as part of the completion, because a finished turn does not begin with
      the template's generation prompt.
    """

    pairs: list[TokenizedPair]
    dropped: Counter[str]
    noted: Counter[str]


DEFAULTS = PoliciesConfig()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """Ids of a conversation with the generation prompt, which opens the assistant's turn."""
    return encode(tokenizer, [render(tokenizer, prompt, True)])[0]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: str, finished: bool
) -> list[int]:
    """Ids of prompt and completion. They end with the turn's terminator (eos) if `finished`, else right before it.

    Text that the template writes behind the terminator is left out. Raises UserError if it writes no terminator at all.
    """
    opened, whole = encode(tokenizer, _rendered(tokenizer, prompt, completion))
    return _to_the_end(tokenizer, whole, common_prefix(whole, opened), finished)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    max_prompt_tokens: int,
    max_completion_tokens: int,
    policies: PoliciesConfig = DEFAULTS,
) -> Tokenized:
    """Tokenize what can be trained on, and count what cannot.

    The prompt of a pair is the longest common token prefix of the rendered prompt and both conversations. A completion
    over its budget loses its end, and so its terminator. A prompt over its budget drops the pair, or with policy `cut`
    loses its beginning (a BOS stays). Completions that are empty, or identical after the cut, drop the pair. A chat
    loses the tokens beyond `max_prompt_tokens` + `max_completion_tokens`.

    Raises UserError for a defect whose policy is to fail, and for a template that cannot write a conversation.
    """
    policy = asdict(policies)
    kept: list[TokenizedPair] = []
    dropped, noted = Counter[str](), Counter[str]()
    # All pairs' texts in one call: prompt, chosen conversation and rejected conversation of each pair in turn.
    pairs = [item for item in items if isinstance(item, Pair)]
    texts = [text for p in pairs for text in _rendered(tokenizer, p.prompt, p.chosen, p.rejected)]
    ids = iter(encode(tokenizer, texts))
    for item in items:
        result: TokenizedPair | str  # or the reason why there is none
        changes = Counter[str]()
        if isinstance(item, Pair):
            rendered = next(ids), next(ids), next(ids)
            cut_prompt = policy["prompt_too_long"] == "cut"
            result = _pair(tokenizer, item, *rendered, max_prompt_tokens, max_completion_tokens, cut_prompt, changes)
        else:
            result = _chat(tokenizer, item, max_prompt_tokens, max_completion_tokens, changes)

        if isinstance(result, TokenizedPair):
            kept.append(result)
            noted += changes
        elif policy[result] == "fail":
            raise UserError(f"{item.source} {item.id}: {result.replace('_', ' ')}; dataset.policies.{result} is fail.")
        else:
            dropped[result] += 1
    return Tokenized(kept, dropped, noted)


def _pair(
    tokenizer: PreTrainedTokenizerBase,
    item: Pair,
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    max_prompt_tokens: int,
    max_completion_tokens: int,
    cut_prompt: bool,
    changes: Counter[str],
) -> TokenizedPair | str:
    """The pair, or the reason to drop it. `prompt`, `chosen`, `rejected`: ids of the prompt with its generation prompt
    and of both whole conversations. Counts what it changes in `changes`."""
    chosen = _to_the_end(tokenizer, chosen, common_prefix(chosen, prompt), item.chosen_finished)
    rejected = _to_the_end(tokenizer, rejected, common_prefix(rejected, prompt), item.rejected_finished)
    # The tokens at the seam may merge otherwise with each completion. The prompt ends where all three still agree.
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    shared = prompt[:start]
    if start < len(prompt):
        changes["shrunk_prompts"] += 1
    changes["cut_completions"] += sum(len(side) - start > max_completion_tokens for side in (chosen, rejected))

    if len(shared) > max_prompt_tokens and cut_prompt:
        changes["cut_prompts"] += 1
        bos = shared[:1] if shared[0] == tokenizer.bos_token_id else []
        shared = bos + shared[len(shared) - max_prompt_tokens + len(bos) :]

    chosen = chosen[start : start + max_completion_tokens]
    rejected = rejected[start : start + max_completion_tokens]
    if not chosen or not rejected:
        return "empty_completion"
    if len(shared) > max_prompt_tokens:
        return "prompt_too_long"
    if chosen == rejected and item.chosen != item.rejected:  # equal texts are the defect `identical`, not this one
        return "identical_after_truncation"
    return TokenizedPair(
        item.id, shared, chosen, rejected, item.chosen_reward, item.rejected_reward, source=item.source
    )


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    item: Chat,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    changes: Counter[str],
) -> TokenizedPair | str:
    """The chat, or the reason to drop it. The loss counts every assistant turn, from where the conversation leaves the
    turn's generation prompt to its terminator. Counts what it changes in `changes`."""
    whole = encode(tokenizer, [render(tokenizer, item.messages, False)])[0]
    mask = [False] * len(whole)
    first = end = 0  # where the first assistant turn begins, and where the last one ends
    for i, message in enumerate(item.messages):
        if message["role"] == "assistant":
            # Only the prompt is used; with the answer, `_rendered` checks that the template does not rewrite it.
            opened, _ = _rendered(tokenizer, item.messages[:i], message["content"])
            start = common_prefix(whole, encode(tokenizer, [opened])[0])
            end = len(_to_the_end(tokenizer, whole, start, True))
            mask[start:end] = [True] * (end - start)
            first = first or start

    if first > max_prompt_tokens:
        return "prompt_too_long"
    limit = max_prompt_tokens + max_completion_tokens
    if end > limit:
        changes["cut_completions"] += 1
        end = limit
    chat = TokenizedPair(item.id, whole[:first], whole[first:end], [], loss_mask=mask[first:end], source=item.source)
    return chat if chat.num_loss_tokens else "empty_completion"


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer without chat template or eos token, or whose template opens with two BOS. Print a
    message if a finished turn begins otherwise than the generation prompt."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Use an instruction-tuned model, or save "
            "a tokenizer with a template beside this one."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos token, so no completion could end.")
    prompt = [{"role": "user", "content": "Hello"}]
    opened, closed = _rendered(tokenizer, prompt, "Hi")
    if encode(tokenizer, [closed])[0][:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(f"the chat template of {tokenizer.name_or_path} opens with two BOS tokens: {closed[:60]!r}.")
    if not closed.startswith(opened) or not closed[len(opened) :].lstrip().startswith("Hi"):
        at = common_prefix(opened, closed)
        log.info(
            f"  chat template of {tokenizer.name_or_path}: a finished turn begins otherwise than the generation "
            f"prompt: after {opened[max(0, at - 20) : at]!r} comes {closed[at : at + 40]!r}, not "
            f"{opened[at : at + 40]!r}. The difference counts as part of the completion."
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], *completions: str) -> list[str]:
    """Texts: the prompt with its generation prompt; then, for every completion, the whole conversation.

    Raises UserError where the template writes the prompt otherwise in one of them: the difference would count as part
    of the completion.
    """
    alone = render(tokenizer, prompt, False)
    answers = [[*prompt, {"role": "assistant", "content": c}] for c in completions]
    texts = [render(tokenizer, prompt, True), *(render(tokenizer, answer, False) for answer in answers)]
    for text in texts:
        if not text.startswith(alone):
            at = common_prefix(alone, text)
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} writes this prompt otherwise once it is answered: "
                f"after {alone[max(0, at - 40) : at]!r} comes {text[at : at + 40]!r}, not "
                f"{alone[at : at + 40]!r}. Use a template that does not (leave out system messages if it moves them)."
            )
    return texts


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """The conversation as the template writes it. Raises UserError where the template fails, refuses the messages, or
    does something that jinja2's sandbox forbids."""
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
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


def _to_the_end(tokenizer: PreTrainedTokenizerBase, whole: list[int], start: int, finished: bool) -> list[int]:
    """`whole` up to the first eos token from `start` on, with it if `finished`. Raises UserError if there is none."""
    try:
        end = whole.index(tokenizer.eos_token_id, start)
    except ValueError:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} does not close the assistant's turn with the eos token "
            f"{tokenizer.eos_token!r}, so the policy could not learn to stop. Set the tokenizer's eos_token to the "
            "token that its template writes there."
        ) from None
    return whole[: end + 1] if finished else whole[:end]
