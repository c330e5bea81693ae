"""LM Evaluation Harness over the policies of a run. One JSON record per policy and task."""

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
from prefopt.evaluation.initial import initial_model
from prefopt.evaluation.results import lm_accuracy, task_names
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder, write_json

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")  # their versions are part of a record


def checkpoints(config: HarnessConfig) -> tuple[list[Checkpoint], Path]:
    """The models to evaluate, and the folder for their records. Raises UserError where there is no such model."""
    if config.output:
        check_folder("output", config.output)
    if config.run is None:
        assert config.output  # check_harness wants a run or an output
        check_as_it_is(config.model)
        return [Checkpoint(config.model.name, config.model)], Path(config.output)

    if config.checkpoints == "initial":
        initial = initial_model(config.run)
        check_as_it_is(initial)
        policies = [Checkpoint("initial", initial, 0)]
    else:
        policies = exported_policies(config.run, config.checkpoints)
    return policies, Path(config.output) if config.output else Path(config.run) / "harness"


def check_as_it_is(model: ModelConfig) -> None:
    """Raise UserError for a model that is not what lies in its folder."""
    if model.resize_embeddings:
        raise UserError(
            "model.resize_embeddings: lm-eval loads a model as it lies in its folder, without the new embeddings. "
            "Evaluate the policy of a run instead, which has them."
        )


def preflight(names: list[str]) -> "TaskManager":
    """Load all tasks with their data, and return lm-eval's task manager. Raises one UserError that names every task
    which does not exist or lacks its data."""
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
    """Everything besides the weights that decides a task's figures."""
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
    """The file of a record. Its name holds the checkpoint, the task, and a digest of the settings `how` and of the
    model's files, which another training may have written anew."""
    model = checkpoint.model
    identity = how | {"files": local_files(model), "template": template_keys(model) if config.chat_template else None}
    if config.output is not None:  # several models of one name may have their records in this folder
        identity |= {"path": model.path, "revision": model.revision}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{checkpoint.name}-{task}-{digest}.json"


def template_keys(model: ModelConfig) -> list[Any]:
    """The keys of a model that decide how its template writes."""
    return [model.eos_token, model.chat_template_kwargs, model.system_message, model.date]


def run_task(lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig) -> dict[str, Any]:
    """Evaluate one task: its metrics, those of its subtasks, and how they were computed."""
    from lm_eval import simple_evaluate

    start = time.monotonic()
    results = simple_evaluate(
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
    assert results is not None  # it is None on ranks above 0 only
    samples = results["samples"]
    return {
        "task": task,
        "metrics": metrics(results["results"][task]),
        "subtasks": {name: metrics(values) for name, values in results["results"].items() if name != task},
        "n": sum(results["n-samples"][name]["effective"] for name in samples),
        "task_versions": results["versions"],
        "fewshot": {name: results["n-shot"][name] for name in samples},
        "fewshot_as_multiturn": config.chat_template,
        "task_hashes": results.get("task_hashes"),
        "first_request": first_request(lm, next(iter(samples.values()))[0]),
        "seconds": time.monotonic() - start,
    }


def metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value", "stderr"}} from lm-eval's {"acc,none", "acc_stderr,none"}. A filter other than none stays in
    the name: "exact_match,strict-match". `stderr` is None where lm-eval has none."""
    by_name: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr"):  # not a metric: the task's alias, or an error, which is read below
            continue
        error = values.get(f"{name}_stderr,{filter_}")
        known = isinstance(error, int | float) and not math.isnan(error)  # lm-eval writes "N/A" for none
        stderr = float(error) if known else None  # type: ignore[arg-type]
        by_name[name if filter_ == "none" else key] = {"value": value, "stderr": stderr}
    return by_name


def first_request(lm: "HFLM", sample: dict[str, Any]) -> dict[str, Any]:
    """The token ids of a sample as the model reads them: the context, and for a loglikelihood the continuation. In a
    record they show how chat template and special tokens were applied."""
    context, continuation = sample["arguments"][0][:2]
    if isinstance(continuation, str):
        context_ids, continuation_ids = lm._encode_pair(context, continuation)
        return {"context": context_ids, "continuation": continuation_ids}
    return {"context": lm.tok_encode(context)}


def load(checkpoint: Checkpoint, config: HarnessConfig) -> "HFLM":
    """lm-eval's model of a checkpoint. It runs no code that comes with a model, and reads no pickles.

    lm-eval gives `generate` the task's own settings (of which greedy decoding is the default) and the longest length,
    and leaves the rest to the model's generation_config. That is taken away but for its stop tokens.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    from prefopt.models.generation_config import stop_tokens
    from prefopt.models.load import checkpoint_path
    from prefopt.models.safe_weights import check_weights, no_pickles

    model = checkpoint.model
    path = checkpoint_path(model)
    check_weights(path, model.revision)
    with no_pickles(path):
        lm = HFLM(
            pretrained=path,
            revision=model.revision or "main",
            tokenizer=tokenizer_of(model, config),
            dtype=config.precision,
            device=config.device,
            batch_size=config.batch_size,
            trust_remote_code=False,
            use_safetensors=True,
        )
    stops = stop_tokens(lm.tokenizer, lm.model.config, lm.model.generation_config)
    lm.model.generation_config = GenerationConfig(eos_token_id=stops)
    return lm


def tokenizer_of(model: ModelConfig, config: HarnessConfig) -> Any:
    """The tokenizer for lm-eval, where it needs another than it finds beside the model; else None."""
    if config.chat_template:  # with the template as the model's keys change it
        from prefopt.models.load import load_tokenizer

        return load_tokenizer(model)
    if model.tokenizer:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
    return None


def weights_of(lm: "HFLM") -> str:
    """The digest of the weights in the precision of the evaluation. In float32 it is the one in the run's record."""
    from prefopt.models.load import weights_digest

    return weights_digest(lm.model)


def format_results(records: list[dict[str, Any]], names: list[str]) -> Table:
    """A row per checkpoint: the first metric of every task, and the means over tasks."""
    table = folding_table("checkpoint", *names, "mean acc", "mean acc_norm")
    for name in dict.fromkeys(r["checkpoint"] for r in records):
        by_task = {r["task"]: r for r in records if r["checkpoint"] == name}
        cells = []
        for task in names:
            metric, numbers = next(iter(by_task[task]["metrics"].items()))
            error = "" if numbers["stderr"] is None else f" ± {100 * numbers['stderr']:.1f}"
            cells.append(f"{100 * numbers['value']:.1f}{error} ({metric})")
        means = lm_accuracy(list(by_task.values()))
        cells += [f"{100 * means[key]:.1f}" if means else "–" for key in ("mean acc", "mean acc_norm")]
        table.add_row(name, *cells)
    return table


def run_pending(config: HarnessConfig, **extra: str) -> None:
    """Evaluate every checkpoint and task that has no record yet, and print the table of all. `extra` goes into the
    records. Raises UserError for what is missing, before a model is loaded."""
    check_harness(config)
    resolve_hardware(config)
    names, how = task_names(config.tasks), task_settings(config)
    policies, folder = checkpoints(config)
    pending = [
        (checkpoint, [t for t in names if not record_file(config, folder, checkpoint, t, how).is_file()])
        for checkpoint in policies
    ]
    if any(tasks for _, tasks in pending):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = preflight(sorted({task for _, tasks in pending for task in tasks}))

    for checkpoint, tasks in pending:
        if not tasks:
            continue
        lm = load(checkpoint, config)
        weights = weights_of(lm)
        # One call per task: its figures must not depend on which other tasks were asked for.
        for task in tasks:
            log.info(f"{checkpoint.path}: {task}")
            facts = {
                "checkpoint": checkpoint.name,
                "step": checkpoint.step,
                "path": checkpoint.path,
                "weights": weights,
                "settings": how,
                **provenance(),
                **extra,
            }
            write_json(record_file(config, folder, checkpoint, task, how), run_task(lm, manager, task, config) | facts)

    records = [json.loads(record_file(config, folder, c, t, how).read_text()) for c in policies for t in names]
    console().print(format_results(records, names))
    print(folder)
