"""AlpacaEval of policies, models and files of outputs: preferences, win rates. One record for each and each judge."""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import build
from prefopt.data.sources import digest
from prefopt.errors import UserError
from prefopt.evaluation.alpaca_figures import summarize
from prefopt.evaluation.annotations import write_annotations
from prefopt.evaluation.answers import (
    Answers,
    OutputsFile,
    answer_questions,
    as_outputs,
    baseline_of,
    load_answers,
    read_outputs_file,
)
from prefopt.evaluation.config import AlpacaConfig, check_alpaca
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge
from prefopt.evaluation.questions import GAMED, NUM_QUESTIONS, QUESTIONS, Question, Questions, hub_file, read_questions
from prefopt.evaluation.result_folder import has_rows, make_once
from prefopt.evaluation.results import two_judges
from prefopt.models.fingerprint import local_files
from prefopt.tracking.archive import results_of
from prefopt.tracking.policies import Checkpoint, each_run, exported_policies
from prefopt.tracking.record import read_result, record_of
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder, safe_name, write_json
from prefopt.utils.fingerprint import fingerprint

log = logging.getLogger(__name__)

PACKAGES = ("alpaca_eval", "scikit-learn", "torch", "transformers")  # their versions are part of a record


def format_results(record: dict[str, Any]) -> Table:
    """The table of one comparison: win rates, and the figures to read them with."""
    figures, judge = record["figures"], record["judge"]["name"]

    def percent(value: str, error: str, interval: str) -> str:
        low, high = figures[interval]
        return f"{figures[value]:.2f} ± {figures[error]:.2f}   [{low:.2f}, {high:.2f}]"

    title = f"{record['model']} against {record['baseline']['name']}"
    table = folding_table("", "%, ± standard error, [95 % interval]", title=title)
    table.add_row(f"win rate ({judge})", percent("win_rate", "standard_error", "interval"))
    controlled = record["why_not_length_controlled"] or percent(
        "length_controlled_win_rate", "lc_standard_error", "lc_interval"
    )
    table.add_row(f"length-controlled win rate ({judge})", controlled)
    for name, weight in figures.get("glm", {}).items():
        table.add_row(f"  weight of {name}", f"{weight:.4f}")

    lengths, unfinished = figures["mean_length"], record["unfinished"]
    table.add_row("mean length, characters", f"{lengths['model']:.0f} against {lengths['baseline']:.0f}")
    table.add_row("answers cut off", f"{unfinished['model']} against {unfinished['baseline']}")
    table.add_row("questions", f"{figures['n']}, of which {figures['equal_outputs']} with equal answers")
    if figures["letter_missing"]:
        table.add_row("one letter without log-prob", str(figures["letter_missing"]))
    return table


def evaluate_checkpoint(
    config: AlpacaConfig,
    judge: Judge,
    checkpoint: Checkpoint | OutputsFile,
    questions: Questions,
    reference: Callable[[], Answers],
    extra: dict[str, str],
) -> Path:
    """Compare a checkpoint's answers with the baseline's, and return the folder with record.json, annotations.json, and
    alpaca-eval's model_outputs.json and reference_outputs.json. Nothing is computed where the record exists. Other
    processes wait while one makes a comparison.

    `reference` returns the baseline's answers. It is called only when they are needed. `extra` goes into the record.
    Raises UserError where the judge does.
    """
    name, baseline = baseline_of(config.baseline, config.run)
    settings = comparison_settings(config, judge, questions)
    # Their files, too, which another training may have written anew.
    models: list[Any] = [local_files(model) for model in (checkpoint.model, baseline) if model]
    if checkpoint.model is None:
        models.append(digest(checkpoint.path))
    elif config.output is not None:  # several models of one name may have their records in this folder
        models.append([checkpoint.path, checkpoint.model.revision, checkpoint.model.tokenizer])
    key = fingerprint([settings, models])[:8]
    title = safe_name(f"{checkpoint.name}-{name}-{judge.title}-{key}")
    folder = results_folder(config) / title

    make = functools.partial(compare, config, judge, checkpoint, questions, reference, settings)
    complete = has_rows("annotations.json", "n")
    return make_once(folder, f"the comparison of {checkpoint.path}", complete, make, extra)


def compare(
    config: AlpacaConfig,
    judge: Judge,
    checkpoint: Checkpoint | OutputsFile,
    questions: Questions,
    reference: Callable[[], Answers],
    settings: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Make the comparison that `evaluate_checkpoint` describes, write its files into `folder`, and return the
    record."""
    name, _ = baseline_of(config.baseline, config.run)
    ours = answers_of(checkpoint, questions, config)
    theirs = reference()
    names = GeneratorNames(name, f"{Path(config.run).name}-{checkpoint.name}" if config.run else checkpoint.name)
    if names.model == names.reference and ours.texts != theirs.texts:
        raise UserError(
            f"both sides are called {name}, and alpaca-eval tells models by their names: name the model (model.name=), "
            "or rename the file or its `generator`"
        )
    for file, answers, generator in (("model", ours, names.model), ("reference", theirs, name)):
        write_json(folder / f"{file}_outputs.json", as_outputs(questions.items, answers, generator))
    comparisons = _pair_answers(questions.items, theirs, ours)
    # Preferences are kept beside the comparisons, not inside: another checkpoint may give some of the same answers.
    kept = folder.parent / "preferences"
    annotations = judge.annotate(comparisons, names, kept, config.max_cost, config.device, config.precision)
    figures = summarize(annotations, questions.is_alpaca_eval)

    finished = {c.index: dict(zip(("finished_1", "finished_2"), c.finished, strict=True)) for c in comparisons}
    rows = [to_jsonable(row) | finished[row["index"]] for row in annotations]
    write_annotations(folder / "annotations.json", rows)
    return {
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "model": names.model,
        "path": checkpoint.path,
        "weights": ours.weights,
        "baseline": {"name": name, "path": config.baseline, "weights": theirs.weights},
        "judge": judge.describe(),
        "figures": figures,
        "why_not_length_controlled": _why_not_length_controlled(questions, figures),
        "unfinished": {"model": ours.finished.count(False), "baseline": theirs.finished.count(False)},
        "settings": settings,
    }


def comparison_settings(config: AlpacaConfig, judge: Judge, questions: Questions) -> dict[str, Any]:
    """Everything besides the checkpoint that decides the figures. The digest of it is in the folder's name."""
    _, model = baseline_of(config.baseline, config.run)
    prompts = [question.prompt for question in questions.items]
    return {
        "baseline": model.path if model else config.baseline,
        "revision": model.revision if model else digest(config.baseline),
        "judge": judge.describe(),
        "instructions": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sampling": asdict(config.sampling),
        **{key: getattr(config, key) for key in ("backend", "seed", "precision", "device")},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _pair_answers(questions: Sequence[Question], reference: Answers, model: Answers) -> list[Comparison]:
    return [
        Comparison(
            index=i,
            prompt=question.prompt,
            instruction=question.instruction,
            reference=reference.texts[i],
            model=model.texts[i],
            finished=(reference.finished[i], model.finished[i]),
        )
        for i, question in enumerate(questions)
    ]


def _why_not_length_controlled(questions: Questions, figures: dict[str, Any]) -> str | None:
    if not questions.is_alpaca_eval:
        return f"none: it needs AlpacaEval's {NUM_QUESTIONS} questions"
    if "length_controlled_win_rate" not in figures:
        return "none: the answers do not differ in length"
    return None


def to_jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with null for NaN, and Python's numbers for numpy's."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in plain.items()}


def answers_of(checkpoint: Checkpoint | OutputsFile, questions: Questions, config: AlpacaConfig) -> Answers:
    """The answers of a policy, a model, or a file."""
    if checkpoint.model is None:
        return load_answers(checkpoint.path, checkpoint.name, questions.items)
    return answer_questions(checkpoint.model, checkpoint.path, questions.items, config)


def answers_of_baseline(config: AlpacaConfig, questions: Questions) -> Answers:
    """The baseline's answers, from its file or from its model."""
    name, model = baseline_of(config.baseline, config.run)
    if model is None:
        return load_answers(config.baseline, name, questions.items)
    return answer_questions(model, name, questions.items, config)


def subjects(config: AlpacaConfig) -> Sequence[Checkpoint | OutputsFile]:
    """What is compared with the baseline: a run's policies, a file of outputs, or a model. Raises UserError where it
    does not exist."""
    if config.run is not None:
        return exported_policies(config.run, config.checkpoints)
    if config.model_outputs is not None:
        return [read_outputs_file(config.model_outputs)]
    return [Checkpoint(config.model.name, config.model)]


def results_folder(config: AlpacaConfig) -> Path:
    """The folder that holds a folder for each comparison."""
    if config.output is not None:
        return Path(config.output)
    assert config.run is not None  # check_alpaca wants a run or an output
    return Path(config.run) / "alpaca"


def prepare_comparison(config: AlpacaConfig) -> tuple[Judge, Questions]:
    """The judge and the questions. Resolves `config`'s baseline, device and precision in place.

    Raises UserError for everything that is missing, before a model is loaded or a judge asked.
    """
    judge, questions = check_comparison(config, lambda: read_questions(config.instructions, config.split))
    if judge is None:
        raise UserError("judge is null: give a judge of conf/judge, such as judge=gpt4o_mini")
    return judge, questions


def check_comparison(config: AlpacaConfig, read: Callable[[], Questions]) -> tuple[Judge | None, Questions]:
    """The judge, None where the configuration has none, and the questions that `read` returns. Resolves `config`'s
    baseline, device and precision in place.

    Raises UserError for everything that is missing, before a model is loaded or a judge asked.
    """
    from prefopt.models.load import check_model

    if config.baseline == "gpt4_turbo":  # the baseline of AlpacaEval 2, whose answers come with the questions
        config.baseline = str(hub_file(QUESTIONS))
    check_alpaca(config)
    if config.output is not None:
        check_folder("output", config.output)
    resolve_hardware(config)
    judge = None if config.judge is None else build(config.judge, Judge, "judge")
    if judge:
        judge.check()
    if config.run is not None:
        record_of(config.run)
    name, model = baseline_of(config.baseline, config.run)
    questions = read()
    if model:
        check_model(model, "baseline")
    else:
        load_answers(config.baseline, name, questions.items)
    for subject in subjects(config):
        if subject.model is None:
            load_answers(subject.path, subject.name, questions.items)
        elif config.run is None:
            check_model(subject.model, "model")
    if questions.is_alpaca_eval:
        hub_file(GAMED)
    return judge, questions


def run_pending(config: AlpacaConfig, **extra: str) -> None:
    """Make every comparison that has no record yet, and print the table of all. `extra` goes into the records."""
    check_alpaca(config)
    for one in each_run(config):
        evaluate_pending(one, extra)


def evaluate_pending(config: AlpacaConfig, extra: dict[str, str]) -> None:
    """The same for one run, model or file."""
    judge, questions = prepare_comparison(config)
    reference = functools.cache(lambda: answers_of_baseline(config, questions))  # loads the model at most once
    for checkpoint in subjects(config):
        folder = evaluate_checkpoint(config, judge, checkpoint, questions, reference, extra)
        record = read_result(folder / "record.json")
        console().print(format_results(record))

        same = [r for r in results_of(results_folder(config), "alpaca") if _without_judge(r) == _without_judge(record)]
        for key, value in two_judges(same).items():
            print(f"mean of the MMPO paper's two judges, {key.replace('_', ' ')}: {value:.2f} %")
        print(folder)


def _without_judge(record: dict[str, Any]) -> list[Any]:
    """Everything that two records share if they differ in their judges only."""
    return [
        record["model"],
        record["weights"],
        record["baseline"],
        {k: v for k, v in record["settings"].items() if k != "judge"},
    ]
