"""Texts of data, names and errors: what they hold steers no terminal, no page and no spreadsheet."""

import csv
import io
import logging
import sys

import pytest
from rich.table import Table
from rich.text import Text

from prefopt.reporting.data import Section, long_csv, markdown
from prefopt.reporting.tables import Column, Tabular, text_columns
from prefopt.utils.console import PlainConsole, configure_logging, rows_table
from prefopt.utils.plain import printable
from prefopt.utils.redact import RedactingStream

ATTACKS = ["\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b31m", "a\x08b", "\u202eevil", "\x7f", "a\u2028b"]
SCRIPT = "<script>alert(1)</script>"


class Stream(io.StringIO):
    """A terminal, or a file of another encoding."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False):
        super().__init__()
        self.name_of_encoding, self.terminal = encoding, terminal

    @property
    def encoding(self) -> str:
        return self.name_of_encoding

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_no_text_steers_the_terminal(attack, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    inside = Stream(terminal=terminal)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, RedactingStream(inside))
    configure_logging()
    table = Table(title=attack, caption=attack)
    table.add_column(attack)
    table.add_row(attack)
    print(attack)
    logging.getLogger("prefopt.test").warning(attack)
    PlainConsole().print(table, attack, rows_table(["a", attack], [["x", attack], [attack, "y"]], attack, attack))
    try:
        raise ValueError(attack)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    shown = inside.getvalue()
    assert printable(attack) in shown
    assert attack not in shown
    steering = [c for c in attack if printable(f"x{c}") != f"x{c}" and c != "\x1b"]
    assert not [c for c in steering if c in shown]
    assert terminal or "\x1b" not in shown


def test_rich_and_progress_bars_still_draw(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    inside = Stream(terminal=True)
    monkeypatch.setattr(sys, "stdout", RedactingStream(inside))
    PlainConsole(force_terminal=True).print(Text("heavy", "bold"))
    print("\r 10%", end="")
    print("a\tb\r\n", end="")
    assert inside.getvalue() == "\x1b[1mheavy\x1b[0m\n\r 10%a\tb\r\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_utf8_gets_tables_that_it_can_show(encoding, monkeypatch):
    inside = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", RedactingStream(inside))
    PlainConsole(width=60).print(rows_table(["β", "reward ± s.e."], [["–", "0.5 ± 0.1 … 漢"], ["1", "é"]]))
    print("β = 0.1 – 漢")
    shown = inside.getvalue()
    shown.encode(encoding)
    assert "beta" in shown
    assert "\\u6f22" in shown
    assert "+--" in shown


def tabular(text: str) -> Tabular:
    columns = [*text_columns(text), Column("n", "n")]
    return Tabular("t", columns, [[text, "1"]], [{text: text, "n": -1.5, "text": "-1.5e3"}], [text])


def section(text: str) -> Section:
    return Section(text, 1, (text, "n"), [(text, 1)], [text])


@pytest.mark.parametrize("attack", [SCRIPT, "<img src=x onerror=alert(1)>", "a\n\n<b>", "a|b\n# c"])
def test_markdown_holds_no_tags(attack):
    for page in (tabular(attack).markdown(), markdown(section(attack))):
        assert "<" not in page
        assert "\n# c" not in page
        assert "\n\n<" not in page


@pytest.mark.parametrize("attack", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1", " =1", "=\n1"])
def test_csv_holds_no_formulas(attack):
    for text in (tabular(attack).csv(), long_csv([section(attack)])):
        for row in csv.reader(io.StringIO(text)):
            for cell in row:
                assert not cell.lstrip(" ").startswith(("=", "@", "+", "\t", "-2")), row
    row = next(csv.DictReader(io.StringIO(tabular(attack).csv())))
    assert (row["n"], row["text"]) == ("-1.5", "-1.5e3")
