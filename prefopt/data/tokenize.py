"""The one place where conversations become token ids: for training, sampling and evaluation alike.

A chat template writes every special token itself, so templated text never gets a second BOS. Where prompt and
completion part is found on tokens, not on characters: merges across the boundary belong to the completion.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prefopt import UserError
from prefopt.data.formats import Message, Pair


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair; both completions follow the same prompt ids. Completions hold at least one token."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_reward: float | None = None
    rejected_reward: float | None = None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """Ids of the conversation up to and including what opens the assistant's turn."""
    return _render(tokenizer, prompt, add_generation_prompt=True)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], completion: str, finished: bool
) -> list[int]:
    """Ids of prompt and completion. They end with the turn's terminator (eos) if `finished`, else right before it.

    What a template writes after the terminator is dropped. Raises UserError if it writes no terminator at all.
    """
    ids = _render(tokenizer, [*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False)
    start = _common_prefix(ids, encode_prompt(tokenizer, prompt))
    try:
        end = ids.index(tokenizer.eos_token_id, start)
    except ValueError:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} does not close the assistant's turn with the eos token "
            f"{tokenizer.eos_token!r}, so the policy could not learn to stop. Set the tokenizer's eos_token to the "
            "token that its template writes there."
        ) from None
    return ids[: end + 1] if finished else ids[:end]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_prompt_tokens: int, max_completion_tokens: int
) -> tuple[list[TokenizedPair], Counter[str]]:
    """Tokenize; return the pairs that can be trained on and the count of those that cannot, by reason.

    The shared prompt is the longest common token prefix of the rendered prompt and both conversations. A completion
    over its budget loses its end (and so its terminator); a prompt over its budget drops the pair, as do empty
    completions and completions that are identical after the cut.
    """
    kept, drops = [], Counter[str]()
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        chosen = encode_completion(tokenizer, pair.prompt, pair.chosen, pair.chosen_finished)
        rejected = encode_completion(tokenizer, pair.prompt, pair.rejected, pair.rejected_finished)
        start = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        shared, chosen, rejected = (
            prompt[:start],
            chosen[start : start + max_completion_tokens],
            rejected[start : start + max_completion_tokens],
        )
        if not pair.chosen.strip() or not pair.rejected.strip() or not chosen or not rejected:
            drops["empty_completion"] += 1
        elif len(shared) > max_prompt_tokens:
            drops["prompt_too_long"] += 1
        elif chosen == rejected:
            drops["identical_after_truncation"] += 1
        else:
            kept.append(TokenizedPair(pair.id, shared, chosen, rejected, pair.chosen_reward, pair.rejected_reward))
    return kept, drops


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer without chat template or eos token."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Use an instruction-tuned model, or save "
            "a tokenizer with a template beside this one."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no eos token, so no completion could end.")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    # return_dict is explicit because its default has changed between versions; a dict here would have a len() of 2.
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert isinstance(ids, list)
    assert all(isinstance(i, int) for i in ids)
    return ids  # type: ignore[return-value]  # just asserted


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
