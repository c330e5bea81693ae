"""Arena-Hard (Li et al. 2024, arXiv 2406.11939): a judge's verdicts on a model's answers beside a baseline's.

Questions, prompts and the weights of verdicts are the benchmark's. All games share the baseline, so the unregularized
Bradley-Terry fit of its leaderboard is the weighted mean of the games.
"""

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import ModelConfig
from prefopt.data.items import Message
from prefopt.data.sources import digest, read_rows, write_rows
from prefopt.errors import UserError
from prefopt.evaluation.answers import baseline_of, draw
from prefopt.evaluation.arena_figures import GAMES, read_verdict, summarize
from prefopt.evaluation.benchmark_files import ARENA_HARD, ArenaHard
from prefopt.evaluation.config import ArenaConfig, check_arena
from prefopt.evaluation.judged import Subject, counted, result, results_folder, sampling_of, settings_of, subjects
from prefopt.evaluation.text_judge import TextJudge, build_text_judge
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import each_run
from prefopt.tracking.record import read_result
from prefopt.utils import signals
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder

log = logging.getLogger(__name__)

FINISH = "continue your judgment and finish by outputting a final verdict label"
REPLY_TOKENS = {"v0.1": 600, "v2.0": 800}  # about as many has a judgment
CODE = re.compile("```([^`]*)```")
MARKDOWN = {  # what the benchmark counts outside of code blocks
    "headers": re.compile(r"^#{1,6}\s", re.MULTILINE),
    "list items": re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}


@dataclass(frozen=True)
class Answer:
    """An answer to a question, and the model that gave it. `finished`: False where the token limit cut it off."""

    model: str
    text: str
    finished: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A version's questions by uid, the template of the user's text, and the system prompts by category."""

    questions: dict[str, dict[str, Any]]
    template: str
    systems: dict[str, str]
    version: ArenaHard


def read_benchmark(version: str, files: str | None) -> Benchmark:
    """Raises UserError where a file is not there, or is not the published one."""
    of_version = ARENA_HARD[version]
    settings = of_version.settings.json(files)
    return Benchmark(
        {row["uid"]: row for row in of_version.questions.rows(files)},
        yaml.safe_load(of_version.config.find(files).read_text())["prompt_template"],
        {category: settings[category]["system_prompt"] for category in of_version.baselines},
        of_version,
    )


def judge_prompt(benchmark: Benchmark, uid: str, baseline: str, model: str, game: int) -> list[Message]:
    """What the judge is asked in a game about two answers."""
    row = benchmark.questions[uid]
    first, second = (baseline, model) if game == 1 else (model, baseline)
    text = benchmark.template.format(QUESTION=row["prompt"], ANSWER_A=first, ANSWER_B=second)
    return [{"role": "system", "content": benchmark.systems[row["category"]]}, {"role": "user", "content": text}]


def read_answers(path: str, benchmark: Benchmark) -> dict[str, Answer]:
    """The answers in a file of Arena-Hard's `model_answer`, by uid. Raises UserError for a row that is none."""
    answers: dict[str, Answer] = {}
    for where, row in read_rows(path, None):
        uid: Any = row.get("uid")
        if uid not in benchmark.questions:
            raise UserError(f"{where}: uid {uid!r} is none of this version's questions.")
        if uid in answers:
            raise UserError(f"{where} answers question {uid} once more. Leave one of the answers out.")
        answer = _answer(row)
        if answer is None:
            raise UserError(
                f"{where} must hold the user's message and the answer: "
                '{"uid": ID, "model": NAME, "messages": [{"role": "user", "content": TEXT}, '
                '{"role": "assistant", "content": {"answer": TEXT}}]}.'
            )
        answers[uid] = answer
    return answers


def _answer(row: dict[str, Any]) -> Answer | None:
    try:
        content: Any = row["messages"][-1]["content"]
        text = content["answer"] if isinstance(content, dict) else content
    except (TypeError, KeyError, IndexError):
        return None
    return Answer(str(row.get("model")), text) if isinstance(text, str) else None


def answer_rows(answers: dict[str, Answer], benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows of Arena-Hard's `model_answer`."""
    return [
        {
            "uid": uid,
            "ans_id": hashlib.sha256(answer.text.encode()).hexdigest()[:22],
            "model": answer.model,
            "messages": [
                {"role": "user", "content": benchmark.questions[uid]["prompt"]},
                {"role": "assistant", "content": {"answer": answer.text}},
            ],
            "tstamp": time.time(),
        }
        for uid, answer in answers.items()
    ]


def draw_answers(
    model: ModelConfig, name: str, uids: Sequence[str], benchmark: Benchmark, config: ArenaConfig
) -> tuple[dict[str, Answer], str]:
    """A model's own answers, the most likely tokens, by uid, and the digest of its weights."""
    log.info(f"{name}: answers to {len(uids)} questions")
    prompts: list[list[Message]] = [[{"role": "user", "content": benchmark.questions[uid]["prompt"]}] for uid in uids]
    drawn, weights = draw(config, model, prompts, sampling_of(config, temperature=0.0))
    return {uid: Answer(name, text, done) for uid, (text, done) in zip(uids, drawn, strict=True)}, weights


def style(texts: Sequence[str]) -> dict[str, float]:
    """Means over texts: characters, and the marks of MARKDOWN outside of code blocks."""
    plain = [CODE.sub("", text) for text in texts]
    counts = {name: [len(pattern.findall(text)) for text in plain] for name, pattern in MARKDOWN.items()}
    return {name: float(np.mean(values)) for name, values in {"length": [len(t) for t in texts], **counts}.items()}


def metric_name(benchmark: Benchmark, category: str, judge: str, baseline: str, n: int) -> str:
    """Against another baseline, or on some of the questions, it is no figure of the leaderboard's kind."""
    version, published = benchmark.version, benchmark.version.baselines[category]
    name = version.name if len(version.baselines) == 1 else f"{version.name} {category}"
    total = sum(row["category"] == category for row in benchmark.questions.values())
    if n < total:
        name += f", {n} of {total} questions"
    elif baseline != published:
        name += " questions"
    return f"{name} ({judge}, against {baseline})"


def format_results(record: dict[str, Any]) -> Table:
    """The table of one model's games."""
    figures, (low, high) = record["figures"], record["figures"]["interval"]
    table = folding_table("", "%, [95 % interval over questions]", title=f"{record['model']}: {record['metric']}")
    table.add_row("win rate", f"{figures['win_rate']:.2f}   [{low:.2f}, {high:.2f}]")
    low, high = figures["leaderboard_interval"]
    table.add_row("what the leaderboard calls its interval", f"[{low:.2f}, {high:.2f}]")
    table.add_row("wins, ties, losses", f"{figures['wins']}, {figures['ties']}, {figures['losses']} games")
    table.add_row("verdicts that count three times", f"{100 * figures['strong_share']:.1f}")
    if figures["contradictory_share"] is not None:
        table.add_row("questions whose games contradict", f"{100 * figures['contradictory_share']:.1f}")
    table.add_row("games", f"{2 * figures['n']}, of which {figures['missing']} have no verdict")
    table.add_row("judge asked again", str(figures["asked_again"]))
    model, baseline = record["style"]["model"], record["style"]["baseline"]
    table.add_row("mean length, characters", f"{model['length']:.0f} against {baseline['length']:.0f}")
    marks = "; ".join(f"{name} {model[name]:.1f} against {baseline[name]:.1f}" for name in MARKDOWN)
    table.add_row("markdown in an answer", marks)
    table.add_row("answers cut off", f"{record['unfinished']['model']} against {record['unfinished']['baseline']}")
    if checked := record["judge_check"]:
        agreement = f"{100 * checked['agreement']:.1f} % the same winner, {checked['n']} games"
        table.add_row("the judge beside the published one", agreement)
    return table


@dataclass(frozen=True)
class Baseline:
    """What a model's answers are compared with: `model`'s, or those of the file `path`."""

    name: str
    path: str
    model: ModelConfig | None

    def identity(self) -> list[Any]:
        """What tells its answers, with the settings of sampling."""
        if self.model is None:
            return [digest(self.path)]
        return [local_files(self.model), self.path, self.model.revision, self.model.tokenizer]

    def answers(
        self, uids: Sequence[str], benchmark: Benchmark, config: ArenaConfig
    ) -> tuple[dict[str, Answer], str | None]:
        """Its answers to these questions, and the digest of its weights. Raises UserError where one lacks."""
        if self.model is not None:
            return draw_answers(self.model, self.name, uids, benchmark, config)
        answers = read_answers(self.path, benchmark)
        if lacking := [uid for uid in uids if uid not in answers]:
            raise UserError(
                f"{self.path} has no answer to {len(lacking)} of {len(uids)} questions ({', '.join(lacking[:5])}), and "
                "must answer them all."
            )
        return answers, None


def baseline_for(category: str, benchmark: Benchmark, config: ArenaConfig) -> Baseline:
    """Raises UserError where there is no such baseline."""
    if config.baseline is None:
        name = benchmark.version.baselines[category]
        return Baseline(name, str(benchmark.version.answers[name].find(config.files)), None)
    name, model = baseline_of(config.baseline, config.run)
    return Baseline(name, model.path if model else config.baseline, model)


def evaluate(
    config: ArenaConfig,
    judge: TextJudge,
    subject: Subject,
    benchmark: Benchmark,
    category: str,
    uids: Sequence[str],
    baseline: Baseline,
    extra: dict[str, str],
) -> Path:
    """Have a model's answers to the questions `uids` of a category compared with the baseline's, and return the folder
    with record.json, and with model_answer.jsonl (of answers that were drawn here) and judgments.jsonl in Arena-Hard's
    format. Raises UserError where the judge does."""
    name = f"{Path(config.run).name}-{subject.name}" if config.run else subject.name
    folder = results_folder(config, "arena")
    settings = settings_of(config, judge, draws=bool(subject.model or baseline.model))
    settings |= {
        "version": config.version,
        "category": category,
        "questions": hashlib.sha256("\n".join(sorted(uids)).encode()).hexdigest(),
        "baseline": [baseline.name, baseline.identity()],
        "files": benchmark.version.digests(),
    }

    def make(place: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        weights = None
        if subject.model is None:
            answers = read_answers(subject.path, benchmark)
        else:
            answers, weights = draw_answers(subject.model, name, uids, benchmark, config)
            write_rows(place / "model_answer.jsonl", answer_rows(answers, benchmark))
        theirs, their_weights = baseline.answers(uids, benchmark, config)
        asked = [(uid, game) for game in GAMES for uid in uids]
        prompts = [judge_prompt(benchmark, uid, theirs[uid].text, answers[uid].text, game) for uid, game in asked]
        verdicts = judge.judge(
            prompts, read_verdict, FINISH, REPLY_TOKENS[config.version], folder / "replies", config.max_cost
        )
        of_game = dict(zip(asked, zip(prompts, verdicts, strict=True), strict=True))
        rows = [
            {
                "uid": uid,
                "category": category,
                "judge": judge.title,
                "model": name,
                "baseline": baseline.name,
                "games": [
                    {"score": verdict.value, "judgment": {"answer": verdict.judgment}, "prompt": prompt}
                    for prompt, verdict in (of_game[uid, game] for game in GAMES)
                ],
            }
            for uid in uids
        ]
        both = {uid: (of_game[uid, 1][1].value, of_game[uid, 2][1].value) for uid in uids}
        sides = {"model": answers, "baseline": theirs}
        return rows, {
            "model": name,
            "weights": weights,
            "metric": metric_name(benchmark, category, judge.title, baseline.name, len(uids)),
            "category": category,
            "baseline": {"name": baseline.name, "path": baseline.path, "weights": their_weights},
            "figures": summarize(both, benchmark.version.quantiles, benchmark.version.drops_rows) | counted(verdicts),
            "judge_check": judge.checked("verdicts"),
            "style": {side: style([given[uid].text for uid in uids]) for side, given in sides.items()},
            "unfinished": {side: sum(not given[uid].finished for uid in uids) for side, given in sides.items()},
        }

    return result(folder, subject, judge, settings, make, extra)


def run_pending(config: ArenaConfig, **extra: str) -> None:
    """Make every result that has no record yet, and print the table of each. `extra` goes into the records."""
    check_arena(config)
    signals.install_handlers()
    for one in each_run(config):
        evaluate_pending(one, extra)


def evaluate_pending(config: ArenaConfig, extra: dict[str, str]) -> None:
    """The same for one run, model or file."""
    from prefopt.models.load import check_model

    judge = build_text_judge(config.judge, ARENA_HARD[config.version].judge_tokens)
    if config.output is not None:
        check_folder("output", config.output)
    resolve_hardware(config)
    benchmark = read_benchmark(config.version, config.files)
    planned = []
    for subject in subjects(config, "model"):
        answered: Sequence[str] = list(benchmark.questions)
        if subject.model is None:
            answered = list(read_answers(subject.path, benchmark))
        elif config.run is None:
            check_model(subject.model, "model")
        for category in benchmark.version.baselines:
            uids = [uid for uid in answered if benchmark.questions[uid]["category"] == category]
            if not uids:
                continue
            baseline = baseline_for(category, benchmark, config)
            if baseline.model is None:
                baseline.answers(uids, benchmark, config)
            else:
                check_model(baseline.model, "baseline")
            planned.append((subject, category, uids, baseline))
    for subject, category, uids, baseline in planned:
        folder = evaluate(config, judge, subject, benchmark, category, uids, baseline, extra)
        console().print(format_results(read_result(folder / "record.json")))
        print(folder)
