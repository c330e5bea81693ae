"""How a judge that answers in text agrees with published judgments: what its figures are worth, before they are made.

It is asked what the published judge was asked, word for word, and read by the same rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import spearmanr

from prefopt.data.items import Message
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation import arena, mtbench
from prefopt.evaluation.arena_figures import GAMES, VERDICTS, games_of, outcome, win_rate
from prefopt.evaluation.benchmark_files import ARENA_HARD, MT_BENCH_PROMPTS
from prefopt.evaluation.config import JudgeCheckConfig, check_judge_check
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.judged import counted
from prefopt.evaluation.text_judge import ReplyFormat, TextJudge, build_text_judge
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import find_result, write_result
from prefopt.utils import signals
from prefopt.utils.console import console, folding_table

QUANTILES = (0.025, 0.975)


def read_ratings(path: str, files: str | None) -> tuple[list[list[Message]], list[float]]:
    """What was asked, and the rating, of each row of FastChat's `model_judgment` that has one. Raises UserError for a
    row that is none, and where none has a rating."""
    systems = {row["name"]: row["system_prompt"] for row in MT_BENCH_PROMPTS.rows(files)}
    prompts, ratings = [], []
    for where, row in read_rows(path, None):
        judge: Any = row.get("judge")
        text, rating = row.get("user_prompt"), row.get("score", "")
        is_judgment = isinstance(judge, list) and len(judge) == 2 and isinstance(text, str)
        if not is_judgment or not isinstance(rating, int | float | None):
            raise UserError(
                f"{where} must hold a judgment of FastChat's with its prompt: judge [NAME, TEMPLATE], user_prompt and "
                "score."
            )
        if judge[1] not in list(systems):  # a list, because what stands here may not be hashable
            raise UserError(f"{where}: the template {judge[1]!r} is none of FastChat's: {', '.join(systems)}.")
        if rating is not None and 1 <= rating <= 10:  # -1: a missing one
            prompts.append([{"role": "system", "content": systems[judge[1]]}, {"role": "user", "content": text}])
            ratings.append(float(rating))
    if len(ratings) < 2:
        raise UserError(f"{path} has {len(ratings)} ratings, and at least 2 are needed.")
    return prompts, ratings


def read_verdicts(path: str, files: str | None) -> tuple[list[list[Message]], list[str]]:
    """What was asked, and the verdict, in both games of each row of Arena-Hard's `model_judgment` that has two, game
    after game. Raises UserError for a row that is none, and where none has two verdicts."""
    settings = ARENA_HARD["v0.1"].settings.json(files)
    prompts: list[list[Message]] = []
    verdicts: list[str] = []
    for where, row in read_rows(path, None):
        games = row.get("games")
        if not isinstance(games, list) or len(games) != len(GAMES):
            games = [{}]
        asked = [_asked(game, settings["arena-hard-v0.1"]["system_prompt"]) for game in games if game is not None]
        if None in asked:
            raise UserError(
                f"{where} must hold a judgment of Arena-Hard's with its prompts: two games, each with score, and with "
                "user_prompt or prompt."
            )
        scores = [game["score"] for game in games if game is not None]  # null: the judge has not answered
        if len(scores) == len(GAMES) and all(score in list(VERDICTS) for score in scores):
            prompts += [messages for messages in asked if messages]
            verdicts += scores
    if not verdicts:
        raise UserError(f"{path} has no row with two verdicts.")
    return prompts, verdicts


def _asked(game: Any, system: str) -> list[Message] | None:
    """The later versions write the whole conversation down, the release the user's text. None for what is no game."""
    try:
        messages = [{"role": message["role"], "content": message["content"]} for message in game.get("prompt", [])]
        if not messages:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": game["user_prompt"]}]
        is_game = "score" in game and all(isinstance(m["content"], str) for m in messages)
    except (AttributeError, KeyError, TypeError):
        return None
    return messages if is_game else None


def compare_ratings(published: Sequence[float], ours: Sequence[float | None]) -> dict[str, Any]:
    """Figures over the answers that both have rated: correlations, the mean difference (ours less the published), the
    mean absolute one, and the share of ratings that differ by at most 1."""
    pairs = np.array([(p, o) for p, o in zip(published, ours, strict=True) if o is not None], dtype=float)
    theirs, mine = pairs[:, 0], pairs[:, 1]
    varies = bool(theirs.std() and mine.std())
    return {
        "n": len(pairs),
        "correlation": float(np.corrcoef(theirs, mine)[0, 1]) if varies else None,
        "rank_correlation": float(spearmanr(theirs, mine).statistic) if varies else None,
        "difference": float((mine - theirs).mean()),
        "absolute_difference": float(np.abs(mine - theirs).mean()),
        "within_1": float((np.abs(mine - theirs) <= 1).mean()),
    }


def compare_verdicts(published: Sequence[str], ours: Sequence[str | None]) -> dict[str, Any]:
    """Figures over the games that both have judged: the share with the same winner or a tie in both; of each judge the
    win rate, and the share of questions whose two games contradict each other, which the sides alone explain."""
    sides = [
        (outcome(p, game)[0], outcome(o, game)[0])
        for game, p, o in zip(GAMES * (len(published) // len(GAMES)), published, ours, strict=True)
        if o is not None
    ]
    figures: dict[str, Any] = {"n": len(sides), "agreement": float(np.mean([p == o for p, o in sides]))}
    for name, verdicts in (("published", published), ("judge", ours)):
        questions = games_of(zip(verdicts[::2], verdicts[1::2], strict=True), drops_rows=True)
        contradictory = [{first, second} == {0, 1} for (first, _), (second, _) in questions]
        figures[name] = {
            "win_rate": win_rate(questions, QUANTILES)["win_rate"] if questions else None,
            "contradictory_share": float(np.mean(contradictory)) if questions else None,
        }
    return figures


@dataclass(frozen=True)
class Kind:
    """A kind of judgments, a key of the configuration: how its file is read, what a judge is to write, and what
    compares its judgments with the published ones."""

    read_file: Callable[[str, str | None], tuple[list[list[Message]], Sequence[Any]]]
    form: ReplyFormat[Any]
    compare: Callable[[Any, Any], dict[str, Any]]


KINDS = {
    "ratings": Kind(read_ratings, mtbench.FORM, compare_ratings),
    "verdicts": Kind(read_verdicts, arena.FORMS["v0.1"], compare_verdicts),
}


def format_check(record: dict[str, Any]) -> Table:
    """The table of a judge's check."""
    table = folding_table("", "", title=f"{record['judge']['name']} beside published judgments")
    if ratings := record["ratings"]:
        table.add_row("ratings", f"{ratings['n']} compared, {ratings['missing']} missing")
        if ratings["correlation"] is not None:
            ranks = f"{ratings['rank_correlation']:.2f} of ranks"
            table.add_row("  correlation", f"{ratings['correlation']:.2f}, {ranks}")
        table.add_row("  its rating less the published", f"{ratings['difference']:+.2f}")
        table.add_row("  mean absolute difference", f"{ratings['absolute_difference']:.2f}")
        table.add_row("  differ by at most 1", f"{100 * ratings['within_1']:.1f} %")
    if verdicts := record["verdicts"]:
        table.add_row("verdicts", f"{verdicts['n']} compared, {verdicts['missing']} missing")
        table.add_row("  same winner", f"{100 * verdicts['agreement']:.1f} %")
        for name, who in (("judge", "its"), ("published", "the published")):
            figures = verdicts[name]
            if figures["win_rate"] is not None:
                contradictory = f"{100 * figures['contradictory_share']:.1f} % contradictory questions"
                table.add_row(f"  {who} win rate", f"{figures['win_rate']:.1f} %, {contradictory}")
    return table


def check(config: JudgeCheckConfig) -> dict[str, Any]:
    """Ask a judge, and write the record of its check, which its figures then carry. What was compared before and is not
    given now stays in the record.

    Raises UserError for what cannot be read, and where the judge does.
    """
    check_judge_check(config)
    signals.install_handlers()
    judge = build_text_judge(config.judge)
    paths = {name: path for name in KINDS if (path := getattr(config, name)) is not None}
    parts = {name: KINDS[name].read_file(path, config.files) for name, path in paths.items()}

    record: dict[str, Any] = dict.fromkeys(KINDS) | (find_result(judge.check_file) or {})
    record["judge"] = judge.describe()
    budget, folder = Budget(config.max_cost), judge.check_file.parent / "replies"
    budget.announce_all(
        [judge.estimate(prompts, KINDS[name].form.tokens, folder) for name, (prompts, _) in parts.items()]
    )
    for name, (prompts, published) in parts.items():
        record[name] = _compare(judge, KINDS[name], prompts, published, folder, budget) | {"rows": digest(paths[name])}
    write_result(judge.check_file, record | provenance())
    console().print(format_check(record))
    print(judge.check_file.parent)
    return record


def _compare(
    judge: TextJudge,
    kind: Kind,
    prompts: Sequence[list[Message]],
    published: Sequence[Any],
    folder: Path,
    budget: Budget,
) -> dict[str, Any]:
    # How many are missing is a result here.
    verdicts = judge.judge(prompts, kind.form, folder, budget, most_missing=1.0)
    values = [verdict.value for verdict in verdicts]
    if all(value is None for value in values):
        raise UserError(f"{judge.title} gave no verdict that can be read to any of {len(values)} prompts.")
    return kind.compare(published, values) | counted(verdicts)
