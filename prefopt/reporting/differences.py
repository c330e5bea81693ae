"""In which settings runs differ: the line below a table, and the two columns of `prefopt diff`."""

import itertools
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prefopt.reporting.labels import flat_config, flat_configs, shortest_texts
from prefopt.reporting.tables import MISSING, Tabular, text_columns
from prefopt.tracking.archive import Record
from prefopt.tracking.run import VOLATILE
from prefopt.utils.console import console

LEAST_TEXT, LONGEST_NUMBER = 14, 30  # characters: a text has room for the first, a longer number is folded
# A label names the seed and beta, and the objective's class is its name. The others follow from what they belong to.
_IN_LABELS = ("seed", "objective.beta", "objective._target_", "runs_dir")


def settings_note(records: Sequence[Record]) -> str:
    """Which settings the methods do not share: "not the same for all methods: optimizer.lr: madpo 2e-4; dpo, ipo
    1e-4". "" where they share all, or are one method.

    A method is an objective. Of each it is the set of values that counts: a key swept alike for all is no difference.
    Keys that change no number (`VOLATILE`) are left out, and those of an objective that no other one has. A wrapper's
    base counts as the objective itself.
    """
    methods: dict[str, list[dict[str, object]]] = {}
    for record, flat in zip(records, flat_configs(records), strict=True):
        config = {_key(key): value for key, value in flat.items()}
        methods.setdefault(record["objective"], []).append(config)
    if len(methods) < 2:
        return ""

    parts = []
    for key in sorted({key for configs in methods.values() for config in configs for key in config}):
        if key in _IN_LABELS or key.split(".")[0] in VOLATILE:
            continue
        having = {name: configs for name, configs in methods.items() if any(key in config for config in configs)}
        # Another objective has no such parameter, while a data format or a sampler without one has its own default.
        compared = having if key.startswith("objective.") else methods
        values = {repr(config.get(key)): config.get(key) for configs in compared.values() for config in configs}
        texts = shortest_texts(values)
        by_values: dict[str, list[str]] = {}
        for name, configs in compared.items():
            swept = sorted({repr(config.get(key)) for config in configs}, key=list(values).index)
            by_values.setdefault(" and ".join(_short(texts[value]) for value in swept), []).append(name)
        if len(by_values) > 1:
            each = (
                f"{', '.join(names)} {value}" for value, names in sorted(by_values.items(), key=lambda x: len(x[1]))
            )
            parts.append(f"{key}: {'; '.join(each)}")
    return f"Not the same for all methods: {'. '.join(parts)}." if parts else ""


def continued_note(records: Sequence[Record]) -> str:
    """Which runs went on from another one: "Not independent runs: A goes on from B after step 4." "" where none did."""
    parts = []
    for record in records:
        if origin := record.get("continued_from"):
            rate = "" if origin["same_as_from_the_start"] else ", with another learning rate until there"
            parts.append(f"{record['name']} goes on from {origin['run']} after step {origin['step']}{rate}")
    return f"Not independent runs: {'; '.join(parts)}." if parts else ""


def comparison_notes(records: Sequence[Record]) -> list[str]:
    """The sentences below a table of these runs: what its methods do not share, and which runs are not independent."""
    return [note for note in (settings_note(records), continued_note(records)) if note]


def config_differences(a: Record, b: Record) -> Tabular:
    """The settings in which two runs differ, those that change no number too: key, A, B."""
    left, right = flat_config(a), flat_config(b)
    rows = []
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            values = {repr(config[key]): config[key] for config in (left, right) if key in config}
            texts = shortest_texts(values)
            cells = [texts[repr(config[key])] if key in config else MISSING for config in (left, right)]
            rows.append({"setting": key, "A": cells[0], "B": cells[1]})
    for what, digests in (("data", "data_digests"), ("initial weights", "initial_weights")):
        if a.get(digests) != b.get(digests):
            rows.append({"setting": f"{what} (digest)", "A": _digest(a.get(digests)), "B": _digest(b.get(digests))})
    commits = [(record.get("git") or {}).get("commit", MISSING)[:10] for record in (a, b)]
    if commits[0] != commits[1]:
        rows.append({"setting": "commit", "A": commits[0], "B": commits[1]})
    columns = text_columns("setting", "A", "B")
    return Tabular("diff", columns, [[row[c.key] for c in columns] for row in rows], rows, title="Settings that differ")


def sides_differ(a: Sequence[Record], b: Sequence[Record]) -> str:
    """A sentence on the settings in which the runs A differ from the runs B, or among themselves, but for the seed."""
    flat = flat_configs([*a, *b])
    sides = {"A": flat[: len(a)], "B": flat[len(a) :]}
    keys = {key for configs in sides.values() for config in configs for key in config}
    parts = []
    for key in sorted(keys - {"seed", "runs_dir"}):
        values = {repr(c.get(key, MISSING)): c.get(key, MISSING) for configs in sides.values() for c in configs}
        if len(values) > 1:
            texts = shortest_texts(values)
            each = {
                side: " and ".join(dict.fromkeys(_short(texts[repr(c.get(key, MISSING))]) for c in configs))
                for side, configs in sides.items()
            }
            parts.append(f"{key}: {', '.join(f'{side} {value}' for side, value in each.items())}")
    return f"A and B differ in {'; '.join(parts)}." if parts else "A and B differ in no setting but the seed."


def print_table(table: Tabular) -> None:
    """Title, table and notes on stdout, at the terminal's width. A number stays in one line, a text goes on in the next
    one; columns for which there is no room stand below, beside what names a row once more: the first column, and plain
    numbers behind it such as β."""
    needed = []
    for column, (heading, *cells) in zip(table.columns, zip(table.headings, *table.texts, strict=True), strict=True):
        if column.text:
            needed.append(min(LEAST_TEXT, max(map(len, (heading, *cells)))))
        else:
            needed.append(max(map(len, (*heading.split(), *cells))))
    plain = itertools.takewhile(lambda c: c.digits is None and not c.text and not c.error, table.columns[1:])
    names = range(1 + len(list(plain)))
    blocks: list[list[int]] = [[]]
    for place in range(len(names), len(needed)):
        if blocks[-1] and sum(needed[i] + 2 for i in (*names, *blocks[-1], place)) > console().width:
            blocks.append([])
        blocks[-1].append(place)

    for number, block in enumerate(blocks):
        title = table.title if number == 0 and table.title else None
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place in (*names, *block):
            heading = table.headings[place]
            if table.columns[place].text or needed[place] > LONGEST_NUMBER:
                shown.add_column(heading, overflow="fold", vertical="bottom")
            else:
                lines = textwrap.wrap(heading, needed[place], break_long_words=False, break_on_hyphens=False)
                shown.add_column("\n".join(lines), justify="right", no_wrap=True, vertical="bottom")
        for cells in table.texts:
            shown.add_row(*(cells[place] for place in (*names, *block)))
        console().print(shown)
    console().print(*table.notes, sep="\n")


def _key(key: str) -> str:
    return key.replace("objective.base.", "objective.", 1) if key.startswith("objective.base.") else key


def _digest(value: object) -> str:
    digests = value.values() if isinstance(value, dict) else [value]
    return " ".join(str(digest)[:8] for digest in digests)


def _short(text: str) -> str:
    """A small number as 1e-4, which is how learning rates are written; other texts as they are."""
    try:
        small = 0 < abs(float(text)) < 1e-3
    except ValueError:
        return text
    mantissa, _, power = f"{float(text):e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if small else text
