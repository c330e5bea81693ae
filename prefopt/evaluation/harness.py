"""LM Evaluation Harness over the policies of a run. One JSON record per policy and task."""

import functools
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
from prefopt.evaluation.initial import initial_model, initial_weights
from prefopt.evaluation.results import lm_accuracy, task_names
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import find_result, read_result, write_result
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder
from prefopt.utils.locks import locked

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


def preflight(names: list[str]) -> "TaskManager":
    """Load all tasks with their data, and return lm-eval's task manager. Raises one UserError that names every task
    which does not exist, lacks its data, or cannot be run here."""
    import datasets
    from lm_eval.tasks import TaskManager

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager, problems, failed = TaskManager(), [], []
    for name in names:
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # `datasets` and lm-eval raise a dozen kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problems.append(f"task {name} cannot be loaded: {reason}")
            failed.append(name)
            continue
        if not tasks:
            problems.append(f"{name} names no task")
        for task_name, task in tasks.items():  # what lm-eval refuses after the model is loaded
            if getattr(task, "UNSAFE_CODE", False):
                problems.append(f"task {task_name} runs code that the model writes, which is not done here")
            if getattr(task, "MULTIMODAL", False):
                problems.append(f"task {task_name} needs a model that reads images or sound")
    if failed:
        problems.append(
            "`lm-eval ls tasks` lists the names. Missing data are fetched on a machine with network: python -m "
            f"prefopt.prefetch 'tasks=[{','.join(failed)}]'"
        )
    if problems:
        raise UserError("\n".join(problems))
    return manager


def expand_tags(names: list[str]) -> list[str]:
    """`names` with the tasks of a tag (`ai2_arc`, `glue`) in its place, each name once. lm-eval evaluates a tag's tasks
    as if they had been named, and has no figure of the tag. Groups stay: they may give their tasks other settings."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    tags = {name: sorted(manager.task_index[name].tags) for name in names if name in manager.all_tags}
    return list(dict.fromkeys(task for name in names for task in tags.get(name, [name])))


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
        identity |= {"path": model.path, "revision": model.revision, "tokenizer": model.tokenizer}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{checkpoint.name}-{task}-{digest}.json"


def template_keys(model: ModelConfig) -> list[Any]:
    """The keys of a model that decide how its template writes."""
    return [model.eos_token, model.chat_template_kwargs, model.system_message, model.date]


def run_task(lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig) -> dict[str, Any]:
    """Evaluate one task: its metrics, those of its subtasks, and how they were computed."""
    from lm_eval import simple_evaluate

    start = time.monotonic()
    requests = RequestLengths(lm)
    try:
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
    except AssertionError as error:
        if "maximum sequence length" not in str(error):
            raise
        raise UserError(f"task {task}: {error}") from None  # the task generates more than the model has positions
    finally:
        requests.stop()
    assert results is not None  # it is None on ranks above 0 only
    samples = results["samples"]
    by_name = {name: metrics(values) for name, values in results["results"].items()}
    return {
        "task": task,
        "metrics": by_name.get(task, {}),
        "subtasks": {name: values for name, values in by_name.items() if name != task},
        "shown": shown(task, by_name, results["group_subtasks"]) or [name for name, v in by_name.items() if v],
        "higher_is_better": results["higher_is_better"],
        "requests": {"n": requests.n, "cut_from_the_left": requests.cut, "max_length": lm.max_length},
        "n": sum(results["n-samples"][name]["effective"] for name in samples),
        "task_versions": results["versions"],
        "fewshot": {name: results["n-shot"].get(name) for name in samples},
        "fewshot_as_multiturn": config.chat_template,
        "task_hashes": results.get("task_hashes"),
        "first_request": next((first_request(lm, rows[0]) for rows in samples.values() if rows), None),
        "seconds": time.monotonic() - start,
    }


class RequestLengths:
    """Counts the requests to `lm` until `stop`, and those longer than the model: lm-eval cuts these from the left."""

    def __init__(self, lm: "HFLM"):
        self.n = self.cut = 0
        self._lm, self._score, self._encode = lm, lm._loglikelihood_tokens, lm.tok_batch_encode
        lm._loglikelihood_tokens = self._count_scored
        lm.tok_batch_encode = self._count_generated

    def stop(self) -> None:
        self._lm._loglikelihood_tokens = self._score
        self._lm.tok_batch_encode = self._encode

    def _count_scored(self, requests: Any, **settings: Any) -> Any:
        longest = self._lm.max_length
        for _, context, continuation in requests:
            if len(continuation) > longest:
                raise UserError(
                    f"a text to be scored has {len(continuation)} tokens, and the model reads {longest}: this task "
                    "needs a model of longer contexts"
                )
            self.n += 1
            self.cut += len(context) + len(continuation) > longest + 1
        return self._score(requests, **settings)

    def _count_generated(self, strings: Any, *, left_truncate_len: int | None = None, **settings: Any) -> Any:
        ids, mask = self._encode(strings, **settings)
        self.n += len(strings)
        if left_truncate_len is None:
            return ids, mask
        self.cut += int((mask.sum(1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]


def shown(name: str, by_name: dict[str, Any], children: dict[str, list[str]]) -> list[str]:
    """The names under which a task's figures stand: its own, or those of a group's parts where the group has none."""
    if by_name.get(name):
        return [name]
    return [part for child in children.get(name, []) for part in shown(child, by_name, children)]


def metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value", "stderr"}} from lm-eval's {"acc,none", "acc_stderr,none"}. A filter other than none stays in
    the name: "exact_match,strict-match". `stderr` is None where lm-eval has none, `value` where it is not finite."""
    by_name: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr"):  # not a metric: the task's alias, or an error, which is read below
            continue
        error = values.get(f"{name}_stderr,{filter_}")
        by_name[name if filter_ == "none" else key] = {"value": _finite(value), "stderr": _finite(error)}
    return by_name


def _finite(value: Any) -> float | None:
    """A number as Python's float; None for NaN, infinities and the text that lm-eval writes for no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def first_request(lm: "HFLM", sample: dict[str, Any]) -> dict[str, Any]:
    """The token ids of a sample as the model reads them: the context, and for a loglikelihood the continuation. In a
    record they show how chat template and special tokens were applied."""
    context, *rest = sample["arguments"][0]
    if not rest:  # a text of a perplexity task; its first window begins so
        return {"context": [lm.prefix_token_id], "continuation": lm.tok_encode(context)}
    if not isinstance(rest[0], str):
        return {"context": lm.tok_encode(context)}
    if not context:
        return {"context": [lm.prefix_token_id], "continuation": lm.tok_encode(rest[0], add_special_tokens=False)}
    context_ids, continuation_ids = lm._encode_pair(context, rest[0])
    return {"context": context_ids, "continuation": continuation_ids}


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
    """The tokenizer for lm-eval, where it needs another than it finds beside the model; else None. Raises UserError
    where it cannot be loaded."""
    if config.chat_template:  # with the template as the model's keys change it
        from prefopt.models.load import load_tokenizer

        return load_tokenizer(model)
    if model.tokenizer:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
        except Exception as error:  # reading a foreign file may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"model.tokenizer={model.tokenizer} cannot be loaded: {reason}") from None
    return None


def check_weights(checkpoint: Checkpoint, config: HarnessConfig) -> None:
    """Raise UserError where a run's policy holds other weights than the run has recorded.

    The digest in the record is of float32 weights, so these are read for it, in whatever precision they are evaluated.
    """
    from prefopt.models.load import load_model, weights_digest

    if checkpoint.weights is None:
        return
    if weights_digest(load_model(checkpoint.model, "cpu")) != checkpoint.weights:
        raise UserError(
            f"{checkpoint.path} does not hold the weights that its run={config.run} has recorded: they were changed "
            "since. Bring the old files back, or evaluate the folder as a model of its own: model=hub "
            f"model.path={checkpoint.path} output=FOLDER"
        )


def weights_of(lm: "HFLM") -> str:
    """The digest of the weights in the precision of the evaluation. In float32 it is the one in the run's record."""
    from prefopt.models.load import weights_digest

    return weights_digest(lm.model)


def format_results(records: list[dict[str, Any]]) -> Table:
    """A row per checkpoint: the first metric of every task, or of each part of a group, and the means over tasks."""
    columns = list(dict.fromkeys(part for record in records for part in record["shown"]))
    table = folding_table("checkpoint", *columns, "mean acc", "mean acc_norm")
    for name in dict.fromkeys(r["checkpoint"] for r in records):
        mine = [r for r in records if r["checkpoint"] == name]
        by_part = {part: format_metric(r, part) for r in mine for part in r["shown"]}
        means = lm_accuracy(mine)
        cells = [by_part.get(part, "–") for part in columns]
        cells += [f"{100 * means[key]:.1f}" if means else "–" for key in ("mean acc", "mean acc_norm")]
        table.add_row(name, *cells)
    return table


def format_metric(record: dict[str, Any], part: str) -> str:
    """The first metric of a task or of a group's part: accuracies and exact matches in percent, others as they are."""
    values = record["metrics"] if part == record["task"] else record["subtasks"][part]
    metric, numbers = next(iter(values.items()))
    base = metric.partition(",")[0]
    lower = (record["higher_is_better"].get(part) or {}).get(base) is False
    what = f"({metric}, lower is better)" if lower else f"({metric})"
    value, error = numbers["value"], numbers["stderr"]
    if value is None:
        return f"not finite {what}"
    if "acc" in base.split("_") or base == "exact_match":
        return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + f" % {what}"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}") + f" {what}"


def said_of_lengths(record: dict[str, Any]) -> str | None:
    """A line about requests that were longer than the model; None where there were none."""
    n, cut, longest = (record["requests"][key] for key in ("n", "cut_from_the_left", "max_length"))
    if not cut:
        return None
    return (
        f"{record['checkpoint']}, {record['task']}: {cut} of {n} requests were cut from the left to the {longest} "
        "tokens that the model reads"
    )


def run_pending(config: HarnessConfig, **extra: str) -> None:
    """Evaluate every checkpoint and task that has no record yet, and print the table of all. `extra` goes into the
    records. Raises UserError for what is missing, before a model is loaded."""
    check_harness(config)
    resolve_hardware(config)
    names, how = task_names(config.tasks), task_settings(config)
    policies, folder = checkpoints(config)

    known = functools.cache(find_result)

    def pending() -> list[tuple[Checkpoint, list[str]]]:
        return [
            (checkpoint, [t for t in names if known(record_file(config, folder, checkpoint, t, how)) is None])
            for checkpoint in policies
        ]

    if any(tasks for _, tasks in pending()):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        names = expand_tags(names)
        manager = preflight(sorted({task for _, tasks in pending() for task in tasks}))
        for checkpoint, tasks in pending():
            if tasks:
                tokenizer_of(checkpoint.model, config)  # refused before anything large is read

    for checkpoint, tasks in pending():
        if not tasks:
            continue
        check_weights(checkpoint, config)
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
            file = record_file(config, folder, checkpoint, task, how)
            with locked(file.with_suffix(".lock"), f"{task} of {checkpoint.path}"):
                if find_result(file) is None:  # another process may have evaluated it meanwhile
                    write_result(file, run_task(lm, manager, task, config) | facts)

    records = [read_result(record_file(config, folder, c, t, how)) for c in policies for t in names]
    console().print(format_results(records))
    for line in filter(None, map(said_of_lengths, records)):
        print(line)
    print(folder)
