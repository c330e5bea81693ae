"""What the figures of evaluations mean: task suites, the judges of the papers, means over them."""

import math
from collections.abc import Sequence
from typing import Any

from prefopt.errors import UserError

PAPER_JUDGES = ("weighted_alpaca_eval_gpt-4o-mini-2024-07-18", "claude-haiku-4-5_ranking")  # of MMPO


def two_judges(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means of the MMPO paper's two judges, where there are both."""
    own = [r["figures"] for name in PAPER_JUDGES for r in records if r["judge"]["name"] == name]
    if len(own) != len(PAPER_JUDGES):
        return {}
    keys = [k for k in ("win_rate", "length_controlled_win_rate") if all(k in f for f in own)]
    return {k: sum(f[k] for f in own) / len(own) for k in keys}


# The ten tasks whose mean accuracy the MMPO paper calls LM accuracy, zero-shot; and MaPPO's academic benchmarks.
SUITES = {
    "mmpo": [
        "winogrande", "arc_easy", "piqa", "hellaswag", "openbookqa", "arc_challenge", "mmlu", "mathqa", "race",
        "commonsense_qa",
    ],
    "mappo": ["ifeval", "gpqa_main_zeroshot", "mmlu", "hellaswag", "truthfulqa_mc2", "gsm8k"],
}  # fmt: skip


def task_names(tasks: Any) -> list[str]:
    """lm-eval's names of a suite, a task, or a list of them. Raises UserError for anything else."""
    asked = [tasks] if isinstance(tasks, str) else tasks
    if not asked or not isinstance(asked, list) or not all(isinstance(task, str) for task in asked):
        raise UserError(f"tasks must be {', '.join(SUITES)}, a task of lm-eval, or a list of them, is {tasks!r}")
    return list(dict.fromkeys(name for task in asked for name in SUITES.get(task, [task])))


def lm_accuracy(records: list[dict[str, Any]]) -> dict[str, float]:
    """The means over tasks: of acc, as the MMPO paper's figures suggest, and of acc_norm where a task has it."""
    accs = [r["metrics"]["acc"]["value"] for r in records if "acc" in r["metrics"]]
    norms = [r["metrics"].get("acc_norm", r["metrics"]["acc"])["value"] for r in records if "acc" in r["metrics"]]
    return {"mean acc": sum(accs) / len(accs), "mean acc_norm": sum(norms) / len(norms)} if accs else {}


def accuracy_percent(records: list[dict[str, Any]]) -> tuple[float, float | None]:
    """The mean of acc over tasks that all have it, and its standard error, the tasks' errors being independent (None
    where one is not known)."""
    errors = [r["metrics"]["acc"]["stderr"] for r in records]
    error = None if None in errors else 100 * math.hypot(*errors) / len(errors)
    return 100 * lm_accuracy(records)["mean acc"], error
