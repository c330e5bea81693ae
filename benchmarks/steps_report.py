"""results/bench/steps.md and steps.png, made from the JSON that `benchmarks.steps` writes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step import PROFILES, Profile
from benchmarks.variants import BETAS, FLOORS, GRID, NAMES, TRL, VARIANTS
from prefopt.reporting.style import COLORS, PAGE, plotting, save

Numbers = dict[str, float]
BAR_COLORS = ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "0.65")  # of the variants in the figure, the floor in grey


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def table(results: dict[str, Any]) -> str:
    """The text of steps.md: a section for every part that `results` holds, and a table of how it was measured."""
    machine, versions = results["machine"], results["versions"]
    processor = (
        f"{machine['cores']} cores of {machine['processor']} ({machine['instructions']}), "
        f"{machine['memory_gib']:.0f} GiB"
    )
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    file = "gpu" if results["device"].startswith("cuda") else "cpu"
    lines = [
        "# prefopt, TRL and the floor, side by side",
        "",
        f"Made by `make bench` (`python -m benchmarks.steps`) from `results/bench/{file}.json`. "
        "Median [lowest–highest] over rounds; ratios are taken within a round.",
        "",
        f"Machine: {', '.join([processor, *machine['gpus']])}; {software}.",
    ]
    for name, profile in PROFILES.items():
        if name in results:
            lines += ["", *profile_section(name, profile, results[name])]
    for part, section in SECTIONS.items():
        if part in results:
            lines += ["", *section(results[part])]
    lines += ["", *measured_table(results["parts"])]
    return "\n".join(lines) + "\n"


def cell(numbers: Numbers, digits: int = 2) -> str:
    """`median [min–max]`, or one number where there was one round."""
    median = f"{numbers['median']:.{digits}f}"
    if numbers["n"] == 1:
        return median
    return f"{median} [{numbers['min']:.{digits}f}–{numbers['max']:.{digits}f}]"


def profile_section(name: str, profile: Profile, result: dict[str, Any]) -> list[str]:
    """All variants on the pairs of one profile."""
    tokens = result["tokens_per_step"]
    rounds = result["vs_floor"]["n"]
    rows = []
    for variant, numbers in result["variants"].items():
        ratio = ""
        if variant in TRL:
            ratio = cell(result[f"vs_{variant}"])
        elif variant in FLOORS:
            ratio = f"prefopt takes {cell(result[f'vs_{variant}'])} of it"
        memory, kernel = cell(numbers["peak_memory_gib"]), f"{100 * kernel_share(numbers):.0f} %"
        if variant == "floor_all_tokens":  # shares its process with the other floor, so it has no memory and time
            memory = kernel = ""
        seconds, rate = cell(numbers["seconds_per_step"], 1), cell(numbers["pairs_per_second"], 3)
        rows.append([NAMES[variant], seconds, rate, ratio, memory, kernel])

    reference = ", ".join(
        f"{NAMES[variant]} {numbers['reference_seconds']['median']:.1f} s"
        for variant, numbers in result["variants"].items()
        if numbers.get("reference_seconds", {}).get("median")
    )
    closing = f"Peak memory of prefopt is {cell(result['memory_vs_trl_default'])} of TRL's."
    if reference:
        closing += f" The reference pass over all the pairs, not in the steps: {reference}."
    headings = ["variant", "s/step", "pairs/s", "prefopt is faster by", "peak GiB", "kernel's share of CPU time"]
    return [
        f"## {name}: prompts of {profile.prompt[0]}–{profile.prompt[1]} tokens, completions of "
        f"{profile.completion[0]}–{profile.completion[1]}, {tokens['pairs']} pairs per step",
        "",
        f"{tokens['prompts_once']:.0f} tokens per step with prompts once, {tokens['prompts_twice']:.0f} with prompts "
        f"twice, {tokens['completions']:.0f} of them in completions. Threads: {result['threads']}; rounds: {rounds}.",
        "",
        *markdown_table(headings, rows),
        "",
        closing,
    ]


def kernel_share(numbers: Numbers) -> float:
    """The part of a process's CPU time that it spent in the kernel."""
    return numbers["system_seconds"] / (numbers["system_seconds"] + numbers["user_seconds"])


def grid_section(grid: dict[str, Any]) -> list[str]:
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


def startup_section(startup: dict[str, Any]) -> list[str]:
    rows = [[stage.replace("_", " "), f"{seconds:.2f}"] for stage, seconds in startup["stages"].items()]
    return [
        "## Start-up of a job",
        "",
        f"{cell(startup['seconds'], 1)} s from process start to the first optimizer step, caches warm "
        f"({startup['cold_seconds']:.1f} s cold). Of these, and of the first two steps (4 chat pairs), in seconds:",
        "",
        *markdown_table(["stage", "s"], rows),
    ]


def scaling_section(scaling: dict[str, Any]) -> list[str]:
    rows = [
        [length, f"{numbers['seconds_per_pair']:.2f}", f"{numbers['peak_memory_gib']:.2f}"]
        for length, numbers in scaling.items()
    ]
    return [
        "## Longer prompts",
        "",
        "Completions of 128 tokens, 4 pairs per step.",
        "",
        *markdown_table(["prompt tokens", "s/pair", "peak GiB"], rows),
    ]


def sampling_section(sampling: dict[str, Any]) -> list[str]:
    rows = [[size, f"{numbers['tokens_per_second']:.0f}"] for size, numbers in sampling.items()]
    return ["## Sampling, up to 64 new tokens", "", *markdown_table(["batch", "tokens/s"], rows)]


def models_section(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, numbers in models.items():
        if "left_out" in numbers:
            rows.append([name, numbers["left_out"], "", ""])
            continue
        utilisation = numbers.get("model_flop_utilisation")  # missing for a GPU of unknown peak
        share = f"{100 * utilisation:.0f} %" if utilisation else "–"
        rows.append([name, f"{numbers['tokens_per_second']:.0f}", share, f"{numbers['peak_memory_gib']:.1f}"])
    return ["## Models", "", *markdown_table(["model", "tokens/s", "model FLOP utilisation", "peak GiB"], rows)]


def measured_table(parts: dict[str, Any]) -> list[str]:
    """When and how each part was measured."""
    rows = []
    for part, how in parts.items():
        commit = "–"
        if how["git"] is not None:
            commit = how["git"]["commit"][:10] + (" with changes" if how["git"]["dirty"] else "")
        load, minutes = f"{how['load_before']:.1f}", f"{how['seconds'] / 60:.1f}"
        rows.append([part, commit, str(how["rounds"]), load, minutes])
    return markdown_table(["measured", "commit", "rounds", "load before", "minutes"], rows)


# A part's key in the JSON, and its section of steps.md.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "grid_vs_trl": grid_section,
    "startup": startup_section,
    "prompt_scaling": scaling_section,
    "sampling": sampling_section,
    "models": models_section,
}


def draw(results: dict[str, Any], output: Path) -> list[Path]:
    """Write steps.png, .svg and .pdf: seconds per step and peak memory of every variant by profile, and seconds per
    pair as prompts grow. Returns the files; none where no profile was measured."""
    profiles = {name: results[name] for name in PROFILES if name in results}
    scaling = results.get("prompt_scaling")
    if not profiles:
        return []
    with plotting() as plt:
        rows = 3 if scaling else 2
        figure, axes = plt.subplots(rows, 1, figsize=(PAGE, 2.3 * rows), layout="constrained")
        draw_bars(axes[0], profiles, "seconds_per_step", "seconds per step")
        draw_bars(axes[1], profiles, "peak_memory_gib", "peak memory (GiB)")
        if scaling:
            draw_scaling(axes[2], scaling)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
        return save(figure, output, "steps")


def draw_bars(axis: Any, profiles: dict[str, Any], key: str, label: str) -> None:
    """Medians of `key` as a group of bars per profile, one bar per variant, with lowest and highest as error bars."""
    variants = [variant for variant in VARIANTS if variant != "floor_all_tokens"]
    for place, (variant, color) in enumerate(zip(variants, BAR_COLORS, strict=True)):
        numbers = [result["variants"][variant][key] for result in profiles.values()]
        medians = [n["median"] for n in numbers]
        spread = [[n["median"] - n["min"] for n in numbers], [n["max"] - n["median"] for n in numbers]]
        positions = [i + 0.16 * (place - (len(variants) - 1) / 2) for i in range(len(profiles))]
        bars = axis.bar(positions, medians, 0.15, yerr=spread, color=color, label=NAMES[variant])
        axis.bar_label(bars, [f"{m:.0f}" if m >= 10 else f"{m:.1f}" for m in medians], fontsize=7, padding=2)

    ticks = [
        f"{name.replace('_', ' ')}\n{result['tokens_per_step']['pairs']} pairs per step"
        for name, result in profiles.items()
    ]
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_ylabel(label)
    axis.margins(y=0.12)
    rounds = next(iter(profiles.values()))["vs_floor"]["n"]
    axis.set_title(f"median of {rounds}, lowest and highest", fontsize=9)


def draw_scaling(axis: Any, scaling: dict[str, Any]) -> None:
    lengths = [int(length) for length in scaling]
    seconds = [numbers["seconds_per_pair"] for numbers in scaling.values()]
    axis.plot(lengths, seconds, color=COLORS[0], marker="o", markersize=4)
    axis.set_xlabel("prompt tokens (completions of 128)")
    axis.set_ylabel("prefopt: seconds per pair")
    axis.set_xlim(0)
    axis.set_ylim(0)
