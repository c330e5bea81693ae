"""The curves of one run: its training steps and its evaluations, a panel for each metric.

A training program draws them into curves.png of a run's folder once the run has finished, and a report into curves/, a
figure for each run. They are drawn from metrics.jsonl alone.
"""

import io
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt.reporting.labels import labels
from prefopt.reporting.style import PAGE, method_color, method_marker, plotting
from prefopt.tracking.archive import Record
from prefopt.tracking.metrics import metrics_files, read_metrics
from prefopt.tracking.record import all_tie, read_record
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import atomic_write

log = logging.getLogger(__name__)

Row = dict[str, Any]  # of metrics.jsonl
Curve = list[tuple[float, float, float]]  # (step, value, its standard error or 0)

CURVES = "curves.png"
PANELS = {  # in this order, by the key of the metric; one that no row has is left out
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "chosen_logps": "chosen log-prob (nats)",
    "rejected_logps": "rejected log-prob (nats)",
    "kl": "KL to the reference (nats)",
    "oracle_reward": "reward of samples",
    "gradient_norm": "gradient norm",
    "lr": "learning rate",
}
MOST_POINTS = 200  # of a line: more steps than that are averaged in equal stretches
TRAIN_COLOR = "0.6"  # the held-out line has the color of the method, as in every figure


def write_curves(folder: Path) -> None:
    """Draw the curves of the finished run in `folder`, and of an online run those of its stages too, unless they are
    there already, or its logger wants none. The run is what it is without them, so a failure is a warning."""
    if not is_main_process():
        return
    try:
        files = metrics_files(folder)
        stages = [(file.parent, [file]) for file in files if file.parent != folder]
        for place, of_place in [(folder, files), *stages] if files else []:
            target = place / CURVES
            # A run that has gone on since has newer metrics than its curves.
            if target.exists() and target.stat().st_mtime >= max(file.stat().st_mtime for file in of_place):
                continue
            record = read_record(place)
            if not record["config"]["logger"]["curves"]:
                continue
            model, data = (record["config"][part]["name"] for part in ("model", "dataset"))
            if draw(of_place, record, f"{labels([record])[0]} · {model} on {data}", target):
                log.info(f"  its curves: {target}")
    except Exception as error:
        log.warning(f"  {folder / CURVES} was not drawn: {error}")


def draw_run_curves(records: Sequence[Record], output: Path) -> list[Path]:
    """Draw the curves of each run whose metrics.jsonl is there, under its label, into `output`/curves/NAME.png; none of
    a run whose logger wants none. Returns that folder; nothing where there is nothing to draw (an archive holds no
    metrics)."""
    drawn = False
    for record, label in zip(records, labels(list(records)), strict=True):
        if "folder" in record and record["config"]["logger"]["curves"]:
            files, target = metrics_files(Path(record["folder"])), output / "curves" / f"{record['name']}.png"
            drawn |= draw(files, record, label, target)
    return [output / "curves"] if drawn else []


def draw(files: Sequence[Path], record: Record, title: str, target: Path) -> bool:
    """Draw the rows in `files`, the metrics of the run `record`. Returns whether there was anything to draw."""
    rows = rows_of(files)
    if not rows:
        return False
    with plotting() as plt:
        figure = curves_figure(plt, rows, title, record["objective"])
        if not figure:
            return False
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200)
        plt.close(figure)
    atomic_write(target, png.getvalue())
    return True


def rows_of(files: Sequence[Path]) -> list[Row]:
    """The rows of the stages of a run, each with its `stage`, their steps counted through. The first evaluation of a
    later stage is the last one of the stage before."""
    rows: list[Row] = []
    for stage, file in enumerate(files):
        before = rows[-1]["step"] if rows else 0
        of_stage = [row | {"step": row["step"] + before, "stage": stage} for row in read_metrics(file)]
        rows += [row for row in of_stage if row["step"] > before or not stage]
    return rows


def curves_figure(plt: Any, rows: Sequence[Row], title: str, method: str) -> Any:
    """A figure PAGE inches wide with a panel for each metric of PANELS that `rows` hold, or None where there is none.

    Train is a thin gray line, the mean over stretches of steps where there are many; held-out is a line with markers in
    the color of `method`, with bars of one standard error where the rows hold it. A dotted line parts the stages.
    """
    panels = {key: lines for key in PANELS if any(lines := [curve(rows, split, key) for split in ("train", "heldout")])}
    if not panels:
        return None
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
    height = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(PAGE, 1.5 * height + 0.6), squeeze=False, layout="constrained", sharex=True
    )
    color = method_color(method)
    borders = [row["step"] for row, after in itertools.pairwise(rows) if row["stage"] != after["stage"]]
    has_errors = any(error for _, heldout in panels.values() for *_, error in heldout)
    handles: dict[str, Any] = {}
    for axis, (key, (train, heldout)) in zip(axes.flat, panels.items(), strict=False):
        if train:
            averaged, stretch = thinned(train)
            style: dict[str, Any] = {"color": TRAIN_COLOR, "linewidth": 1, "marker": "" if len(train) > 1 else "."}
            label = "training step" if stretch == 1 else f"training, mean of {stretch} steps"
            (handles[label],) = axis.plot([x for x, *_ in averaged], [y for _, y, _ in averaged], **style)
        if heldout:
            x, y, errors = ([point[i] for point in heldout] for i in range(3))
            style = {"color": color, "linewidth": 1.2, "marker": method_marker(method), "markersize": 3}
            label = "held-out, ± 1 standard error" if has_errors else "held-out"
            handles[label] = axis.errorbar(x, y, yerr=errors if any(errors) else None, elinewidth=0.7, **style)
        axis.set_title(PANELS[key])
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 1e-05, not a factor beside the title
        for border in borders:
            axis.axvline(border, color="0.3", linewidth=0.8, linestyle=":")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for column in range(columns):
        lowest = max(row for row in range(height) if row * columns + column < len(panels))
        axes[lowest][column].tick_params(labelbottom=True)
    figure.suptitle(f"{title}, over optimizer steps", fontsize=8)
    style = {"frameon": False, "fontsize": 7.5, "handlelength": 2.4}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), **style)
    return figure


def curve(rows: Sequence[Row], split: str, key: str) -> Curve:
    """The finite values of a metric in the rows of `split`; an accuracy of pairs that all tie is none."""
    said = [r for r in rows if r["split"] == split and key in r and not (key == "accuracy" and all_tie(r))]
    found = [(r["step"], r[key], r.get(f"{key}_se") or 0.0) for r in said]
    return [point for point in found if isinstance(point[1], int | float) and math.isfinite(point[1])]


def thinned(line: Curve) -> tuple[Curve, int]:
    """At most MOST_POINTS points, each the mean over a stretch of steps, and the length of the stretches."""
    stretch = math.ceil(len(line) / MOST_POINTS)
    return list(_means(line, stretch)), stretch


def _means(line: Curve, stretch: int) -> Iterator[tuple[float, float, float]]:
    for start in range(0, len(line), stretch):
        part = line[start : start + stretch]
        yield sum(x for x, *_ in part) / len(part), sum(y for _, y, _ in part) / len(part), 0.0
