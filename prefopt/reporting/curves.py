"""Points and paths of a grid: by epoch, by beta, over seeds."""

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.reporting.evaluated import Evaluated, Metric, Value, accuracy_of, aggregate_seeds, win_rate_of
from prefopt.reporting.labels import flat_config, labels
from prefopt.tracking.archive import Record, beta
from prefopt.utils.stats import mean_and_error

log = logging.getLogger(__name__)


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


def points_of(found: Sequence[Evaluated], metric: Metric | None, models: dict[str, str]) -> list[Point]:
    """The evaluated policies of all preference runs but for the initial ones, over their evaluated seeds, by epoch; a
    step that some of these lack is named and left out.

    A method is an objective, with the keys (but beta and seed) in which its runs of one model differ."""
    policies = [p for p in found if p.run["objective"] != "sft" and p.step]
    runs = {p.run["name"]: p.run for p in policies}
    points = []
    for model in dict.fromkeys(models[name] for name in runs):
        members = [r for name, r in runs.items() if models[name] == model]
        for (method, value), seeds in group_by_config(members).items():
            by_step: dict[int, list[Evaluated]] = {}
            for policy in policies:
                if policy.run["name"] in {r["name"] for r in seeds}:
                    by_step.setdefault(policy.step, []).append(policy)
            for step, own in sorted(by_step.items()):
                if len(own) < len(seeds):
                    log.warning(
                        f"left out: {model} {method} β={value} at step {step} is evaluated for {len(own)} of its seeds"
                    )
                    continue
                rates = (
                    aggregate_seeds([accuracy_of(p) for p in own]),
                    aggregate_seeds([win_rate_of(p, metric) for p in own]),
                )
                points.append(Point(model, method, value, epoch_of(own[0].run, step), *rates, len(own)))
    return sorted(points, key=lambda p: (p.model, p.method, p.beta or 0.0, p.epoch))


def epoch_of(run: Record, step: int) -> float:
    """Passes over the training pairs, to two digits: the last step of an epoch may go beyond its end."""
    return round(step * run["config"]["batch_size"] / run["data"]["train"]["items"], 2)


def group_by_config(records: Sequence[Record]) -> dict[tuple[str, float | None], list[Record]]:
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


def best_points(points: Iterable[Point], by: str) -> list[Point]:
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
    for (method, value), seeds in group_by_config(records).items():
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
