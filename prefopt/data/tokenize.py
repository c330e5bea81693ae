"""Conversations -> token ids, for training, reward models, sampling and evaluation alike.

A chat template writes every special token itself, so the tokenizer must not add a second BOS. The boundary between
prompt and completion is decided by tokens, not by characters: a token across the boundary belongs to the completion.

Every row is proved: the conversation holds the completion's text (`rewritten_by_template` otherwise), the learnt tokens
spell that text, and a turn ends no later than where the next message begins.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from prefopt.config.schema import PoliciesConfig
from prefopt.data.chat_template import USER, markup, merges_system
from prefopt.data.fields import common_prefix, extra_fields
from prefopt.data.items import Chat, Item, Message, Pair
from prefopt.data.proof import Defect, check_fields, check_spelling, check_written, locate, short
from prefopt.data.rendering import encode, render, render_answers
from prefopt.errors import UserError
from prefopt.objectives import SIDES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair: both completions follow the same prompt and hold at least one token.

    Of a chat, `chosen` is everything behind the first prompt and `rejected` is empty; `loss_mask`, as long as `chosen`,
    is True for tokens that the assistant wrote. Of a pair, `loss_mask` is None. `mismatched` is no part of the data:
    `prefopt.data.mismatch` fills it for the pairs of a step. `others` and `other_rewards` are those of a group
    (`prefopt.data.items.Pair.others`), and None of a pair. `*_token_weights` are as long as the completions, or None.
    """

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    weight: float = 1.0
    chosen_token_weights: list[float] | None = None
    rejected_token_weights: list[float] | None = None
    loss_mask: list[bool] | None = None
    source: str = ""
    mismatched: "TokenizedPair | None" = None
    others: list[list[int]] | None = None
    other_rewards: list[float] | None = None

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
      the template's generation prompt;
    * `merged_system`: system messages that became a part of the user's first turn;
    * `whitespace_changed`: completions in which the template changed blanks and newlines, mostly at the ends;
    * `changed_by_tokenizer`: completions whose tokens spell another text (unknown or normalized characters);
    * `inner_turns_without_terminator`: turns of a chat that are learnt without their end, because the template closes
      inner turns otherwise than the last one;
    * `weighted`: pairs with another weight than 1;
    * `token_weights`: pairs with weights for their tokens;
    * `template_in_text`: items with special tokens or other markup of the template in their text.
    """

    pairs: list[TokenizedPair]
    dropped: Counter[str]
    noted: Counter[str]


class Rendered(NamedTuple):
    """What the template writes of one pair.

    `alone`: the prompt; `opened`: the prompt with the generation prompt and the pair's opening; `answered`: whole
    conversations, with the chosen completion, the rejected one and, of a group, the others.
    """

    alone: str
    opened: str
    answered: list[str]


DEFAULTS = PoliciesConfig()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """Ids of a conversation with the generation prompt, which opens the assistant's turn."""
    return encode(tokenizer, [render(tokenizer, prompt, True)])[0]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: str, finished: bool
) -> tuple[list[int], list[int]]:
    """(prompt, completion): their ids. The completion ends with the turn's terminator (eos) if `finished`, else right
    before it.

    Text that the template writes behind the terminator is left out. Raises UserError if it writes no terminator at all.
    """
    _, opened, text = render_answers(tokenizer, prompt, [{"role": "assistant", "content": completion}])
    start, whole = encode(tokenizer, [opened, text])
    boundary = common_prefix(whole, start)
    ids = _to_the_end(tokenizer, whole, boundary, finished, completion.count(tokenizer.eos_token))
    return ids[:boundary], ids[boundary:]


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
    pattern, merged = markup(tokenizer), merges_system(tokenizer)

    def prepare(item: Item) -> Rendered | Defect | None:
        """What the template makes of a pair (of a chat: None), or why the item is not used."""
        try:
            if policy["template_in_text"] != "keep" and (found := _search(pattern, item)):
                raise Defect("template_in_text", f"it holds {found!r}")
            return _render_pair(tokenizer, item) if isinstance(item, Pair) else None
        except Defect as defect:
            return defect

    prepared = [prepare(item) for item in items]
    # All pairs' texts in one call: prompt, then the conversations with its completions, of each pair in turn.
    texts = [text for r in prepared if isinstance(r, Rendered) for text in (r.opened, *r.answered)]
    ids = iter(encode(tokenizer, texts))
    for item, rendered in zip(items, prepared, strict=True):
        changes = Counter[str]()
        try:
            if isinstance(rendered, Defect):
                raise rendered
            if isinstance(item, Pair):
                assert rendered is not None
                prompt_ids, answer_ids = next(ids), [next(ids) for _ in rendered.answered]
                cut = policy["prompt_too_long"] == "cut"
                limits = max_prompt_tokens, max_completion_tokens, cut
                result = _pair(tokenizer, item, rendered, prompt_ids, answer_ids, *limits, changes)
            else:
                result = _chat(tokenizer, item, max_prompt_tokens, max_completion_tokens, changes)
        except Defect as defect:
            if policy[defect.reason] == "fail":
                raise UserError(_refusal(tokenizer, item, defect)) from None
            dropped[defect.reason] += 1
            continue
        kept.append(result)
        opening = item.prompt if isinstance(item, Pair) else item.messages
        changes["merged_system"] += merged and opening[0]["role"] == "system"
        changes["weighted"] += isinstance(item, Pair) and item.weight != 1
        changes["token_weights"] += result.chosen_token_weights is not None
        changes["template_in_text"] += policy["template_in_text"] == "keep" and _search(pattern, item) is not None
        noted += changes
    return Tokenized(kept, dropped, noted)


def _refusal(tokenizer: PreTrainedTokenizerBase, item: Item, defect: Defect) -> str:
    what = defect.reason.replace("_", " ") + (f" ({defect.detail})" if defect.detail else "")
    other = ""
    if defect.reason == "rewritten_by_template":
        other = f", or use another template than that of {tokenizer.name_or_path}: model.chat_template=FILE"
    return (
        f"{item.source} {item.id}: {what}. Leave such rows out with dataset.policies.{defect.reason}=drop{other} "
        f"(in a mixture dataset.sources.NAME.policies.{defect.reason})."
    )


def _search(pattern: re.Pattern[str], item: Item) -> str | None:
    """The first match of `pattern` in the texts of an item."""
    spoken = [*item.prompt, *item.answers] if isinstance(item, Pair) else item.messages
    texts = [m.get("content") or "" for m in spoken]
    return next((match[0] for text in texts if (match := pattern.search(text))), None)


def _render_pair(tokenizer: PreTrainedTokenizerBase, item: Pair) -> Rendered:
    """Raises Defect where the template leaves out something the prompt says, UserError as `render_answers` does."""
    alone, opened, *answered = render_answers(tokenizer, item.prompt, item.answers, item.tools)
    rendered = Rendered(alone, opened, answered)
    if item.opening:
        rendered = rendered._replace(opened=rendered.opened + item.opening)
        if not all(text.startswith(rendered.opened) for text in rendered.answered):
            raise Defect(
                "rewritten_by_template", f"the steps so far, {short(item.opening)}, are not written as they are"
            )
    check_written(tokenizer, item.prompt, item.tools, rendered.alone)
    for answer, text in zip(item.answers, rendered.answered, strict=True):
        check_fields(tokenizer, [*item.prompt, answer], item.tools, text, len(item.prompt))
    return rendered


def _pair(
    tokenizer: PreTrainedTokenizerBase,
    item: Pair,
    rendered: Rendered,
    prompt: list[int],
    answered: list[list[int]],
    max_prompt_tokens: int,
    max_completion_tokens: int,
    cut_prompt: bool,
    changes: Counter[str],
) -> TokenizedPair:
    """The pair or group. `prompt`, `answered`: ids of the prompt with its generation prompt and of the whole
    conversations. Counts what it changes in `changes`. Raises Defect for a pair that cannot be trained on."""
    finished = [item.chosen_finished, item.rejected_finished, *(other.finished for other in item.others or [])]
    wholes = []
    for text, ids, answer, is_finished in zip(rendered.answered, answered, item.answers, finished, strict=True):
        locate(text, common_prefix(rendered.alone, text), answer["content"], changes)
        start = common_prefix(ids, prompt)
        check_spelling(tokenizer, ids[start:], text[common_prefix(rendered.opened, text) :], text, changes)
        fields = json.dumps(extra_fields(answer), ensure_ascii=False)
        inside = f"{answer['content']} {fields}".count(tokenizer.eos_token)
        wholes.append(_to_the_end(tokenizer, ids, start, is_finished, inside))
    # The tokens at the seam may merge otherwise with each completion. The prompt ends where all of them still agree.
    start = min(common_prefix(prompt, whole) for whole in wholes)
    shared = prompt[:start]
    if start < len(prompt):
        changes["shrunk_prompts"] += 1
    changes["cut_completions"] += sum(len(whole) - start > max_completion_tokens for whole in wholes)

    if len(shared) > max_prompt_tokens and cut_prompt:
        changes["cut_prompts"] += 1
        bos = shared[:1] if shared[0] == tokenizer.bos_token_id else []
        shared = bos + shared[len(shared) - max_prompt_tokens + len(bos) :]

    chosen, rejected, *others = (whole[start : start + max_completion_tokens] for whole in wholes)
    if not all((chosen, rejected, *others)):
        raise Defect("empty_completion")
    if len(shared) > max_prompt_tokens:
        raise Defect("prompt_too_long")
    # Equal texts are the defect `identical`, not this one.
    if item.others is None and chosen == rejected and item.answers[0] != item.answers[1]:
        raise Defect("identical_after_truncation")
    rewards = item.chosen_reward, item.rejected_reward
    pair = TokenizedPair(item.id, shared, chosen, rejected, *rewards, weight=item.weight, source=item.source)
    if item.chosen_token_weights is not None:
        of_chosen, of_rejected = (
            _token_weights(tokenizer, item, side, len(whole) - start)[:max_completion_tokens]
            for side, whole in zip(SIDES, wholes, strict=True)
        )
        pair = replace(pair, chosen_token_weights=of_chosen, rejected_token_weights=of_rejected)
    if item.others is None:
        return pair
    return replace(pair, others=others, other_rewards=[other.reward for other in item.others])


def _token_weights(tokenizer: PreTrainedTokenizerBase, item: Pair, side: str, tokens: int) -> list[float]:
    """The weights of a side's tokens. Raises UserError unless it has one for each of its `tokens`."""
    weights: list[float] = getattr(item, f"{side}_token_weights")
    if len(weights) != tokens:
        raise UserError(
            f"{item.where or item.id}: {side}_token_weights holds {len(weights)} numbers, and the completion has "
            f"{tokens} tokens as {tokenizer.name_or_path or 'the tokenizer'} and its chat template write it, before "
            "any cut and with its terminator. Make the weights with the policy's own tokenizer (prefopt "
            "token_weights), or leave out chosen_token_weights and rejected_token_weights."
        )
    return weights


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    item: Chat,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    changes: Counter[str],
) -> TokenizedPair:
    """The chat. The loss counts every assistant turn, from where the conversation leaves the turn's generation prompt
    to its terminator, which must stand before the next message. Counts what it changes in `changes`. Raises Defect for
    a chat that cannot be trained on."""
    text = render(tokenizer, item.messages, False, item.tools)
    whole = encode(tokenizer, [text])[0]
    check_written(tokenizer, item.messages, item.tools, text)
    mask = [False] * len(whole)
    first = end = 0  # where the first assistant turn begins, and where the last one ends
    for i, message in enumerate(item.messages):
        if message["role"] != "assistant":
            continue
        alone, opened, _ = render_answers(tokenizer, item.messages[:i], [message], item.tools)
        if not text.startswith((alone, opened)):
            raise Defect("rewritten_by_template", f"the turns before turn {i + 1} are written otherwise in the whole")
        check_fields(tokenizer, item.messages, item.tools, text, i)
        _, answer_end = locate(text, common_prefix(alone, text), message["content"], changes)
        start = common_prefix(whole, encode(tokenizer, [opened])[0])
        inside = message["content"].count(tokenizer.eos_token)
        is_last = i + 1 == len(item.messages)
        if tokenizer.eos_token in (text[answer_end:] if is_last else _closing(tokenizer, item, i, alone)):
            end = len(_to_the_end(tokenizer, whole, start, True, inside))
        else:
            changes["inner_turns_without_terminator"] += 1
            end = common_prefix(whole, encode(tokenizer, [text[:answer_end]])[0])
        learnt = text[common_prefix(opened, text) : answer_end]
        check_spelling(tokenizer, whole[start:end], learnt, None, changes)
        mask[start:end] = [True] * (end - start)
        first = first or start

    if first > max_prompt_tokens:
        raise Defect("prompt_too_long")
    limit = max_prompt_tokens + max_completion_tokens
    if end > limit:
        changes["cut_completions"] += 1
        end = limit
    chat = TokenizedPair(item.id, whole[:first], whole[first:end], [], loss_mask=mask[first:end], source=item.source)
    if not chat.num_loss_tokens:
        raise Defect("empty_completion")
    return chat


def _closing(tokenizer: PreTrainedTokenizerBase, item: Chat, i: int, alone: str) -> str:
    """What the template writes between the words of message `i` and those of the next one: the markup that closes the
    turn and opens the next. `alone`: what it writes of the messages before."""
    *messages, following = item.messages[: i + 2]
    # The real words may be empty, or look like markup.
    text = render(tokenizer, [*messages, {**following, "content": USER}], False, item.tools)
    _, end = locate(text, common_prefix(alone, text), messages[-1]["content"], Counter())
    return text[end : text.find(USER, end)]


def _to_the_end(
    tokenizer: PreTrainedTokenizerBase, whole: list[int], start: int, finished: bool, inside: int
) -> list[int]:
    """`whole` up to the terminator, with it if `finished`. The terminator is the first eos token from `start` on, after
    `inside` others that are a part of the answer's own text. Raises UserError if there is none."""
    eos = tokenizer.eos_token_id  # looked up once: a tokenizer computes it each time
    ends = [i for i in range(start, len(whole)) if whole[i] == eos]
    if not ends:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} does not close this turn with the eos token "
            f"{tokenizer.eos_token!r}, so the policy could not learn to stop. Use a template that does: "
            "model.chat_template=FILE."
        )
    end = ends[min(inside, len(ends) - 1)]
    return whole[: end + 1] if finished else whole[:end]
