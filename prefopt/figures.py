"""What all figures share: colours, style, and how they are written."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@contextmanager
def plotting() -> Iterator[Any]:
    """matplotlib.pyplot, without a display and in our style. Imported here because it takes a second."""
    import matplotlib as mpl

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Hydra lets its notes on fonts through
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "prefopt"}
    with plt.rc_context(style):
        yield plt


def save(figure: Any, output: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg, the same bytes for the same figure, and forget it."""
    import matplotlib.pyplot as plt

    files = [output / f"{name}.png", output / f"{name}.svg"]
    figure.savefig(files[0], dpi=160)
    figure.savefig(files[1], metadata={"Date": None})
    plt.close(figure)
    return files
