"""LM-Harness on what a run has trained, or on any model: one JSON record per checkpoint and task.

    python -m prefopt.harness run=runs/RUN tasks=mmpo                  # the final policy
    python -m prefopt.harness run=runs/RUN tasks=[arc_easy,piqa] checkpoints=all
    python -m prefopt.harness -m run=runs/A,runs/B tasks=mmpo
    python -m prefopt.harness model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct output=results/qwen tasks=mappo

A checkpoint is loaded once for all tasks; a task is asked by itself, so its figures do not depend on which others are
asked for, and are those of `lm-eval run` with the same arguments. What is recorded is not computed again: the records
lie in RUN/harness (or `output`), named by checkpoint, task and settings.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.table import Table

from prefopt import UserError
from prefopt.config import HarnessConfig, ModelConfig, check_harness, parse, resolve_hardware
from prefopt.launch import Launcher, refuse_launcher
from prefopt.paths import check_folder, write_json
from prefopt.posthoc.policies import Checkpoint, policies, record_of
from prefopt.program import program
from prefopt.progress import say
from prefopt.run import provenance
from prefopt.runs import console
from prefopt.sweep import sweep

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

# The ten tasks whose mean accuracy the MMPO paper calls LM accuracy, zero-shot; and MaPPO's academic benchmarks.
SUITES = {
    "mmpo": [
        "winogrande", "arc_easy", "piqa", "hellaswag", "openbookqa", "arc_challenge", "mmlu", "mathqa", "race",
        "commonsense_qa",
    ],
    "mappo": ["ifeval", "gpqa_main_zeroshot", "mmlu", "hellaswag", "truthfulqa_mc2", "gsm8k"],
}  # fmt: skip
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
        found = policies(config.run, config.checkpoints)
    return found, Path(config.output) if config.output else Path(config.run) / "harness"


def task_names(tasks: Any) -> list[str]:
    """lm-eval's names of a suite, a task, or a list of them. Raises UserError for anything else."""
    asked = [tasks] if isinstance(tasks, str) else tasks
    if not asked or not isinstance(asked, list) or not all(isinstance(task, str) for task in asked):
        raise UserError(f"tasks must be {', '.join(SUITES)}, a task of lm-eval, or a list of them, is {tasks!r}")
    return list(dict.fromkeys(name for task in asked for name in SUITES.get(task, [task])))


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


def settings(config: HarnessConfig) -> dict[str, Any]:
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


def score(lm: "HFLM", manager: "TaskManager", task: str, config: HarnessConfig) -> dict[str, Any]:
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


def lm_accuracy(records: list[dict[str, Any]]) -> dict[str, float]:
    """The means over tasks: of acc, as the MMPO paper's figures suggest, and of acc_norm where a task has it."""
    accs = [r["metrics"]["acc"]["value"] for r in records if "acc" in r["metrics"]]
    norms = [r["metrics"].get("acc_norm", r["metrics"]["acc"])["value"] for r in records if "acc" in r["metrics"]]
    return {"mean acc": sum(accs) / len(accs), "mean acc_norm": sum(norms) / len(norms)} if accs else {}


def accuracy_percent(records: list[dict[str, Any]]) -> tuple[float, float | None]:
    """The mean of acc over tasks that all have it, and its standard error, the tasks' errors being independent (None
    where one is not known)."""
    errors = [r["metrics"]["acc"]["stderr"] for r in records]
    error = None if None in errors else 100 * math.hypot(*errors) / len(errors)
    return 100 * lm_accuracy(records)["mean acc"], error


def shown(records: list[dict[str, Any]], names: list[str]) -> Table:
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


def go_on(config: HarnessConfig, **told: str) -> None:
    """Everything that is not recorded yet, and the table; `told` goes into the records."""
    check_harness(config)
    resolve_hardware(config)
    names, how = task_names(config.tasks), settings(config)
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
            write_json(record_file(config, folder, checkpoint, task, how), score(lm, manager, task, config) | facts)
    records = [json.loads(record_file(config, folder, c, t, how).read_text()) for c in found for t in names]
    console().print(shown(records, names))
    print(folder)


def check(config: HarnessConfig, _: Launcher) -> ModelConfig:
    """Raises UserError for what cannot be evaluated; the model that would be loaded."""
    check_harness(config)
    task_names(config.tasks)
    found = checkpoints(config)[0]
    return ModelConfig(found[-1].name, found[-1].path, found[-1].revision)


@program("harness", HarnessConfig, sweep("harness", check))
def main(cfg: DictConfig) -> None:
    refuse_launcher()
    go_on(parse(cfg, HarnessConfig))


if __name__ == "__main__":
    main()
