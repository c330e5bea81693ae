"""A paper's page."""

import re
from collections.abc import Sequence

from markupsafe import Markup

from prefopt.reporting.paper_common import Figure, commit
from prefopt.reporting.tables import Tabular, text_columns
from prefopt.reporting.templating import render
from prefopt.tracking.archive import Record


def page(
    title: str, tables: Sequence[Tabular], figures: Sequence[Figure], records: Sequence[Record], origin: Sequence[str]
) -> str:
    """One HTML file that needs nothing besides: the figures stand in it as SVG. `origin`: sentences on what the page
    was made from; they stand on top, once, and not below each table. A figure's own legend says what its bars are and
    what the methods do not share."""
    pictures = [
        (figure.title, figure.caption, inline(file.read_text(), figure.title))
        for figure in figures
        for file in figure.files
        if file.suffix == ".svg"
    ]

    shown = list(tables)
    if records:
        cells = [[r["name"], commit(r["git"]), r.get("command") or ""] for r in records]
        notes = ["A + after a commit: with changes of the code that were not committed."]
        shown.append(Tabular("runs", text_columns("run", "commit", "command"), cells, [], notes, "Runs"))

    return render("papers.html", title=title, origin=origin, pictures=pictures, tables=shown)


def inline(svg: str, title: str) -> Markup:
    """An SVG file of ours as an element of a page: without its prolog, its comments and its metadata, and without the
    namespaces, which are addresses of other places. matplotlib has escaped the texts in it."""
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    return Markup('<svg role="img" aria-label="{}"').format(title) + Markup(body.removeprefix("<svg"))
