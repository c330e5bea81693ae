"""Points and paths of a grid: by epoch, by beta, over seeds."""

import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prefopt.reporting.evaluated import (
    Evaluated,
    Metric,
    Value,
    accuracy_of,
    aggregate_seeds,
    main_measure,
    mean_over_seeds,
    win_rate_of,
)
from prefopt.reporting.labels import flat_config, labels
from prefopt.tracking.archive import Record, beta

log = logging.getLogger(__name__)

Curve = list[tuple[float, float, float | None]]  # (place on the x axis, mean, its standard error or None)


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


def points_of(policies: Sequence[Evaluated], metric: Metric | None, models: dict[str, str]) -> list[Point]:
    """The evaluated policies of all preference runs but for the initial ones, over their evaluated seeds, by epoch; a
    step that some of these lack is named and left out.

    A method is an objective, with the keys (but beta and seed) in which its runs of one model differ."""
    trained = [p for p in policies if p.run["objective"] != "sft" and p.step]
    runs = {p.run["name"]: p.run for p in trained}
    points = []
    for model in dict.fromkeys(models[name] for name in runs):
        members = [run for name, run in runs.items() if models[name] == model]
        for (method, value), seeds in group_by_config(members).items():
            names = {run["name"] for run in seeds}
            by_step: defaultdict[int, list[Evaluated]] = defaultdict(list)
            for policy in trained:
                if policy.run["name"] in names:
                    by_step[policy.step].append(policy)

            for step, group in sorted(by_step.items()):
                if len(group) < len(seeds):
                    have = len(group)
                    log.info(
                        f"left out: {model} {method} β={value} at step {step} is evaluated for {have} of its seeds"
                    )
                    continue
                accuracy = aggregate_seeds([accuracy_of(p) for p in group])
                win_rate = aggregate_seeds([win_rate_of(p, metric) for p in group])
                epoch = epoch_of(group[0].run, step)
                points.append(Point(model, method, value, epoch, accuracy, win_rate, len(group)))
    return sorted(points, key=lambda p: (p.model, p.method, p.beta or 0.0, p.epoch))


def epoch_of(run: Record, step: int) -> float:
    """Passes over the training pairs, to two digits: the last step of an epoch may go beyond its end."""
    return round(step * run["config"]["batch_size"] / run["data"]["train"]["items"], 2)


def group_by_config(records: Sequence[Record]) -> dict[tuple[str, float | None], list[Record]]:
    """Runs that differ in nothing but their seed, by method and beta."""
    groups: defaultdict[tuple[str, float | None], list[Record]] = defaultdict(list)
    for record, name in zip(records, labels(list(records), without=("seed",)), strict=True):
        method = " ".join(part for part in name.split(" ") if not part.startswith("β="))
        groups[method, beta(record)].append(record)
    return dict(groups)


def sft_accuracy(policies: Sequence[Evaluated], models: dict[str, str]) -> dict[str, Value]:
    """LM accuracy of the policies that preference runs began from, by the model of these, the mean where there are
    several: the last ones of SFT runs, and those evaluated as `checkpoints=initial`."""
    of_preferences = [p for p in policies if p.run["objective"] != "sft"]
    initial = {p.run["initial_weights"]: models[p.run["name"]] for p in of_preferences}
    accuracies: dict[str, dict[str, Value | None]] = {}  # by model and weights: a model's runs may begin with several
    for policy in policies:
        if policy.run["objective"] == "sft" and policy.run["final_weights"] in initial:
            weights = policy.run["final_weights"]
            accuracies.setdefault(initial[weights], {})[weights] = accuracy_of(policy)
    for policy in of_preferences:
        if policy.step == 0:
            of_model = accuracies.setdefault(models[policy.run["name"]], {})
            of_model[policy.run["initial_weights"]] = accuracy_of(policy)
    means = {model: aggregate_seeds(list(values.values())) for model, values in accuracies.items()}
    return {model: value for model, value in means.items() if value is not None}


def paths(points: Iterable[Point]) -> dict[tuple[str, str, float | None], list[Point]]:
    """The points of each model, method and beta in the order of their epochs."""
    groups: defaultdict[tuple[str, str, float | None], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.model, point.method, point.beta].append(point)
    return {key: sorted(path, key=lambda p: p.epoch) for key, path in groups.items()}


def best_points(points: Iterable[Point], by: str) -> list[Point]:
    """Of each model and method the point with the highest `accuracy` or `win_rate` over betas and epochs, among those
    that have both; of equals the earliest, then that of the smallest beta."""
    groups: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        if point.accuracy and point.win_rate:
            groups[point.model, point.method].append(point)
    return [min(group, key=lambda p: (-getattr(p, by)[0], p.epoch, p.beta or 0.0)) for group in groups.values()]


def at_last_epoch(points: Iterable[Point]) -> dict[tuple[str, str], tuple[float, dict[float, Value]]]:
    """For each model and method with several betas: the last epoch that all of them have, and the win rates there by
    beta."""
    columns = ["model", "method", "beta", "epoch", "win_rate"]
    rows = [[getattr(p, key) for key in columns] for p in points if p.win_rate and p.beta is not None]
    rates = pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:-1], keep="last")
    ends = {}
    for key, group in rates.groupby(["model", "method"], sort=False):
        by_epoch = group.pivot(index="epoch", columns="beta", values="win_rate").dropna()
        if len(by_epoch.columns) > 1 and len(by_epoch):
            epoch = by_epoch.index.max()
            ends[key] = float(epoch), by_epoch.loc[epoch].to_dict()
    return ends


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


def drift(records: Sequence[Record], side: str) -> dict[str, Curve]:
    """The change of the mean held-out log-prob of this side since before training, in nats, over seeds: a curve over
    the steps that all seeds of a method have evaluated, by method (with its beta)."""
    key = f"{side}_logps"
    curves = {}
    for (method, value), seeds in group_by_config(records).items():
        by_seed = [pd.Series({row["step"]: row[key] for row in r["evaluations"] if key in row}) for r in seeds]
        logps = pd.concat(by_seed, axis=1, join="inner").sort_index()
        if 0 in logps.index:
            name = f"{method} β={value:g}" if value is not None else method
            changes = logps - logps.loc[0]
            means = {step: mean_over_seeds(seed_changes) for step, seed_changes in changes.iterrows()}
            curves[name] = [(step, *value) for step, value in means.items() if value]
    return curves


def sensitive_keys(records: Sequence[Record]) -> list[str]:
    """The numeric hyperparameters in which runs of one objective differ."""
    keys: dict[str, None] = {}
    for name in dict.fromkeys(r["objective"] for r in records):
        configs = [flat_config(r) for r in records if r["objective"] == name]
        for key in configs[0]:
            values = {c[key] for c in configs if _is_number(c.get(key))}
            if key.startswith("objective.") and len(values) > 1:
                keys[key] = None
    return list(keys)


def sensitivity(records: Sequence[Record], key: str) -> dict[str, Curve]:
    """The final oracle reward (without any oracle: the held-out accuracy) over the values of `key`, a curve for all
    that else tells the runs apart: the mean over seeds and its standard error (of one seed alone, that over its prompts
    or pairs, or None).

    Runs without the key or the figure are left out, and curves of a single value."""
    rows = []
    measure, _ = main_measure(records)
    evaluated = [r for r in records if r["evaluations"] and measure in r["evaluations"][-1]]
    evaluated = [r for r in evaluated if isinstance(flat_config(r).get(key), int | float)]
    for record, name in zip(evaluated, labels(evaluated, without=("seed", "dataset.name", key)), strict=True):
        if key.endswith(".beta"):  # a label names beta whatever `without` says
            name = " ".join(part for part in name.split(" ") if not part.startswith("β="))
        end = record["evaluations"][-1]
        rows.append((name, float(flat_config(record)[key]), end[measure], end.get(f"{measure}_se")))

    ends = pd.DataFrame(rows, columns=["name", "value", "reward", "error"], dtype=object)  # object: None stays None
    curves: defaultdict[str, Curve] = defaultdict(list)
    for (name, value), seeds in ends.groupby(["name", "value"]):
        if reward := mean_over_seeds(seeds["reward"]):
            mean, error = reward
            curves[name].append((value, mean, error if len(seeds) > 1 else seeds["error"].iloc[0]))
    return {name: curve for name, curve in curves.items() if len(curve) > 1}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
