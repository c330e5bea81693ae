"""record.json of a run, or of a job of a sweep: the place that reads, checks and writes it."""

import contextlib
import json
import logging
import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.tracking.process import STATES, resolve_status
from prefopt.utils.files import refresh_nfs, write_json, write_plain_json
from prefopt.utils.locks import open_lock
from prefopt.utils.redact import redact_values
from prefopt.utils.stats import share_error
from prefopt.utils.store import SEAL, seal, unseal

log = logging.getLogger(__name__)

# The kinds of values in a record. A bool is an int in Python, and is no number here.
TEXT, NUMBER, WHOLE, MAPPING, ROWS = (str,), (int, float), (int,), (dict,), (list,)
TEXT_OR_NULL, WHOLE_OR_NULL = (str, type(None)), (int, type(None))
KINDS = {
    str: "text", int: "a whole number", float: "a number", dict: "a mapping", list: "a list", bool: "true or false",
    type(None): "null",
}  # fmt: skip
Shape = dict[str, tuple[type, ...]]

# What the keys (with dots) of every record are, where it has them.
RECORD: Shape = {
    "status": TEXT,
    "name": TEXT,
    "id": TEXT,
    "objective": TEXT,
    "command": TEXT_OR_NULL,
    "error": TEXT_OR_NULL,
    "host": TEXT_OR_NULL,
    "pid": WHOLE_OR_NULL,
    "pid_born": TEXT_OR_NULL,
    "since": TEXT_OR_NULL,
    "slurm_job": TEXT_OR_NULL,
    "attempt": WHOLE,
    "initial_weights": TEXT_OR_NULL,
    "final_weights": TEXT_OR_NULL,
    "config": MAPPING,
    "config.model": MAPPING,
    "config.model.name": TEXT,
    "config.model.path": TEXT,
    "config.dataset": MAPPING,
    "config.dataset.name": TEXT,
    "config.objective": MAPPING,
    "config.objective.beta": (int, float, type(None)),
    "config.objective.base": (dict, type(None)),
    "config.objective.base.beta": (int, float, type(None)),
    "config.seed": WHOLE,
    "config.precision": TEXT,
    "config.steps": WHOLE_OR_NULL,
    "config.batch_size": WHOLE,
    "data": MAPPING,
    "model": MAPPING,
    "data.train": MAPPING,
    "data.train.items": WHOLE,
    "evaluations": ROWS,
    "stages": ROWS,
    "files": MAPPING,
    "metrics": MAPPING,
    "metrics.length": WHOLE,
    "metrics.sha256": TEXT,
    "seconds": NUMBER,
    "continued_from": (dict, type(None)),
    "continued_from.run": TEXT,
    "continued_from.step": WHOLE,
    "continued_from.same_as_from_the_start": (bool,),
    "git": (dict, type(None)),
    "git.commit": TEXT,
    "git.dirty": (bool,),
    "machine": MAPPING,
    "machine.cores": WHOLE,
    "machine.processor": TEXT,
    "machine.instructions": TEXT,
    "machine.memory_gib": NUMBER,
    "machine.gpus": ROWS,
    "versions": MAPPING,
    "versions.torch": TEXT,
    "versions.transformers": TEXT,
    "harness": ROWS,
    "alpaca": ROWS,
    "reward_bench": ROWS,
    "mtbench": ROWS,
    "arena": ROWS,
}
# The keys that a finished training run has, and no table can be made without.
FINISHED = (
    "name", "objective", "config.model.name", "config.model.path", "config.dataset.name", "config.objective",
    "config.seed", "config.precision", "evaluations", "initial_weights", "seconds", "git", "machine.cores",
    "machine.processor", "machine.instructions", "machine.memory_gib", "machine.gpus", "versions.torch",
    "versions.transformers",
)  # fmt: skip
# The results of the programs that evaluate policies, all of whose keys are needed.
HARNESS: Shape = {
    "task": TEXT,
    "checkpoint": TEXT,
    "step": WHOLE,
    "metrics": MAPPING,
    "settings": MAPPING,
    "settings.limit": (int, float, type(None)),
    "settings.num_fewshot": WHOLE_OR_NULL,
    "settings.chat_template": (bool,),
    "git": (dict, type(None)),
}
ALPACA: Shape = {
    "checkpoint": TEXT,
    "step": WHOLE,
    "judge": MAPPING,
    "judge.name": TEXT,
    "baseline": MAPPING,
    "baseline.name": TEXT,
    "baseline.weights": TEXT_OR_NULL,
    "settings": MAPPING,
    "settings.instructions": TEXT,
    "settings.sampling": MAPPING,
    "settings.revision": TEXT_OR_NULL,
    "figures": MAPPING,
    "figures.n": WHOLE,
    "figures.win_rate": NUMBER,
    "figures.standard_error": NUMBER,
    "git": (dict, type(None)),
}
REWARD_BENCH: Shape = {
    "checkpoint": TEXT,
    "step": WHOLE_OR_NULL,
    "rows": TEXT,
    "reward": MAPPING,
    "reward.kind": TEXT,
    "settings": MAPPING,
    "settings.rows": TEXT,
    "figures": MAPPING,
    "figures.benchmark": TEXT_OR_NULL,
    "figures.subsets": MAPPING,
    "figures.sections": MAPPING,
    "figures.overall": (dict, type(None)),
    "git": (dict, type(None)),
}
JUDGED: Shape = {
    "checkpoint": TEXT,
    "step": WHOLE,
    "metric": TEXT,
    "judge": MAPPING,
    "judge.name": TEXT,
    "settings": MAPPING,
    "figures": MAPPING,
    "figures.n": WHOLE,
    "figures.missing": WHOLE,
    "git": (dict, type(None)),
}
MTBENCH: Shape = {**JUDGED, "figures.score": NUMBER, "figures.standard_error": NUMBER}
ARENA: Shape = {
    **JUDGED,
    "baseline": MAPPING,
    "baseline.name": TEXT,
    "settings.version": TEXT,
    "figures.win_rate": NUMBER,
    "figures.standard_error": NUMBER,
}
SHAPES = {"harness": HARNESS, "alpaca": ALPACA, "reward_bench": REWARD_BENCH, "mtbench": MTBENCH, "arena": ARENA}


def load_record(file: Path) -> dict[str, Any]:
    """The record of a run, or of a job of a sweep. Raises UserError for a file that is not a record."""
    advice = "Bring it back, or move its folder away."
    if (file.parent / "checkpoints").is_dir():
        advice = (
            "Bring it back, or remove this file alone: the same command then goes on from the last checkpoint, bit for "
            "bit."
        )
    try:
        record = read_json(file)
    except UserError as error:
        raise UserError(f"{error} {advice}") from None
    if problem := next(record_problems(record), None):
        raise UserError(f"{file} is no run's record: {problem}. {advice}")
    return record


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises UserError, which names the file, where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {KINDS.get(type(content))}, and should hold a mapping.")
    return content


def record_problems(record: dict[str, Any], finished: bool = False) -> Iterator[str]:
    """What keeps `record` from being a run's record; with `finished`, one that tables can be made of."""
    yield from shape_problems(record, RECORD, FINISHED if finished else ("status",))
    if record.get("status") not in STATES:
        yield f"its status is {record.get('status')!r}"
    if isinstance(record.get("git"), dict):
        yield from shape_problems(record, {}, ("git.commit", "git.dirty"))
    evaluations = record.get("evaluations")
    if not isinstance(evaluations, list):
        return
    for row in evaluations:
        if not isinstance(row, dict) or not is_kind(row.get("step"), WHOLE):
            yield f"a row of its evaluations is {str(row)[:60]}"
            return
        where = f"its evaluation after step {row['step']}"
        for key, value in row.items():
            if key not in NO_FIGURES and not is_kind(value, NUMBER):
                yield f"{key} in {where} is no number"
            elif key in MOST and (value < 0 or value > MOST[key]):
                yield f"{key} in {where} is {value}"
        for first, *others in TOGETHER:
            if (first in row) != (first in evaluations[0]) or (first in row and not row.keys() >= {*others}):
                yield f"{where} lacks some of {', '.join([first, *others])}"


def heldout_accuracy(evaluation: Mapping[str, Any]) -> tuple[float, float] | None:
    """The accuracy of an evaluation and its standard error over the held-out pairs. None where it has none, and where
    all pairs tie, as where policy and reference are equal: then the accuracy of 0 says nothing."""
    accuracy, n = evaluation.get("accuracy"), evaluation.get("n")
    if accuracy is None or not n or all_tie(evaluation):
        return None
    return accuracy, share_error(accuracy, n)


def all_tie(evaluation: Mapping[str, Any]) -> bool:
    """Whether no held-out pair has two different scores."""
    return bool(evaluation.get("tie_rate") == 1)


NO_FIGURES = ("split", "reliability")  # of what an evaluation holds
# The shares and counts in an evaluation, of which standard errors are made: none is below 0 or above this.
MOST = {"accuracy": 1, "tie_rate": 1, "sample_finished": 1, "n": math.inf, "samples": math.inf}
# Figures that an evaluation has together, and all evaluations of a run or none.
TOGETHER = (
    ("chosen_logps",),
    ("oracle_reward", "oracle_reward_se", "kl"),
    ("kl", "kl_se", "samples"),
    ("calibration_error", "loss"),
)


def result_problems(result: dict[str, Any], kind: str) -> Iterator[str]:
    """What keeps `result` from being a record of a program that evaluates; `kind` is a key of SHAPES."""
    yield from shape_problems(result, SHAPES[kind], tuple(SHAPES[kind]))
    if kind != "harness":
        return
    metrics = result.get("metrics")
    for name, metric in metrics.items() if isinstance(metrics, dict) else []:
        if not isinstance(metric, dict) or not is_kind(metric.get("value"), (int, float, str, type(None))):
            yield f"its metric {name} has no value"
        elif name in ("acc", "acc_norm") and not is_kind(metric["value"], NUMBER):
            yield f"its metric {name} is no number"


def shape_problems(node: dict[str, Any], shape: Shape, required: tuple[str, ...]) -> Iterator[str]:
    """The keys (with dots) of `node` that are of another kind than `shape` says, and the `required` ones it lacks."""
    for key in dict.fromkeys([*shape, *required]):
        place: Any = node
        for part in key.split("."):
            if not isinstance(place, dict) or part not in place:
                if key in required:
                    yield f"it has no {key}"
                break
            place = place[part]
        else:
            if key in shape and not is_kind(place, shape[key]):
                wanted = " or ".join(KINDS[kind] for kind in shape[key])
                yield f"its {key} is {KINDS.get(type(place))}, and should be {wanted}"


def is_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether `value` is of one of these types. A bool is none of int."""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def read_record(folder: Path) -> dict[str, Any]:
    """The newest record in a run's folder, also where another machine writes it. Raises UserError as `load_record`.

    A job that is queued in Slurm gets its `slurm_job` from job.json: the submitter learns the id after sbatch, when the
    job itself may be writing its record already.
    """
    refresh_nfs(folder)
    record = load_record(folder / "record.json")
    if record["status"] == "queued" and not record.get("slurm_job") and (folder / "job.json").is_file():
        record["slurm_job"] = read_json(folder / "job.json").get("slurm_job")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replace the record in `folder` in one step."""
    write_json(folder / "record.json", record)


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write the result of an evaluation, sealed (`utils/store.py`). Secrets are redacted."""
    write_plain_json(file, seal(redact_values(result)))


def read_result(file: Path) -> dict[str, Any]:
    """What `write_result` has written. Raises UserError, which names the file, where it is damaged."""
    content = read_json(file)
    result = unseal(content)
    if result is None and SEAL in content:
        raise UserError(f"{file} is damaged: it is not what its {SEAL} was made of.")
    return content if result is None else result


def find_result(file: Path) -> dict[str, Any] | None:
    """The result in `file`; None where there is none, or where it is damaged, which the log says."""
    if not file.is_file():
        return None
    try:
        result = unseal(read_json(file))
        why = f"{file} is damaged: it is not what its {SEAL} was made of."
    except UserError as error:
        result, why = None, str(error)
    if result is None:
        log.warning(f"  {why} It is made anew.")
    return result


def update_record(folder: Path, **facts: object) -> None:
    """Merge `facts` into the record of a run that no other process writes."""
    record = read_json(folder / "record.json")
    write_record(folder, record | facts)


@contextlib.contextmanager
def amending(folder: Path) -> Iterator[None]:
    """Inside, no other process that is not its owner amends the record in `folder`. Whoever is not the owner has to
    look at the record in here, and may change it only where the owner is gone, or it is queued by this process."""
    with open_lock(folder / "record.lock"):
        yield


def give_up(folder: Path, pids: tuple[int, ...], **facts: object) -> None:
    """Merge `facts` into the record in `folder`, unless it has ended, or a process other than `pids` has it: then
    another sweep has taken it over."""
    with amending(folder):
        record = read_record(folder)
        ours = record.get("host") == socket.gethostname() and record.get("pid") in pids
        if record["status"] in ("queued", "running") and (ours or resolve_status(record) == "died"):
            write_record(folder, record | facts)


def record_of(run: str) -> dict[str, Any]:
    """The record of the training run in the folder `run`, as the user names it. Raises UserError for another folder."""
    file = Path(run) / "record.json"
    if not file.is_file():
        raise UserError(f"run={run} is no run's folder: it holds no record.json")
    record = load_record(file)
    if not isinstance(record.get("config", {}).get("model"), dict):
        raise UserError(f"run={run} is no training run: its record.json says of no model which it began from")
    return record
