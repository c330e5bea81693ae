"""Scorers that read token ids with a model: reward models, and the log-likelihood of a language model."""

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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

    from prefopt.data.collate import Batch, Layout
    from prefopt.data.tokenize import TokenizedPair

log = logging.getLogger(__name__)


class ModelScorer(RewardScorer):
    """A scorer that computes one number of the token ids of prompt and response. Numbers are kept in the user's cache,
    by the digests of the weights and of the tokens."""

    @property
    @abstractmethod
    def model(self) -> ModelConfig: ...

    @property
    def label(self) -> str:
        return f"{self.model.place}@{self.model.revision}" if self.model.revision else self.model.place

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        return self.compute(self.encode(requests)[0], device, precision, show)

    def encode(
        self, requests: Sequence[Request], max_length: int | None = None
    ) -> "tuple[list[TokenizedPair], list[bool]]":
        """(texts, cut): prompt and response of each request as the chosen side of a pair without rejected one, and
        whether it has lost its beginning (all but a BOS), because it had more than `max_length` tokens, or more than
        the model reads. Raises UserError for a text that the model cannot read, where `max_length` is None."""
        from prefopt.models.load import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        texts = [self._encode(tokenizer, request) for request in requests]
        limit = self.max_tokens() or math.inf
        lengths = [len(text.prompt) + len(text.chosen) for text in texts]
        for request, length in zip(requests, lengths, strict=True):
            if max_length is None and length > limit:
                raise UserError(
                    f"{request.where}: response {request.key} and its prompt have {length} tokens, and the reward "
                    f"model {self.model.path} reads {limit}. Leave the row out, or take another reward model."
                )
        longest = min(limit, max_length or math.inf)
        cut = [length > longest for length in lengths]
        kept = [keep_end(t, int(longest), tokenizer.bos_token_id) if c else t for t, c in zip(texts, cut, strict=True)]
        return kept, cut

    def max_tokens(self) -> int | None:
        """The most tokens that the model reads; None where its configuration has no limit."""
        from prefopt.models.load import check_model

        return check_model(self.model)

    def compute(self, texts: "Sequence[TokenizedPair]", device: str, precision: str, show: bool = True) -> list[float]:
        """The number of each text that `encode` has made. Equal texts are computed once. A collective."""
        from prefopt.models.frozen import freeze
        from prefopt.models.load import finalize
        from prefopt.utils.console import Bar

        keys = [tensor_store.hash_tokens(text.prompt, text.chosen) for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        model = finalize(freeze(self._load(), precision), device)
        self._check_ids(model, texts)
        layout = self._layout(model, texts, precision)
        cache = tensor_store.TensorCache(self._cache_folder(model, precision, sorted(by_key)), 1)
        with cache.locked("rewards"):
            # From long to short, so that the texts of a micro-batch have similar lengths.
            length = {key: len(text.prompt) + len(text.chosen) for key, text in by_key.items()}
            missing = sorted((k for k in by_key if k not in cache), key=length.__getitem__, reverse=True)
            with Bar("rewards", len(missing), show and bool(missing)) as bar:
                for start in range(0, len(missing), tensor_store.SHARD_ROWS):
                    shard = missing[start : start + tensor_store.SHARD_ROWS]
                    cache.add(shard, self._compute(model, [by_key[k] for k in shard], precision, bar, layout))
                    bar.advance(by=start + len(shard) - bar.done)  # what the other processes have computed
        log.info(f"  rewards: {len(by_key) - len(missing)} of {len(by_key)} from the cache, {len(missing)} computed")
        return cache.get(keys)[:, 0].tolist()

    def _check_ids(self, model: "PreTrainedModel", texts: "Sequence[TokenizedPair]") -> None:
        from torch import nn

        rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        largest = max(max(text.prompt + text.chosen) for text in texts)
        if largest >= rows:
            raise UserError(
                f"{self.label} has {rows} embeddings, and the tokenizer gives the id {largest}: the two do not belong "
                "together."
            )

    @abstractmethod
    def _load(self) -> "PreTrainedModel": ...

    @abstractmethod
    def _encode(self, tokenizer: "PreTrainedTokenizerBase", request: Request) -> "TokenizedPair":
        """The token ids of prompt and response."""

    @abstractmethod
    def _numbers(self, model: "PreTrainedModel", batch: "Batch") -> "Tensor":
        """The numbers of the batch's completions, `(C,)`."""

    def _layout(self, model: "PreTrainedModel", texts: "Sequence[TokenizedPair]", precision: str) -> "Layout | None":
        """The fastest layout that gives the same numbers as one text at a time; None where `_compute` needs none."""
        from prefopt.models.layout_check import choose_layout

        return choose_layout("packed", model, texts, precision)

    def _compute(
        self,
        model: "PreTrainedModel",
        texts: "Sequence[TokenizedPair]",
        precision: str,
        bar: Any,
        layout: "Layout | None",
    ) -> "Tensor":
        """The numbers of the texts: `(len(texts), 1)`, float32, on the CPU. A collective."""
        import torch

        from prefopt.data.collate import groups_of
        from prefopt.models.logprobs import autocast

        assert layout is not None

        def numbers_of(micro_batch: "list[TokenizedPair]") -> "Tensor":
            numbers = self._numbers(model, layout.collate(micro_batch, ("chosen",)).to(model.device)).float().cpu()
            bar.advance(by=len(micro_batch))
            return numbers

        numbered = [replace(text, id=str(i)) for i, text in enumerate(texts)]
        parts = layout.micro_batches(numbered, micro_batch_tokens(model.device.type), None, ("chosen",))
        with torch.no_grad(), autocast(model.device, precision):
            found = map_shared(numbers_of, parts, lambda part: layout.tokens(groups_of(part, ("chosen",))))
        numbers = torch.empty(len(texts), 1)
        # Micro-batches may reorder the pairs. The id of a pair is its row.
        numbers[[int(p.id) for part in parts for p in part], 0] = torch.cat(found)
        return numbers

    def _cache_folder(self, model: "PreTrainedModel", precision: str, keys: list[bytes]) -> Path:
        """The cache's folder. Its name is a digest of everything that decides a number, the other texts of the call too
        (`keys`): on some processors the last bits of a text's number depend on what shares its micro-batch, and a job
        must not depend on what another one has left in the cache."""
        from prefopt.data import collate
        from prefopt.models import chunked_logprobs, logprobs, packed_attention
        from prefopt.models.fingerprint import loaded_model

        texts = tensor_store.hash_tokens(b"".join(keys)).hex()
        decides = [type(self).__qualname__, *loaded_model(model), precision, texts]
        key = fingerprint(decides, type(self), logprobs, chunked_logprobs, packed_attention, collate)
        return cache_dir() / "rewards" / key[:24]


def keep_end(text: "TokenizedPair", length: int, bos: int | None) -> "TokenizedPair":
    """The last `length` tokens of a text; a BOS (the id `bos`) that opens it stays. At least one token is its prompt's:
    of a completion that is longer, the beginning becomes the prompt of the rest."""
    ids = text.prompt + text.chosen
    opening = ids[:1] if ids[0] == bos else []
    ids = opening + ids[len(ids) - length + len(opening) :]
    boundary = max(1, len(ids) - len(text.chosen))
    return replace(text, prompt=ids[:boundary], chosen=ids[boundary:])


@dataclass(frozen=True)
class RewardModel(ModelScorer):
    """A reward model whose head has one output, read at the last token of the conversation.

    The conversation is written with the tokenizer and the chat template of the reward model. `ends_with` chooses its
    last token: "terminator", the end of the response, as in the reward models that prefopt trains; or "template", the
    last token of the chat template, as in most reward models on the hub.
    """

    path: str
    ends_with: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.ends_with not in ("terminator", "template"):
            raise ValueError(f"ends_with must be terminator or template, is {self.ends_with!r}")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(self.path, self.path, self.revision)

    def _load(self) -> "PreTrainedModel":
        from prefopt.models.load import load_trained_reward_model

        return load_trained_reward_model(self.model, "cpu")

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", request: Request) -> "TokenizedPair":
        from prefopt.data.rendering import encode, render
        from prefopt.data.tokenize import TokenizedPair, encode_completion

        if self.ends_with == "terminator":
            prompt, response = encode_completion(tokenizer, request.prompt, request.response, request.finished)
            ids = prompt + response
        else:
            conversation = [*request.prompt, {"role": "assistant", "content": request.response}]
            (ids,) = encode(tokenizer, [render(tokenizer, conversation, False)])
        # Where the prompt ends does not matter: the reward is read at the last token.
        return TokenizedPair("", ids[:1], ids[1:], [])

    def _numbers(self, model: "PreTrainedModel", batch: "Batch") -> "Tensor":
        from prefopt.models.logprobs import completion_rewards

        return completion_rewards(model, batch)


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

    def max_tokens(self) -> int | None:
        from prefopt.models.load import check_model

        return check_model(self.model, trust_remote_code=True)

    def _load(self) -> "PreTrainedModel":
        from prefopt.models.load import load_custom_reward_model

        return load_custom_reward_model(self.model, "cpu")

    def _layout(self, model: "PreTrainedModel", texts: "Sequence[TokenizedPair]", precision: str) -> None:
        return None

    def _compute(
        self,
        model: "PreTrainedModel",
        texts: "Sequence[TokenizedPair]",
        precision: str,
        bar: Any,
        layout: "Layout | None",
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

        ids = [text.prompt + text.chosen for text in texts]
        with torch.no_grad(), autocast(model.device, precision):
            return torch.tensor(map_shared(reward_of, ids, len)).view(-1, 1)


@dataclass(frozen=True)
class LogLikelihood(ModelScorer):
    """log pi(response | prompt) in nats under a language model: the sum over the response's tokens and its
    terminator."""

    config: ModelConfig

    @property
    def model(self) -> ModelConfig:
        return self.config

    def _load(self) -> "PreTrainedModel":
        from prefopt.models.load import load_model

        return load_model(self.config, "cpu")

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", request: Request) -> "TokenizedPair":
        from prefopt.data.tokenize import TokenizedPair, encode_completion

        return TokenizedPair(
            "", *encode_completion(tokenizer, request.prompt, request.response, request.finished), rejected=[]
        )

    def _numbers(self, model: "PreTrainedModel", batch: "Batch") -> "Tensor":
        from prefopt.models.logprobs import completion_logps

        return completion_logps(model, batch).sums
