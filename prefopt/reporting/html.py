"""A paper's page."""

import html
import re
from collections.abc import Sequence
from dataclasses import replace

from prefopt.reporting.paper_common import Figure, commit
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; } figure { margin: 0 0 2.5rem; }
figure > div { overflow-x: auto; } svg { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .85rem; opacity: .85; max-width: 50rem; } figcaption p { margin: .3rem 0; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; font-size: .85rem; }
thead { border-bottom: 1px solid; } th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
.text { text-align: left; } td code { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(
    title: str, tables: Sequence[Tabular], figures: Sequence[Figure], records: Sequence[Record], origin: Sequence[str]
) -> str:
    """One HTML file that needs nothing besides: the figures stand in it as SVG. All text is escaped."""
    shown = []
    for figure in figures:
        for file in figure.files:
            if file.suffix == ".svg":
                caption = f"<figcaption><p>{html.escape(figure.caption)}</p></figcaption>"
                picture = inline(file.read_text(), figure.title)
                shown.append(f"<figure><h2>{html.escape(figure.title)}</h2><div>{picture}</div>{caption}</figure>")
    shown += [replace(t, notes=[note for note in t.notes if note not in origin]).html() for t in tables]
    if records:
        cells = [[r["name"], commit(r["git"]), r["command"]] for r in records]
        notes = ["A + after a commit: with changes of the code that were not committed."]
        shown.append(Tabular("runs", ["run", "commit", "command"], cells, [], notes, "Runs").html())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>{"".join(f"<p>{html.escape(sentence)}</p>" for sentence in origin)}
{"".join(shown)}</body></html>
"""


def inline(svg: str, title: str) -> str:
    """An SVG file as an element of a page: without its prolog, its comments, and what names places outside."""
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
