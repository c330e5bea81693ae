"""What the records of finished runs say of the policies that were evaluated after training, as points, curves and their
extremes: the numbers behind the tables and figures of prefopt.papers."""

import csv
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import UserError
from prefopt.alpaca import PAPER_JUDGES, two_judges
from prefopt.config import PapersConfig
from prefopt.harness import accuracy_percent, task_names
from prefopt.metrics import mean_and_error
from prefopt.progress import say
from prefopt.records import Record, beta
from prefopt.report import flat_config, labels

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


@dataclass(frozen=True)
class Point:
    """A method at a beta after so many epochs, in percent; over training seeds where several were evaluated."""

    model: str
    method: str
    beta: float | None
    epoch: float
    accuracy: Value | None
    win_rate: Value | None
    seeds: int = 1


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


def pooled(values: Sequence[Value | None]) -> Value | None:
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


def points_of(found: Sequence[Evaluated], metric: Metric | None, models: dict[str, str]) -> list[Point]:
    """The evaluated policies of all preference runs but for the initial ones, over their evaluated seeds, by epoch; a
    step that some of these lack is named and left out.

    A method is an objective, with the keys (but beta and seed) in which its runs of one model differ."""
    policies = [p for p in found if p.run["objective"] != "sft" and p.step]
    runs = {p.run["name"]: p.run for p in policies}
    points = []
    for model in dict.fromkeys(models[name] for name in runs):
        members = [r for name, r in runs.items() if models[name] == model]
        for (method, value), seeds in grouped(members).items():
            by_step: dict[int, list[Evaluated]] = {}
            for policy in policies:
                if policy.run["name"] in {r["name"] for r in seeds}:
                    by_step.setdefault(policy.step, []).append(policy)
            for step, own in sorted(by_step.items()):
                if len(own) < len(seeds):
                    say(f"left out: {model} {method} β={value} at step {step} is evaluated for {len(own)} of its seeds")
                    continue
                rates = pooled([accuracy_of(p) for p in own]), pooled([win_rate_of(p, metric) for p in own])
                points.append(Point(model, method, value, epoch_of(own[0].run, step), *rates, len(own)))
    return sorted(points, key=lambda p: (p.model, p.method, p.beta or 0.0, p.epoch))


def epoch_of(run: Record, step: int) -> float:
    """Passes over the training pairs, to two digits: the last step of an epoch may go beyond its end."""
    return round(step * run["config"]["batch_size"] / run["data"]["train"]["items"], 2)


def grouped(records: Sequence[Record]) -> dict[tuple[str, float | None], list[Record]]:
    """Runs that differ in nothing but their seed, by method and beta."""
    groups: dict[tuple[str, float | None], list[Record]] = {}
    for record, name in zip(records, labels(list(records), without=("seed",)), strict=True):
        method = " ".join(part for part in name.split(" ") if not part.startswith("β="))
        groups.setdefault((method, beta(record)), []).append(record)
    return groups


def sft_accuracy(found: Sequence[Evaluated], models: dict[str, str]) -> dict[str, Value]:
    """LM accuracy of the policies that preference runs began from, by the model of these: the last ones of SFT runs,
    and those evaluated as `checkpoints=initial`."""
    begun = {p.run["initial_weights"]: models[p.run["name"]] for p in found if p.run["objective"] != "sft"}
    own = [p for p in found if p.run["objective"] == "sft" and p.run["final_weights"] in begun]
    last = {begun[p.run["final_weights"]]: accuracy_of(p) for p in own}
    last |= {models[p.run["name"]]: accuracy_of(p) for p in found if p.run["objective"] != "sft" and p.step == 0}
    return {model: value for model, value in last.items() if value is not None}


def paths(points: Iterable[Point]) -> dict[tuple[str, str, float | None], list[Point]]:
    """The points of each model, method and beta in the order of their epochs."""
    found: dict[tuple[str, str, float | None], list[Point]] = {}
    for point in points:
        found.setdefault((point.model, point.method, point.beta), []).append(point)
    return {key: sorted(path, key=lambda p: p.epoch) for key, path in found.items()}


def peaks(points: Iterable[Point], by: str) -> list[Point]:
    """Of each model and method the point with the highest `accuracy` or `win_rate` over betas and epochs, among those
    that have both; of equals the earliest, then that of the smallest beta."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point.accuracy and point.win_rate:
            groups.setdefault((point.model, point.method), []).append(point)
    return [min(group, key=lambda p: (-getattr(p, by)[0], p.epoch, p.beta or 0.0)) for group in groups.values()]


def at_last_epoch(points: Iterable[Point]) -> dict[tuple[str, str], tuple[float, dict[float, Value]]]:
    """For each model and method with several betas: the last epoch that all of them have, and the win rates there by
    beta."""
    groups: dict[tuple[str, str], dict[float, dict[float, Value]]] = {}
    for point in points:
        if point.win_rate and point.beta is not None:
            groups.setdefault((point.model, point.method), {}).setdefault(point.beta, {})[point.epoch] = point.win_rate
    found = {}
    for key, betas in groups.items():
        shared = set.intersection(*(set(epochs) for epochs in betas.values()))
        if len(betas) > 1 and shared:
            found[key] = max(shared), {b: epochs[max(shared)] for b, epochs in sorted(betas.items())}
    return found


def spreads(points: Iterable[Point], source: str) -> list[dict[str, Any]]:
    """How much the win rate depends on beta: for each model and method the highest less the lowest at the last epoch,
    with its standard error as if the two were independent.

    `noise` is the spread that equal win rates would show on average if they were measured with independent errors of
    these sizes. The betas share their questions, so it is an upper estimate.
    """
    rows: list[dict[str, Any]] = []
    for (model, method), (epoch, by_beta) in at_last_epoch(points).items():
        low, high = min(by_beta.values()), max(by_beta.values())
        errors = [error for _, error in by_beta.values() if error is not None]
        known = len(errors) == len(by_beta)
        rows.append(
            {
                "source": source,
                "model": model,
                "method": method,
                "betas": " ".join(f"{b:g}" for b in by_beta),
                "epoch": epoch,
                "lowest": low[0],
                "highest": high[0],
                "spread": high[0] - low[0],
                "se": math.hypot(low[1] or 0, high[1] or 0) if known else None,
                "noise": normal_range(len(by_beta)) * math.hypot(*errors) / len(errors) ** 0.5 if known else None,
            }
        )
    return rows


def normal_range(n: int) -> float:
    """E[max - min] of n independent standard normal numbers: the integral of 1 - F^n - (1 - F)^n."""
    cdf, step = statistics.NormalDist().cdf, 0.01
    return step * sum(1 - cdf(i * step) ** n - (1 - cdf(i * step)) ** n for i in range(-800, 801))


def drift(records: Sequence[Record], side: str) -> dict[str, list[tuple[int, float, float | None]]]:
    """By method (with its beta) the mean held-out log-prob of this side less that before training, in nats, over seeds:
    (step, mean, standard error or None) at each step that all its seeds have evaluated."""
    found: dict[str, list[tuple[int, float, float | None]]] = {}
    key = f"{side}_logps"
    for (method, value), seeds in grouped(records).items():
        curves = [{row["step"]: row[key] for row in r["evaluations"] if key in row} for r in seeds]
        shared = set.intersection(*(set(curve) for curve in curves))
        if 0 not in shared:
            continue
        curve = []
        for step in sorted(shared):
            mean, error = mean_and_error([c[step] - c[0] for c in curves])
            curve.append((step, mean, error if len(curves) > 1 else None))
        found[f"{method} β={value:g}" if value is not None else method] = curve
    return found


def sensitive_keys(records: Sequence[Record]) -> list[str]:
    """The numeric hyperparameters in which runs of one objective differ."""
    keys: dict[str, None] = {}
    for name in dict.fromkeys(r["objective"] for r in records):
        flat = [flat_config(r) for r in records if r["objective"] == name]
        for key in flat[0]:
            values = {
                c.get(key) for c in flat if isinstance(c.get(key), int | float) and not isinstance(c.get(key), bool)
            }
            if key.startswith("objective.") and len(values) > 1:
                keys[key] = None
    return list(keys)


def sensitivity(records: Sequence[Record], key: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """By what else tells the runs apart, where there are several values of the key: (the value, the final oracle
    reward's mean over seeds, its standard error over these; of one seed alone, that over its prompts, or None). Runs
    without the key or an oracle have no place in it."""
    own = [r for r in records if r["evaluations"] and "oracle_reward" in r["evaluations"][-1]]
    own = [r for r in own if isinstance(flat_config(r).get(key), int | float)]
    groups: dict[str, dict[float, list[tuple[float, float | None]]]] = {}
    for record, name in zip(own, labels(own, without=("seed", "dataset.name", key)), strict=True):
        if key.endswith(".beta"):
            name = " ".join(part for part in name.split(" ") if not part.startswith("β="))
        values = groups.setdefault(name, {}).setdefault(float(flat_config(record)[key]), [])
        end = record["evaluations"][-1]
        values.append((end["oracle_reward"], end.get("oracle_reward_se")))
    found: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, by_value in sorted(groups.items()):
        if len(by_value) > 1:
            for value, ends in sorted(by_value.items()):
                mean, error = mean_and_error([reward for reward, _ in ends])
                found.setdefault(name, []).append((value, mean, error if len(ends) > 1 else ends[0][1]))
    return found


# What the papers print


def plain(model: str) -> str:
    """The name of a model without what is written in several ways."""
    return re.sub(r"[-_ ]", "", model.lower())


def published_points(folder: str) -> list[Point]:
    """The win rates of the published MMPO runs (arXiv 2510.22881) by epoch, for gpt-4o-mini alone, as its plots have
    them: without length normalization, SimPO too, and MMPO without the entropy bonus."""
    return [
        Point(
            row["model"],
            row["method"],
            float(row["beta"]),
            float(row["epoch"]),
            None,
            (float(row["lc_win_rate"]), None),
        )
        for row in read_csv(folder, "mmpo_epochs_gpt4o_mini.csv")
        if row["length_normalized"] == "no" and row["entropy"] != "yes"
    ]


def read_csv(folder: str, name: str) -> list[dict[str, str]]:
    """Raises UserError where the file is not there."""
    file = Path(folder) / name
    if not file.is_file():
        raise UserError(f"published={folder} holds no {name}; the repository has it in results/published")
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))
