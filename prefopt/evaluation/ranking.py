"""Iterative pairwise ranking (budget-controlled regularization, arXiv 2411.05875): the best of n responses by n - 1
comparisons of a judge.

The first response is the running winner. The judge compares it with the second, the better one with the third, and so
on. The procedure is the paper's as far as its excerpts tell; the judge's prompt is ours.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.data.fields import as_prompt, content_id, responses_of
from prefopt.data.items import Message, Row
from prefopt.data.sources import read_rows
from prefopt.errors import UserError
from prefopt.evaluation.config import RankConfig, check_rank
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.text_judge import ReplyFormat, TextJudge, Verdict, build_text_judge

log = logging.getLogger(__name__)

SYSTEM = (
    "You compare two answers of AI assistants to the last message of a user. Judge by how helpful, correct and "
    "harmless they are. Neither their order nor their length must count. Explain briefly, and end with the better "
    "answer as [[A]] or [[B]]. There is no tie."
)


@dataclass
class Candidates:
    """The responses to a prompt, and what is known of them so far: the number of the running winner, and the numbers of
    those without a verdict."""

    prompt: list[Message]
    texts: list[str]
    winner: int = 0
    unknown: set[int] = field(default_factory=set)

    def challenged_by(self, i: int) -> bool:
        """Whether response `i` has to be compared with the running winner."""
        return i < len(self.texts) and self.texts[i] != self.texts[self.winner]

    def is_first(self, i: int) -> bool:
        """Whether the winner stands first, as answer A: by the content, so in half of all comparisons."""
        return int(content_id(self.prompt, self.texts[self.winner], self.texts[i])[0], 16) % 2 == 0

    def question(self, i: int) -> list[Message]:
        """What the judge is asked."""
        answers = [self.texts[self.winner], self.texts[i]]
        if not self.is_first(i):
            answers.reverse()
        talk = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in self.prompt)
        text = f"{talk}\n\n[answer A]\n{answers[0]}\n[end of answer A]\n\n[answer B]\n{answers[1]}\n[end of answer B]"
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

    def take(self, i: int, verdict: Verdict[str]) -> None:
        """The running winner after a verdict on response `i`: A, B or none."""
        if verdict.value is None:
            self.unknown.add(i)
        elif (verdict.value == "A") != self.is_first(i):
            self.winner = i

    @property
    def rewards(self) -> list[float | None]:
        """1 for the winner, 0 for all that were beaten, None for those without a verdict."""
        best = self.texts[self.winner]
        return [1.0 if t == best else None if i in self.unknown else 0.0 for i, t in enumerate(self.texts)]


def read_choice(reply: str) -> str | None:
    """The last verdict in a reply.

    >>> read_choice("A is short. [[B]]"), read_choice("[[C]]")
    ('B', None)
    """
    found = re.findall(r"\[\[([AB])\]\]", reply)
    return found[-1] if found else None


FORM = ReplyFormat(read_choice, "Finish with your verdict: [[A]] or [[B]].", 200)


def read_candidates(path: str, split: str | None) -> tuple[list[Row], list[Candidates]]:
    """The rows, and what is to be ranked. Raises UserError for a row without a prompt and two responses."""
    rows, candidates = [], []
    for where, row in read_rows(path, split):
        try:
            responses, _ = responses_of(row)
            prompt = as_prompt(row["prompt"])
        except KeyError as error:
            raise UserError(f"{where} has no field {error}; a row has prompt and responses (prefopt.sample).") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if len(responses) < 2:
            raise UserError(f"{where} has one response, and there is nothing to compare it with.")
        rows.append(row)
        candidates.append(Candidates(prompt, [message["content"] for message in responses]))
    if not rows:
        raise UserError(f"{path} has no row to rank.")
    return rows, candidates


def rank_candidates(candidates: Sequence[Candidates], judge: TextJudge, folder: Path, budget: Budget) -> None:
    """Find the winners, round by round. The judge's replies are kept in `folder`, and no comparison is paid for twice.

    Raises UserError and Interrupted as `TextJudge.judge` does, and UserError before the first call where all rounds are
    estimated to cost more than `budget`. Their winners are not known then; the first responses stand for them.
    """
    rounds = max(len(of_prompt.texts) for of_prompt in candidates) - 1
    first = [[c.question(i) for c in candidates if c.challenged_by(i)] for i in range(1, rounds + 1)]
    budget.announce_all(judge.estimate(questions, FORM.tokens, folder) for questions in first)
    for i in range(1, rounds + 1):
        challenged = [of_prompt for of_prompt in candidates if of_prompt.challenged_by(i)]
        if not challenged:
            continue
        log.info(f"round {i} of {rounds}: {len(challenged)} comparisons")
        questions = [of_prompt.question(i) for of_prompt in challenged]
        verdicts = judge.judge(questions, FORM, folder, budget)
        for of_prompt, verdict in zip(challenged, verdicts, strict=True):
            of_prompt.take(i, verdict)


def rank(config: RankConfig, replies: Path) -> list[Row]:
    """The rows of the input with `rewards` and `judge`, its name. Replies are kept in the folder `replies`."""
    check_rank(config)
    judge = build_text_judge(config.judge)
    rows, candidates = read_candidates(config.input, config.split)
    rank_candidates(candidates, judge, replies, Budget(config.max_cost))
    named: dict[str, Any] = {"judge": judge.title}
    # Rewards that a row has on other scales are of another scorer.
    kept = [{k: v for k, v in row.items() if not k.startswith("rewards")} for row in rows]
    return [row | {"rewards": of_prompt.rewards} | named for row, of_prompt in zip(kept, candidates, strict=True)]
