"""The figures of Arena-Hard: what a verdict is, and win rates with their intervals."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prefopt.evaluation.alpaca_figures import bootstrap

PATTERNS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
# A verdict, and the same with the sides exchanged: who wins, and how often it counts.
STRONG = 3
VERDICTS = {
    "A>>B": ("A", STRONG), "A>B": ("A", 1), "A=B": ("=", 1), "B>A": ("B", 1), "B>>A": ("B", STRONG),
    "B<<A": ("A", STRONG), "B<A": ("A", 1), "B=A": ("=", 1), "A<B": ("B", 1), "A<<B": ("B", STRONG),
}  # fmt: skip
GAMES = (1, 2)  # in the first, the baseline is assistant A
ROUNDS = 100  # of the leaderboard's own bootstrap

Game = tuple[float, int]  # what the model gets (1: it wins, 0.5: a tie, 0), and how often the game counts


def read_verdict(reply: str) -> str | None:
    """The last verdict in a judge's reply, a key of VERDICTS; None where there is none, or it is none of these."""
    for pattern in PATTERNS:
        if found := pattern.findall(reply.upper()):
            return found[-1] if found[-1] in VERDICTS else None
    return None


def outcome(verdict: str, game: int) -> Game:
    """What a verdict in a game gives the model."""
    winner, weight = VERDICTS[verdict]
    if winner == "=":
        return 0.5, weight
    model = "B" if game == 1 else "A"
    return float(winner == model), weight


def games_of(verdicts: Iterable[tuple[str | None, str | None]], drops_rows: bool) -> list[list[Game]]:
    """The games of each question, those without verdict left out; with `drops_rows` both, where one has none. A
    question without games is left out."""
    questions = []
    for both in verdicts:
        games = [outcome(verdict, game) for verdict, game in zip(both, GAMES, strict=True) if verdict is not None]
        if games and (len(games) == len(GAMES) or not drops_rows):
            questions.append(games)
    return questions


def win_rate(questions: Sequence[Sequence[Game]], quantiles: tuple[float, float]) -> dict[str, Any]:
    """The weighted mean over all games of all questions, in percent, with its standard error and the 95 % interval of a
    bootstrap over questions, each with both games.

    `leaderboard_interval` is what Arena-Hard prints: between the `quantiles` of ROUNDS resamples of single verdicts,
    those that count three times as three. It is too narrow: games of one question are not independent.
    """
    sums = np.array([sum(value * weight for value, weight in games) for games in questions])
    counts = np.array([sum(weight for _, weight in games) for games in questions], dtype=float)
    rate = sums.sum() / counts.sum()
    # Of a ratio of two sums over questions, by its linear part.
    n = len(questions)
    error = np.sqrt(((sums - rate * counts) ** 2).sum() * n / max(n - 1, 1)) / counts.sum()
    verdicts = np.array([value for games in questions for value, weight in games for _ in range(weight)])
    generator = np.random.default_rng(0)
    rounds = [verdicts[generator.integers(0, len(verdicts), len(verdicts))].mean() for _ in range(ROUNDS)]
    return {
        "win_rate": float(100 * rate),
        "standard_error": float(100 * error),
        "interval": [100 * end for end in bootstrap(sums, counts)],
        "leaderboard_interval": [float(100 * q) for q in np.quantile(rounds, quantiles)],
        "weighted_verdicts": len(verdicts),
    }


def summarize(
    verdicts: dict[str, tuple[str | None, str | None]], quantiles: tuple[float, float], drops_rows: bool
) -> dict[str, Any]:
    """The figures of the verdicts in both games of each question, where None is a missing one: it is left out, and with
    `drops_rows` the other one of its question too."""
    questions = games_of(verdicts.values(), drops_rows)
    games = [game for both in questions for game in both]
    pairs = [both for both in questions if len(both) == len(GAMES)]
    return {
        "n": len(verdicts),
        **win_rate(questions, quantiles),
        **{
            name: sum(value == score for value, _ in games)
            for name, score in (("wins", 1), ("ties", 0.5), ("losses", 0))
        },
        "strong_share": sum(weight == STRONG for _, weight in games) / len(games),
        "contradictory_share": sum({a, b} == {0, 1} for (a, _), (b, _) in pairs) / len(pairs) if pairs else None,
    }


def question_values(questions: Sequence[Sequence[Game]]) -> list[float]:
    """A value for each question, in percent, whose mean is the win rate, and whose spread is that of the win rate: its
    linear part, since a win rate is a ratio of two sums over questions."""
    sums = np.array([sum(value * weight for value, weight in games) for games in questions])
    counts = np.array([sum(weight for _, weight in games) for games in questions], dtype=float)
    rate = sums.sum() / counts.sum()
    return [float(100 * value) for value in rate + (sums - rate * counts) / counts.mean()]
