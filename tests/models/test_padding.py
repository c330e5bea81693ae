"""The token with which a reward model's export pads."""

import pytest

from prefopt.models.padding import pad_token
from tests.helpers.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 320, "<|endoftext|>"),  # its pad token is the terminator
        ({"pad_token": "<|im_start|>"}, 320, "<|im_start|>"),
        ({"unk_token": "<|im_start|>"}, 320, "<|im_start|>"),
        ({"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}, 320, "<|im_end|>"),
        ({}, 0, None),  # none that the model has an embedding for
    ],
)
def test_padding_is_no_terminator_and_has_an_embedding(changes, rows, expected):
    tokenizer = tiny_tokenizer()
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    found = pad_token(tokenizer, rows)
    assert (found if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_a_token_that_is_named_for_padding_comes_before_others():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|finetune_right_pad_id|>"]})
    assert pad_token(tokenizer, len(tokenizer)) == len(tokenizer) - 1
    assert pad_token(tokenizer, len(tokenizer) - 1) == 0
