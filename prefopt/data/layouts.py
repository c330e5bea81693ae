"""Which layout a file's rows have, found by looking at the first of them: `dataset=PATH` on the command line.

`find_layout` decides by the names of the fields and the kinds of their values, and then reads the rows in this way.
Where two layouts fit and mean something else, it decides nothing: the message gives the command of each.
"""

import itertools
import re
import shlex
from dataclasses import dataclass

from prefopt.data.fields import as_number, nested
from prefopt.data.formats import (
    Chats,
    Completions,
    ImplicitPrompt,
    LabelledCompletions,
    Pairs,
    ScoredCompletions,
    ScoredResponses,
    Steps,
    Transcripts,
    TwoResponses,
)
from prefopt.data.items import Dropped, Row, RowDefect
from prefopt.data.look import Look, has
from prefopt.data.overrides import Layout, quoted
from prefopt.data.sources import read_rows
from prefopt.errors import UserError

LOOKED_AT = 1000  # rows, at most
# A list of messages that became text, as in a CSV file: JSON, or as Python writes it.
WRITTEN_MESSAGES = re.compile(
    r"""\s*\[?\s*\{\s*['"](role['"]\s*:.*?['"]content|content['"]\s*:.*?['"]role|from['"]\s*:.*?['"]value)['"]\s*:""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Found:
    """The layout of a file, and what to say about fields that it does not read: `rewards` are overrides that would use
    columns that look like rewards."""

    layout: Layout
    unread: list[str]
    rewards: list[str]


def find_layout(path: str, split: str | None, columns: dict[str, str], command: str) -> Found:
    """The layout of the rows of a file or folder.

    Args:
        split: The split of a folder; None: all rows of a file.
        columns: {our name: theirs}, as `dataset.columns`, that the user has given.
        command: The command without what chooses the data set, for messages: "python -m prefopt.train objective=dpo".

    Raises UserError for a file that cannot be read, and where no layout fits, or several that mean something else.
    """
    rows = [row for _, row in itertools.islice(read_rows(path, split), LOOKED_AT)]
    renamed = []
    for row in rows:
        try:
            renamed.append(row | {ours: row[t] if t in row else nested(row, t) for ours, t in columns.items()})
        except KeyError as error:
            raise UserError(f"{path} has no field {error} (its fields: {', '.join(row) or 'none'}).") from None
    look = Look(renamed)
    candidates = list(look.layouts())
    fitting = [layout for layout in candidates if (failure := first_failure(layout, renamed)) is None]
    if not fitting:
        reason = f" As {candidates[0].format.__name__}: {failure}." if candidates else ""
        raise UserError(f"no known layout fits the rows of {path}.{reason}\n{look.describe()}\n{known_layouts()}")
    if len(fitting) > 1 or (fitting[0].meaning and len(candidates) == 1):
        lines = [f"  {layout.meaning}:\n    {command} {shlex.join(layout.overrides(path))}" for layout in fitting]
        more = "several layouts fit" if len(fitting) > 1 else "it is not certain what they mean"
        raise UserError(f"{path}, rows of {look.describe()}: {more}. Choose by the command:\n" + "\n".join(lines))
    (layout,) = fitting
    read = {name.partition(".")[0] for name in [*layout.columns.values(), *columns.values()]}
    known = {*(layout.format(**layout.options).fields() or ()), "split"}
    # A field of one of our names is not read where another one is mapped to that name.
    if "prompt" in look.names or "prompt" in layout.columns:
        known -= {"instruction", "input", "history"}  # the prompt is there already
    unread = [name for name in look.names if name not in read and (name not in known or name in layout.columns)]
    for name in look.names:
        if name not in unread and look.mostly(name, lambda v: isinstance(v, str) and WRITTEN_MESSAGES.match(v)):
            raise UserError(
                f"{path}: field {name!r} holds messages that were written as text, which would be learnt with all its "
                "brackets. Write the rows as JSON lines or Parquet, with lists of messages."
            )
    return Found(layout, unread, reward_columns(look) if not layout.is_chats else [])


def first_failure(layout: Layout, rows: list[Row]) -> str | None:
    """Why the layout cannot read most of the rows; None if it can."""
    read = layout.format(**layout.options)
    failures = []
    for row in rows:
        mapped = row | {
            ours: row[t] if t in row else nested(row, t) for ours, t in layout.columns.items() if has(row, t)
        }
        try:
            made = read(mapped)
        except RowDefect as error:
            # Null or no text: a counted defect of a row. If all rows have it, the layout is another one.
            failures.append(str(error) if error.dropped.reason == "not_text" else None)
        except KeyError as error:
            failures.append(f"a row has no field {error}")
        except ValueError as error:
            failures.append(str(error))
        else:
            # Whole files of turns that do not fit are rather another layout than defects.
            is_misread = isinstance(made, Dropped) and made.reason in ("wrong_roles", "sides_part_early")
            failures.append(str(made) if is_misread else None)
    reasons = [reason for reason in failures if reason is not None]
    return reasons[0] if len(reasons) * 2 > len(rows) else None


def known_layouts() -> str:
    """What the known layouts need, a line each."""
    formats = (Pairs, Steps, ImplicitPrompt, Transcripts, TwoResponses, ScoredResponses, ScoredCompletions,
               LabelledCompletions, Chats, Completions)  # fmt: skip
    lines = [f"  {kind.__name__}: {(kind.__doc__ or '').splitlines()[0]}" for kind in formats]
    return "The layouts are:\n" + "\n".join(lines) + "\nOther names are mapped by +dataset.columns.OURS=YOURS."


def reward_columns(look: Look) -> list[str]:
    """Overrides that would read columns of the two sides' scores as rewards, if there are such columns."""
    if {"chosen_reward", "rejected_reward"} & set(look.names):
        return []
    inside = [
        f"{name}.{key}"
        for name in look.names
        for key in dict.fromkeys(k for v in look.values(name) if isinstance(v, dict) for k in v)
    ]
    for name in [*look.names, *inside]:
        head, dot, tail = name.rpartition(".")
        other = f"{head}{dot}{tail.replace('chosen', 'rejected')}"
        if other == name or name == "chosen":
            continue
        if all(look.mostly(n, lambda value: as_number(value) is not None) for n in (name, other)):
            columns = (("chosen_reward", name), ("rejected_reward", other))
            return [f"+dataset.columns.{ours}={quoted(theirs)}" for ours, theirs in columns]
    return []
