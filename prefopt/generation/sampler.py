"""Sample from a policy with transformers' `generate`."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.items import Message
from prefopt.data.tokenize import encode_prompt
from prefopt.errors import UserError
from prefopt.models.generation_config import stop_tokens, without_own_generation_config
from prefopt.utils.console import Bar
from prefopt.utils.distributed import map_shared, world_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One response. `tokens` end with a stop token if `finished`; otherwise `max_new_tokens` cut the response off.
    `text` is without the stop token and other special tokens."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finished: bool


class _GumbelNoise(LogitsProcessor):
    """Turn greedy decoding into sampling: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T).

    Every row has its own random generator, so a response depends on its seed and not on the other rows of the batch;
    `generate` itself would draw all rows from one stream. With `top_p` below 1 the tokens outside of the nucleus are
    removed first. At temperature 0 decoding stays greedy.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int], device: torch.device, bar: Bar):
        self.temperature, self.bar = temperature, bar
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.advance()
        if not self.temperature:
            return scores
        scores = scores.float() / self.temperature
        if self.nucleus:
            scores = self.nucleus(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # for E from Exp(1), -log(E) has the Gumbel distribution


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    sampling: SamplingConfig,
    seed: int,
    samples_per_prompt: int = 1,
    show_progress: bool = False,
    shared: bool = False,
) -> list[list[Sample]]:
    """Sample `samples_per_prompt` responses to each prompt: one list per prompt, in the order of `prompts`.

    Tokens come from softmax(logits / temperature), without top-k, and with `top_p` below 1 from its nucleus. At
    temperature 0 the most likely token is taken. The model's own generation_config has no part in that; but a response
    ends at any of the model's `stop_tokens`. Each response has its own random stream, seeded by `seed`, the prompt's
    token ids and the number of the response. With `shared`, a collective, each process draws a part of the batches.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Prompts of similar length share a batch, which saves padding.
    jobs = [
        (p, k) for p in sorted(range(len(prompts)), key=lambda p: len(encoded[p])) for k in range(samples_per_prompt)
    ]
    batches = [jobs[i : i + sampling.batch_size] for i in range(0, len(jobs), sampling.batch_size)]
    padded = any(len({len(encoded[p]) for p, _ in batch}) > 1 for batch in batches)
    if padded and not reads_padding(model, encoded[jobs[0][0]]):
        log.info(f"  {model.config.model_type} computes padded prompts wrongly: a batch holds prompts of one length")
        batches = [
            group[i : i + sampling.batch_size]
            for _, same in itertools.groupby(jobs, lambda job: len(encoded[job[0]]))
            for group in [list(same)]
            for i in range(0, len(group), sampling.batch_size)
        ]
    stops = stop_tokens(tokenizer, model.config, model.generation_config)
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
    )

    def draw(batch: list[tuple[int, int]]) -> dict[tuple[int, int], Sample]:
        width = max(len(encoded[p]) for p, _ in batch)
        # generate() wants padding on the left. The value there does not matter, because the mask hides it.
        ids = torch.tensor([[stops[0]] * (width - len(encoded[p])) + encoded[p] for p, _ in batch])
        mask = torch.tensor([[0] * (width - len(encoded[p])) + [1] * len(encoded[p]) for p, _ in batch])
        seeds = [response_seed(seed, encoded[p], k) for p, k in batch]
        done = bar.done
        output = model.generate(  # type: ignore[operator]  # mypy takes the mixin for a submodule
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            synced_gpus=False,  # a process draws by itself, from weights that are gathered meanwhile
            logits_processor=LogitsProcessorList(
                [_GumbelNoise(sampling.temperature, sampling.top_p, seeds, model.device, bar)]
            ),
        )
        # A batch that ends early has fewer steps than the bar counts for it.
        bar.advance(by=done + sampling.max_new_tokens - bar.done)
        rows = zip(batch, output[:, width:].tolist(), strict=True)
        return {(p, k): as_sample(tokenizer, encoded[p], tokens, stops) for (p, k), tokens in rows}

    own = -(-len(batches) // world_size()) if shared else len(batches)
    # The bar counts token positions.
    with (
        Bar("sampling", own * sampling.max_new_tokens, show_progress) as bar,
        without_own_generation_config(model),
    ):
        drawn = map_shared(draw, batches, len) if shared else [draw(batch) for batch in batches]
    results = {job: found for of_batch in drawn for job, found in of_batch.items()}
    return [[results[p, k] for k in range(samples_per_prompt)] for p in range(len(prompts))]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    sampling: SamplingConfig,
    streamer: BaseStreamer,
) -> Sample:
    """One answer to a conversation, which `streamer` gets token by token. Drawn from torch's random stream.

    Raises UserError where the conversation fills what the model reads.
    """
    ids, stops = encode_prompt(tokenizer, messages), stop_tokens(tokenizer, model.config, model.generation_config)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = longest - len(ids) if longest else sampling.max_new_tokens
    if room <= 0:
        raise UserError(f"the conversation has {len(ids)} tokens, and the model reads {longest}: begin another one.")
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        eos_token_id=stops,
        pad_token_id=stops[0],
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    prompt = torch.tensor([ids], device=model.device)
    with without_own_generation_config(model):
        output = model.generate(  # type: ignore[operator]  # mypy takes the mixin for a submodule
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=streamer
        )
    return as_sample(tokenizer, ids, output[0, len(ids) :].tolist(), stops)


def as_sample(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int], stops: list[int]) -> Sample:
    """The response in `tokens`, which ends at the first stop token."""
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    text = str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return Sample(prompt, tokens if end is None else tokens[: end + 1], text, end is not None)


@torch.no_grad()
def reads_padding(model: PreTrainedModel, prompt: list[int]) -> bool:
    """Whether the model's next tokens behind `prompt` are the same with padding before it. Some recurrent models (RWKV,
    MiniMax) do not look at the mask, and take up the padding into their state."""
    found = []
    settings = GenerationConfig(
        max_new_tokens=4,  # in some it shows in the second one
        do_sample=False,
        pad_token_id=prompt[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    for padding in (0, 8):
        mask = torch.tensor([[0] * padding + [1] * len(prompt)], device=model.device)
        with without_own_generation_config(model):
            output = model.generate(  # type: ignore[operator]  # mypy takes the mixin for a submodule
                input_ids=torch.tensor([[prompt[0]] * padding + prompt], device=model.device),
                attention_mask=mask,
                generation_config=settings,
                synced_gpus=False,
            )
        found.append(torch.stack(output.logits).float())
    tolerance = 0.05 if torch.is_autocast_enabled(model.device.type) else 1e-3  # of the largest logit
    return found[1].shape == found[0].shape and bool(
        (found[1] - found[0]).abs().max() <= tolerance * found[0].abs().max()
    )


# A function (prompts, sampling, seed, samples_per_prompt) -> the samples of each prompt.
Sampler = Callable[[Sequence[list[Message]], SamplingConfig, int, int], list[list[Sample]]]


def transformers_sampler(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: str, precision: str
) -> tuple[Sampler, str, list[Any]]:
    """(`sample` with this model, the digest of its weights, and everything about it that decides a response)."""
    from prefopt.models.fingerprint import loaded_model
    from prefopt.models.frozen import freeze
    from prefopt.models.load import finalize, load_model, weights_digest
    from prefopt.models.logprobs import autocast
    from prefopt.utils.memory import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()
    model = load_model(config, "cpu")
    weights = weights_digest(model)
    model = finalize(freeze(model, precision), device)

    def sampler(prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int, n: int) -> list[list[Sample]]:
        with autocast(model.device, precision):
            return sample(model, tokenizer, prompts, sampling, seed, n)

    stops = stop_tokens(tokenizer, model.config, model.generation_config)
    return sampler, weights, [*loaded_model(model, weights), stops]


def response_seed(seed: int, prompt: list[int], k: int) -> int:
    """A seed below 2**56 for response `k` to the prompt with these token ids."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{k}".encode()).digest()[:7], "big")
