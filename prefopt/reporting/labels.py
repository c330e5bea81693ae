"""What tells a run from the others in a table."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.tracking.archive import Record, beta
from prefopt.tracking.run import VOLATILE, flatten
from prefopt.utils.fingerprint import class_names

OF_SEED = ("model.path", "dataset.train", "dataset.heldout")  # where what a run begins with lies


def flat_config(record: Record) -> dict[str, Any]:
    """The run's config with dotted keys."""
    # 2.0, a default, and 2, from a command line, are one value.
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in flatten(class_names(record["config"]))
    }


def flat_configs(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Their `flat_config`s, in which a path of `OF_SEED` that names the run's seed has `${seed}` in its place, if those
    of all runs of this model do: each seed has a policy and data of its own, and a table shows them as one method."""
    flat = [flat_config(record) for record in records]
    for key in OF_SEED:
        by_model: dict[Any, list[dict[str, Any]]] = {}
        for config in flat:
            if isinstance(config.get(key), str):
                by_model.setdefault(config.get("model.name"), []).append(config)
        for configs in by_model.values():
            parts = [config[key].split("/") for config in configs]
            if all(str(config["seed"]) in of_path for config, of_path in zip(configs, parts, strict=True)):
                for config, of_path in zip(configs, parts, strict=True):
                    config[key] = "/".join("${seed}" if part == str(config["seed"]) else part for part in of_path)
    return flat


def labels(records: list[Record], without: Sequence[str] = ()) -> list[str]:
    """What tells a run from the others: objective, beta, and every other key in which runs of one objective differ, but
    for the keys `without`, and those of the data that follow from its name. The objective's own keys come without their
    `objective.`; a key that is null, or that the run lacks, is left out. Runs of one objective have the same label if
    and only if they agree in all these."""
    flat = flat_configs(records)
    # Of each objective, by key: the values in its runs, by their repr.
    values: dict[str, dict[str, dict[str, Any]]] = {r["objective"]: {} for r in records}
    for record, config in zip(records, flat, strict=True):
        for key, value in config.items():
            values[record["objective"]].setdefault(key, {})[repr(value)] = value
    for record, config in zip(records, flat, strict=True):
        of_objective = values[record["objective"]]
        for key in of_objective.keys() - config.keys():
            of_objective[key]["None"] = None  # a key that this run lacks tells it apart from runs that have it

    apart = {
        objective: {
            key: shortest_texts(of_objective[key])
            for key in sorted(of_objective)
            if len(of_objective[key]) > 1
            and key not in ("objective.beta", "objective.base.beta", *without)
            and key.split(".")[0] not in VOLATILE
        }
        for objective, of_objective in values.items()
    }
    for objective, keys in apart.items():
        if "dataset.name" in keys:  # what follows from the data's name needs no place beside it
            configs = [c for r, c in zip(records, flat, strict=True) if r["objective"] == objective]
            number = len({c.get("dataset.name") for c in configs})
            for key in [key for key in keys if key.startswith("dataset.") and key != "dataset.name"]:
                if len({(c.get("dataset.name"), repr(c.get(key))) for c in configs}) == number:
                    del keys[key]
    names = []
    for record, config in zip(records, flat, strict=True):
        parts = [record["objective"]] + ([f"β={beta(record):g}"] if beta(record) is not None else [])
        for key, texts in apart[record["objective"]].items():
            if config.get(key) is not None:
                parts.append(f"{key.removeprefix('objective.')}={texts[repr(config[key])]}")
        names.append(" ".join(parts))
    return names


def sort_by_label(records: list[Record]) -> list[Record]:
    """The records by their labels, numbers in these by size. (By folder name they would be ordered by digests.)"""
    keys = [re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", label) for label in labels(records)]
    sizes = [[float(part) if i % 2 else part for i, part in enumerate(key)] for key in keys]
    return [records[i] for i in sorted(range(len(records)), key=sizes.__getitem__)]


def shortest_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values by their repr, as people read them: four digits, no quotes (but around a blank, which parts the keys of a
    label); exactly, where two would read the same."""
    texts = {
        exact: f"{v:.4g}" if isinstance(v, float) else v if isinstance(v, str) and " " not in v else exact
        for exact, v in values.items()
    }
    return texts if len(set(texts.values())) == len(texts) else {exact: exact for exact in values}
