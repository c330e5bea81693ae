"""AlpacaEval over the policies of a run: answers, judgments, win rates."""

import functools
import hashlib
import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig
from prefopt.data.formats import Message, as_prompt
from prefopt.data.sources import SUFFIXES, digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.config import AlpacaConfig, check_alpaca
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge, alpaca_eval
from prefopt.evaluation.results import two_judges
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import record_of
from prefopt.utils.console import console, say
from prefopt.utils.files import cache_dir, write_json

REPOSITORY = "tatsu-lab/alpaca_eval"  # a data set on the hub
QUESTIONS = "alpaca_eval_gpt4_baseline.json"  # the 805 questions, with the answers of AlpacaEval 2's own baseline
GAMED = "df_gamed.csv"  # what the GLM of the length-controlled win rate is regularized by
SHA256 = {
    QUESTIONS: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    GAMED: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
}
N = 805
RESAMPLES = 10_000
PACKAGES = ("alpaca_eval", "scikit-learn", "torch", "transformers")


@dataclass(frozen=True)
class Question:
    prompt: list[Message]
    instruction: str


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions, in their order."""

    name: str
    texts: list[str]
    finished: list[bool]
    weights: str | None  # the digest of the weights that gave them; None: they came in a file


def hub_file(name: str) -> Path:
    """A file of AlpacaEval's, from the hub's cache or the hub. Raises UserError where it cannot be had, or is not what
    it was when its digest was published."""
    try:
        file = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except Exception as error:  # the hub's clients raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"AlpacaEval's {name} is not here: {reason}\nFetch it on a machine with network: python -m "
            "prefopt.prefetch alpaca=true (or take questions of your own: instructions=FILE, for a win rate without "
            "length control)"
        ) from None
    if digest(str(file)) != SHA256[name]:
        raise UserError(
            f"{file} is not the {name} that published figures rest on: its SHA-256 is {digest(str(file))}, and not "
            f"{SHA256[name]}. Remove it, and fetch it again: python -m prefopt.prefetch alpaca=true"
        )
    return file


def read_questions(path: str | None, split: str | None) -> tuple[list[Question], bool]:
    """The questions, each once, and whether they are AlpacaEval's 805. Raises UserError for a row without one."""
    file = path or str(hub_file(QUESTIONS))
    questions: dict[str, Question] = {}
    repeated = 0
    for where, row in read_rows(file, split):
        try:
            prompt = as_prompt(row["instruction"] if "instruction" in row else row["prompt"])
        except KeyError:
            fields = ", ".join(row) or "none"
            raise UserError(f"{where} has neither a field 'instruction' nor 'prompt' (its fields: {fields}).") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None
        single = len(prompt) == 1
        text = prompt[0]["content"] if single else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        repeated += text in questions
        questions[text] = Question(prompt, text)
    if repeated:
        say(f"{file}: {repeated} rows ask what another row asks, and are left out")
    return list(questions.values()), file.endswith(SUFFIXES) and digest(file) == SHA256[QUESTIONS]


def answer_questions(model: ModelConfig, name: str, questions: Sequence[Question], config: AlpacaConfig) -> Answers:
    """Draw one answer to each question; those that this model gave before are in the user's cache."""
    from prefopt.generation.responses import generate_resumable

    say(f"{name}: answers to {len(questions)} questions")
    folder = cache_dir() / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [q.prompt for q in questions]
    where = (config.backend, config.device, config.precision)
    rows, weights = generate_resumable(model, prompts, config.sampling, 1, config.seed, *where, folder)
    return Answers(name, [row["responses"][0] for row in rows], [row["finished"][0] for row in rows], weights)


def baseline_of(config: AlpacaConfig) -> tuple[str, ModelConfig | None]:
    """What the baseline is called, and its model; None: it is a file. Raises UserError where it is not there."""
    given = config.baseline
    if given.endswith(SUFFIXES):
        return Path(given).name.partition(".")[0], None
    if given == "initial":
        trained = record_of(config.run)["config"]
        if (trained.get("peft") or {}).get("path"):
            raise UserError("the run began from a model with an adapter: say baseline=FOLDER, with the two merged")
        return f"{trained['model']['name']}-initial", ModelConfig(**trained["model"])
    if (Path(given) / "record.json").is_file():
        (policy,) = exported_policies(given, "final")
        return Path(given).name, ModelConfig(given, policy.path, None)
    return Path(given).name, ModelConfig(given, given, None)


def load_answers(path: str, name: str, questions: Sequence[Question]) -> Answers:
    """The answers that a file holds. Raises UserError for a question without one."""
    found = {}
    for where, row in read_rows(path, None):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise UserError(f"{where} needs the texts `instruction` and `output` (its fields: {', '.join(row)}).")
        found[row["instruction"]] = row["output"]
    if lacking := [i for i, q in enumerate(questions) if q.instruction not in found]:
        raise UserError(
            f"{path} has no answer to {len(lacking)} of {len(questions)} questions (rows {str(lacking[:10])[1:-1]}), "
            "and must answer them all."
        )
    return Answers(name, [found[q.instruction] for q in questions], [True] * len(questions), None)


def summarize(annotations: list[dict[str, Any]], length_controlled: bool) -> dict[str, Any]:
    """What alpaca-eval makes of complete annotations, in percent, and 95 % intervals of the bootstrap over questions.

    The length-controlled ones need all of AlpacaEval's questions, joined with their difficulty by `index`. Their
    standard error and interval take the GLM as it was fitted.
    """
    import pandas as pd

    frame = pd.DataFrame(annotations)
    preferences = frame["preference"].astype(float)
    lengths = {side: frame[f"output_{k}"].str.len() for side, k in (("baseline", 1), ("model", 2))}
    found: dict[str, Any] = {
        "n": len(frame),
        "mean_length": {side: float(values.mean()) for side, values in lengths.items()},
        "equal_outputs": int((frame["output_1"] == frame["output_2"]).sum()),
        "letter_missing": sum(_letter_missing(row) for row in annotations),
    }
    with alpaca_eval() as package, TemporaryDirectory() as scratch:
        # Without a difference in length there is nothing to control for, and the GLM's feature is 0 / 0. A baseline
        # against itself is 50 by definition.
        itself = (frame["generator_1"] == frame["generator_2"]).all()
        if length_controlled and (itself or (lengths["model"] - lengths["baseline"]).std() > 0):
            frame = frame[["index", "preference", "output_1", "output_2", "generator_1", "generator_2"]]
            told = package.metrics.get_length_controlled_winrate(frame, save_weights_dir=scratch)
            (file,) = Path(scratch).rglob("*.csv")
            found |= {
                "length_controlled_win_rate": float(told["length_controlled_winrate"]),
                "lc_standard_error": float(told["lc_standard_error"]),
                "lc_interval": bootstrap(100 * frame["glm_preference"].to_numpy(dtype=float)),
                "glm": {k: float(v) for k, v in pd.read_csv(file, index_col=0).iloc[0].items()},
            }
        else:
            told = package.metrics.get_winrate(frame)
    found |= {k: float(told[k]) for k in ("win_rate", "standard_error", "discrete_win_rate")}
    return found | {"interval": bootstrap(100 * (preferences.to_numpy() - 1))}


def bootstrap(values: np.ndarray) -> list[float]:
    """The 95 % percentile interval of the mean: whole questions are drawn again, each with both of its answers."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def _letter_missing(row: dict[str, Any]) -> bool:
    """Whether one of the letters m and M was not among the judge's alternatives, so that the other one has all."""
    completion: Any = row.get("preference_raw_completion")
    if not isinstance(completion, dict) or not completion.get("logprobs"):
        return False
    return len({"m", "M"} & {top["token"] for top in completion["logprobs"]["content"][0]["top_logprobs"]}) == 1


def format_results(record: dict[str, Any]) -> Table:
    """Everything that a win rate must be read with."""
    f, judge = record["figures"], record["judge"]["name"]

    def percent(value: str, error: str, interval: str) -> str:
        low, high = f[interval]
        return f"{f[value]:.2f} ± {f[error]:.2f}   [{low:.2f}, {high:.2f}]"

    table = Table(
        "", "%, ± standard error, [95 % interval]", title=f"{record['model']} against {record['baseline']['name']}"
    )
    table.add_row(f"win rate ({judge})", percent("win_rate", "standard_error", "interval"))
    controlled = record["why_not_length_controlled"] or percent(
        "length_controlled_win_rate", "lc_standard_error", "lc_interval"
    )
    table.add_row(f"length-controlled win rate ({judge})", controlled)
    for name, weight in f.get("glm", {}).items():
        table.add_row(f"  weight of {name}", f"{weight:.4f}")
    lengths, n = f["mean_length"], f["n"]
    table.add_row("mean length, characters", f"{lengths['model']:.0f} against {lengths['baseline']:.0f}")
    cut = record["unfinished"]
    table.add_row("answers cut off", f"{cut['model']} against {cut['baseline']}")
    table.add_row("questions", f"{n}, of which {f['equal_outputs']} with equal answers")
    if f["letter_missing"]:
        table.add_row("one letter without log-prob", str(f["letter_missing"]))
    return table


def evaluate_checkpoint(
    config: AlpacaConfig,
    judge: Judge,
    checkpoint: Checkpoint,
    questions: list[Question],
    all_: bool,
    reference: Callable[[], Answers],
    told: dict[str, str],
) -> Path:
    """Answer, judge and record, as far as that is not done; the comparison's folder. `reference` gives the baseline's
    answers, which are asked for only where there is something to do."""
    name, model = baseline_of(config)
    settings = {
        "baseline": model.path if model else config.baseline,
        "revision": model.revision if model else digest(config.baseline),
        "judge": judge.describe(),
        "instructions": hashlib.sha256(json.dumps([q.prompt for q in questions]).encode()).hexdigest(),
        "sampling": asdict(config.sampling),
        **{key: getattr(config, key) for key in ("backend", "seed", "precision", "device")},
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    home = Path(config.run) / "alpaca"
    folder = home / re.sub(r"[^A-Za-z0-9._-]+", "_", f"{checkpoint.name}-{name}-{judge.title}-{key}")
    if (folder / "record.json").is_file():
        return folder
    began = time.monotonic()
    ours = answer_questions(ModelConfig(checkpoint.name, checkpoint.path, None), checkpoint.path, questions, config)
    theirs = reference()
    duels = [
        Comparison(i, q.prompt, q.instruction, theirs.texts[i], ours.texts[i], (theirs.finished[i], ours.finished[i]))
        for i, q in enumerate(questions)
    ]
    names = GeneratorNames(name, f"{Path(config.run).name}-{checkpoint.name}")
    found = judge.annotate(duels, names, home / "preferences", config.max_cost, config.device, config.precision)
    result = summarize(found, all_)
    why = None if all_ else f"none: it needs AlpacaEval's {N} questions"
    if all_ and "length_controlled_win_rate" not in result:
        why = "none: the answers do not differ in length"
    write_json(folder / "annotations.json", [to_jsonable(row) for row in found])
    write_json(
        folder / "record.json",
        {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "model": names.model,
            "path": checkpoint.path,
            "weights": ours.weights,
            "baseline": {"name": name, "path": config.baseline, "weights": theirs.weights},
            "judge": judge.describe(),
            "figures": result,
            "why_not_length_controlled": why,
            "unfinished": {"model": ours.finished.count(False), "baseline": theirs.finished.count(False)},
            "settings": settings,
            "seconds": time.monotonic() - began,
            **provenance(),
            **told,
        },
    )
    return folder


def to_jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: null for the NaN of what a judge did not say, plain numbers for numpy's."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in plain.items()}


def answers_of_baseline(config: AlpacaConfig, questions: list[Question]) -> Answers:
    name, model = baseline_of(config)
    return answer_questions(model, name, questions, config) if model else load_answers(config.baseline, name, questions)


def prepare_comparison(config: AlpacaConfig) -> tuple[Judge, list[Question], bool]:
    """The judge, the questions, and whether these are all of AlpacaEval's. Raises UserError for whatever is missing,
    before a model is loaded or a judge asked."""
    from prefopt.models.load import check_model

    if config.baseline == "gpt4_turbo":  # AlpacaEval 2's own
        config.baseline = str(hub_file(QUESTIONS))
    check_alpaca(config)
    resolve_hardware(config)
    judge = build(config.judge, Judge, "judge")
    judge.check()
    record_of(config.run)
    name, model = baseline_of(config)
    questions, all_ = read_questions(config.instructions, config.split)
    if model:
        check_model(model, "baseline")
    else:
        load_answers(config.baseline, name, questions)
    if all_:
        hub_file(GAMED)
    return judge, questions, all_


def run_pending(config: AlpacaConfig, **told: str) -> None:
    """Every comparison that is not recorded yet, and what came of each; `told` goes into the records."""
    judge, questions, all_ = prepare_comparison(config)
    reference = functools.cache(lambda: answers_of_baseline(config, questions))  # one model load for all checkpoints
    for checkpoint in exported_policies(config.run, config.checkpoints):
        folder = evaluate_checkpoint(config, judge, checkpoint, questions, all_, reference, told)
        record = json.loads((folder / "record.json").read_text())
        console().print(format_results(record))
        others = [json.loads(f.read_text()) for f in folder.parent.glob("*/record.json")]
        same = [r for r in others if _but_judge(r) == _but_judge(record)]
        for key, value in two_judges(same).items():
            print(f"mean of the MMPO paper's two judges, {key.replace('_', ' ')}: {value:.2f} %")
        print(folder)


def _but_judge(record: dict[str, Any]) -> list[Any]:
    return [record["weights"], record["baseline"], {k: v for k, v in record["settings"].items() if k != "judge"}]
