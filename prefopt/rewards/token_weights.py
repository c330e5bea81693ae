"""Weights for the tokens of pairs, from two contrastive models (Liu et al. 2024, TIS-DPO, arXiv 2410.04350).

Of a token of the chosen completion w = exp(mu clamp(d, L, U)), d = log pi+ - log pi-, where pi+ is a model that was
trained towards the chosen completions and pi- one that was trained towards the rejected ones. Of the rejected
completion -mu takes the place of mu. The paper's constant factor k on all weights is the objective's beta over again.

The direction of d on either side is that of the authors' code. It has other functions of d than the exponential, which
is the paper's as far as is known: the paper was not at hand, and so the defaults of mu, L and U could not be checked.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.config.hardware import check_hardware, micro_batch_tokens, resolve_hardware
from prefopt.config.schema import DatasetConfig, ModelConfig, PoliciesConfig
from prefopt.data.items import Pair, Row
from prefopt.data.sources import read_rows, write_rows
from prefopt.errors import UserError
from prefopt.objectives import SIDES
from prefopt.rewards.config import TokenWeightsConfig
from prefopt.tracking.process import output_lock
from prefopt.utils.distributed import is_main_process, map_shared, process_group
from prefopt.utils.files import check_output

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.tokenize import TokenizedPair

log = logging.getLogger(__name__)

# A row that training may leave out gets no weights; what training may keep gets some.
POLICIES = PoliciesConfig(rewritten_by_template="drop", template_in_text="keep")
NO_LIMIT = 2**31


def check_token_weights(config: TokenWeightsConfig) -> Path:
    """The output. Raises UserError for what cannot be."""
    check_hardware(config)
    if config.scale <= 0:
        raise UserError(f"scale must be positive, is {config.scale:g}")
    if config.low > config.high:
        raise UserError(f"low must not be above high, is {config.low:g} of {config.high:g}")
    return check_output(config.output, config.input)


def write_token_weights(config: TokenWeightsConfig) -> None:
    """Write the rows of the input with `chosen_token_weights` and `rejected_token_weights`. Raises UserError for rows
    that are no pairs, and for models that do not fit each other."""
    output = check_token_weights(config)
    resolve_hardware(config)
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the models have computed
    with process_group(config.device), output_lock(output):
        rows, weighted = weighted_rows(config)
        if is_main_process():
            write_rows(output, rows)
    log.info(f"wrote {len(rows)} rows to {output}, {weighted} of them with weights for their tokens")


def weighted_rows(config: TokenWeightsConfig, show: bool = True) -> tuple[list[Row], int]:
    """(the rows, those of them that could be tokenized with weights; how many these are). A collective."""
    models = [ModelConfig(path, path) for path in (config.positive, config.negative)]
    tokenizer = common_tokenizer(models)
    rows = list(read_rows(config.input, config.split))
    pairs = tokenized_pairs(config, rows, tokenizer)
    check_lengths(models, rows, pairs)
    positive, negative = (token_logps(model, tokenizer, pairs, config, show) for model in models)

    found = [row for _, row in rows]
    for pair, good, bad in zip(pairs, positive, negative, strict=True):
        i, weights = int(pair.id), {}
        for side, scale, a, b in zip(SIDES, (config.scale, -config.scale), good, bad, strict=True):
            values = (scale * (a - b).clamp(config.low, config.high)).exp()
            weights[f"{side}_token_weights"] = [round(value, 6) for value in values.tolist()]
        found[i] = found[i] | weights
    return found, len(pairs)


def common_tokenizer(models: Sequence[ModelConfig]) -> "PreTrainedTokenizerBase":
    """The tokenizer of the first model. Raises UserError unless the other ones write and tokenize in the same way."""
    from prefopt.data.cache import tokenizer_digest
    from prefopt.models.load import load_tokenizer

    tokenizers = [load_tokenizer(model) for model in models]
    if len(set(map(tokenizer_digest, tokenizers))) > 1:
        places = " and ".join(model.place for model in models)
        raise UserError(
            f"{places} have different tokenizers or chat templates, and weights of tokens are those of one: give two "
            "models that were trained from the policy."
        )
    return tokenizers[0]


def tokenized_pairs(
    config: TokenWeightsConfig, rows: Sequence[tuple[str, Row]], tokenizer: "PreTrainedTokenizerBase"
) -> "list[TokenizedPair]":
    """The pairs of the rows as training tokenizes them, whole. The id of a pair is its row's index. Raises UserError
    for rows of another kind."""
    from prefopt.data.layouts import find_layout
    from prefopt.data.read_row import read_row
    from prefopt.data.tokenize import tokenize

    layout = find_layout(config.input, config.split, {}, "python -m prefopt.train").layout
    read = layout.format(**layout.options)
    if "chosen_token_weights" not in (read.fields() or ()):
        raise UserError(
            f"{config.input} is read as {type(read).__name__}, and weights of tokens belong to rows of one pair each: "
            "{prompt, chosen, rejected}."
        )
    source = DatasetConfig("input", config.input, columns=layout.columns)
    items = []
    for i, (where, row) in enumerate(rows):
        # Weights that are there already are replaced.
        item = read_row(read, {key: value for key, value in row.items() if "_token_weights" not in key}, source, where)
        if isinstance(item, Pair):
            items.append(replace(item, id=str(i), where=where))
    pairs = tokenize(tokenizer, items, NO_LIMIT, NO_LIMIT, POLICIES).pairs
    if not pairs:
        raise UserError(f"{config.input} has no pair whose tokens could get weights.")
    return pairs


def check_lengths(
    models: Sequence[ModelConfig], rows: Sequence[tuple[str, Row]], pairs: "Sequence[TokenizedPair]"
) -> None:
    """Raise UserError for a pair with more tokens than a model reads."""
    from prefopt.models.load import check_model

    limits = [limit for model in models if (limit := check_model(model)) is not None]
    for pair in pairs:
        length = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if limits and length > min(limits):
            raise UserError(
                f"{rows[int(pair.id)][0]} has {length} tokens, and the models read {min(limits)}: leave the row out."
            )


def token_logps(
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: "Sequence[TokenizedPair]",
    hardware: TokenWeightsConfig,
    show: bool,
) -> "list[tuple[Tensor, Tensor]]":
    """Of each pair the log-probs of the chosen and of the rejected completion's tokens, on the CPU. A collective."""
    import torch

    from prefopt.data.collate import groups_of
    from prefopt.models.frozen import freeze
    from prefopt.models.layout_check import choose_layout
    from prefopt.models.load import check_vocabulary, finalize, load_model
    from prefopt.models.logprobs import LogprobComputer
    from prefopt.utils.console import Bar

    model = finalize(freeze(load_model(config, "cpu"), hardware.precision), hardware.device)
    check_vocabulary(model, tokenizer)
    layout = choose_layout("packed", model, pairs, hardware.precision)
    score = LogprobComputer(hardware.precision)
    parts = layout.micro_batches(pairs, micro_batch_tokens(model.device.type), None, SIDES)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Bar(config.place, len(pairs), show) as bar, torch.no_grad():

        def compute(part: "list[TokenizedPair]") -> "Tensor":
            tokens = score(model, layout.collate(part).to(model.device)).tokens
            assert tokens is not None
            bar.advance(by=len(part))
            return tokens.cpu()

        for part, tokens in zip(
            parts, map_shared(compute, parts, lambda part: layout.tokens(groups_of(part, SIDES))), strict=True
        ):
            for pair, chosen, rejected in zip(part, *tokens.chunk(2), strict=True):
                found[pair.id] = chosen[: len(pair.chosen)], rejected[: len(pair.rejected)]
    return [found[pair.id] for pair in pairs]
