"""A tiny random Llama with a byte-level BPE tokenizer and a ChatML template, made on the fly."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers import forks

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"  # real data that the project may not ship: marker `shared`
TEXT = [
    "Write a two-sentence review of the electric kettle. It was good and bad and quick.",
    "In two sentences, say what you think of the old train. The ride was lovely, loud and long.",
    "user assistant system prompt chosen rejected great terrible soup bread river mountain",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# For configs of any architecture of transformers.
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large weights, so that a wrong mask, window or cap shows
}

VISION = {  # of a tower that the loss does not reach
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    # pad = eos, as SmolLM2-Instruct ships.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(vocab_size: int, seed: int = 0, **changes) -> LlamaForCausalLM:
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    } | changes
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config))


def save_tiny(folder: Path, seed: int = 0) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, n: int = 12, split: str | None = None, start: int = 0) -> Path:
    things = ["kettle", "train", "soup", "river", "bread", "mountain"]
    rows = [
        {
            "prompt": f"Review the {things[i % 6]} number {i}.",
            "chosen": f"The {things[i % 6]} was great" + ", really great" * (i % 3) + ".",
            "rejected": f"A terrible {things[i % 6]}" + ", loud" * (i % 4) + ".",
            "chosen_reward": 0.9,
            "rejected_reward": 0.2,
        }
        | ({"split": split} if split else {})
        for i in range(start, start + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_overrides(model: Path, data: Path, runs: Path) -> list[str]:
    return [
        "model=hub",
        f"model.path={model}",
        "dataset=jsonl",
        f"dataset.train={data / 'train.jsonl'}",
        f"dataset.heldout={data / 'heldout.jsonl'}",
        f"runs_dir={runs}",
        "logger=quiet",
        "precision=float32",
        "device=cpu",
        "steps=4",
        "batch_size=4",
        "micro_batch_tokens=100",
        "eval_every=2",
        "save_every=1",
        "optimizer.lr=1e-3",
        "sampling.prompts=0",  # `SAMPLED` draws samples: they cost as much as the steps
    ]


# Samples to all held-out prompts, with rewards; behind `tiny_overrides`.
SAMPLED = [
    "dataset.oracle={_target_: prefopt.rewards.scorers.Vader}", "sampling.prompts=null", "sampling.max_new_tokens=6"
]  # fmt: skip


def command(*args: str, program: str = "train") -> list[str]:
    return [sys.executable, "-m", f"prefopt.{program}", *args]


# One thread: the tiny model has no work for two, and threads that wait for each other slow everything down.
# Without the width of a terminal, which pytest-xdist sets.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_program(
    *args: str, program: str = "train", cwd: Path = ROOT, env: dict[str, str] | None = None, curves: bool = False
):
    """Of a process that is not forked where it has variables that libraries read when they are imported, or runs in
    another checkout."""
    elsewhere = cwd != ROOT and (cwd / "prefopt").is_dir()
    if elsewhere or not all(key.startswith("PREFOPT_") for key in env or {}):
        environment = ENVIRONMENT | (env or {})
        return subprocess.run(command(*args, program=program), cwd=cwd, env=environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder, "stdout"), Path(folder, "stderr")
        code, said = forks.run(log, *args, program=program, cwd=cwd, env=env, errors=errors, curves=curves)
        return subprocess.CompletedProcess([program, *args], code, said, errors.read_text())


def records(runs: Path) -> list[dict]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        found = [json.loads(file.read_text()) for file in sorted(runs.glob("*/record.json"))]
    return found
