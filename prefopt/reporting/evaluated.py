"""What the records of finished runs say of the policies that were evaluated after training, as points, curves and their
extremes: the numbers behind the tables and figures of prefopt.papers."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.results import PAPER_JUDGES, accuracy_percent, task_names, two_judges
from prefopt.reporting.config import PapersConfig
from prefopt.tracking.archive import Record
from prefopt.utils.stats import mean_and_error

Value = tuple[float, float | None]  # a figure and its standard error, where that is known
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Evaluated:
    """A policy of a run, with what prefopt.harness (of each task) and prefopt.alpaca (of each judge) recorded of it."""

    run: Record
    step: int
    harness: list[Record]
    alpaca: list[Record]


@dataclass(frozen=True)
class Metric:
    """Which win rate a figure shows: its name, its keys in a record's `figures`, and who judged against what."""

    name: str
    key: str
    error: str
    about: str


def read_evaluated(records: Sequence[Record], config: PapersConfig) -> list[Evaluated]:
    """The evaluated policies of these runs, with the records that the config chooses. Where a run has kept its last
    policy twice, the final one alone.

    Raises UserError where the records could not share a figure, naming what differs and where, and where the config
    chooses what is not there.
    """
    wanted = None if config.tasks is None else set(task_names(config.tasks))
    found = []
    seen: dict[str, set[str]] = {"tasks": set(), "judge_name": set(), "baseline_name": set()}
    for record in records:
        steps: dict[int, dict[str, list[Record]]] = {}
        for kind, content in [*(("harness", t) for t in record["harness"]), *(("alpaca", t) for t in record["alpaca"])]:
            if kind == "harness":
                seen["tasks"].add(content["task"])
                keep = "acc" in content["metrics"] and (wanted is None or content["task"] in wanted)
            else:
                judge, baseline = content["judge"]["name"], content["baseline"]["name"]
                seen["judge_name"].add(judge)
                seen["baseline_name"].add(baseline)
                keep = config.judge_name in (None, judge) and config.baseline_name in (None, baseline)
            if keep:
                steps.setdefault(content["step"], {"harness": [], "alpaca": []})[kind].append(content)
        for step, kinds in sorted(steps.items()):
            names = {t["checkpoint"] for told in kinds.values() for t in told}
            one = "final" if "final" in names else min(names)
            own = {kind: [t for t in told if t["checkpoint"] == one] for kind, told in kinds.items()}
            found.append(Evaluated(record, step, **own))
    asked = {"tasks": wanted, "judge_name": {config.judge_name or ""}, "baseline_name": {config.baseline_name or ""}}
    for key, chosen in asked.items():
        if lacking := sorted((chosen or set()) - seen[key] - {""}):
            there = ", ".join(sorted(seen[key])) or "none"
            raise UserError(f"{key}: no record in {config.runs_dir} has {', '.join(lacking)}. There is {there}.")
    check_comparable(found, model_names(records), wanted)
    return found


def check_comparable(found: Sequence[Evaluated], models: dict[str, str], wanted: set[str] | None = None) -> None:
    """Raise UserError unless all policies have the same tasks, limits, judges, questions and sampling, and those of a
    model the same baseline, each once."""
    seen: dict[str, dict[str, list[str]]] = {}

    def note(what: str, value: Any, file: str) -> None:
        seen.setdefault(what, {}).setdefault(str(value), []).append(file)

    problems: list[str] = []
    missing: dict[str, list[str]] = {}
    for policy in found:
        for told in policy.harness:
            for key in ("limit", "num_fewshot", "chat_template"):
                note(key, told["settings"][key], told["file"])
        tasks = sorted(t["task"] for t in policy.harness)
        if tasks:
            note("tasks", ", ".join(dict.fromkeys(tasks)), policy.harness[0]["file"])
            if lacking := ", ".join(sorted((wanted or set()) - set(tasks))):
                missing.setdefault(lacking, []).append(policy.harness[0]["file"])
        judges = sorted(t["judge"]["name"] for t in policy.alpaca)
        if judges and policy.run["objective"] != "sft":
            note("judges", ", ".join(dict.fromkeys(judges)), policy.alpaca[0]["file"])
            for told in policy.alpaca:
                how, base = told["settings"], told["baseline"]
                judge = hashlib.sha256(json.dumps(told["judge"], sort_keys=True).encode()).hexdigest()[:8]
                note(f"settings of {told['judge']['name']}", judge, told["file"])
                note("questions", f"{how['instructions'][:12]} ({told['figures']['n']})", told["file"])
                sampling = {k: v for k, v in how["sampling"].items() if k != "batch_size"}
                note("sampling", ", ".join(f"{k} {v}" for k, v in sampling.items()), told["file"])
                weights = f"weights {base['weights'][:12]}" if base["weights"] else f"{base['name']} {how['revision']}"
                note(f"baseline of {models[policy.run['name']]}", weights, told["file"])
        for kind, names in (("task", tasks), ("judge", judges)):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                files = [t["file"] for t in (policy.harness if kind == "task" else policy.alpaca)]
                problems.append(f"{kind} {twice[0]} has two records of one policy: {', '.join(files)}")
    for lacking, files in missing.items():
        problems.append(f"no record of {lacking} beside {files[0]}, {len(files)} such policies in all")
    for what, values in seen.items():
        if len(values) > 1:
            places = [f"{value} ({files[0]}, {len(files)} in all)" for value, files in values.items()]
            problems.append(f"{what}: {'; '.join(places)}")
    if problems:
        raise UserError(
            "\n  ".join(["these records cannot share a figure:", *problems])
            + "\nChoose by tasks=, judge_name= or baseline_name=, finish what is missing, or move the others away."
        )


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


def metric_of(found: Sequence[Evaluated]) -> Metric | None:
    """The win rate that all judged policies have, length-controlled if it can be; None where none was judged.

    Raises UserError for several judges other than the MMPO paper's two.
    """
    told = [t for policy in found if policy.run["objective"] != "sft" for t in policy.alpaca]
    if not told:
        return None
    judges = sorted({t["judge"]["name"] for t in told})
    if len(judges) > 1 and set(judges) != set(PAPER_JUDGES):
        raise UserError(f"several judges, whose mean means nothing: {', '.join(judges)}. Choose one: judge_name=NAME")
    controlled = all("length_controlled_win_rate" in t["figures"] for t in told)
    who = judges[0] if len(judges) == 1 else f"the mean of {' and '.join(judges)}"
    against = ", ".join(sorted({t["baseline"]["name"] for t in told}))
    about = f"judged by {who}, against {against}, on {told[0]['figures']['n']} questions"
    if controlled:
        return Metric("length-controlled win rate", "length_controlled_win_rate", "lc_standard_error", about)
    return Metric("win rate", "win_rate", "standard_error", about)


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
    own = [t["figures"] for t in policy.alpaca]
    mean = two_judges(policy.alpaca)[metric.key] if len(own) > 1 else own[0][metric.key]
    return mean, statistics.fmean(f[metric.error] for f in own)


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
    """The mean over training seeds. Its error is that over seeds and, since all share their questions, the mean of
    their own, as independent parts."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    mean, over_seeds = mean_and_error([value for value, _ in known])
    errors = [error for _, error in known]
    if None in errors:
        return mean, None if len(known) == 1 else over_seeds
    own = statistics.fmean(e for e in errors if e is not None)
    return mean, own if len(known) == 1 else math.hypot(over_seeds, own)
