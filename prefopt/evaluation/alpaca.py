"""AlpacaEval of policies, models and files of outputs: preferences, win rates. One record for each and each judge."""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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
    check_source,
    format_unfinished,
    load_answers,
    read_outputs_file,
)
from prefopt.evaluation.config import AlpacaConfig, check_alpaca
from prefopt.evaluation.cost import Budget, Estimate
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge
from prefopt.evaluation.questions import GAMED, NUM_QUESTIONS, QUESTIONS, Question, Questions, hub_file, read_questions
from prefopt.evaluation.result_folder import has_rows, make_all, make_once
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

    lengths = figures["mean_length"]
    unfinished = {side: format_unfinished(n) for side, n in record["unfinished"].items()}
    table.add_row("mean length, characters", f"{lengths['model']:.0f} against {lengths['baseline']:.0f}")
    table.add_row("answers cut off", f"{unfinished['model']} against {unfinished['baseline']}")
    table.add_row("questions", f"{figures['n']}, of which {figures['equal_outputs']} with equal answers")
    if figures["letter_missing"]:
        table.add_row("one letter without log-prob", str(figures["letter_missing"]))
    return table


@dataclass(frozen=True)
class AlpacaResult:
    """A comparison of a checkpoint's answers with the baseline's, which `reference` returns. A `JudgedResult`."""

    config: AlpacaConfig
    judge: Judge
    checkpoint: Checkpoint | OutputsFile
    questions: Questions
    reference: Callable[[], Answers]

    def check(self) -> None:
        config = self.config
        _, baseline = baseline_of(config.baseline, config.run)
        if baseline:
            check_source(baseline, "baseline")
        if self.checkpoint.model:
            check_source(self.checkpoint.model, "model" if config.run is None else f"policy of {config.run}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        return comparison_settings(self.config, self.judge, self.questions)

    @cached_property
    def folder(self) -> Path:
        checkpoint, config = self.checkpoint, self.config
        name, baseline = baseline_of(config.baseline, config.run)
        # Their files, too, which another training may have written anew.
        models: list[Any] = [local_files(model) for model in (checkpoint.model, baseline) if model]
        if checkpoint.model is None:
            models.append(digest(checkpoint.path))
        elif config.output is not None:  # several models of one name may have their records in this folder
            models.append([checkpoint.path, checkpoint.model.revision, checkpoint.model.tokenizer])
        key = fingerprint([self.settings, models])[:8]
        return results_folder(config) / safe_name(f"{checkpoint.name}-{name}-{self.judge.title}-{key}")

    def is_complete(self) -> bool:
        return has_rows("annotations.json", "n")(self.folder)

    @property
    def names(self) -> GeneratorNames:
        name, _ = baseline_of(self.config.baseline, self.config.run)
        run, checkpoint = self.config.run, self.checkpoint.name
        return GeneratorNames(name, f"{Path(run).name}-{checkpoint}" if run else checkpoint)

    @cached_property
    def sides(self) -> tuple[Answers, Answers]:
        """The checkpoint's answers and the baseline's. Raises UserError where they differ and have one name."""
        ours, theirs = answers_of(self.checkpoint, self.questions, self.config), self.reference()
        if self.names.model == self.names.reference and ours.texts != theirs.texts:
            raise UserError(
                f"both sides are called {self.names.model}, and alpaca-eval tells models by their names: name the "
                "model (model.name=), or rename the file or its `generator`"
            )
        return ours, theirs

    @property
    def comparisons(self) -> list[Comparison]:
        ours, theirs = self.sides
        return _pair_answers(self.questions.items, theirs, ours)

    @property
    def preferences(self) -> Path:
        # Beside the comparisons, not inside: another checkpoint may give some of the same answers.
        return self.folder.parent / "preferences"

    def estimate(self) -> Estimate:
        return self.judge.estimate(self.comparisons, self.preferences)

    def make(self, budget: Budget, extra: dict[str, str]) -> Path:
        """The folder with record.json, annotations.json, and alpaca-eval's model_outputs.json and
        reference_outputs.json. Nothing is computed where the record exists. Other processes wait while one makes it."""
        what = f"the comparison of {self.checkpoint.path}"
        return make_once(
            self.folder, what, lambda _: self.is_complete(), functools.partial(self.compare, budget), extra
        )

    def compare(self, budget: Budget, folder: Path) -> dict[str, Any]:
        """Write the comparison's files into `folder`, and return the record."""
        config, questions, names = self.config, self.questions, self.names
        ours, theirs = self.sides
        for file, answers, generator in (("model", ours, names.model), ("reference", theirs, names.reference)):
            write_json(folder / f"{file}_outputs.json", as_outputs(questions.items, answers, generator))
        comparisons = self.comparisons
        annotations = self.judge.annotate(comparisons, names, self.preferences, budget, config.device, config.precision)
        figures = summarize(annotations, questions.is_alpaca_eval)

        finished = {c.index: dict(zip(("finished_1", "finished_2"), c.finished, strict=True)) for c in comparisons}
        rows = [to_jsonable(row) | finished[row["index"]] for row in annotations]
        write_annotations(folder / "annotations.json", rows)
        return {
            "checkpoint": self.checkpoint.name,
            "step": self.checkpoint.step,
            "model": names.model,
            "path": self.checkpoint.path,
            "weights": ours.weights,
            "baseline": {"name": names.reference, "path": config.baseline, "weights": theirs.weights},
            "judge": self.judge.describe(),
            "figures": figures,
            "why_not_length_controlled": _why_not_length_controlled(questions, figures),
            "unfinished": {"model": ours.unfinished, "baseline": theirs.unfinished},
            "settings": self.settings,
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


def plan(config: AlpacaConfig) -> list[AlpacaResult]:
    """The comparisons of one run, model or file. Raises UserError for what is missing."""
    judge, questions = prepare_comparison(config)
    reference = functools.cache(lambda: answers_of_baseline(config, questions))  # loads the model at most once
    return [AlpacaResult(config, judge, checkpoint, questions, reference) for checkpoint in subjects(config)]


def run_pending(config: AlpacaConfig, **extra: str) -> None:
    """Make every comparison that has no record yet, and print the table of all. `extra` goes into the records."""
    check_alpaca(config)
    comparisons = [comparison for one in each_run(config) for comparison in plan(one)]
    for comparison, folder in make_all(comparisons, config.max_cost, extra):
        record = read_result(folder / "record.json")
        console().print(format_results(record))

        results = results_of(results_folder(comparison.config), "alpaca")
        same = [r for r in results if _without_judge(r) == _without_judge(record)]
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
