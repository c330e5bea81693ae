"""A configuration's value from the runs that did best: `optimizer.lr=${best:runs/tuning,optimizer.lr}`."""

import statistics
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefopt.errors import UserError
from prefopt.tracking.run import flatten
from prefopt.tracking.status import inspect_runs


def register_best() -> None:
    """Let configurations use `${best:FOLDER,KEY}` and `${best:FOLDER,KEY,MEASURE}`."""
    OmegaConf.register_new_resolver("best", best, replace=True)


def best(folder: str, key: str, measure: str | None = None, *, _root_: DictConfig) -> Any:
    """The value of `key` (with dots) that is best in those runs in `folder` that have the objective (and base) of the
    configuration `_root_`: its runs end with the highest mean `measure`, a figure of the evaluations. None: the oracle
    reward; where no run has an oracle, the held-out accuracy.

    Raises UserError where there is no such run, one has no such key or figure, or one has not finished: with that one
    the choice might be another.
    """
    method = _method(OmegaConf.to_container(_root_.objective))  # type: ignore[arg-type]  # a mapping
    what = f"the best {key} in {folder}"
    runs = inspect_runs(sorted(file.parent for file in Path(folder).glob("*/record.json")))
    if damaged := [run.folder.name for run in runs if run.state == "damaged"]:
        raise UserError(f"{what}: these records cannot be read: {', '.join(damaged)}")
    runs = [run for run in runs if _method(run.record["config"]["objective"]) == method]
    if not runs:
        raise UserError(f"{what}: it has no run with objective {' of '.join(method)}. Train some first.")
    if unfinished := [run.folder.name for run in runs if run.state != "finished"]:
        raise UserError(f"{what}: these runs have not finished: {', '.join(unfinished)}")
    ends: list[dict[str, Any]] = [(run.record.get("evaluations") or [{}])[-1] for run in runs]
    measure = measure or ("oracle_reward" if any("oracle_reward" in end for end in ends) else "accuracy")
    measured: dict[Any, list[float]] = {}
    for run, end in zip(runs, ends, strict=True):
        value = dict(flatten(run.record["config"])).get(key)  # OmegaConf's own look into a record takes 20 ms
        if value is None or not isinstance(end.get(measure), int | float):
            raise UserError(f"{what}: {run.folder.name} has no {key if value is None else measure}")
        measured.setdefault(value, []).append(end[measure])
    return max(measured, key=lambda value: statistics.fmean(measured[value]))


def _method(objective: dict[str, Any]) -> list[str]:
    """The names of the objective's class and of that of its base."""
    parts = [objective, objective.get("base") or {}]
    return [part["_target_"].rpartition(".")[2] for part in parts if "_target_" in part]
