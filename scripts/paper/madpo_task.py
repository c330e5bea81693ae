"""The task of MADPO's experiment (arXiv 2510.05342): to continue film reviews, judged by a classifier of sentiment.

    python scripts/paper/madpo_task.py FOLDER     # writes FOLDER/sft.jsonl.gz and FOLDER/negatives.jsonl.gz

A prompt is the first 20 tokens of a training review of IMDB. In the data set's own order the rows that the authors take
for preferences, the first 12,000, are negative reviews, and those for fine-tuning, 18,000 to 25,000, positive ones.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from prefopt.data.fields import Row
from prefopt.data.sources import read_rows, write_rows

MODEL = "google/gemma-3-270m"
REVIEWS = "stanfordnlp/imdb"
ORACLE = "cardiffnlp/twitter-roberta-base-sentiment-latest"
PROMPT, RESPONSE = 20, 176  # tokens
TRAIN, HELDOUT = 10_000, 2_000  # rows of preferences
SFT = range(18_000, 25_000)


def main(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [row["text"] for _, row in read_rows(REVIEWS, "train")]
    write_rows(folder / "sft.jsonl.gz", [sft_row(tokenizer, rows[i]) for i in SFT])
    write_rows(folder / "negatives.jsonl.gz", [preference_row(tokenizer, i, rows[i]) for i in range(TRAIN + HELDOUT)])


def sft_row(tokenizer: Any, review: str) -> Row:
    prompt, completion = cut(tokenizer, review)
    return {"prompt": prompt, "completion": completion}


def preference_row(tokenizer: Any, i: int, review: str) -> Row:
    prompt, response = cut(tokenizer, review)
    return {"split": "train" if i < TRAIN else "heldout", "prompt": prompt, "responses": [response]}


def cut(tokenizer: Any, review: str) -> tuple[str, str]:
    """A review's first tokens, and the next ones."""
    ids = tokenizer(review, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[:PROMPT]), tokenizer.decode(ids[PROMPT : PROMPT + RESPONSE])


def positive(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    """The oracle (`scorer=function`): p of "positive" of a review that ends with the response. The authors' reward is
    6 (p - 1/2), so that `label_scale` is 6. Whether they show it the prompt too is not known to us."""
    texts = [prompt[-1]["content"] + response for prompt, response in zip(prompts, responses, strict=True)]
    found = classifier()(texts, batch_size=64, truncation=True, top_k=None)
    return [next(label["score"] for label in labels if label["label"] == "positive") for labels in found]


@functools.cache
def classifier() -> Any:
    from transformers import pipeline

    return pipeline("text-classification", model=ORACLE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
