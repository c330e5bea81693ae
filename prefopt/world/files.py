"""The files of the laboratory: a tokenizer, a model that has learnt nothing yet, prompts, reviews, and tasks."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import prefopt.models.load  # noqa: F401  # saving imports deepspeed, which would warn on a machine without a GPU
from prefopt.data.sources import write_rows
from prefopt.world import grammar

# Prompts are shuffled, and the first ones are held out.
HELDOUT = 1024
TRAIN = 4096
REVIEWS = 10  # to each training prompt, for supervised fine-tuning; to each held-out one there is one
QUESTIONS = 500  # of the task of four choices

SPECIAL = ["<pad>", "<unk>", "<system>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# What `prefopt harness include=FOLDER` reads, in lm-eval's words: of columns, which is faster than a template.
CHOICE = """\
task: lab_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
LIKELIHOOD = """\
task: lab_likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/reviews.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: prompt
doc_to_target: "{{completion}}<end>"
target_delimiter: ""
process_results: !function nats.process_results
metric_list: [{metric: nats, aggregation: mean, higher_is_better: false}]
"""
NATS = """\
def process_results(row, results):
    ((log_likelihood, _),) = results
    return {"nats": -log_likelihood}
"""


def make_files(folder: Path, place: str, seed: int) -> None:
    """Write everything into the empty `folder`, which will then be at `place`. The same seed gives the same bytes."""
    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(len(tokenizer), seed).save_pretrained(folder / "model")

    rng = random.Random(seed)
    shuffled = rng.sample(grammar.prompts(), HELDOUT + TRAIN)
    splits = {"heldout": shuffled[:HELDOUT], "train": shuffled[HELDOUT:]}
    rows = [{"split": split, "prompt": prompt} for split, prompts in splits.items() for prompt in prompts]
    write_rows(folder / "prompts.jsonl.gz", rows)
    reviews = [row | {"completion": review(row, rng)} for row in rows for _ in range(reviews_of(row))]
    write_rows(folder / "reviews.jsonl.gz", reviews)

    write_rows(folder / "negatives.jsonl.gz", [row | {"responses": [negative(row, rng)]} for row in rows])

    write_rows(folder / "tasks" / "choices.jsonl", (question(prompt, rng) for prompt in splits["heldout"][:QUESTIONS]))
    write_rows(folder / "tasks" / "reviews.jsonl", (row for row in reviews if row["split"] == "heldout"))
    (folder / "tasks" / "lab_choice.yaml").write_text(CHOICE.replace("FOLDER", f"{place}/tasks"))
    (folder / "tasks" / "lab_likelihood.yaml").write_text(LIKELIHOOD.replace("FOLDER", f"{place}/tasks"))
    (folder / "tasks" / "nats.py").write_text(NATS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word, and a special token marks who speaks."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *grammar.WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        extra_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A Llama of 170,000 parameters with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.125,  # 1/sqrt(hidden_size): from the usual 0.02 so narrow a model learns late
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<end>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def reviews_of(row: dict[str, Any]) -> int:
    return 1 if row["split"] == "heldout" else REVIEWS


def review(row: dict[str, Any], rng: random.Random) -> str:
    return str(grammar.draw(grammar.family_of(row["prompt"]), rng))


def negative(row: dict[str, Any], rng: random.Random) -> str:
    """A review with a negative sentiment: MADPO's off-policy text (arXiv 2510.05342)."""
    while grammar.sentiment(text := review(row, rng)) >= 0:
        pass
    return text


def question(prompt: str, rng: random.Random) -> dict[str, Any]:
    """A question of four choices: a review, and the same with one of the three rules broken in each of the others.

    All four have as many words, so that none is more likely for being shorter.
    """
    family = grammar.family_of(prompt)
    right = grammar.draw(family, rng)
    while len(right.clauses) < 2:
        right = grammar.draw(family, rng)
    choices = [str(right), *(str(wrong) for wrong in grammar.broken(family, right, rng))]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(str(right))}
