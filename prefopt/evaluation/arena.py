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
from functools import cached_property
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import ModelConfig
from prefopt.data.items import Message
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.answers import baseline_of, check_source, draw, format_unfinished
from prefopt.evaluation.arena_figures import GAMES, read_verdict, summarize
from prefopt.evaluation.benchmark_files import ARENA_HARD, ArenaHard
from prefopt.evaluation.config import ArenaConfig, check_arena
from prefopt.evaluation.judged import TextJudgedResult, counted, sampling_of, settings_of, subjects
from prefopt.evaluation.result_folder import make_all
from prefopt.evaluation.text_judge import ReplyFormat, Verdict, build_text_judge
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import each_run
from prefopt.tracking.record import read_result
from prefopt.utils import signals
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder

log = logging.getLogger(__name__)

FINISH = "continue your judgment and finish by outputting a final verdict label"
FORMS = {"v0.1": ReplyFormat(read_verdict, FINISH, tokens=600), "v2.0": ReplyFormat(read_verdict, FINISH, tokens=800)}
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
    """The answers in a file of Arena-Hard's `model_answer`, in the form of today or of the release of 2024, by uid.
    Raises UserError for a row that is none."""
    answers: dict[str, Answer] = {}
    for where, row in read_rows(path, None):
        uid = str(row.get("uid", row.get("question_id")))
        if uid not in benchmark.questions:
            others = ", ".join(version for version in ARENA_HARD if ARENA_HARD[version] != benchmark.version)
            raise UserError(
                f"{where}: uid {uid!r} is none of {benchmark.version.name}'s questions. If the file answers another "
                f"version's, name it: version={others}"
            )
        if uid in answers:
            raise UserError(f"{where} answers question {uid} once more. Leave one of the answers out.")
        text = _answer_text(row)
        if text is None:
            raise UserError(
                f"{where} must hold the user's message and the answer: "
                '{"uid": ID, "model": NAME, "messages": [{"role": "user", "content": TEXT}, '
                '{"role": "assistant", "content": {"answer": TEXT}}]}; or, as until 2024, '
                '{"question_id": ID, "model_id": NAME, "choices": [{"index": 0, "turns": [{"content": TEXT}]}]}.'
            )
        answers[uid] = Answer(str(row.get("model", row.get("model_id"))), text)
    return answers


def _answer_text(row: dict[str, Any]) -> str | None:
    """None where there is no answer to one turn."""
    try:
        if "messages" in row:
            roles = [message["role"] for message in row["messages"]]  # a system message may lead
            content = row["messages"][-1]["content"]
            text = content["answer"] if isinstance(content, dict) else content
            is_answer = roles[-1] == "assistant" and roles.count("assistant") == 1
        else:
            (turn,) = row["choices"][0]["turns"]
            text, is_answer = turn["content"] if isinstance(turn, dict) else turn, True
    except (TypeError, KeyError, ValueError, IndexError):
        return None
    return text if is_answer and isinstance(text, str) else None


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


def metric_name(benchmark: Benchmark, category: str, judge: str, baseline: "Baseline", n: int) -> str:
    """Against another baseline, or on some of the questions, it is no figure of the leaderboard's kind."""
    version = benchmark.version
    name = version.name if len(version.baselines) == 1 else f"{version.name} {category}"
    total = sum(row["category"] == category for row in benchmark.questions.values())
    if n < total:
        name += f", {n} of {total} questions"
    elif baseline.config.baseline is not None:
        name += " questions"
    return f"{name} ({judge}, against {baseline.name})"


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
    ours, theirs = (format_unfinished(record["unfinished"][side]) for side in ("model", "baseline"))
    table.add_row("answers cut off", f"{ours} against {theirs}")
    if checked := record["judge_check"]:
        agreement = f"{100 * checked['agreement']:.1f} % the same winner, {checked['n']} games"
        table.add_row("the judge beside the published one", agreement)
    return table


@dataclass(frozen=True)
class Baseline:
    """What models' answers to the questions `uids` are compared with: the answers of `model`, or of the file `path`.
    They are drawn or read once, when they are first asked for."""

    name: str
    path: str
    model: ModelConfig | None
    uids: Sequence[str]
    benchmark: Benchmark
    config: ArenaConfig

    def identity(self) -> list[Any]:
        """What tells its answers, with the settings of sampling."""
        if self.model is None:
            return [digest(self.path)]
        return [local_files(self.model), self.path, self.model.revision, self.model.tokenizer]

    def check(self) -> None:
        """Raise UserError for a model that cannot answer, and for a file without all answers."""
        if self.model is not None:
            check_source(self.model, "baseline")
        else:
            assert self.answers

    @cached_property
    def answers(self) -> tuple[dict[str, Answer], str | None]:
        """By uid, and the digest of its weights. Raises UserError where one lacks."""
        if self.model is not None:
            return draw_answers(self.model, self.name, self.uids, self.benchmark, self.config)
        answers = read_answers(self.path, self.benchmark)
        if lacking := [uid for uid in self.uids if uid not in answers]:
            raise UserError(
                f"{self.path} has no answer to {len(lacking)} of {len(self.uids)} questions "
                f"({', '.join(lacking[:5])}), and must answer them all."
            )
        return answers, None


def baseline_for(category: str, uids: Sequence[str], benchmark: Benchmark, config: ArenaConfig) -> Baseline:
    """Raises UserError where there is no such baseline."""
    name, model = benchmark.version.baselines[category], None
    if config.baseline is None:
        path = str(benchmark.version.answers[name].find(config.files))
    else:
        name, model = baseline_of(config.baseline, config.run)
        path = model.path if model else config.baseline
    return Baseline(name, path, model, uids, benchmark, config)


@dataclass(frozen=True)
class ArenaResult(TextJudgedResult):
    """A model's answers to the questions of a category, in two games each with the baseline's."""

    config: ArenaConfig
    benchmark: Benchmark
    category: str
    baseline: Baseline
    job = "arena"

    @property
    def form(self) -> ReplyFormat[str]:
        return FORMS[self.config.version]

    @property
    def uids(self) -> Sequence[str]:
        return self.baseline.uids

    def settings(self) -> dict[str, Any]:
        settings = settings_of(self.config, self.judge, draws=bool(self.subject.model or self.baseline.model))
        return settings | {
            "version": self.config.version,
            "category": self.category,
            "questions": hashlib.sha256("\n".join(sorted(self.uids)).encode()).hexdigest(),
            "baseline": [self.baseline.name, self.baseline.identity()],
            "files": self.benchmark.version.digests(),
        }

    def check(self) -> None:
        super().check()
        self.baseline.check()

    @cached_property
    def answers(self) -> tuple[dict[str, Answer], str | None]:
        """By uid, and the digest of the weights that drew them."""
        if self.subject.model is None:
            return read_answers(self.subject.path, self.benchmark), None
        return draw_answers(self.subject.model, self.model_name, self.uids, self.benchmark, self.config)

    @cached_property
    def asked(self) -> dict[tuple[str, int], list[Message]]:
        """By uid and game, what the judge is asked."""
        (ours, _), (theirs, _) = self.answers, self.baseline.answers
        return {
            (uid, game): judge_prompt(self.benchmark, uid, theirs[uid].text, ours[uid].text, game)
            for game in GAMES
            for uid in self.uids
        }

    def prompts(self) -> list[list[Message]]:
        return list(self.asked.values())

    def drawn_rows(self) -> list[dict[str, Any]]:
        return answer_rows(self.answers[0], self.benchmark)

    def judged(self, verdicts: Sequence[Verdict[str]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        (ours, weights), (theirs, their_weights) = self.answers, self.baseline.answers
        of_game = dict(zip(self.asked, verdicts, strict=True))
        rows = [
            {
                "uid": uid,
                "category": self.category,
                "judge": self.judge.title,
                "model": self.model_name,
                "baseline": self.baseline.name,
                "games": [
                    {
                        "score": of_game[uid, game].value,
                        "judgment": {"answer": of_game[uid, game].judgment},
                        "prompt": self.asked[uid, game],
                    }
                    for game in GAMES
                ],
            }
            for uid in self.uids
        ]
        both = {uid: (of_game[uid, 1].value, of_game[uid, 2].value) for uid in self.uids}
        version, baseline = self.benchmark.version, self.baseline
        sides = {"model": ours, "baseline": theirs}
        drawn = {"model": weights, "baseline": their_weights}
        return rows, {
            "model": self.model_name,
            "weights": weights,
            "metric": metric_name(self.benchmark, self.category, self.judge.title, baseline, len(self.uids)),
            "category": self.category,
            "baseline": {"name": baseline.name, "path": baseline.path, "weights": their_weights},
            "figures": summarize(both, version.quantiles, version.drops_rows) | counted(verdicts),
            "judge_check": self.judge.checked("verdicts"),
            "style": {side: style([given[uid].text for uid in self.uids]) for side, given in sides.items()},
            "unfinished": {
                side: None if drawn[side] is None else sum(not given[uid].finished for uid in self.uids)
                for side, given in sides.items()
            },
        }


def plan(config: ArenaConfig) -> list[ArenaResult]:
    """The results of a configuration, of all its runs and categories. Raises UserError for what is missing or no
    answer."""
    check_arena(config)
    judge = build_text_judge(config.judge, ARENA_HARD[config.version].judge_tokens)
    if config.output is not None:
        check_folder("output", config.output)
    benchmark = read_benchmark(config.version, config.files)
    results = []
    for one in each_run(config):
        found = subjects(one)
        answered = read_answers(one.answers, benchmark) if one.answers else benchmark.questions
        baselines = {
            category: baseline_for(category, uids, benchmark, one)
            for category in benchmark.version.baselines
            if (uids := [uid for uid in answered if benchmark.questions[uid]["category"] == category])
        }
        results += [
            ArenaResult(one, judge, subject, benchmark, category, baseline)
            for subject in found
            for category, baseline in baselines.items()
        ]
    return results


def run_pending(config: ArenaConfig, **extra: str) -> None:
    """Make every result that has no record yet, and print the table of each. `extra` goes into the records."""
    signals.install_handlers()
    check_arena(config)
    resolve_hardware(config)
    for _, folder in make_all(plan(config), config.max_cost, extra):
        console().print(format_results(read_result(folder / "record.json")))
        print(folder)
