"""The answers of two policies side by side: as a page, and the first of them in a terminal."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prefopt.reporting.tables import Tabular
from prefopt.reporting.templating import render

SIDES = {"": "all", "a": "A preferred", "b": "B preferred", "tie": "neither"}
MARKS = {"": "all answers", "cut": "one was cut off", "equal": "A and B are equal", "differ": "A and B differ"}
# The page sorts by the first word, a key of an item's `data`, times the second.
ORDERS = {
    "index 1": "in their order",
    "preference 1": "most clearly preferred: B first",
    "preference -1": "most clearly preferred: A first",
    "reward -1": "reward of A above B's",
    "reward 1": "reward of B above A's",
    "length -1": "A longer than B",
    "length 1": "B longer than A",
}


@dataclass(frozen=True)
class Answer:
    """One answer. `finished`: False where the token limit cut it off."""

    text: str
    finished: bool = True
    reward: float | None = None


@dataclass(frozen=True)
class Compared:
    """A prompt with the answers of A, of B and, if asked for, of a third. `preference` goes from 1 (B's answer) to 2
    (A's); None: no judge was asked."""

    prompt: str
    answers: Sequence[Answer]
    preference: float | None = None

    @property
    def preferred(self) -> str:
        """a, b or tie; "" without a judge."""
        if self.preference is None:
            return ""
        return "a" if self.preference > 1.5 else "b" if self.preference < 1.5 else "tie"

    @property
    def equal(self) -> bool:
        """Whether A and B answer the same."""
        return self.answers[0].text == self.answers[1].text

    @property
    def data(self) -> dict[str, Any]:
        """The keys by which the page filters and orders."""
        a, b = self.answers[:2]
        cut = "" if all(answer.finished for answer in self.answers) else "cut "
        data: dict[str, Any] = {
            "marks": cut + ("equal" if self.equal else "differ"),
            "length": len(a.text) - len(b.text),
        }
        if self.preference is not None:
            data |= {"side": self.preferred, "preference": self.preference}
        if a.reward is not None and b.reward is not None:
            data["reward"] = a.reward - b.reward
        return data


def summarize(items: Sequence[Compared], names: Sequence[str]) -> dict[str, str]:
    """What the answers are in all, by name: lengths, cut-off and equal ones, preferences."""
    letters = "ABC"[: len(names)]
    sides = list(zip(*(item.answers for item in items), strict=True))
    mean_length = (sum(len(answer.text) for answer in side) / len(items) for side in sides)
    cut = (sum(not answer.finished for answer in side) for side in sides)
    facts = dict(zip(letters, names, strict=True)) | {
        "prompts": f"{len(items)}, of which {sum(item.equal for item in items)} with equal answers of A and B",
        "mean length": ", ".join(f"{k} {n:.0f}" for k, n in zip(letters, mean_length, strict=True)) + " characters",
        "cut off": ", ".join(f"{k} {n}" for k, n in zip(letters, cut, strict=True)),
    }
    if items[0].preference is not None:
        wins = Counter(item.preferred for item in items)
        facts["preferred"] = f"A {wins['a']}, B {wins['b']}, neither {wins['tie']}"
    return facts


def page(names: Sequence[str], facts: dict[str, str], items: Sequence[Compared], differences: Tabular | None) -> str:
    """One HTML file that needs nothing besides: the settings in which A and B differ, then prompts and answers.

    Args:
        names: of the columns: A, B, and the third if there is one.
        facts: what the page says of itself, by name.
        differences: of the two runs' configs (`config_differences`); None where B is no run.
    """
    keys = set(items[0].data)
    orders = {key: name for key, name in ORDERS.items() if key == "index 1" or key.split(" ")[0] in keys}
    sides = SIDES if "preference" in keys else {}
    return render(
        "compare.html",
        titles=names,
        facts=facts,
        sides=sides,
        marks=MARKS,
        orders=orders,
        items=items,
        differences=differences,
    )


def marks(item: Compared, place: int) -> list[str]:
    """What is to be said above the answer in column `place`: its reward, and whether it is the preferred one, cut off,
    or the same as the other."""
    answer = item.answers[place]
    words = [] if answer.reward is None else [f"reward {answer.reward:.3f}"]
    words += ["preferred"] * (item.preferred == "abc"[place])
    words += ["cut off"] * (not answer.finished)
    return words + ["equal"] * (item.equal and place < 2)


def format_answers(items: Sequence[Compared], most: int) -> Group:
    """The first `most` prompts whose answers differ, with the answers in columns, for a terminal; without blank
    lines."""
    shown = [item for item in items if not item.equal][:most] or list(items[:most])
    tables: list[Any] = []
    for item in shown:
        table = Table(box=SIMPLE, padding=(0, 1), expand=True)
        for place in range(len(item.answers)):
            heading = ", ".join(["ABC"[place], *marks(item, place)])
            table.add_column(heading, overflow="fold", ratio=1)
        table.add_row(*(Text(re.sub(r"\s*\n\s*", "\n", answer.text.strip())) for answer in item.answers))
        tables += [Text(item.prompt, style="bold"), table]
    return Group(*tables)
