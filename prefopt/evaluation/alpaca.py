"""AlpacaEval over the policies of a run: answers, preferences, win rates. One record per policy and judge."""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig
from prefopt.data.sources import SUFFIXES, digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.annotations import write_annotations
from prefopt.evaluation.clients import alpaca_eval
from prefopt.evaluation.config import AlpacaConfig, check_alpaca
from prefopt.evaluation.initial import initial_model
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge
from prefopt.evaluation.questions import GAMED, NUM_QUESTIONS, QUESTIONS, Question, Questions, hub_file, read_questions
from prefopt.evaluation.results import two_judges
from prefopt.generation.responses import GenerationRequest, generate_resumable
from prefopt.models.fingerprint import local_files
from prefopt.tracking.archive import results_of
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import find_result, read_result, record_of, write_result
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.locks import locked
from prefopt.utils.store import read_sealed_lines

log = logging.getLogger(__name__)

RESAMPLES = 10_000  # of the bootstrap
PACKAGES = ("alpaca_eval", "scikit-learn", "torch", "transformers")  # their versions are part of a record


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions, in their order."""

    name: str
    texts: list[str]
    finished: list[bool]  # False where the token limit cut the answer off
    weights: str | None  # the digest of the model's weights; None: the answers come from a file


def answer_questions(model: ModelConfig, name: str, questions: Sequence[Question], config: AlpacaConfig) -> Answers:
    """Sample one answer per question. Answers of the same weights and settings come from the user's cache."""
    log.info(f"{name}: answers to {len(questions)} questions")
    folder = cache_dir() / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    request = GenerationRequest(
        model=model,
        prompts=[question.prompt for question in questions],
        sampling=config.sampling,
        samples_per_prompt=1,
        seed=config.seed,
        backend=config.backend,
        device=config.device,
        precision=config.precision,
    )
    rows, weights = generate_resumable(request, folder)
    return Answers(name, [row["responses"][0] for row in rows], [row["finished"][0] for row in rows], weights)


def baseline_of(config: AlpacaConfig) -> tuple[str, ModelConfig | None]:
    """The baseline's name, and its model; None: its answers are in a file. Raises UserError where there is no such
    baseline."""
    baseline = config.baseline
    if baseline.endswith(SUFFIXES):
        return Path(baseline).name.partition(".")[0], None
    if baseline == "initial":
        model = initial_model(config.run)
        return f"{model.name}-initial", model
    if (Path(baseline) / "record.json").is_file():
        (policy,) = exported_policies(baseline, "final")
        return Path(baseline).name, policy.model
    return Path(baseline).name, ModelConfig(baseline, baseline, None)


def load_answers(path: str, name: str, questions: Sequence[Question]) -> Answers:
    """The answers in a file. Raises UserError for a question without an answer."""
    answers = {}
    for where, row in read_rows(path, None):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise UserError(f"{where} needs the texts `instruction` and `output` (its fields: {', '.join(row)}).")
        answers[row["instruction"]] = row["output"]
    if lacking := [i for i, question in enumerate(questions) if question.instruction not in answers]:
        raise UserError(
            f"{path} has no answer to {len(lacking)} of {len(questions)} questions (rows {str(lacking[:10])[1:-1]}), "
            "and must answer them all."
        )
    return Answers(name, [answers[q.instruction] for q in questions], [True] * len(questions), None)


def summarize(annotations: list[dict[str, Any]], length_controlled: bool) -> dict[str, Any]:
    """alpaca-eval's figures of complete annotations, in percent, with 95 % intervals of a bootstrap over questions.

    `length_controlled` needs all of AlpacaEval's questions: `index` joins them with their difficulty. The standard
    error and the interval of that win rate take the fitted GLM as fixed.
    """
    import pandas as pd

    frame = pd.DataFrame(annotations)
    preferences = frame["preference"].astype(float)
    lengths = {side: frame[f"output_{k}"].str.len() for side, k in (("baseline", 1), ("model", 2))}
    figures: dict[str, Any] = {
        "n": len(frame),
        "mean_length": {side: float(values.mean()) for side, values in lengths.items()},
        "equal_outputs": int((frame["output_1"] == frame["output_2"]).sum()),
        "letter_missing": sum(_letter_missing(row) for row in annotations),
    }
    with alpaca_eval() as package, TemporaryDirectory() as scratch:
        # Where no answer differs in length the GLM's length feature is 0 / 0, and there is nothing to control for. A
        # baseline against itself is allowed: alpaca-eval gives 50 by definition.
        against_itself = (frame["generator_1"] == frame["generator_2"]).all()
        if length_controlled and (against_itself or (lengths["model"] - lengths["baseline"]).std() > 0):
            frame = frame[["index", "preference", "output_1", "output_2", "generator_1", "generator_2"]]
            # alpaca-eval adds the column glm_preference to `frame`, and writes the GLM's weights as a CSV.
            results = package.metrics.get_length_controlled_winrate(frame, save_weights_dir=scratch)
            (file,) = Path(scratch).rglob("*.csv")
            figures["length_controlled_win_rate"] = float(results["length_controlled_winrate"])
            figures["lc_standard_error"] = float(results["lc_standard_error"])
            figures["lc_interval"] = bootstrap(100 * frame["glm_preference"].to_numpy(dtype=float))
            figures["glm"] = {k: float(v) for k, v in pd.read_csv(file, index_col=0).iloc[0].items()}
        else:
            results = package.metrics.get_winrate(frame)
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        figures[key] = float(results[key])
    figures["interval"] = bootstrap(100 * (preferences.to_numpy() - 1))
    return figures


def bootstrap(values: np.ndarray) -> list[float]:
    """The 95 % percentile interval of the mean, [low, high]. A resample draws questions, each with both answers."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def _letter_missing(row: dict[str, Any]) -> bool:
    """Whether the judge's log-probs hold only one of the letters m and M. alpaca-eval then gives that letter all
    of the probability."""
    completion: Any = row.get("preference_raw_completion")
    if not isinstance(completion, dict) or not completion.get("logprobs"):
        return False
    return len({"m", "M"} & {top["token"] for top in completion["logprobs"]["content"][0]["top_logprobs"]}) == 1


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
    checkpoint: Checkpoint,
    questions: Questions,
    reference: Callable[[], Answers],
    extra: dict[str, str],
) -> Path:
    """Compare a checkpoint's answers with the baseline's, and return the folder with record.json and annotations.json.
    Nothing is computed where the record exists. Other processes wait while one makes a comparison.

    `reference` returns the baseline's answers. It is called only when they are needed. `extra` goes into the record.
    Raises UserError where the judge does.
    """
    name, baseline = baseline_of(config)
    settings = comparison_settings(config, judge, questions)
    # Their files, too, which another training may have written anew.
    models = [local_files(model) for model in (checkpoint.model, baseline) if model]
    key = fingerprint([settings, models])[:8]
    folder = (
        Path(config.run) / "alpaca" / re.sub(r"[^A-Za-z0-9._-]+", "_", f"{checkpoint.name}-{name}-{judge.title}-{key}")
    )
    with locked(folder.with_name(f"{folder.name}.lock"), f"the comparison of {checkpoint.path}"):
        if not is_complete(folder):
            compare(config, judge, checkpoint, questions, reference, extra, settings, folder)
    return folder


def compare(
    config: AlpacaConfig,
    judge: Judge,
    checkpoint: Checkpoint,
    questions: Questions,
    reference: Callable[[], Answers],
    extra: dict[str, str],
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Make the comparison that `evaluate_checkpoint` describes, and write it into `folder`."""
    name, _ = baseline_of(config)
    start = time.monotonic()
    ours = answer_questions(checkpoint.model, checkpoint.path, questions.items, config)
    theirs = reference()
    names = GeneratorNames(name, f"{Path(config.run).name}-{checkpoint.name}")
    comparisons = _pair_answers(questions.items, theirs, ours)
    # Preferences are kept beside the comparisons, not inside: another checkpoint may give some of the same answers.
    kept = folder.parent / "preferences"
    annotations = judge.annotate(comparisons, names, kept, config.max_cost, config.device, config.precision)
    figures = summarize(annotations, questions.is_alpaca_eval)

    record = {
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
        "seconds": time.monotonic() - start,
    }
    # In this order: where the record exists, the comparison is complete.
    write_annotations(folder / "annotations.json", [to_jsonable(row) for row in annotations])
    write_result(folder / "record.json", record | provenance() | extra)


def is_complete(folder: Path) -> bool:
    """Whether the comparison in this folder has been made. A damaged one has not, which the log says."""
    record = find_result(folder / "record.json")
    if record is None:
        return False
    file = folder / "annotations.json"
    rows, whole = read_sealed_lines(file)
    if not whole or len(rows) != record["figures"]["n"]:
        log.warning(f"  {file} is damaged. It is made anew.")
        return False
    return True


def comparison_settings(config: AlpacaConfig, judge: Judge, questions: Questions) -> dict[str, Any]:
    """Everything besides the checkpoint that decides the figures. The digest of it is in the folder's name."""
    _, model = baseline_of(config)
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


def answers_of_baseline(config: AlpacaConfig, questions: Questions) -> Answers:
    """The baseline's answers, from its file or from its model."""
    name, model = baseline_of(config)
    if model is None:
        return load_answers(config.baseline, name, questions.items)
    return answer_questions(model, name, questions.items, config)


def prepare_comparison(config: AlpacaConfig) -> tuple[Judge, Questions]:
    """The judge and the questions. Resolves `config`'s baseline, device and precision in place.

    Raises UserError for everything that is missing, before a model is loaded or a judge asked.
    """
    from prefopt.models.load import check_model

    if config.baseline == "gpt4_turbo":  # the baseline of AlpacaEval 2, whose answers come with the questions
        config.baseline = str(hub_file(QUESTIONS))
    check_alpaca(config)
    resolve_hardware(config)
    judge = build(config.judge, Judge, "judge")
    judge.check()
    record_of(config.run)
    name, model = baseline_of(config)
    questions = read_questions(config.instructions, config.split)
    if model:
        check_model(model, "baseline")
    else:
        load_answers(config.baseline, name, questions.items)
    if questions.is_alpaca_eval:
        hub_file(GAMED)
    return judge, questions


def run_pending(config: AlpacaConfig, **extra: str) -> None:
    """Make every comparison that has no record yet, and print the table of all. `extra` goes into the records."""
    judge, questions = prepare_comparison(config)
    reference = functools.cache(lambda: answers_of_baseline(config, questions))  # loads the model at most once
    for checkpoint in exported_policies(config.run, config.checkpoints):
        folder = evaluate_checkpoint(config, judge, checkpoint, questions, reference, extra)
        record = read_result(folder / "record.json")
        console().print(format_results(record))

        same = [r for r in results_of(Path(config.run), "alpaca") if _without_judge(r) == _without_judge(record)]
        for key, value in two_judges(same).items():
            print(f"mean of the MMPO paper's two judges, {key.replace('_', ' ')}: {value:.2f} %")
        print(folder)


def _without_judge(record: dict[str, Any]) -> list[Any]:
    """Everything that two records share if they differ in their judges only."""
    return [record["weights"], record["baseline"], {k: v for k, v in record["settings"].items() if k != "judge"}]
