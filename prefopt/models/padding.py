"""What transformers' own reward models need to score several conversations at a time."""

import copy
import json
import logging
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.utils.files import write_plain_json

log = logging.getLogger(__name__)


def pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> int | None:
    """The id of a special token that can stand for padding, below `rows`; None where there is none.

    It is not the terminator: transformers reads a score at the last token that is not padding, and that is where
    training has read it. Only tokens that are special already: making one special changes how texts are split.
    """
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [i for i, text in special.items() if "pad" in text.lower()]
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *named, tokenizer.bos_token_id, *special]
    return next((i for i in candidates if i is not None and i != tokenizer.eos_token_id and i < rows), None)


def save_reward_tokenizer(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer of a reward model into `folder`, and the token it pads with into config.json there.

    It pads on the right, where positions need no correction."""
    rows = cast(torch.nn.Embedding, policy.get_input_embeddings()).num_embeddings
    pad = pad_token(tokenizer, rows)
    if pad is None:
        log.warning("  the tokenizer has no token for padding: transformers scores the export's texts one at a time")
        tokenizer.save_pretrained(folder)
        return
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = tokenizer.convert_ids_to_tokens(pad)
    padding.padding_side = "right"
    padding.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for part in (values, values.get("text_config")):
        if part is not None:
            part["pad_token_id"] = pad
    write_plain_json(file, values)
