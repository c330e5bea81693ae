"""LM Evaluation Harness over the policies of runs. One JSON record per policy and task, and lm-eval's own files."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.harness_model import (
    RequestCounts,
    check_texts,
    check_weights,
    first_request,
    load,
    weights_of,
)
from prefopt.evaluation.harness_table import format_results, metrics, said_of_lengths, said_of_unused, shown
from prefopt.evaluation.initial import initial_model, initial_weights
from prefopt.evaluation.lm_eval_files import write_lm_eval_files
from prefopt.evaluation.results import FIGURE_SETTINGS, task_names
from prefopt.evaluation.tasks import (
    OwnTasks,
    check_used,
    expand_tags,
    preflight,
    read_own_tasks,
    task_manager,
    unused_in_requests,
    unused_settings,
)
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, each_run, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import find_result, read_result, write_result
from prefopt.utils.console import console
from prefopt.utils.files import check_folder
from prefopt.utils.locks import locked

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")  # their versions are part of a record

Subject = tuple[HarnessConfig, Checkpoint, Path]  # a model to evaluate: its run's config, itself, the records' folder


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
        policies = [Checkpoint("initial", initial, 0, initial_weights(config.run))]
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


def task_settings(config: HarnessConfig, task: str = "", own: OwnTasks | None = None) -> dict[str, Any]:
    """Everything besides the weights that decides a task's figures."""
    return {
        **{key: getattr(config, key) for key in (*FIGURE_SETTINGS, "batch_size", "precision", "device")},
        "gen_kwargs": dict(config.gen_kwargs) or None,
        "include": own.digest if own and task in own.names else None,
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }


def evaluation_key(config: HarnessConfig, checkpoint: Checkpoint, how: dict[str, Any]) -> str:
    """Eight digits of a digest of the settings `how` and of the model's files, which another training may have written
    anew."""
    model = checkpoint.model
    identity = how | {"files": local_files(model), "template": template_keys(model) if config.chat_template else None}
    if config.output is not None:  # several models of one name may have their records in this folder
        identity |= {"path": model.place, "revision": model.revision, "tokenizer": model.tokenizer}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def record_file(config: HarnessConfig, folder: Path, checkpoint: Checkpoint, task: str, how: dict[str, Any]) -> Path:
    """The file of a record."""
    return folder / f"{checkpoint.name}-{task}-{evaluation_key(config, checkpoint, how)}.json"


def template_keys(model: ModelConfig) -> list[Any]:
    """The keys of a model that decide how its template writes."""
    return [model.eos_token, model.chat_template_kwargs, model.system_message, model.date]


def evaluate_task(lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig) -> tuple[Any, RequestCounts]:
    """What lm-eval's `simple_evaluate` returns of one task, and what was counted. Raises UserError for a task that
    needs a model of longer contexts."""
    from lm_eval import simple_evaluate

    describe_environment_once()
    counts = RequestCounts(lm)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints there what it finds for batch_size=auto
            results = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                batch_size=config.batch_size,
                limit=config.limit,
                system_instruction=config.system_instruction,
                gen_kwargs=dict(config.gen_kwargs) or None,
                apply_chat_template=config.chat_template,
                fewshot_as_multiturn=config.chat_template,
                log_samples=True,
            )
    except AssertionError as error:
        if "maximum sequence length" not in str(error):
            raise
        raise UserError(f"task {task}: {error}") from None  # the task generates more than the model has positions
    finally:
        counts.stop()
    assert results is not None  # it is None on ranks above 0 only
    return results, counts


def describe_environment_once() -> None:
    """lm-eval describes the environment in every result, with a `pip list` that takes two seconds. In one process it
    stays the same, so it is kept."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


def summarize(
    lm: "HFLM", task: str, results: Any, counts: RequestCounts, config: HarnessConfig, own: OwnTasks | None
) -> dict[str, Any]:
    """The record of a task: its metrics, those of its subtasks, and how they were computed."""
    title = own.title if own else str
    samples = results["samples"]
    by_name = {title(name): metrics(values) for name, values in results["results"].items()}
    children = {title(name): list(map(title, parts)) for name, parts in results["group_subtasks"].items()}
    name = title(task)
    return {
        "task": name,
        "metrics": by_name.get(name, {}),
        "subtasks": {part: values for part, values in by_name.items() if part != name},
        "shown": shown(name, by_name, children) or [part for part, values in by_name.items() if values],
        "higher_is_better": {title(part): value for part, value in results["higher_is_better"].items()},
        "requests": {"n": counts.n, "cut_from_the_left": counts.cut, "max_length": lm.max_length},
        "batch_sizes": counts.batch_sizes or [config.batch_size],
        "n": sum(results["n-samples"][part]["effective"] for part in samples),
        "task_versions": results["versions"],
        "fewshot": {part: results["n-shot"].get(part) for part in samples},
        "fewshot_as_multiturn": config.chat_template,
        "task_hashes": results.get("task_hashes"),
        "first_request": next((first_request(lm, rows[0]) for rows in samples.values() if rows), None),
    }


def run_task(
    lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig, own: OwnTasks | None, folder: Path
) -> dict[str, Any]:
    """Evaluate one task, and write lm-eval's own files of it into `folder`. The task's part of its record."""
    start = time.monotonic()
    results, counts = evaluate_task(lm, manager, task, config)
    record = summarize(lm, task, results, counts, config, own)
    unused = {
        (key, name) for name, one in manager.load([task])["tasks"].items() for key in unused_settings(one, config)
    }
    unused |= set(unused_in_requests(results["samples"], config))
    record["unused"] = {key: sorted(name for k, name in unused if k == key) for key in sorted({k for k, _ in unused})}

    model = {"pretrained": lm.pretrained, "dtype": config.precision, "max_length": config.max_length}
    template = lm.tokenizer.chat_template if config.chat_template else None
    how = {"chat_template": template, "fewshot_as_multiturn": config.chat_template}
    write_lm_eval_files(folder, results, model, how | {"system_instruction": config.system_instruction})
    return record | {"lm_eval_files": folder.name, "seconds": time.monotonic() - start}


def run_pending(config: HarnessConfig, **extra: str) -> None:
    """Evaluate every checkpoint and task that has no record yet, and print the table of all. `extra` goes into the
    records. Raises UserError for what is missing, before a model is loaded."""
    check_harness(config)
    resolve_hardware(config)
    names, own = task_names(config.tasks), read_own_tasks(config.include)
    # Every checkpoint with the config of its run alone.
    configs = each_run(config)
    subjects = [
        (one, checkpoint, folder)
        for one in configs
        for policies, folder in [checkpoints(one)]
        for checkpoint in policies
    ]

    known = functools.cache(find_result)

    def file_of(subject: Subject, task: str) -> Path:
        one, checkpoint, folder = subject
        title = own.title(task) if own else task
        return record_file(one, folder, checkpoint, title, task_settings(one, task, own))

    def pending() -> list[tuple[Subject, list[str]]]:
        todo = [(subject, [task for task in names if known(file_of(subject, task)) is None]) for subject in subjects]
        return [(subject, tasks) for subject, tasks in todo if tasks]

    if pending():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = task_manager(own, names)
        names = expand_tags(names, manager)
        check_used(preflight(sorted({task for _, tasks in pending() for task in tasks}), manager), config)
        for (one, checkpoint, _), _ in pending():
            check_texts(checkpoint.model, one)  # refused before anything large is read

    for subject, tasks in pending():
        one, checkpoint, folder = subject
        check_weights(checkpoint, one)
        lm = load(checkpoint, one)
        facts = {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "path": checkpoint.path,
            "weights": weights_of(lm),
            **provenance(),
            **extra,
        }
        # One call per task: its figures must not depend on which other tasks were asked for.
        for task in tasks:
            log.info(f"{checkpoint.path}: {task}")
            how = task_settings(one, task, own)
            file, evaluation = file_of(subject, task), f"{checkpoint.name}-{evaluation_key(one, checkpoint, how)}"
            with locked(file.with_suffix(".lock"), f"{task} of {checkpoint.path}"):
                if find_result(file) is None:  # another process may have evaluated it meanwhile
                    record = run_task(lm, manager, task, one, own, folder / "lm_eval" / evaluation)
                    write_result(file, record | facts | {"settings": how})
        del lm  # before the next one is loaded

    rows = [(_label(subject, len(configs)), read_result(file_of(subject, t))) for subject in subjects for t in names]
    console().print(format_results(rows))
    for label, record in rows:
        for line in (said_of_lengths(record), said_of_unused(record)):
            if line:
                print(f"{label}, {record['task']}: {line}")
    for folder in dict.fromkeys(folder for _, _, folder in subjects):
        print(folder)


def _label(subject: "Subject", runs: int) -> str:
    """The name of a checkpoint in tables; where there are several runs, with its run's."""
    config, checkpoint, _ = subject
    return f"{Path(config.run).name}/{checkpoint.name}" if runs > 1 and config.run else checkpoint.name
