"""Texts of data, names and errors as text: nothing in them steers a terminal, a page or a spreadsheet."""

import html
import re

# Control characters but newline and tab, the marks that reverse the direction of writing, and Unicode's line ends. A
# carriage return may start a text, as progress bars write it, and stand before a newline.
CONTROL = re.compile(r"(?!\A\r)(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
ASCII = str.maketrans({"–": "-", "−": "-", "…": "...", "±": "+-", "×": "x", "·": "*", "“": '"', "”": '"', "’": "'",
                       "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "σ": "sigma", "τ": "tau"})  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """`text` for a terminal: control characters as Python writes them, such as \\x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def encodable(text: str, encoding: str | None) -> str:
    """`text` for a terminal or file of this encoding: what it lacks in ASCII, and the rest as \\u03b1."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        assert encoding
        return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def markdown_text(text: str) -> str:
    """`text` for one line of Markdown that a browser may show: no tag, and no end of the line."""
    return " ".join(html.escape(text, quote=False).splitlines())


def csv_cell(value: object) -> object:
    """A cell of a CSV file: a text that a spreadsheet would take for a formula has a quote before it. Numbers stay."""
    if not isinstance(value, str) or not value.lstrip(" ").startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
