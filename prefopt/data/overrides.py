"""A layout of rows as the overrides that read it."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from prefopt.config.parse import file_name_problems
from prefopt.data.fields import as_number
from prefopt.data.formats import Chats, Completions, Format, Pairs


@dataclass(frozen=True)
class Layout:
    """A way to read rows: a format with its `options`, the `columns` that it needs, and policies."""

    format: type[Format]
    columns: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    meaning: str = ""  # what tells it from the other layouts that fit

    @property
    def rows(self) -> str:
        """The rows that it reads, in one line."""
        return (self.format.__doc__ or "").splitlines()[0]

    @property
    def is_chats(self) -> bool:
        return self.format in (Chats, Completions)

    def overrides(self, path: str) -> list[str]:
        """The command line that reads `path` in this way."""
        target = f"{self.format.__module__}.{self.format.__qualname__}"
        return [
            "dataset=jsonl",
            f"dataset.train={quoted(path)}",
            *naming(path),
            *([f"dataset.format._target_={target}"] if self.format is not Pairs else []),
            *(f"+dataset.format.{key}={quoted(value)}" for key, value in self.options.items()),
            *(f"+dataset.columns.{ours}={quoted(theirs)}" for ours, theirs in self.columns.items()),
            *(f"dataset.policies.{reason}={policy}" for reason, policy in self.policies.items()),
        ]


def naming(path: str) -> list[str]:
    """An override of the data set's name where that of the file cannot name a folder."""
    name = PurePath(path).name
    clean = re.sub(r"[^\w+=@,. -]", "_", name).lstrip(". ") or "data"
    return [f"dataset.name={quoted(clean)}"] if file_name_problems({"dataset.name": name}) else []


def quoted(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    text = str(value)
    if re.fullmatch(r"[\w./:@%+-]+", text, re.ASCII) and as_number(text) is None and not is_keyword(text):
        return text
    return QuotedString(text, Quote.double).with_quotes()


def is_keyword(text: str) -> bool:
    """Whether Hydra would read the text as something else."""
    return text.lower() in ("null", "true", "false", "nan", "inf", "-inf")
