"""A table of results, as Markdown, CSV, LaTeX (booktabs) and HTML."""

import csv
import html
import io
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.utils.files import atomic_write

TEXT_COLUMNS = (
    "run",
    "objective",
    "method",
    "model",
    "source",
    "commit",
    "command",
)  # set to the left; numbers to the right
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


@dataclass
class Tabular:
    """`texts` are the cells as people read them, `rows` the numbers as they are, `notes` sentences for below."""

    name: str
    headers: list[str]
    texts: list[list[str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    title: str = ""

    def markdown(self) -> str:
        rule = "|" + "|".join(" --- " if header in TEXT_COLUMNS else " ---: " for header in self.headers) + "|"
        lines = [[cell.replace("|", "\\|") for cell in line] for line in [self.headers, *self.texts]]
        head, *body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([head, rule, *body, "", *self.notes]) + "\n"

    def csv(self) -> str:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in self.rows for key in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        return stream.getvalue()

    def latex(self) -> str:
        r"""A `tabular` for \input, the notes above it as comments. It needs \usepackage{booktabs}."""
        columns = "".join("l" if header in TEXT_COLUMNS else "r" for header in self.headers)
        rows = [map(_latex_heading, self.headers), *(map(latex_text, line) for line in self.texts)]
        head, *body = [" & ".join(cells) + r" \\" for cells in rows]
        comments = ["% " + " ".join(note.split()) for note in [self.title, *self.notes] if note]
        begin = rf"\begin{{tabular}}{{{columns}}}"
        return "\n".join(
            [*comments, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
        )

    def html(self) -> str:
        """A figure with its caption; everything that is not ours is escaped."""

        def row(tag: str, cells: list[str]) -> str:
            left = [' class="text"' * (header in TEXT_COLUMNS) for header in self.headers]
            return "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for c, cell in zip(left, cells, strict=True))

        body = "".join(f"<tr>{row('td', line)}</tr>" for line in self.texts)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<figure><h2>{html.escape(self.title or self.name)}</h2><div><table><thead><tr>{row('th', self.headers)}"
            f"</tr></thead><tbody>{body}</tbody></table></div><figcaption>{notes}</figcaption></figure>"
        )

    def write(self, folder: Path) -> list[Path]:
        """NAME.md, NAME.csv and NAME.tex."""
        contents = {"md": self.markdown(), "csv": self.csv(), "tex": self.latex()}
        files = [folder / f"{self.name}.{suffix}" for suffix in contents]
        for file, content in zip(files, contents.values(), strict=True):
            atomic_write(file, content)
        return files


def _latex_heading(text: str) -> str:
    """In lines about as wide as a figure with its error: in one line the headings make a table wider than its page."""
    lines = textwrap.wrap(text, 12, break_long_words=False, break_on_hyphens=False)
    stacked = r"\\".join(map(latex_text, lines))
    return rf"\shortstack[r]{{{stacked}}}" if len(lines) > 1 else stacked


def latex_text(text: str) -> str:
    """`text` with what LaTeX would take for a command, or has no sign for, written so that it is printed, and with the
    signs of numbers where it would set hyphens."""
    return "".join(_LATEX.get(c, c) for c in re.sub(r"(?<![\w.])-(?=\d)", "−", text))
