"""lm-eval's own files of an evaluation, for its tools and for comparisons row by row."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefopt.utils.files import atomic_write, remove
from prefopt.utils.locks import locked

# What lm-eval's results hold by task. All else in them is of one command: its date, its model, its machine.
BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"),
    "task_hashes",
)


def write_lm_eval_files(folder: Path, results: dict[str, Any], model: dict[str, Any], how: dict[str, Any]) -> None:
    """Write what `lm-eval run --log_samples --output_path` would: results_DATE.json and samples_TASK_DATE.jsonl.

    Tasks are evaluated one by one. So `folder` holds one evaluation of a model by the same settings, and the results
    that are there already are joined to the new ones; a task's older files are removed.

    Args:
        results: what lm-eval's `simple_evaluate` returns, with its samples. Both are changed.
        model: the arguments of lm-eval's model, of which `pretrained` is its name.
        how: fields of lm-eval's GeneralConfigTracker: system_instruction, chat_template, fewshot_as_multiturn.
    """
    from lm_eval.loggers import EvaluationTracker

    samples = results.pop("samples")
    results["config"] |= {"model": "hf", "model_args": model}
    with TemporaryDirectory() as scratch:
        tracker = EvaluationTracker(output_path=f"{scratch}/results.json")
        tracker.general_config_tracker.log_experiment_args("hf", model, **how)
        tracker.save_results_aggregated(results, samples)
        for task in samples:
            tracker.save_results_samples(task, samples[task])
        written = {file.name: file.read_text(encoding="utf-8") for file in Path(scratch).iterdir()}
    if len(written) != len(samples) + 1:  # lm-eval only logs that it cannot write
        raise OSError(f"lm-eval could not write its results into {scratch}: is there room?")

    with locked(folder / "lock", f"lm-eval's files in {folder}"):
        older = sorted(folder.glob("results_*.json"))
        name = next(name for name in written if name.startswith("results_"))
        written[name] = _joined([file.read_text(encoding="utf-8") for file in older] + [written[name]])
        for task in samples:
            older += folder.glob(f"samples_{task}_????-??-??T*.jsonl")
        # The samples first: a results file names tasks whose samples are there.
        for file in sorted(written, key=lambda file: file == name):
            atomic_write(folder / file, written[file])
        for stale in older:
            if stale.name not in written:
                remove(stale)


def _joined(texts: list[str]) -> str:
    """The results of the last text, and of the others those of other tasks."""
    every = [json.loads(text) for text in texts]
    joined = dict(every[-1])
    for key in BY_TASK:
        parts = [results[key] for results in every if key in results]
        if parts:
            joined[key] = {task: value for part in parts for task, value in part.items()}
    return json.dumps(joined, indent=2, ensure_ascii=False)
