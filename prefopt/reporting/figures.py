"""The figures: reward over KL, and those of the papers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from prefopt.objectives import SIDES
from prefopt.reporting.curves import Point, at_last_epoch, drift, paths, sensitive_keys, sensitivity
from prefopt.reporting.differences import settings_note
from prefopt.reporting.evaluated import Value, counts, main_measure, model_names
from prefopt.reporting.labels import labels
from prefopt.reporting.published import normalize_model_name
from prefopt.reporting.style import (
    COLUMN,
    MARKERS,
    PAGE,
    base_method,
    is_mappo,
    legend,
    method_color,
    method_marker,
    plotting,
    save,
    shade,
    wrapped,
)
from prefopt.tracking.archive import Record
from prefopt.utils.stats import mean_and_error

SFT_LINE: dict[str, Any] = {"color": "0.82", "linestyle": "-", "linewidth": 4}  # no method's line looks like it
Drawn = tuple[str, list[dict[str, Any]]]  # a method's name, and evaluations with their standard errors
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # of the methods, where markers tell the betas apart


def draw_paths(
    points: Sequence[Point],
    sft: dict[str, Value],
    published: Sequence[Point],
    metric: str,
    output: Path,
    note: str,
) -> list[Path]:
    """MMPO's figures 1 to 3, a column per model: LM accuracy against win rate on top, and below the win rate alone over
    the epochs, where the published runs have a place too: faint behind ours, and in full where there are none of ours.
    `note` stands in the legend.

    Returns the files; none where there are no points at all.
    """
    has_ours = bool(points)
    models = list(dict.fromkeys(p.model for p in points or published))
    if not models:
        return []
    if has_ours:  # the published runs of models that we do not have would have no panel
        names = {normalize_model_name(model) for model in models}
        published = [p for p in published if normalize_model_name(p.model) in names]
    has_accuracy = any(p.accuracy and p.win_rate for p in points)
    everything = [*points, *published]
    colors = {method: method_color(method) for method in sorted({p.method for p in everything})}
    betas = sorted({p.beta for p in everything if p.beta is not None})

    with plotting() as plt:
        rows = 2 if has_accuracy else 1
        size = (PAGE if len(models) > 1 else COLUMN, 2.1 * rows)
        figure, axes = plt.subplots(rows, len(models), figsize=size, squeeze=False, layout="constrained", sharey="row")
        for column, model in enumerate(models):
            axes[0][column].set_title(model)
            ours = _styled_paths([p for p in points if p.model == model], colors, betas)
            behind = [p for p in published if normalize_model_name(p.model) == normalize_model_name(model)]
            if has_accuracy:
                _draw_accuracy_vs_win_rate(axes[0][column], ours, sft.get(model))
            _draw_win_rate_by_epoch(axes[-1][column], ours, _styled_paths(behind, colors, betas), faint=has_ours)
        for row in axes:
            row[0].set_ylabel(f"{metric}, %".replace("length-controlled ", "length-controlled\n"))

        line = plt.Line2D
        methods = [
            line([], [], color=c, linestyle=s, linewidth=1.5, label=m)
            for (m, c), s in zip(colors.items(), cycle(LINES), strict=False)
        ]
        lines = [line([], [], color="0.3", linestyle="--", linewidth=0.8, label="50 %")]
        if has_accuracy and sft:
            lines.append(line([], [], **SFT_LINE, label="SFT accuracy"))
        if has_ours and published:
            lines.append(line([], [], color="0.3", alpha=0.4, linewidth=0.9, label="published"))
        legend(figure, [[*methods, *lines], _beta_handles(plt, betas)], note)
        return save(figure, output, "mmpo_paths")


StyledPath = tuple[list[Point], dict[str, Any]]  # a path, and matplotlib's keywords for its line


def _styled_paths(points: Sequence[Point], colors: Mapping[str, str], betas: list[float]) -> list[StyledPath]:
    """The path of each method and beta; a darker shade and another marker for each larger beta."""
    styled = []
    lines = dict(zip(colors, cycle(LINES), strict=False))
    for (_, method, value), path in paths(points).items():
        place = betas.index(value) if value is not None else 0
        color = shade(colors[method], place, len(betas))
        style: dict[str, Any] = {"color": color, "marker": MARKERS[place % len(MARKERS)], "linewidth": 1.1}
        style["linestyle"] = lines[method]
        styled.append((path, style))
    return styled


def _draw_accuracy_vs_win_rate(axis: Any, styled: Sequence[StyledPath], sft: Value | None) -> None:
    """An arrowed path per method and beta, and the SFT model's accuracy as a vertical line."""
    for path, style in styled:
        _arrows(axis, path, style)
    if sft:
        axis.axvline(sft[0], zorder=0, **SFT_LINE)
    axis.axhline(50, color="0.3", linestyle="--", linewidth=0.8)
    axis.set_xlabel("LM accuracy, %")


def _draw_win_rate_by_epoch(
    axis: Any, ours: Sequence[StyledPath], published: Sequence[StyledPath], faint: bool
) -> None:
    """A line per method and beta with its errors; the published ones `faint`, without markers and errors."""
    for path, style in published:
        _over_epochs(axis, path, style, faint)
    for path, style in ours:
        _over_epochs(axis, path, style)
    axis.axhline(50, color="0.3", linestyle="--", linewidth=0.8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")


def _beta_handles(plt: Any, betas: Sequence[float]) -> list[Any]:
    """Legend entries for the betas in gray: what differs between them is shade and marker, not the color."""
    handles = []
    for place, value in enumerate(betas):
        gray = str(0.65 - 0.65 * place / max(1, len(betas) - 1))
        marker = MARKERS[place % len(MARKERS)]
        handles.append(plt.Line2D([], [], color=gray, marker=marker, markersize=4, linewidth=1, label=f"β = {value:g}"))
    return handles


def _arrows(axis: Any, path: Sequence[Point], style: dict[str, Any]) -> None:
    """A path with an arrow head in the middle of each of its parts, and the errors of its last point."""
    values = [(p.accuracy, p.win_rate) for p in path if p.accuracy and p.win_rate]
    if not values:
        return
    x, y = [accuracy[0] for accuracy, _ in values], [win_rate[0] for _, win_rate in values]
    axis.plot(x, y, markersize=3, **style)

    arrow = {
        "arrowstyle": "-|>,head_length=0.3,head_width=0.15",
        "color": style["color"],
        "shrinkA": 0,
        "shrinkB": 0,
        "linewidth": style["linewidth"],
    }
    for i in range(len(x) - 1):
        if values[i] == values[i + 1]:  # an arrow of no length has no direction
            continue
        middle = (x[i] + x[i + 1]) / 2, (y[i] + y[i + 1]) / 2
        axis.annotate("", xy=middle, xytext=(x[i], y[i]), arrowprops=arrow)

    accuracy, win_rate = values[-1]
    errors = {"xerr": accuracy[1] or 0, "yerr": win_rate[1] or 0, "elinewidth": 0.7}
    axis.errorbar(x[-1], y[-1], color=style["color"], marker=style["marker"], markersize=5.5, **errors)


def _over_epochs(axis: Any, path: Sequence[Point], style: dict[str, Any], faint: bool = False) -> None:
    values = [(p.epoch, p.win_rate) for p in path if p.win_rate]
    x, y = [epoch for epoch, _ in values], [win_rate[0] for _, win_rate in values]
    if faint:
        axis.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.4, zorder=1)
        return
    errors = [win_rate[1] or 0 for _, win_rate in values]
    axis.errorbar(x, y, yerr=errors if any(errors) else None, markersize=3, elinewidth=0.7, **style)


def draw_spread(points: Mapping[str, Sequence[Point]], output: Path, note: str) -> list[Path]:
    """The win rates of all betas at the last epoch, by source of the points: a bar from the lowest to the highest.

    The marks of the first source are filled. Those of the second are hollow, and only of models that the first has.
    `note` stands in the legend."""
    all_ends = {source: at_last_epoch(of_source) for source, of_source in points.items()}
    sources = [source for source, ends in all_ends.items() if ends]
    if not sources:
        return []
    models = list(dict.fromkeys(model for model, _ in all_ends[sources[0]]))
    names = [normalize_model_name(model) for model in models]
    ends = {
        source: {key: end for key, end in all_ends[source].items() if normalize_model_name(key[0]) in names}
        for source in sources
    }
    sources = [source for source in sources if ends[source]]
    methods = sorted({method for of_source in ends.values() for _, method in of_source})
    places = [(method, source) for method in methods for source in sources]
    with plotting() as plt:
        size = (PAGE if len(places) * len(models) > 14 else COLUMN, 2.6)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        for source in sources:
            mark: dict[str, Any] = {"markersize": 4, "linestyle": "", "markeredgewidth": 0.8}
            if source != sources[0]:
                mark["markerfacecolor"] = "white"
            for (model, method), (_, by_beta) in ends[source].items():
                place = (places.index((method, source)) + 0.5) / len(places) - 0.5
                x = names.index(normalize_model_name(model)) + 0.8 * place
                y = [value for value, _ in by_beta.values()]
                color = method_color(method)
                axis.plot([x, x], [min(y), max(y)], color=color, linewidth=5, alpha=0.3, solid_capstyle="butt")
                axis.plot([x] * len(y), y, color=color, marker=method_marker(method), **mark)
        axis.axhline(50, color="0.3", linestyle="--", linewidth=0.8, zorder=0)
        axis.set_xticks(range(len(models)), models)
        axis.set_xlim(-0.5, len(models) - 0.5)
        axis.set_ylabel("win rate at the last epoch, %")
        axis.set_title("Spread of the win rate over β")
        handles = [
            plt.Line2D([], [], color=method_color(m), marker=method_marker(m), markersize=4, linestyle="", label=m)
            for m in methods
        ]
        for source in sources if len(sources) > 1 else []:
            face = {"markerfacecolor": "white"} if source != sources[0] else {}
            handles.append(
                plt.Line2D([], [], color="0.3", marker="o", markersize=3.5, linestyle="", label=source, **face)
            )
        legend(figure, [handles[: len(methods)], *([h] if (h := handles[len(methods) :]) else [])], note)
        return save(figure, output, "mmpo_spread")


def draw_drift(records: Sequence[Record], output: Path, name: str) -> list[Path]:
    """Held-out log-probs of the chosen and the rejected completions over the steps, less their value before training. A
    row per model and data, a line per method, a band of one standard error over its seeds; a base full, its
    MaPPO dashed in the same color."""
    models = model_names(records)
    measured = [
        r for r in records if r["evaluations"] and "chosen_logps" in r["evaluations"][0] and r["objective"] != "sft"
    ]
    panels = list(dict.fromkeys((models[r["name"]], r["config"]["dataset"]["name"]) for r in measured))
    if not panels:
        return []
    with plotting() as plt:
        size = (PAGE, 2.4 * len(panels) + 0.2)
        figure, axes = plt.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained", sharey="row")
        handles: dict[str, Any] = {}
        for row, panel in zip(axes, panels, strict=True):
            # The two panels of a row share their log-prob axis, so that chosen and rejected can be compared.
            members = [r for r in measured if (models[r["name"]], r["config"]["dataset"]["name"]) == panel]
            for axis, side in zip(row, SIDES, strict=True):
                curves = drift(members, side)
                for label, curve in curves.items():
                    dashed, color = is_mappo(label), method_color(label)
                    same = [m for m in curves if base_method(m) == base_method(label) and is_mappo(m) == dashed]
                    style = {"color": color, "linestyle": "--" if dashed else "-", "linewidth": 1.4}
                    style |= {"marker": method_marker(label, same.index(label)), "markersize": 4}
                    if dashed:
                        style["markerfacecolor"] = "white"
                    steps, means = [s for s, *_ in curve], [m for _, m, _ in curve]
                    (handle,) = axis.plot(steps, means, label=label, **style)
                    if any(e is not None for *_, e in curve):
                        low, high = ([m + sign * (e or 0) for _, m, e in curve] for sign in (-1, 1))
                        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
                    handles.setdefault(label, handle)
                axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
                axis.set_title(f"{side} · {panel[0]} on {panel[1]}", fontsize=8)
                axis.set_xlabel("optimizer step")
                axis.xaxis.get_major_locator().set_params(integer=True)
            row[0].set_ylabel("change of log-prob (nats)")
        bases = [handle for label, handle in handles.items() if not is_mappo(label)]
        wrappers = [handle for label, handle in handles.items() if is_mappo(label)]
        pairs = counts(r["evaluations"][0].get("n") for r in measured)
        seeds = ", ".join(str(seed) for seed in sorted({r["config"]["seed"] for r in measured}))
        note = f"Means over {pairs} held-out pairs. Bands: ± 1 standard error over seeds ({seeds})."
        legend(figure, [g for g in (bases, wrappers) if g], f"{note} {settings_note(measured)}", 4)
        return save(figure, output, name)


def draw_sensitivity(records: Sequence[Record], output: Path, name: str) -> list[Path]:
    """The final oracle reward (without any oracle: the held-out accuracy) over each hyperparameter that was varied, a
    panel for each; bars of one standard error, over seeds or (of one seed alone) over its prompts or pairs."""
    measure, measure_name = main_measure(records)
    panels = {key: curves for key in sensitive_keys(records) if (curves := sensitivity(records, key))}
    if not panels:
        return []
    lines = max(map(len, panels.values()))

    def shorten(part: str) -> str:
        """Of KEY=VALUE the last part of a dotted key, and three digits of a long number."""
        part = re.sub(r"^.*\.(?=\w+=)", "", part)
        return re.sub(r"(?<==)\d+\.\d{3,}$", lambda number: f"{float(number[0]):.3g}", part)

    with plotting() as plt:
        size = (PAGE if len(panels) > 1 else COLUMN, 2.6 + 0.17 * lines)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
        for axis, (key, curves) in zip(axes[0], panels.items(), strict=True):
            # What all curves of a panel have in common stands in its title, the rest in its legend.
            shared = set.intersection(*(set(label.split(" ")) for label in curves))
            for place, (label, curve) in enumerate(curves.items()):
                siblings = [other for other in curves if method_color(other) == method_color(label)]
                style = {"color": shade(method_color(label), siblings.index(label), len(siblings)), "linewidth": 1.2}
                style |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 4, "elinewidth": 0.8}
                differing = " ".join(shorten(part) for part in label.split(" ") if part not in shared)
                x, y, errors = ([point[i] or 0 for point in curve] for i in range(3))
                axis.errorbar(x, y, yerr=errors if any(errors) else None, label=differing, **style)
            title = " ".join(
                shorten(part) for part in next(iter(curves)).split(" ") if part in shared and "=None" not in part
            )
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(key.removeprefix("objective."))
            if len(curves) > 1:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize=7.5)
        axes[0][0].set_ylabel(f"final {measure_name}")
        n, items = ("samples", "prompts") if measure == "oracle_reward" else ("n", "pairs")
        number = counts(r["evaluations"][-1].get(n) for r in records if r["evaluations"])
        note = f"Bars: ± 1 standard error over seeds; of one seed, over its {number} held-out {items}."
        note = wrapped(f"{note} {settings_note(records)}", size[0])
        figure.set_figheight(size[1] + 0.16 * (note.count("\n") + 1))
        figure.supxlabel(note, fontsize=7, x=0.02, ha="left")
        return save(figure, output, name)


def draw(records: list[Record], output: Path) -> list[Path]:
    """Oracle reward against KL to the reference: a path per run, a marker per evaluation, a panel per model and data
    set. Where all methods have three seeds or more, a path is a method's mean. The legend names what tells the methods
    apart, and below it what they do not share. Returns nothing if no run was evaluated by an oracle."""
    sampled = [r for r in records if r["evaluations"] and "oracle_reward" in r["evaluations"][0]]
    if not sampled:
        return []
    panels: dict[tuple[str, str], list[Record]] = {}
    for record in sampled:
        panels.setdefault(_panel(record), []).append(record)
    as_means = _has_means(panels.values())
    drawn = {panel: (_means if as_means else _runs)(members) for panel, members in panels.items()}
    names = sorted({name for paths in drawn.values() for name, _ in paths}, key=lambda name: (is_mappo(name), name))
    handles: dict[str, Any] = {}
    with plotting() as plt:
        width = PAGE if len(panels) > 1 or len(names) > 6 else COLUMN
        rows = -(-len(panels) // 3)
        size = (width, 2.5 * rows)
        figure, grid = plt.subplots(rows, -(-len(panels) // rows), figsize=size, squeeze=False, layout="constrained")
        for axis in grid.flat[len(panels) :]:
            axis.axis("off")
        for axis, (panel, paths) in zip(grid.flat, sorted(drawn.items()), strict=False):
            for start in sorted({points[0]["oracle_reward"] for _, points in paths}):  # one for each seed
                line = axis.axhline(start, color="0.4", linestyle=":", linewidth=1, label="initial policy", zorder=1)
                handles["initial policy"] = line
            for name, points in paths:
                turn = [other for other in names if base_method(other) == base_method(name)].index(name)
                handles[name] = axis.errorbar(
                    [p["kl"] for p in points],
                    [p["oracle_reward"] for p in points],
                    xerr=[0.0] * (len(points) - 1) + [points[-1]["kl_se"]],
                    yerr=[0.0] * (len(points) - 1) + [points[-1]["oracle_reward_se"]],
                    color=method_color(name),
                    marker=method_marker(name, turn),
                    markersize=4.5,
                    markerfacecolor="white" if turn % 2 else None,
                    linestyle="--" if turn % 2 else "-",
                    linewidth=1.2,
                    elinewidth=0.8,
                    alpha=0.9,
                    label=name,
                )
            axis.set_xlabel("KL to the reference (nats)")
            axis.set_title("\n".join(panel) if len(panels) > 1 else f"{panel[0]} on {panel[1]}")
        for row in grid:
            row[0].set_ylabel("oracle reward")
        shown = [handles[name] for name in ("initial policy", *names)]
        if as_means:
            note = "A line per method: the mean of its runs. Bars: ± 1 standard error over training seeds, at the end."
        else:
            prompts = counts(r["evaluations"][-1]["samples"] for r in sampled)
            note = f"A line per run. Bars: ± 1 standard error over {prompts} held-out prompts, at the end."
        legend(figure, [shown], f"{note} {settings_note(sampled)}")
        return save(figure, output, "reward_kl")


def _runs(members: Sequence[Record]) -> list[Drawn]:
    """The path of each run of a panel."""
    names = labels(list(members), without=("seed",))
    return [(name, record["evaluations"]) for name, record in zip(names, members, strict=True)]


def _has_means(panels: Iterable[Sequence[Record]]) -> bool:
    """Whether all methods have three runs or more, evaluated at the same steps."""
    for members in panels:
        steps: dict[str, list[list[int]]] = {}
        for name, points in _runs(members):
            steps.setdefault(name, []).append([point["step"] for point in points])
        if any(len(of_method) < 3 or of_method.count(of_method[0]) < len(of_method) for of_method in steps.values()):
            return False
    return True


def _means(members: Sequence[Record]) -> list[Drawn]:
    """The path of each method of a panel: means over its runs, with the standard errors of those means."""
    by_name: dict[str, list[list[dict[str, Any]]]] = {}
    for name, points in _runs(members):
        by_name.setdefault(name, []).append(points)
    return [(name, [_mean(of_step) for of_step in zip(*runs, strict=True)]) for name, runs in by_name.items()]


def _mean(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for key in ("kl", "oracle_reward"):
        found[key], found[f"{key}_se"] = mean_and_error([point[key] for point in points])
    return found


def _panel(record: Record) -> tuple[str, str]:
    """The model and the data set: rewards of different ones do not compare."""
    return record["config"]["model"]["name"], record["config"]["dataset"]["name"]
