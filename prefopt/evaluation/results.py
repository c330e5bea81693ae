"""The papers' task suites and judges, and the means over them that the papers report."""

import math
from collections.abc import Sequence
from typing import Any

from prefopt.errors import UserError

# The two judges of the MMPO paper, whose mean is its win rate.
PAPER_JUDGES = ("weighted_alpaca_eval_gpt-4o-mini-2024-07-18", "claude-haiku-4-5_ranking")


def two_judges(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean win rates, in percent, of the MMPO paper's two judges; empty where a record of either is missing."""
    figures = [r["figures"] for name in PAPER_JUDGES for r in records if r["judge"]["name"] == name]
    if len(figures) != len(PAPER_JUDGES):
        return {}
    keys = [k for k in ("win_rate", "length_controlled_win_rate") if all(k in f for f in figures)]
    return {k: sum(f[k] for f in figures) / len(figures) for k in keys}


# mmpo: the ten zero-shot tasks whose mean accuracy the MMPO paper calls LM accuracy. mappo: the MaPPO paper's academic
# benchmarks.
SUITES = {
    "mmpo": [
        "winogrande", "arc_easy", "piqa", "hellaswag", "openbookqa", "arc_challenge", "mmlu", "mathqa", "race",
        "commonsense_qa",
    ],
    "mappo": ["ifeval", "gpqa_main_zeroshot", "mmlu", "hellaswag", "truthfulqa_mc2", "gsm8k"],
}  # fmt: skip


# Settings of prefopt.harness that change a figure. Records that differ in one share no table.
FIGURE_SETTINGS = ("limit", "num_fewshot", "chat_template", "system_instruction", "gen_kwargs", "max_length")


def task_names(tasks: Any) -> list[str]:
    """lm-eval's names of a suite, a task, or a list of them, each name once. Raises UserError for anything else."""
    names = [tasks] if isinstance(tasks, str) else tasks
    if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"tasks must be {', '.join(SUITES)}, a task of lm-eval, or a list of them, is {tasks!r}")
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, [name])))


def lm_accuracy(records: list[dict[str, Any]]) -> dict[str, float]:
    """The means over the tasks that have acc, as fractions: of acc, as the MMPO paper's figures suggest, and of
    acc_norm, with acc in place of it for a task that has none. Empty where no task has acc."""
    accs = [r["metrics"]["acc"]["value"] for r in records if "acc" in r["metrics"]]
    norms = [r["metrics"].get("acc_norm", r["metrics"]["acc"])["value"] for r in records if "acc" in r["metrics"]]
    return {"mean acc": sum(accs) / len(accs), "mean acc_norm": sum(norms) / len(norms)} if accs else {}


def accuracy_percent(records: list[dict[str, Any]]) -> tuple[float, float | None]:
    """The mean acc in percent over tasks that all have it, and its standard error. The tasks' errors are taken as
    independent; the result is None where one of them is not known."""
    errors = [r["metrics"]["acc"]["stderr"] for r in records]
    error = None if None in errors else 100 * math.hypot(*errors) / len(errors)
    return 100 * lm_accuracy(records)["mean acc"], error
