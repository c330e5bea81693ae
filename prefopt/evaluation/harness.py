"""LM Evaluation Harness over the policies of a run: one record a policy and task."""

import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.results import lm_accuracy, task_names
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import record_of
from prefopt.utils.console import console, say
from prefopt.utils.files import check_folder, write_json

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


def checkpoints(config: HarnessConfig) -> tuple[list[Checkpoint], Path]:
    """What is to be evaluated, and the folder for its records. Raises UserError where it is not there."""
    from prefopt.models.load import checkpoint_path

    if config.output:
        check_folder("output", config.output)
    if config.run is None:
        assert config.output  # checked with the config
        return [Checkpoint(config.model.name, checkpoint_path(config.model), None, config.model.revision)], Path(
            config.output
        )
    if config.checkpoints == "initial":
        model = ModelConfig(**record_of(config.run)["config"]["model"])
        found = [Checkpoint("initial", checkpoint_path(model), 0, model.revision)]
    else:
        found = exported_policies(config.run, config.checkpoints)
    return found, Path(config.output) if config.output else Path(config.run) / "harness"


def preflight(names: list[str]) -> "TaskManager":
    """Raises UserError that names every task that does not exist or whose data are missing."""
    import datasets
    from lm_eval.tasks import TaskManager

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager, problems, failed = TaskManager(), [], []
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # `datasets` and lm-eval raise a dozen kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problems.append(f"task {name} cannot be loaded: {reason}")
            failed.append(name)
    if problems:
        hint = (
            "`lm-eval ls tasks` lists the names. Missing data are fetched on a machine with network: python -m "
            f"prefopt.prefetch 'tasks=[{','.join(failed)}]'"
        )
        raise UserError("\n".join([*problems, hint]))
    return manager


def task_settings(config: HarnessConfig) -> dict[str, Any]:
    """What decides a task's figures besides the weights."""
    return {
        "chat_template": config.chat_template,
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "device": config.device,
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }


def record_file(config: HarnessConfig, folder: Path, checkpoint: Checkpoint, task: str, how: dict[str, Any]) -> Path:
    """Named by all that decides the figures: in a run's own folder its policies are known by their names, and in
    `output` models of one name may meet."""
    which = how if config.output is None else how | {"path": checkpoint.path, "revision": checkpoint.revision}
    digest = hashlib.sha256(json.dumps(which, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{checkpoint.name}-{task}-{digest}.json"


def run_task(lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig) -> dict[str, Any]:
    """The figures of one task, its subtasks' beside them."""
    from lm_eval import simple_evaluate

    began = time.monotonic()
    found = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        limit=config.limit,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
        log_samples=True,
    )
    assert found is not None
    samples = found["samples"]
    return {
        "task": task,
        "metrics": metrics(found["results"][task]),
        "subtasks": {name: metrics(values) for name, values in found["results"].items() if name != task},
        "n": sum(found["n-samples"][name]["effective"] for name in samples),
        "task_versions": found["versions"],
        "fewshot": {name: found["n-shot"][name] for name in samples},
        "fewshot_as_multiturn": config.chat_template,
        "task_hashes": found.get("task_hashes"),
        "first_request": first_request(lm, next(iter(samples.values()))[0]),
        "seconds": time.monotonic() - began,
    }


def metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value", "stderr"}} from lm-eval's "acc,none" and "acc_stderr,none"; a filter other than none stays in
    the name ("exact_match,strict-match")."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr,{filter_}")
        known = isinstance(error, int | float) and not math.isnan(error)  # "N/A" where there is none
        stderr = float(error) if known else None  # type: ignore[arg-type]
        found[name if filter_ == "none" else key] = {"value": value, "stderr": stderr}
    return found


def first_request(lm: "HFLM", sample: dict[str, Any]) -> dict[str, Any]:
    """The token ids that the model is given for the first sample: context and, of a loglikelihood, continuation."""
    context, continuation = sample["arguments"][0][:2]
    if isinstance(continuation, str):
        context_ids, continuation_ids = lm._encode_pair(context, continuation)
        return {"context": context_ids, "continuation": continuation_ids}
    return {"context": lm.tok_encode(context)}


def load(checkpoint: Checkpoint, config: HarnessConfig) -> "HFLM":
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=checkpoint.path,
        revision=checkpoint.revision or "main",
        dtype=config.precision,
        device=config.device,
        batch_size=config.batch_size,
        trust_remote_code=False,
        use_safetensors=True,
    )


def weights_of(lm: "HFLM") -> str:
    """The digest of the weights in the precision in which they are evaluated; in float32 that of the run's record."""
    from prefopt.models.load import weights_digest

    return weights_digest(lm.model)


def format_results(records: list[dict[str, Any]], names: list[str]) -> Table:
    """A row per checkpoint: every task's first metric, and the means."""
    table = Table("checkpoint", *names, "mean acc", "mean acc_norm")
    for name in dict.fromkeys(r["checkpoint"] for r in records):
        own = {r["task"]: r for r in records if r["checkpoint"] == name}
        cells = []
        for task in names:
            metric, numbers = next(iter(own[task]["metrics"].items()))
            error = "" if numbers["stderr"] is None else f" ± {100 * numbers['stderr']:.1f}"
            cells.append(f"{100 * numbers['value']:.1f}{error} ({metric})")
        means = lm_accuracy(list(own.values()))
        cells += [f"{100 * means[key]:.1f}" if means else "–" for key in ("mean acc", "mean acc_norm")]
        table.add_row(name, *cells)
    return table


def run_pending(config: HarnessConfig, **told: str) -> None:
    """Everything that is not recorded yet, and the table; `told` goes into the records."""
    check_harness(config)
    resolve_hardware(config)
    names, how = task_names(config.tasks), task_settings(config)
    found, folder = checkpoints(config)
    todo = {c: [t for t in names if not record_file(config, folder, c, t, how).is_file()] for c in found}
    if any(todo.values()):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = preflight(sorted({task for tasks in todo.values() for task in tasks}))
    for checkpoint, tasks in todo.items():
        if not tasks:
            continue
        lm = load(checkpoint, config)
        weights = weights_of(lm)
        for task in tasks:
            say(f"{checkpoint.path}: {task}")
            facts = {
                "checkpoint": checkpoint.name,
                "step": checkpoint.step,
                "path": checkpoint.path,
                "weights": weights,
                "settings": how,
                **provenance(),
                **told,
            }
            write_json(record_file(config, folder, checkpoint, task, how), run_task(lm, manager, task, config) | facts)
    records = [json.loads(record_file(config, folder, c, t, how).read_text()) for c in found for t in names]
    console().print(format_results(records, names))
    print(folder)
