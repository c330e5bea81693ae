"""Colors and style of all figures, and how they are written."""

import hashlib
import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKERS = "osD^vP*X"
COLUMN, PAGE = 3.3, 6.8  # inches: the width of a column of a paper, and of its page. Every figure has one of them
# The hues of Okabe and Ito's palette, which every kind of color vision tells apart, in steps of lightness, which print
# in gray keeps.
COLORS = ("#0063A6", "#C95A12", "#2FA583", "#7A2E66", "#F5C440", "#69B1E0", "#000000")
# Every objective has its own color and marker in all figures: of those that share a color each has another marker. The
# first ones are those that the papers compare.
METHODS = (
    "mmpo", "dpo", "simpo", "ipo", "cpo", "beta_dpo", "madpo",
    "orpo", "kto", "sppo", "rrhf", "gpo", "f_dpo", "cal_dpo",
    "robust_dpo", "margin_matching", "lmpo", "sft", "reward", "alpha_dpo", "alpha_po",
    "aot", "aot_unpaired", "apo_down", "apo_zero", "arpo", "bco", "budget",
    "discopop", "dpo_norm", "dpop", "exo", "nca", "r_dpo", "simper",
    "slic", "wpo", "grpo", "rloo", "ld_dpo", "tdpo", "symmpo",
    "tis_dpo", "svpo",
)  # fmt: skip


def base_method(method: str) -> str:
    """The objective of a method ("online-mappo_dpo optimizer.lr=1e-05"), without MaPPO around it: dpo."""
    return method.split(" ")[0].removeprefix("online-").removeprefix("mappo_")


def is_mappo(method: str) -> bool:
    """Whether it is a base with MaPPO around it, offline or online."""
    return method.removeprefix("online-").startswith("mappo_")


def _place(method: str) -> int:
    """The place of a method's objective in METHODS; of another one, which is somebody's own, a number made of its name,
    so that it too looks the same in every figure."""
    base = base_method(method)
    return METHODS.index(base) if base in METHODS else int(hashlib.sha256(base.encode()).hexdigest()[:8], 16)


def method_color(method: str) -> str:
    """MaPPO has the color of its base, so it needs another line style; an online form has that of its objective."""
    return COLORS[_place(method) % len(COLORS)]


def method_marker(method: str, turn: int = 0) -> str:
    """A marker for a method, so that two methods are told apart without their colors; `turn` counts the lines of this
    objective."""
    place = _place(method)
    rounds = place // len(COLORS)  # through the colors: after four of them the markers would come again
    return MARKERS[(place + rounds * 3 + rounds // 4 + turn * 3) % len(MARKERS)]


def shade(color: str, place: int, of: int) -> tuple[float, ...]:
    """`color` mixed with white: the first of so many is the lightest, the last one the color itself."""
    from matplotlib.colors import to_rgb

    white = 0.0 if of < 2 else 0.55 * (1 - place / (of - 1))
    return tuple(c + white * (1 - c) for c in to_rgb(color))


@contextmanager
def plotting() -> Iterator[Any]:
    """matplotlib.pyplot, without a display and in our style. Imported here because it takes a second."""
    import matplotlib as mpl

    for chatty in ("matplotlib", "fontTools"):  # Hydra lets their notes on fonts through
        logging.getLogger(chatty).setLevel(logging.WARNING)
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "prefopt"}
    style["pdf.fonttype"] = 42  # Type 3 fonts are refused by some conferences
    with plt.rc_context(style):
        yield plt


def wrapped(note: str, width: float) -> str:
    """`note` in lines as wide as a figure of so many inches."""
    return textwrap.fill(" ".join(note.split()), int(18 * width))


def legend(figure: Any, groups: Sequence[Sequence[Any]], note: str, most: float = 99) -> None:
    """A legend below the figure, in which every group of handles begins a new row, of at most `most` columns; above it
    the note: what n is, what the bars are, and what the methods do not share."""
    width = figure.get_figwidth()
    longest = max(len(str(handle.get_label())) for group in groups for handle in group)
    columns = max(1, int(min(most, (width - 0.1) / (0.52 + 0.058 * longest))))
    rows = [list(group[i : i + columns]) for group in groups for i in range(0, len(group), columns)]
    wide = max(map(len, rows))
    blank = figure.axes[0].plot([], [], linestyle="", label=" ")[0]
    padded = [[*row, *[blank] * (wide - len(row))] for row in rows]
    handles = [row[i] for i in range(wide) for row in padded]  # matplotlib fills column by column
    style: dict[str, Any] = {"frameon": False, "fontsize": 7, "handlelength": 2.4, "columnspacing": 1.0}
    made = figure.legend(handles=handles, loc="outside lower center", ncols=wide, **style)
    made.set_title(wrapped(note, width), prop={"size": 7})
    # The axes keep their height: the figure grows by what stands below them.
    below = 0.16 * (len(rows) + wrapped(note, width).count("\n") + 1)
    figure.set_figheight(figure.get_figheight() + below)


def save(figure: Any, output: Path, name: str) -> list[Path]:
    """Write NAME.png, NAME.svg and NAME.pdf, the same bytes for the same figure, and forget it."""
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"{name}.{suffix}" for suffix in ("png", "svg", "pdf")]
    figure.savefig(files[0], dpi=200)
    figure.savefig(files[1], metadata={"Date": None})
    figure.savefig(files[2], metadata={"CreationDate": None})
    plt.close(figure)
    return files
