"""Scorers that compute rewards with a reward model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.hardware import micro_batch_tokens
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.rewards.scorers import Request, RewardScorer
from prefopt.utils import tensor_store
from prefopt.utils.distributed import map_shared
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.data.collate import Layout
    from prefopt.data.tokenize import TokenizedPair

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardModel(RewardScorer):
    """A reward model whose head has one output, read at the last token of the conversation.

    The conversation is written with the tokenizer and the chat template of the reward model. `ends_with` chooses its
    last token: "terminator", the end of the response, as in the reward models that prefopt trains; or "template", the
    last token of the chat template, as in most reward models on the hub.

    Rewards are kept in the user's cache, by the digests of the weights and of the tokens.
    """

    path: str
    ends_with: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.ends_with not in ("terminator", "template"):
            raise ValueError(f"ends_with must be terminator or template, is {self.ends_with!r}")

    @property
    def label(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(self.path, self.path, self.revision)

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        from prefopt.models.frozen import freeze
        from prefopt.models.load import check_vocabulary, finalize, load_tokenizer
        from prefopt.utils.console import Bar

        tokenizer = load_tokenizer(self.model)
        texts = [self._encode(tokenizer, request) for request in requests]
        keys = [tensor_store.hash_tokens(tokens) for tokens in texts]
        by_key = dict(zip(keys, texts, strict=True))  # equal texts are computed once

        model = finalize(freeze(self._load(), precision), device)
        check_vocabulary(model, tokenizer)
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        for request, tokens in zip(requests, texts, strict=True):
            if len(tokens) > limit:
                raise UserError(
                    f"{request.where}: response {request.key} and its prompt have {len(tokens)} tokens, and the reward "
                    f"model {self.path} reads {limit}. Leave the row out, or take another reward model."
                )

        layout = self._layout(model, texts, precision)
        cache = tensor_store.TensorCache(self._cache_folder(model, precision, sorted(by_key)), 1)
        with cache.locked("rewards"):
            # From long to short, so that the texts of a micro-batch have similar lengths.
            missing = sorted((k for k in by_key if k not in cache), key=lambda k: len(by_key[k]), reverse=True)
            with Bar("rewards", len(missing), show and bool(missing)) as bar:
                for start in range(0, len(missing), tensor_store.SHARD_ROWS):
                    shard = missing[start : start + tensor_store.SHARD_ROWS]
                    cache.add(shard, self._compute(model, [by_key[k] for k in shard], precision, bar, layout))
                    bar.advance(by=start + len(shard) - bar.done)  # what the other processes have computed
        log.info(f"  rewards: {len(by_key) - len(missing)} of {len(by_key)} from the cache, {len(missing)} computed")
        return cache.get(keys)[:, 0].tolist()

    def _load(self) -> "PreTrainedModel":
        from prefopt.models.load import load_trained_reward_model

        return load_trained_reward_model(self.model, "cpu")

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", request: Request) -> list[int]:
        """The token ids of prompt and response."""
        from prefopt.data.rendering import encode, render
        from prefopt.data.tokenize import encode_completion

        if self.ends_with == "terminator":
            return encode_completion(tokenizer, request.prompt, request.response, request.finished)
        conversation = [*request.prompt, {"role": "assistant", "content": request.response}]
        return encode(tokenizer, [render(tokenizer, conversation, False)])[0]

    def _layout(self, model: "PreTrainedModel", texts: list[list[int]], precision: str) -> "Layout | None":
        """The fastest layout that gives the same numbers as one text at a time; None where `_compute` needs none."""
        from prefopt.models.layout_check import choose_layout

        return choose_layout("packed", model, _as_pairs(texts), precision)

    def _compute(
        self, model: "PreTrainedModel", texts: list[list[int]], precision: str, bar: Any, layout: "Layout | None"
    ) -> "Tensor":
        """The rewards of texts of token ids: `(len(texts), 1)`, float32, on the CPU. A collective."""
        import torch

        from prefopt.data.collate import groups_of
        from prefopt.models.logprobs import autocast, completion_rewards

        assert layout is not None

        def rewards_of(micro_batch: "list[TokenizedPair]") -> "Tensor":
            batch = layout.collate(micro_batch, ("chosen",)).to(model.device)
            rewards = completion_rewards(model, batch).float().cpu()
            bar.advance(by=len(micro_batch))
            return rewards

        parts = layout.micro_batches(_as_pairs(texts), micro_batch_tokens(model.device.type), None, ("chosen",))
        with torch.no_grad(), autocast(model.device, precision):
            found = map_shared(rewards_of, parts, lambda part: layout.tokens(groups_of(part, ("chosen",))))
        rewards = torch.empty(len(texts), 1)
        # Micro-batches may reorder the pairs. The id of a pair is its row.
        rewards[[int(p.id) for part in parts for p in part], 0] = torch.cat(found)
        return rewards

    def _cache_folder(self, model: "PreTrainedModel", precision: str, keys: list[bytes]) -> Path:
        """The cache's folder. Its name is a digest of everything that decides a reward, the other texts of the call too
        (`keys`): on some processors the last bits of a text's reward depend on what shares its micro-batch, and a job
        must not depend on what another one has left in the cache."""
        from prefopt.data import collate
        from prefopt.models import logprobs, packed_attention
        from prefopt.models.fingerprint import loaded_model

        texts = tensor_store.hash_tokens(b"".join(keys)).hex()
        decides = [type(self).__qualname__, *loaded_model(model), precision, texts]
        key = fingerprint(decides, type(self), logprobs, packed_attention, collate)
        return cache_dir() / "rewards" / key[:24]


@dataclass(frozen=True)
class CustomRewardModel(RewardModel):
    """A reward model that comes with the code of its forward pass, whose output holds the reward as `score` (ArmoRM).
    One response is computed at a time, because that code may not handle padding."""

    ends_with: str = "template"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trust_remote_code:
            raise ValueError(
                f"trust_remote_code: {self.path} runs Python code that comes with the model. Read it, and if you trust "
                "it set scorer.trust_remote_code=true."
            )

    def _load(self) -> "PreTrainedModel":
        from prefopt.models.load import load_custom_reward_model

        return load_custom_reward_model(self.model, "cpu")

    def _layout(self, model: "PreTrainedModel", texts: list[list[int]], precision: str) -> None:
        return None

    def _compute(
        self, model: "PreTrainedModel", texts: list[list[int]], precision: str, bar: Any, layout: "Layout | None"
    ) -> "Tensor":
        import torch

        from prefopt.models.logprobs import autocast

        def reward_of(tokens: list[int]) -> float:
            row = torch.tensor([tokens], device=model.device)
            reward = getattr(model(input_ids=row, attention_mask=torch.ones_like(row)), "score", None)
            if reward is None or reward.numel() != 1:
                raise UserError(f"the output of {self.path} has no `score` of one number. It is no such model.")
            bar.advance()
            return float(reward)

        with torch.no_grad(), autocast(model.device, precision):
            return torch.tensor(map_shared(reward_of, texts, len)).view(-1, 1)


def _as_pairs(texts: list[list[int]]) -> "list[TokenizedPair]":
    """The texts as chosen sides of pairs, as collating wants them."""
    from prefopt.data.tokenize import TokenizedPair

    # Where the prompt ends does not matter: the reward is read at the last token.
    return [TokenizedPair(str(i), tokens[:1], tokens[1:], []) for i, tokens in enumerate(texts)]
