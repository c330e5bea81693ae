"""The policies that were evaluated after training, from the records of finished runs: which of them may stand in one
figure, their LM accuracies and win rates, and means of these over seeds."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.results import FIGURE_SETTINGS, PAPER_JUDGES, accuracy_percent, task_names, two_judges
from prefopt.reporting.config import PapersConfig
from prefopt.tracking.archive import Record
from prefopt.utils.stats import mean_and_error

Value = tuple[float, float | None]  # a figure and its standard error, where that is known


@dataclass(frozen=True)
class Evaluated:
    """A policy of a run, with its records of prefopt.harness (one per task) and prefopt.alpaca (one per judge)."""

    run: Record
    step: int
    harness: list[Record]
    alpaca: list[Record]


@dataclass(frozen=True)
class Metric:
    """Which win rate a figure shows: its name, its keys in a record's `figures`, who judged against what, as a sentence
    says it and by name, and on how many questions."""

    name: str
    key: str
    error: str
    about: str
    judges: tuple[str, ...]
    baselines: tuple[str, ...]
    questions: int


def read_evaluated(records: Sequence[Record], config: PapersConfig) -> list[Evaluated]:
    """The evaluated policies of these runs, with the records that the config chooses. Where a run has kept its last
    policy twice, as the final one and as a checkpoint, the final one alone.

    Raises UserError where the records could not share a figure, naming what differs and where, and where the config
    chooses what no record has.
    """
    tasks = None if config.tasks is None else set(task_names(config.tasks))
    _check_choices(records, config, tasks)

    policies = []
    for record in records:
        harness = [r for r in record["harness"] if "acc" in r["metrics"] and (tasks is None or r["task"] in tasks)]
        alpaca = [
            r for r in record["alpaca"]
            if config.judge_name in (None, r["judge"]["name"]) and config.baseline_name in (None, r["baseline"]["name"])
        ]  # fmt: skip
        for step in sorted({r["step"] for r in [*harness, *alpaca]}):
            names = {r["checkpoint"] for r in [*harness, *alpaca] if r["step"] == step}
            key = step, "final" if "final" in names else min(names)
            of_step = [[r for r in kind if (r["step"], r["checkpoint"]) == key] for kind in (harness, alpaca)]
            policies.append(Evaluated(record, step, *of_step))
    check_comparable(policies, model_names(records), tasks)
    return policies


def _check_choices(records: Sequence[Record], config: PapersConfig, tasks: set[str] | None) -> None:
    """Raise UserError where the config chooses a task, judge or baseline that no record has."""
    alpaca = [result for record in records for result in record["alpaca"]]
    judges = set() if config.judge_name is None else {config.judge_name}
    baselines = set() if config.baseline_name is None else {config.baseline_name}
    choices = {
        "tasks": (tasks or set(), {result["task"] for record in records for result in record["harness"]}),
        "judge_name": (judges, {result["judge"]["name"] for result in alpaca}),
        "baseline_name": (baselines, {result["baseline"]["name"] for result in alpaca}),
    }
    for key, (chosen, recorded) in choices.items():
        if missing := sorted(chosen - recorded):
            have = ", ".join(sorted(recorded)) or "none"
            raise UserError(f"{key}: no record in {config.runs_dir} has {', '.join(missing)}. There is {have}.")


def check_comparable(policies: Sequence[Evaluated], models: dict[str, str], tasks: set[str] | None = None) -> None:
    """Raise UserError unless all policies have the same tasks (and all of `tasks`), limits, judges, questions and
    sampling, and those of a model the same baseline, each once. Where each seed has an initial policy of its own, it
    has its own baseline."""
    problems: list[str] = []
    missing: dict[str, list[str]] = {}
    conditions: dict[str, dict[str, list[str]]] = {}  # by name and value, the files of the records that have it
    several = _with_a_policy_of_each_seed(policies, models)
    for policy in policies:
        for name, value, file in _conditions(policy, models, several):
            conditions.setdefault(name, {}).setdefault(value, []).append(file)

        measured = [result["task"] for result in policy.harness]
        if measured and (lacking := sorted((tasks or set()) - set(measured))):
            missing.setdefault(", ".join(lacking), []).append(policy.harness[0]["file"])
        judges = [result["judge"]["name"] for result in policy.alpaca]
        for kind, names, results in (("task", measured, policy.harness), ("judge", judges, policy.alpaca)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                both = ", ".join(result["file"] for result in results)
                problems.append(f"{kind} {twice[0]} has two records of one policy: {both}")

    for names_of_tasks, files in missing.items():
        problems.append(f"no record of {names_of_tasks} beside {files[0]}, {len(files)} such policies in all")
    for name, values in conditions.items():
        if len(values) > 1:
            places = [f"{value} ({files[0]}, {len(files)} in all)" for value, files in values.items()]
            problems.append(f"{name}: {'; '.join(places)}")
    if problems:
        raise UserError(
            "\n  ".join(["these records cannot share a figure:", *problems])
            + "\nChoose by tasks=, judge_name= or baseline_name=, finish what is missing, or move the others away."
        )


def _with_a_policy_of_each_seed(policies: Sequence[Evaluated], models: dict[str, str]) -> set[str]:
    """The models whose runs begin with another policy at each seed."""
    weights: dict[str, dict[int, set[str]]] = {}
    for policy in policies:
        seeds = weights.setdefault(models[policy.run["name"]], {})
        seeds.setdefault(policy.run["config"]["seed"], set()).add(policy.run["initial_weights"])
    return {
        model for model, seeds in weights.items()
        if len(seeds) > 1 and sum(map(len, seeds.values())) == len(seeds) == len(set().union(*seeds.values()))
    }  # fmt: skip


def _conditions(policy: Evaluated, models: dict[str, str], several: set[str]) -> Iterable[tuple[str, str, str]]:
    """What must be the same for all policies: its name, its value as text, and the file of the record that has it.
    `several`: the models whose runs begin with another policy at each seed."""
    for result in policy.harness:
        for key in FIGURE_SETTINGS:
            yield key, str(result["settings"].get(key)), result["file"]
    if policy.harness:
        yield "tasks", ", ".join(sorted({r["task"] for r in policy.harness})), policy.harness[0]["file"]

    # An SFT policy is judged against another baseline, if at all: no figure shows its win rate.
    if not policy.alpaca or policy.run["objective"] == "sft":
        return
    yield "judges", ", ".join(sorted({r["judge"]["name"] for r in policy.alpaca})), policy.alpaca[0]["file"]
    for result in policy.alpaca:
        settings, baseline, file = result["settings"], result["baseline"], result["file"]
        judge = hashlib.sha256(json.dumps(result["judge"], sort_keys=True).encode()).hexdigest()[:8]
        yield f"settings of {result['judge']['name']}", judge, file
        yield "questions", f"{settings['instructions'][:12]} ({result['figures']['n']})", file
        # The size of a batch changes no answer but for rounding.
        sampling = [f"{key} {value}" for key, value in settings["sampling"].items() if key != "batch_size"]
        yield "sampling", ", ".join(sampling), file
        name = f"{baseline['name']} {settings['revision']}"  # of a baseline whose answers come from a file
        weights = f"weights {baseline['weights'][:12]}" if baseline["weights"] else name
        model = models[policy.run["name"]]
        of_seed = f" at seed {policy.run['config']['seed']}" if model in several else ""
        yield f"baseline of {model}{of_seed}", weights, file


def model_names(records: Sequence[Record]) -> dict[str, str]:
    """The model of each run by the run's name. One that was not named but after its folder, and began from the final
    weights of an SFT run among these, has the name of that run's model."""
    sft = {r.get("final_weights"): r["config"]["model"]["name"] for r in records if r["objective"] == "sft"}
    names = {}
    for record in records:
        model = record["config"]["model"]
        unnamed = model["name"] == Path(model["path"]).name
        names[record["name"]] = sft.get(record["initial_weights"], model["name"]) if unnamed else model["name"]
    return names


def metric_of(policies: Sequence[Evaluated]) -> Metric | None:
    """The win rate that all judged policies have, length-controlled if all have that; None where none was judged.

    Raises UserError for several judges other than the MMPO paper's two.
    """
    results = [result for policy in policies if policy.run["objective"] != "sft" for result in policy.alpaca]
    if not results:
        return None
    judges = sorted({t["judge"]["name"] for t in results})
    if len(judges) > 1 and set(judges) != set(PAPER_JUDGES):
        raise UserError(f"several judges, whose mean means nothing: {', '.join(judges)}. Choose one: judge_name=NAME")
    controlled = all("length_controlled_win_rate" in t["figures"] for t in results)
    who = judges[0] if len(judges) == 1 else f"the mean of {' and '.join(judges)}"
    baselines = sorted({t["baseline"]["name"] for t in results})
    questions = results[0]["figures"]["n"]
    about = f"judged by {who}, against {', '.join(baselines)}, on {questions} questions"
    rest = about, tuple(judges), tuple(baselines), questions
    if controlled:
        return Metric("length-controlled win rate", "length_controlled_win_rate", "lc_standard_error", *rest)
    return Metric("win rate", "win_rate", "standard_error", *rest)


def accuracy_of(policy: Evaluated) -> Value | None:
    """LM accuracy, percent: the mean of `acc` over the tasks, whose errors are independent."""
    if not policy.harness:
        return None
    return accuracy_percent(policy.harness)


def win_rate_of(policy: Evaluated, metric: Metric | None) -> Value | None:
    """Percent. Two judges see the same questions and answers, so the error of their mean is taken to be the mean of
    their errors, which is the most it can be."""
    if not policy.alpaca or metric is None:
        return None
    figures = [result["figures"] for result in policy.alpaca]
    mean = two_judges(policy.alpaca)[metric.key] if len(figures) > 1 else figures[0][metric.key]
    return mean, statistics.fmean(f[metric.error] for f in figures)


def counts(values: Iterable[Any]) -> str:
    """The different values among these as text, as a sentence on n has them: "64", "32 or 64"."""
    return " or ".join(map(str, sorted({value for value in values if value is not None})))


def main_measure(records: Iterable[Record]) -> tuple[str, str]:
    """By what the ends of these runs are compared, as the key of a figure and its name: the oracle reward where some
    run has one, else the held-out accuracy."""
    rewarded = any("oracle_reward" in row for record in records for row in record["evaluations"][-1:])
    return ("oracle_reward", "oracle reward") if rewarded else ("accuracy", "held-out accuracy")


def flatten_value(key: str, value: Value | None) -> dict[str, float | None]:
    """A figure and its standard error as two fields of a table's row: `key` and KEY_se."""
    mean, error = value or (None, None)
    return {key: mean, f"{key}_se": error}


def mean_over_seeds(values: Iterable[float | None]) -> Value | None:
    """The mean over training seeds and its standard error, None for one seed alone; None where a seed has no value."""
    values = list(values)
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return None
    mean, error = mean_and_error(known)
    return mean, error if len(known) > 1 else None


def aggregate_seeds(values: Sequence[Value | None]) -> Value | None:
    """The mean over training seeds; None where a seed has no value.

    Its error has two parts, taken as independent: that over seeds, and the mean of the seeds' own errors, since all
    share their questions. Where a seed's own error is not known, it is that over seeds alone."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    mean, over_seeds = mean_and_error([value for value, _ in known])
    errors = [error for _, error in known]
    if None in errors:
        return mean, None if len(known) == 1 else over_seeds
    over_questions = statistics.fmean(error for error in errors if error is not None)
    return mean, over_questions if len(known) == 1 else math.hypot(over_seeds, over_questions)
