"""LaTeX of tables: it compiles where TeX is, and where it is not its width is estimated."""

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pytest

from prefopt.reporting.config import ReportConfig
from prefopt.reporting.summary import main_table, over_seeds_table, table_rows
from prefopt.reporting.tables import LINES_OF_PAGE, Column, Tabular, latex_text, text_columns
from prefopt.tracking.archive import read_records
from prefopt.utils.files import ROOT

PAGE = 6.5  # inches of text on a page
# Computer Modern at footnotesize is cmr8, whose characters are 1/16 wider than those of cmr10 are at 8 points.
POINTS = 8 * 17 / 16
AFM = (Path(matplotlib.get_data_path()) / "fonts" / "afm" / "cmr10.afm").read_text()
NAMES = {"hyphen": "-", "period": ".", "comma": ",", "colon": ":", "equal": "=", "parenleft": "(", "parenright": ")",
         "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
         "eight": "8", "nine": "9", "slash": "/", "percent": "%", "semicolon": ";", "plus": "+"}  # fmt: skip
WIDTHS = {NAMES.get(name, name): float(wide) for wide, name in re.findall(r"WX ([\d.]+) ; N (\w+) ;", AFM)}
WIDE = 778.0  # of ± and −, and of what the font lacks


def inches(cell: str) -> float:
    """The width of a cell of a tabular, of its longest line."""
    inner = re.sub(r"\\begin\{tabular\}\[b\]\{@\{\}[lr]@\{\}\}|\\end\{tabular\}", "", cell)
    lines = [re.sub(r"\\textbackslash\{\}|\$[^$]*\$", "±", line) for line in inner.split(r"\\")]
    lines = [re.sub(r"\\(.)", r"\1", line).strip() for line in lines]
    return max(sum(WIDTHS.get(c, 333.0 if c == " " else WIDE) for c in line) for line in lines) / 1000 * POINTS / 72.27


def width(latex: str) -> float:
    """The width in inches of the widest tabular, with 3 points at each side of a column."""
    rows = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r" \\")]
    columns = zip(*(row.split(" & ") for row in rows), strict=True)
    return sum(max(map(inches, column)) + 6 / 72.27 for column in columns)


def tables() -> list[Tabular]:
    """Those of the committed records, and one that is too wide, too long, and full of LaTeX's own characters."""
    made = []
    for archive in sorted((ROOT / "results").rglob("records.jsonl")):
        records, config = read_records(archive), ReportConfig("runs", "out")
        found = [main_table(table_rows(records), records, config), over_seeds_table(records, config)]
        made += [table for table in found if table]
    special = r"a_b & 5 % of $1 #2 {x} ~ ^ \n <é|"
    wide = [f"{special} {i} {'word ' * i}" for i in range(12)]
    cells = [wide for _ in range(60)]
    return [*made, Tabular("wide", text_columns(*wide), cells, [], [special], special, [special])]


def test_tables_fit_a_page():
    """Shrunk to the line, so that the text of 8 points keeps 7; but for those with columns of evaluations."""
    *made, too_wide = tables()
    natural = [width(table.latex()) for table in made if not any("," in heading for heading in table.headings)]
    assert len(natural) > 8
    assert max(natural) <= PAGE * 8 / 7
    assert width(too_wide.latex()) > PAGE
    for table in (*made, too_wide):
        parts = table.latex().split(r"\begin{table}")[1:]
        shrunk = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%" + "\n" + r"\begin{tabular}"
        assert all(shrunk in part for part in parts)
        for part in parts:
            rows = part.partition("\\midrule")[2].partition("\\bottomrule")[0].strip().splitlines()
            assert sum(1 + max(cell.count(r" \\ ") for cell in row.split(" & ")) for row in rows) <= LINES_OF_PAGE


def test_a_float_has_caption_label_and_escaped_cells():
    table = Tabular(
        "my_table",
        [Column("method", "method", text=True), Column("drift", "log-prob drift of β")],
        [["a_b & 5 %", "-0.1 ± 2"], ["y", "–"]],
        [{"a": 1}],
        ["50 % of\nx_y."],
        "A title",
        ["Made by `x_y`\nhere"],
    )
    lines = table.latex().splitlines()
    assert lines == [
        "% Made by `x_y` here",
        r"% Needs \usepackage{booktabs,graphicx}. On a page of two columns: table*.",
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        r"\caption{A title. 50 \% of x\_y.}",
        r"\label{tab:my_table}",
        r"\smallskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & \begin{tabular}[b]{@{}r@{}}log-prob \\ drift of $\beta$\end{tabular} \\",
        r"\midrule",
        r"a\_b \& 5 \% & $-$0.1 $\pm$ 2 \\",
        r"y & -- \\",
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    assert latex_text("-0.5 ± 0.1, mappo-7, 1e-05") == r"$-$0.5 $\pm$ 0.1, mappo-7, 1e-05"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_nothing_is_wider_or_longer_than_its_page(tmp_path):
    made = tables()
    (tmp_path / "all.tex").write_text(
        r"\documentclass{article}\usepackage[letterpaper,margin=1in]{geometry}\usepackage{booktabs,graphicx}"
        + r"\begin{document}"
        + "\n\\clearpage\n".join(table.latex() for table in made)
        + r"\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert process.returncode == 0, process.stdout[-2000:]
    assert "Overfull" not in process.stdout
    assert "too large" not in process.stdout
