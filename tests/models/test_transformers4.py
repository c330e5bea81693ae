"""Exports are read alike by transformers 5 and by transformers 4."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    StableLmConfig,
)

from prefopt.models.transformers4 import parts_with_rope, write_for_transformers4
from prefopt.training.checkpoint import export
from tests.helpers.tiny import SMALL, VISION, tiny_tokenizer

SIZES = SMALL | {"vocab_size": 320, "initializer_range": 0.2, "max_position_embeddings": 512}
HEADS = {"head_dim": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30_000.0},
}
OF_OLMO = {  # version 4 knows one base for both
    "full_attention": YARN | {"rope_theta": 500_000.0, "attention_factor": 1.2},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters={"rope_theta": 100_000.0, "rope_type": "default"}),
    "llama3": lambda: LlamaConfig(
        **SIZES, rope_parameters=LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 64}
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_parameters=YARN | {"rope_theta": 1_000_000.0}),
    "stablelm": lambda: StableLmConfig(
        **SIZES, rope_parameters={"rope_theta": 50_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        rope_parameters={"rope_theta": 50_000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **HEADS, layer_types=list(BY_LAYER), rope_parameters=BY_LAYER),
    "gemma3-vision": lambda: Gemma3Config(
        text_config=SIZES | HEADS | {"layer_types": list(BY_LAYER), "rope_parameters": BY_LAYER},
        vision_config=VISION,
        mm_tokens_per_image=1,
    ),
    "olmo3": lambda: Olmo3Config(**SIZES, layer_types=list(OF_OLMO), rope_parameters=OF_OLMO),
    "phi3": lambda: Phi3Config(
        **SIZES, pad_token_id=0, original_max_position_embeddings=256, rope_parameters=LONG | {"rope_theta": 20_000.0}
    ),
}
IDS = torch.arange(3, 200)[None]

# Runs in an environment with transformers 4.
READ_BY_4 = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model(torch.arange(3, 200)[None]).logits
        row = logits.log_softmax(-1)[0, :-1].gather(1, torch.arange(4, 200)[:, None])[:, 0].tolist()
        text = [{"role": "user", "content": "Hello <extra> there"}]
        found[folder] = [row, tokenizer.apply_chat_template(text, tokenize=False), tokenizer("Hello <extra>").input_ids]
    except Exception as error:
        found[folder] = repr(error)
print("FOUND" + json.dumps(found))
"""


def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})  # one that it has
    return tokenizer


def logprobs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None])[:, 0]


def model_of(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_version_5_reads_the_same_model_where_both_spellings_stand(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "alone")
    tokenizer().save_pretrained(tmp_path / "alone")
    expected = AutoConfig.from_pretrained(tmp_path / "alone").to_dict()
    export(model, tokenizer(), tmp_path / "both")

    read = AutoConfig.from_pretrained(tmp_path / "both").to_dict()
    for part in [read, expected, *parts_with_rope(read), *parts_with_rope(expected)]:
        for key in ("_name_or_path", "eos_token_id", "partial_rotary_factor"):  # an export names its terminator
            part.pop(key, None)
        part.get("rope_parameters", {}).pop("type", None)  # phi3's type, by two names
    assert read == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logprobs(loaded), logprobs(model))
    again = AutoTokenizer.from_pretrained(tmp_path / "both")
    text = "Hello <|im_start|> there"
    assert again(text).input_ids == tokenizer()(text).input_ids
    assert again.extra_special_tokens == ["<|im_start|>"]
    assert type(again) is type(AutoTokenizer.from_pretrained(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "llama": {"rope_theta": 100_000.0, "rope_scaling": None},
        "llama3": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        "stablelm": {"rope_theta": 50_000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        "gpt-neox": {"rotary_emb_base": 50_000.0, "rotary_pct": 0.5, "rope_scaling": None},
        "gemma3": {
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 30_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "phi3": {"rope_theta": 20_000.0, "rope_scaling": {"type": "longrope"} | dict(list(LONG.items())[1:])},
    }.items(),
)
def test_the_configuration_has_the_names_of_version_4(name, expected, tmp_path):
    export(model_of(name), tokenizer(), tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: values[key] for key in expected} == expected
    assert "rope_parameters" in values
    words = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in words


def test_names_that_version_5_would_read_as_another_model_are_left_out(tmp_path, monkeypatch, caplog):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    monkeypatch.setattr("prefopt.models.transformers4.rope", lambda part: {"rope_scaling": LLAMA3})
    write_for_transformers4(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert "Do not use it with transformers 4" in caplog.text


@pytest.fixture(scope="session")
def version_4(tmp_path_factory) -> dict[str, str]:
    """The environment of a process with transformers 4.57 beside this torch. PREFOPT_TRANSFORMERS4 names a folder that
    has it; else pip fetches it."""
    folder = os.environ.get("PREFOPT_TRANSFORMERS4")
    if not folder:
        folder = str(tmp_path_factory.mktemp("transformers4"))
        packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
        words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *packages]
        subprocess.run(words, check=True)
    return os.environ | {"PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_version_4_computes_the_same_log_probs(version_4, tmp_path):
    folders = {name: str(tmp_path / name) for name in CONFIGS}
    for name, folder in folders.items():
        export(model_of(name), tokenizer(), Path(folder))
    words = [sys.executable, "-c", READ_BY_4, *folders.values()]
    ended = subprocess.run(words, env=version_4, capture_output=True, text=True, cwd=tmp_path)
    assert "FOUND" in ended.stdout, ended.stderr
    found = json.loads(ended.stdout.partition("FOUND")[2])
    failed = {name: found[folder] for name, folder in folders.items() if isinstance(found[folder], str)}
    assert not failed
    text = tokenizer().apply_chat_template([{"role": "user", "content": "Hello <extra> there"}], tokenize=False)
    for name, folder in folders.items():
        row, template, ids = found[folder]
        apart = (torch.tensor(row) - logprobs(model_of(name))).abs().max()
        assert apart < 1e-3, f"{name}: {apart}"
        assert (template, ids) == (text, tokenizer()("Hello <extra>").input_ids)
