"""Colors and style of all figures, and how they are written."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKERS = "osD^vP*X"
COLUMN, PAGE = 3.3, 6.8  # inches: the width of a column of a paper, and of its page. Every figure has one of them
# The hues of Okabe and Ito's palette, which every kind of color vision tells apart, in steps of lightness, which print
# in gray keeps.
COLORS = ("#0063A6", "#C95A12", "#2FA583", "#7A2E66", "#F5C440", "#69B1E0", "#000000")
# The methods that the papers compare have the same color in all figures.
METHOD_COLORS = dict(zip(("mmpo", "dpo", "simpo", "ipo", "cpo", "beta_dpo", "madpo"), COLORS, strict=True))


def is_mappo(method: str) -> bool:
    """Whether it is a base with MaPPO around it, offline or online."""
    return method.removeprefix("online-").startswith("mappo_")


def method_colors(methods: Sequence[str]) -> dict[str, str]:
    """A color for each method, by the objective with which its name begins ("dpo optimizer.lr=1e-05").

    MaPPO has the color of its base, so it needs another line style; an online form has that of its objective. Methods
    that no paper compares get colors that are not taken by the others."""
    bases = {m: m.split(" ")[0].removeprefix("online-").removeprefix("mappo_") for m in methods}
    taken = [METHOD_COLORS[b] for b in bases.values() if b in METHOD_COLORS]
    free = [c for c in COLORS if c not in taken] or list(COLORS)
    others = sorted({b for b in bases.values() if b not in METHOD_COLORS})
    by_base = METHOD_COLORS | {b: free[i % len(free)] for i, b in enumerate(others)}
    return {m: by_base[b] for m, b in bases.items()}


def method_marker(method: str, place: int = 0) -> str:
    """A marker for a method, so that two methods are told apart without their colors; `place` counts the lines that
    share its color."""
    base = method.split(" ")[0].removeprefix("online-").removeprefix("mappo_")
    first = list(METHOD_COLORS).index(base) if base in METHOD_COLORS else len(METHOD_COLORS)
    return MARKERS[(first + place * 3) % len(MARKERS)]


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
