"""What `generate` reads beside its arguments: the tokens that end a response, and the model's own generation_config."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, generation_config: GenerationConfig | None
) -> list[int]:
    """The ids of the tokens that end a response, each once: first the tokenizer's eos token, which training puts at the
    end of a completion; then those that the model's two configurations name, at which `generate` and vLLM stop."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *named_stops(config, generation_config)]))


def named_stops(config: PreTrainedConfig | None, generation_config: GenerationConfig | None) -> list[int]:
    """The ids that a model's configurations name as the end of a generation, each once. None: it has no such file."""
    named: list[Any] = []
    for source in (config, config and config.get_text_config(), generation_config):
        ids: Any = getattr(source, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    return list(dict.fromkeys(int(token) for token in named if token is not None))


@contextlib.contextmanager
def without_own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model has no generation settings of its own.

    `generate` takes every setting that its caller leaves open from `model.generation_config`: a repetition penalty, a
    list of suppressed tokens, a length. Such settings come with many models, and tokens would not be drawn from the
    model's own distribution. Afterwards the model has them again, for its export.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
