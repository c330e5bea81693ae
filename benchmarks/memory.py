"""Compare what a dry run says of a step's memory with what the step takes: SmolLM2-135M on this machine's CPU.

    python -m benchmarks.memory

Writes results/bench/memory.json and memory.md. Each measurement is a process that trains two steps of two micro-batches
of random tokens; the peak is that of the second step, when the moments are there, without what the process held before
the model was loaded.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from benchmarks.step import PROFILES, Spec, make_pairs, resolved
from prefopt.tracking.provenance import git, machine
from prefopt.utils.console import echo
from prefopt.utils.files import atomic_write, write_json

OUTPUT = Path("results/bench")
# (name, profile, overrides); a micro-batch has two pairs.
CASES = [
    ("full, packed", "chat", []),
    ("full, padded", "chat", ["layout=padded"]),
    ("full, packed, long prompts", "long_prompts", []),
    ("LoRA, packed", "chat", ["peft=lora_attention", "reference=adapter_off"]),
]
PAIRS = 4


def status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, the memory of this process, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(profile: str, overrides: list[str]) -> dict[str, int]:
    """The bytes that a step takes, and what its trace says."""
    from prefopt.config.parse import build
    from prefopt.models.load import load_tokenizer, read_config
    from prefopt.models.logprobs import LogprobComputer, autocast_weight_cache
    from prefopt.models.lora import train_mode
    from prefopt.models.packed_attention import enable_packed_attention
    from prefopt.models.reference import AdapterOff
    from prefopt.objectives.base import Objective
    from prefopt.training.build import build_engine, build_policy
    from prefopt.training.memory import Cached, TracedStep
    from prefopt.training.step import accumulate_gradients
    from prefopt.utils.memory import keep_freed_memory

    with tempfile.TemporaryDirectory() as folder:
        config = resolved(Spec("memory", folder, "none.jsonl", PAIRS, overrides=["device=cpu", *overrides]))
    objective = build(config.objective, Objective, "objective")
    config.fill(objective)
    tokenizer = load_tokenizer(config.model)
    traced = TracedStep(config, objective, read_config(config.model))
    pairs = make_pairs(PROFILES[profile], PAIRS)
    halves = [pairs[:2], pairs[2:]]
    expected = max(traced.memory(half).total for half in halves)

    keep_freed_memory()
    before = status("VmRSS")
    policy, _ = build_policy(config, objective, tokenizer)
    if traced.state.layout.name == "packed":
        enable_packed_attention(policy)
    state = traced.state
    state.engine = build_engine(config, objective, policy)
    is_off = config.reference == "adapter_off"
    state.reference = AdapterOff(policy, LogprobComputer(config.precision)) if is_off else Cached()
    for step in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        micro_batches = state.collate([list(state.complete(half)) for half in halves])
        with train_mode(policy), autocast_weight_cache():  # as `train_step` does
            accumulate_gradients(state, step, micro_batches)
        state.engine.step(1e-6)
    return {"measured": status("VmHWM") - before, "estimated": expected}


def main() -> None:
    if sys.argv[1:]:  # one case, in a process of its own
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    results: list[dict[str, Any]] = []
    for name, profile, overrides in CASES:
        arguments = [sys.executable, "-m", "benchmarks.memory", json.dumps([profile, overrides])]
        process = subprocess.run(arguments, check=True, capture_output=True, text=True)
        found = cast(dict[str, int], json.loads(process.stdout.splitlines()[-1]))
        results.append({"case": name, **found})
        echo(f"{name}: {found['measured'] / 2**30:.2f} GiB measured, {found['estimated'] / 2**30:.2f} estimated")
    write_json(OUTPUT / "memory.json", {"results": results, "machine": machine(), "git": git()})
    rows = [
        f"| {r['case']} | {r['measured'] / 2**30:.2f} | {r['estimated'] / 2**30:.2f} "
        f"| {r['estimated'] / r['measured'] - 1:+.1%} |"
        for r in results
    ]
    head = [
        "| SmolLM2-135M, two pairs at a time | measured, GiB | estimated, GiB | difference |",
        "| --- | --- | --- | --- |",
    ]
    atomic_write(OUTPUT / "memory.md", "\n".join([*head, *rows]) + "\n")


if __name__ == "__main__":
    main()
