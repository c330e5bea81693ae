"""A table of results, as Markdown, CSV and LaTeX; the HTML pages show it by templates/papers.html."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.utils.files import atomic_write
from prefopt.utils.plain import csv_cell, markdown_text

LINES_OF_PAGE = 45  # of small type, with room for a caption
MISSING = "–"  # in a cell: not measured, or not published
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
}


@dataclass(frozen=True)
class Column:
    """A column of a table: which value of a row it shows, under which heading, and how.

    digits: after the point; None: as many as the number needs, at most six (counts, β).
    error: whether the standard error follows, which a row holds under KEY_se.
    signed: whether a positive number has its sign.
    text: names and sentences, set to the left; numbers are set to the right.
    """

    key: str
    heading: str
    digits: int | None = None
    error: bool = False
    signed: bool = False
    text: bool = False

    def format(self, row: Mapping[str, Any]) -> str:
        """The cell of this column; a text (as published figures are) as it is."""
        value = row.get(self.key)
        if value is None or value == "":
            return MISSING
        if isinstance(value, str):
            return value
        if self.digits is None:
            return str(value) if isinstance(value, int) else f"{value:g}"
        return format_value(value, row.get(f"{self.key}_se") if self.error else None, self.digits, self.signed)


def format_value(mean: float | None, error: float | None, digits: int, signed: bool = False) -> str:
    """The text MEAN ± ERROR, or MEAN alone where the error is not known; a dash where the mean is not."""
    if mean is None or math.isnan(mean):
        return MISSING
    sign = "+" if signed else ""
    text = f"{mean:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def format_interval(low: float, high: float, digits: int) -> str:
    """The ends of an interval of differences, with their signs; a dash where it is not known."""
    return MISSING if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}".replace("-", "−")


def format_p(p: float) -> str:
    """Three digits, and no more zeros than a permutation test of 9999 resamples can tell; a dash for nan."""
    return MISSING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_rows(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of all rows, as people read them."""
    return [[column.format(row) for column in columns] for row in rows]


def text_columns(*headings: str) -> list[Column]:
    """Columns of names or sentences, whose keys are their headings."""
    return [Column(heading, heading, text=True) for heading in headings]


@dataclass
class Tabular:
    """`texts` are the cells as people read them, `rows` the numbers as they are, `notes` sentences that a reader needs
    (n, what ± means, what is not the same for all), `origin` sentences on what the table was made from."""

    name: str
    columns: Sequence[Column]
    texts: list[list[str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    title: str = ""
    origin: list[str] = field(default_factory=list)

    @property
    def headings(self) -> list[str]:
        return [column.heading for column in self.columns]

    def markdown(self) -> str:
        title = [f"**{markdown_text(self.title)}**", ""] if self.title else []
        below = map(markdown_text, [*self.notes, *self.origin])
        return "\n".join([*title, markdown_table(self.columns, self.texts), "", *below]) + "\n"

    def csv(self) -> str:
        """The numbers with full precision; a column for every key that a row has."""
        stream = io.StringIO(newline="")
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.writer(stream)
        writer.writerow(map(csv_cell, keys))
        writer.writerows([csv_cell(row.get(key, "")) for key in keys] for row in self.rows)
        return stream.getvalue()

    def latex(self) -> str:
        r"""A `table` for \input: title and notes are its caption, the origin stands above as comments.

        Small type and cells of several lines keep it within a page's 6.5 inches. A table that is wider than the line it
        stands on is shrunk to it, and one of more than LINES_OF_PAGE lines goes on in further floats.
        """
        sides = ["l" if column.text else "r" for column in self.columns]
        head = _latex_row(self.headings, sides, 12)
        comments = [*self.origin, r"Needs \usepackage{booktabs,graphicx}. On a page of two columns: table*."]
        floats = [f"% {' '.join(comment.split())}" for comment in comments]
        parts: list[list[str]] = [[]]
        for row in (_latex_row(cells, sides, 40) for cells in self.texts):
            if sum(map(_height, (*parts[-1], row))) > LINES_OF_PAGE:
                parts.append([])
            parts[-1].append(row)

        title = self.title or self.name
        caption = " ".join(" ".join(latex_text(sentence) for sentence in [f"{title}.", *self.notes]).split())
        for number, body in enumerate(parts):
            floats += [
                r"\begin{table}",
                r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
                rf"\caption{{{latex_text(title)}, continued.}}" if number else rf"\caption{{{caption}}}",
                *([] if number else [rf"\label{{tab:{self.name}}}"]),
                r"\smallskip",
                r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
                rf"\begin{{tabular}}{{{''.join(sides)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}}",
                r"\end{table}",
            ]
        return "\n".join(floats) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """NAME.md, NAME.csv and NAME.tex."""
        contents = {"md": self.markdown(), "csv": self.csv(), "tex": self.latex()}
        files = [folder / f"{self.name}.{suffix}" for suffix in contents]
        for file, content in zip(files, contents.values(), strict=True):
            atomic_write(file, content)
        return files


def markdown_table(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> str:
    """Heading, rule and rows in Markdown, without a newline at the end."""
    rule = "|" + "|".join(" --- " if column.text else " ---: " for column in columns) + "|"
    lines = [[column.heading for column in columns], *texts]
    # A bar in a cell would end the cell.
    plain = ([markdown_text(cell).replace("|", "\\|") for cell in cells] for cells in lines)
    head, *body = [f"| {' | '.join(cells)} |" for cells in plain]
    return "\n".join([head, rule, *body])


def _latex_row(cells: Sequence[str], sides: Sequence[str], width: int) -> str:
    """A row of a tabular. A text goes on in a next line after about so many characters, at this side ("l" or "r") of
    its column."""
    stacked = []
    for cell, side in zip(cells, sides, strict=True):
        lines = textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]
        text = r" \\ ".join(map(latex_text, lines))
        stacked.append(rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}{text}\end{{tabular}}" if len(lines) > 1 else text)
    return " & ".join(stacked) + r" \\"


def _height(row: str) -> int:
    """The lines of a row of a tabular: those of its highest cell."""
    return 1 + max(cell.count(r" \\ ") for cell in row.split(" & "))


def latex_text(text: str) -> str:
    """`text` for LaTeX: what it would take for a command is escaped, the sign of a number is a minus, not a hyphen."""
    return "".join(_LATEX.get(c, c) for c in re.sub(r"(?<![\w.])-(?=\d)", "−", text))
