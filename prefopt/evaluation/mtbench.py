"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): a judge's ratings of answers to 80 questions of two turns.

Questions, temperatures, prompts and the mean are FastChat's (single-answer grading); a rating that cannot be read is
asked for again, and is no rating.
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
from rich.table import Table

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import ModelConfig
from prefopt.data.items import Message
from prefopt.data.sources import read_rows
from prefopt.errors import UserError
from prefopt.evaluation.alpaca_figures import bootstrap
from prefopt.evaluation.answers import draw, format_unfinished
from prefopt.evaluation.benchmark_files import MT_BENCH_PROMPTS, MT_BENCH_QUESTIONS, MT_BENCH_REFERENCES
from prefopt.evaluation.config import MtbenchConfig, check_mtbench
from prefopt.evaluation.judged import TextJudgedResult, counted, sampling_of, settings_of, subjects
from prefopt.evaluation.result_folder import make_all
from prefopt.evaluation.text_judge import ReplyFormat, Verdict, build_text_judge
from prefopt.generation.responses import load_sampler
from prefopt.tracking.policies import each_run
from prefopt.tracking.record import read_result
from prefopt.utils import signals
from prefopt.utils.console import console, folding_table
from prefopt.utils.files import check_folder
from prefopt.utils.stats import mean_and_error

log = logging.getLogger(__name__)

NUM_QUESTIONS = 80
TURNS = (1, 2)
TEMPERATURES = {  # of the answers, by category
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # the categories whose answers are laid beside a reference
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")


@dataclass(frozen=True)
class Benchmark:
    """The questions by id, the prompt templates by name, and the reference answers by question id."""

    questions: dict[int, dict[str, Any]]
    templates: dict[str, dict[str, Any]]
    references: dict[int, list[str]]
    digests: dict[str, str]  # SHA-256 of the files


@dataclass(frozen=True)
class Conversation:
    """A model's answers to the two turns of a question. `finished`: False where the token limit cut one off."""

    turns: tuple[str, str]
    finished: tuple[bool, bool] = (True, True)


def read_benchmark(files: str | None, references: str) -> Benchmark:
    """Raises UserError where a file is not there, or is not the published one."""
    used = (MT_BENCH_QUESTIONS, MT_BENCH_PROMPTS, MT_BENCH_REFERENCES[references])
    questions, templates, answers = (file.rows(files) for file in used)
    return Benchmark(
        {row["question_id"]: row for row in questions},
        {row["name"]: row for row in templates},
        {row["question_id"]: row["choices"][0]["turns"] for row in answers},
        {file.name: file.digest for file in used},
    )


def read_rating(reply: str) -> float | None:
    """The rating in a judge's reply, 1 to 10; None where there is none, or several that differ."""
    found = {float(rating) for rating in RATING.findall(reply)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and 1 <= rating <= 10 else None


# About as many tokens has a judgment of GPT-4.
FORM = ReplyFormat(read_rating, "Please finish with the rating, strictly in the format [[rating]].", tokens=200)


def judge_prompt(benchmark: Benchmark, question: int, answers: Sequence[str], turn: int) -> tuple[str, list[Message]]:
    """The name of the template by which an answer is judged, and what the judge is asked."""
    row = benchmark.questions[question]
    kind = "single-math-v1" if row["category"] in WITH_REFERENCE else "single-v1"
    name = kind if turn == 1 else f"{kind}-multi-turn"
    template = benchmark.templates[name]
    fields = {"question": row["turns"][0], "answer": answers[0]}
    for n, (asked, answer) in enumerate(zip(row["turns"], answers, strict=True), start=1):
        fields |= {f"question_{n}": asked, f"answer_{n}": answer}
    for n, reference in enumerate(benchmark.references.get(question, []), start=1):
        fields[f"ref_answer_{n}"] = reference
    text = template["prompt_template"].format(**fields)
    return name, [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}]


def read_answers(path: str, benchmark: Benchmark) -> dict[int, Conversation]:
    """The answers in a file of FastChat's `model_answer`, by question id. Of several choices the first counts, as in
    FastChat, which the log says. Raises UserError for a row that is no answer to two turns."""
    answers: dict[int, Conversation] = {}
    several = 0
    for where, row in read_rows(path, None):
        question = _question_id(row.get("question_id"))
        if question not in benchmark.questions:
            ids = f"{min(benchmark.questions)} to {max(benchmark.questions)}"
            raise UserError(f"{where}: question_id {row.get('question_id')!r} is none of MT-Bench's, {ids}.")
        if question in answers:
            raise UserError(f"{where} answers question {question} once more. Leave one of the answers out.")
        choices: Any = row.get("choices")
        turns = None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            turns = choices[0].get("turns")
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UserError(
                f"{where} must hold the answers to two turns as texts: "
                '{"question_id": 81, "model_id": NAME, "choices": [{"index": 0, "turns": [TEXT, TEXT]}]}.'
            )
        if len(turns) != len(TURNS):
            raise UserError(
                f"{where} has {len(turns)} answers to question {question}, which has {len(TURNS)} turns. Where the "
                'model gave none, write an empty text, "", which is judged as it is.'
            )
        several += len(choices) > 1
        answers[question] = Conversation((turns[0], turns[1]))
    if several:
        log.info(f"{path}: {several} rows have several choices. The first is judged, as FastChat does it.")
    return dict(sorted(answers.items()))


def _question_id(value: Any) -> int | None:
    """Some programs write 81 as "81" or 81.0."""
    try:
        return int(value) if isinstance(value, str) or value == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def draw_answers(
    model: ModelConfig, benchmark: Benchmark, config: MtbenchConfig
) -> tuple[dict[int, Conversation], str]:
    """A model's own answers, by question id, and the digest of its weights. The second turn is drawn after the first
    answer, cut off or not."""
    sampler = load_sampler(model, config.backend, config.device, config.precision)
    drawn: dict[int, list[tuple[str, bool]]] = {question: [] for question in benchmark.questions}
    for turn in TURNS:
        for temperature in sorted(set(TEMPERATURES.values())):
            rows = [r for r in benchmark.questions.values() if TEMPERATURES[r["category"]] == temperature]
            log.info(f"{model.name}: answers to turn {turn} of {len(rows)} questions, temperature {temperature:g}")
            talks = [_talk(row["turns"][:turn], [text for text, _ in drawn[row["question_id"]]]) for row in rows]
            answers_of_turn, _ = draw(config, model, talks, sampling_of(config, temperature), sampler)
            for row, answer in zip(rows, answers_of_turn, strict=True):
                drawn[row["question_id"]].append(answer)
    answers = {
        question: Conversation((first, second), (finished_1, finished_2))
        for question, ((first, finished_1), (second, finished_2)) in drawn.items()
    }
    return answers, sampler.weights


def _talk(asked: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """The user's turns with the answers between them."""
    messages: list[Message] = [{"role": "user", "content": asked[0]}]
    for answer, question in zip(answers, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


def answer_rows(answers: dict[int, Conversation], name: str) -> list[dict[str, Any]]:
    """The rows of FastChat's `model_answer`."""
    return [
        {
            "question_id": question,
            "answer_id": hashlib.sha256("\0".join(answer.turns).encode()).hexdigest()[:22],
            "model_id": name,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": time.time(),
        }
        for question, answer in answers.items()
    ]


def summarize(ratings: dict[tuple[int, int], float | None], categories: dict[int, str]) -> dict[str, Any]:
    """The figures of ratings by (question, turn), where None is a missing one: means over both turns, each turn, each
    category, with the standard error and the 95 % interval of a bootstrap over questions.

    The score and its errors are there for all of MT-Bench's questions alone.
    """
    known = {key: rating for key, rating in ratings.items() if rating is not None}

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    of_question = {question: [r for (q, _), r in known.items() if q == question] for question, _ in ratings}
    figures: dict[str, Any] = {
        "n": len(of_question),
        "categories": {
            name: mean([r for (q, _), r in known.items() if categories[q] == name])
            for name in dict.fromkeys(categories[q] for q in of_question)
        },
    }
    if len(of_question) == NUM_QUESTIONS:
        sums, counts = (np.array([f(r) for r in of_question.values()], dtype=float) for f in (sum, len))
        figures["score"] = mean(list(known.values()))
        for name, turn in zip(("first_turn", "second_turn"), TURNS, strict=True):
            figures[name] = mean([r for (_, t), r in known.items() if t == turn])
        _, figures["standard_error"] = mean_and_error([s / n for s, n in zip(sums, counts, strict=True) if n])
        figures["interval"] = bootstrap(sums, counts)
    return figures


def metric_name(judge: str, references: str) -> str:
    """MT-Bench is as many scales as there are judges and references."""
    return f"mt_bench ({judge}, {references} references)"


def format_results(record: dict[str, Any]) -> Table:
    """The table of one model's ratings."""
    figures = record["figures"]
    table = folding_table("", "mean rating, 1 to 10", title=f"{record['model']}: {record['metric']}")
    if "score" in figures:
        low, high = figures["interval"]
        table.add_row("score, [95 % interval]", f"{figures['score']:.2f}   [{low:.2f}, {high:.2f}]")
        table.add_row("first turn", f"{figures['first_turn']:.2f}")
        table.add_row("second turn", f"{figures['second_turn']:.2f}")
    else:
        table.add_row("score", f"none: it needs all {NUM_QUESTIONS} questions, and here are {figures['n']}")
    for name, value in figures["categories"].items():
        table.add_row(f"  {name}", "–" if value is None else f"{value:.2f}")
    table.add_row("ratings", f"{figures['judgments']}, of which {figures['missing']} are missing")
    table.add_row("judge asked again", str(figures["asked_again"]))
    table.add_row("answers cut off", format_unfinished(record["unfinished"]))
    if checked := record["judge_check"]:
        table.add_row("the judge beside the published one", f"{checked['difference']:+.2f}, {checked['n']} ratings")
    return table


@dataclass(frozen=True)
class MtbenchResult(TextJudgedResult):
    """A model's conversations, rated."""

    config: MtbenchConfig
    benchmark: Benchmark
    job = "mtbench"
    form = FORM

    def settings(self) -> dict[str, Any]:
        settings = settings_of(self.config, self.judge, draws=self.subject.model is not None)
        return settings | {"references": self.config.references, "files": self.benchmark.digests}

    @cached_property
    def answers(self) -> tuple[dict[int, Conversation], str | None]:
        """By question id, and the digest of the weights that drew them."""
        if self.subject.model is None:
            return read_answers(self.subject.path, self.benchmark), None
        return draw_answers(self.subject.model, self.benchmark, self.config)

    @cached_property
    def asked(self) -> dict[tuple[int, int], tuple[str, list[Message]]]:
        """By question and turn, the name of the template and what the judge is asked."""
        answers, _ = self.answers
        return {(q, turn): judge_prompt(self.benchmark, q, answers[q].turns, turn) for turn in TURNS for q in answers}

    def prompts(self) -> list[list[Message]]:
        return [messages for _, messages in self.asked.values()]

    def drawn_rows(self) -> list[dict[str, Any]]:
        return answer_rows(self.answers[0], self.model_name)

    def judged(self, verdicts: Sequence[Verdict[float]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        answers, weights = self.answers
        of_turn = dict(zip(self.asked, verdicts, strict=True))
        rows = [
            {
                "question_id": question,
                "model": self.model_name,
                "judge": [self.judge.title, template],
                "user_prompt": messages[-1]["content"],
                "judgment": verdict.judgment,
                "score": -1 if verdict.value is None else verdict.value,  # as FastChat marks a missing one
                "turn": turn,
                "tstamp": verdict.replies[-1].tstamp if verdict.replies else None,
            }
            for ((question, turn), verdict), (template, messages) in zip(
                of_turn.items(), self.asked.values(), strict=True
            )
        ]
        ratings = {key: verdict.value for key, verdict in of_turn.items()}
        categories = {question: row["category"] for question, row in self.benchmark.questions.items()}
        return rows, {
            "model": self.model_name,
            "weights": weights,
            "metric": metric_name(self.judge.title, self.config.references),
            "figures": summarize(ratings, categories) | counted(verdicts),
            "judge_check": self.judge.checked("ratings"),
            "unfinished": None if weights is None else sum(a.finished.count(False) for a in answers.values()),
        }


def plan(config: MtbenchConfig) -> list[MtbenchResult]:
    """The results of a configuration, of all its runs. Raises UserError for what is missing or no answer."""
    check_mtbench(config)
    judge = build_text_judge(config.judge)
    if config.output is not None:
        check_folder("output", config.output)
    benchmark = read_benchmark(config.files, config.references)
    results = [MtbenchResult(one, judge, subject, benchmark) for one in each_run(config) for subject in subjects(one)]
    for result in results:
        if result.subject.model is None:
            read_answers(result.subject.path, benchmark)
    return results


def run_pending(config: MtbenchConfig, **extra: str) -> None:
    """Make every result that has no record yet, and print the table of each. `extra` goes into the records."""
    signals.install_handlers()
    check_mtbench(config)
    resolve_hardware(config)
    for _, folder in make_all(plan(config), config.max_cost, extra):
        console().print(format_results(read_result(folder / "record.json")))
        print(folder)
