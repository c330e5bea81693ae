"""Reward models as scorers."""

import importlib.metadata
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
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.data.collate import Layout
    from prefopt.data.tokenize import TokenizedPair


@dataclass(frozen=True)
class RewardModel(RewardScorer):
    """A sequence-classification head of one output, on the last token of the conversation as the reward model's own
    tokenizer and template write it. `ends_with` says which token that is: the response's `terminator`, as in the reward
    models that prefopt trains, or the last one that the `template` writes, as in most on the hub.

    Scores are kept in the user's cache by weights and tokens.
    """

    path: str
    ends_with: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.ends_with not in ("terminator", "template"):
            raise ValueError(f"ends_with must be terminator or template, is {self.ends_with!r}")

    @property
    def label(self) -> str:
        return self.path + f"@{self.revision}" * bool(self.revision)

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        from prefopt.models.load import check_vocabulary, load_tokenizer
        from prefopt.utils.console import Bar, say

        tokenizer = load_tokenizer(self._model)
        texts = [self._encode(tokenizer, r) for r in requests]
        keys = [tensor_store.hash_tokens(tokens) for tokens in texts]
        wanted = dict(zip(keys, texts, strict=True))
        model = self._load(device)
        check_vocabulary(model, tokenizer)
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        for request, tokens in zip(requests, texts, strict=True):
            if len(tokens) > limit:
                raise UserError(
                    f"{request.where}: response {request.key} and its prompt have {len(tokens)} tokens, and the reward "
                    f"model {self.path} reads {limit}. Leave the row out, or take another reward model."
                )
        layout = self._layout(model, texts, precision)
        known = tensor_store.TensorCache(self._cache_folder(model, precision), 1)
        with known.locked("rewards"):
            # From long to short, so that what is computed together is of similar length.
            missing = sorted((k for k in wanted if k not in known), key=lambda k: len(wanted[k]), reverse=True)
            with Bar("rewards", len(missing), show and bool(missing)) as bar:
                for start in range(0, len(missing), tensor_store.SHARD_ROWS):
                    shard = missing[start : start + tensor_store.SHARD_ROWS]
                    known.add(shard, self._compute(model, [wanted[k] for k in shard], precision, bar, layout))
        say(f"  rewards: {len(wanted) - len(missing)} of {len(wanted)} from the cache, {len(missing)} computed")
        return known.get(keys)[:, 0].tolist()

    @property
    def _model(self) -> ModelConfig:
        return ModelConfig(self.path, self.path, self.revision)

    def _load(self, device: str) -> "PreTrainedModel":
        from prefopt.models.load import load_trained_reward_model

        return load_trained_reward_model(self._model, device)

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", request: Request) -> list[int]:
        from prefopt.data.tokenize import encode, encode_completion, render

        if self.ends_with == "terminator":
            return encode_completion(tokenizer, request.prompt, request.response, request.finished)
        answered = [*request.prompt, {"role": "assistant", "content": request.response}]
        return encode(tokenizer, [render(tokenizer, answered, False)])[0]

    def _layout(self, model: "PreTrainedModel", texts: list[list[int]], precision: str) -> "Layout | None":
        """The fastest one that gives the model's own numbers."""
        from prefopt.models.layout_check import choose_layout

        return choose_layout("packed", model, _as_pairs(texts), precision)

    def _compute(
        self, model: "PreTrainedModel", texts: list[list[int]], precision: str, bar: Any, layout: "Layout | None"
    ) -> "Tensor":
        """(len(texts), 1)."""
        import torch

        from prefopt.models.logprobs import autocast, completion_rewards

        assert layout is not None
        pairs = _as_pairs(texts)
        found = torch.empty(len(texts), 1)
        with torch.no_grad(), autocast(model.device, precision):
            for part in layout.micro_batches(pairs, micro_batch_tokens(model.device.type), None, ("chosen",)):
                rewards = completion_rewards(model, layout.collate(part, ("chosen",)).to(model.device))
                found[[int(p.id) for p in part], 0] = rewards.float().cpu()
                bar.advance(by=len(part))
        return found

    def _cache_folder(self, model: "PreTrainedModel", precision: str) -> Path:
        """Named by all that decides a score besides the tokens."""
        from prefopt.data import collate
        from prefopt.models import logprobs, packed_attention
        from prefopt.models.load import resolved_config, weights_digest

        versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
        decides = [type(self).__qualname__, weights_digest(model), resolved_config(model), precision, versions]
        key = fingerprint([*decides, model.device.type], type(self), logprobs, packed_attention, collate)
        return cache_dir() / "rewards" / key[:24]


@dataclass(frozen=True)
class CustomRewardModel(RewardModel):
    """A reward model whose forward pass is code that comes with it, and whose output has the reward of each row as
    `score` (ArmoRM). One response is computed at a time, so that no padding can matter."""

    ends_with: str = "template"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trust_remote_code:
            raise ValueError(
                f"trust_remote_code: {self.path} runs Python code that comes with the model. Read it, and if you trust "
                "it set scorer.trust_remote_code=true."
            )

    def _load(self, device: str) -> "PreTrainedModel":
        from prefopt.models.load import load_custom_reward_model

        return load_custom_reward_model(self._model, device)

    def _layout(self, model: "PreTrainedModel", texts: list[list[int]], precision: str) -> None:
        return None  # its forward pass is its own

    def _compute(
        self, model: "PreTrainedModel", texts: list[list[int]], precision: str, bar: Any, layout: "Layout | None"
    ) -> "Tensor":
        import torch

        from prefopt.models.logprobs import autocast

        found = torch.empty(len(texts), 1)
        with torch.no_grad(), autocast(model.device, precision):
            for i, tokens in enumerate(texts):
                row = torch.tensor([tokens], device=model.device)
                score = getattr(model(input_ids=row, attention_mask=torch.ones_like(row)), "score", None)
                if score is None or score.numel() != 1:
                    raise UserError(f"the output of {self.path} has no `score` of one number. It is no such model.")
                found[i, 0] = score.float().cpu().view(())
                bar.advance()
        return found


def _as_pairs(texts: list[list[int]]) -> "list[TokenizedPair]":
    """Without a rejected side; what counts as prompt is of no account."""
    from prefopt.data.tokenize import TokenizedPair

    return [TokenizedPair(str(i), tokens[:1], tokens[1:], []) for i, tokens in enumerate(texts)]
