"""A paper's tables and figures from the records of finished runs, with what the paper prints beside them.

    python -m prefopt.papers paper=mmpo                                   # the published figures by themselves
    python -m prefopt.papers paper=mmpo 'runs_dir=runs/paper/mmpo/*'
    python -m prefopt.papers paper=mappo runs_dir=runs/mini/mappo/final
    python -m prefopt.papers paper=madpo runs_dir=results/mini/madpo/records.jsonl

Tables are written as Markdown, CSV and LaTeX (booktabs), figures as PNG, SVG and PDF, and all of it once more as one
HTML page that needs nothing besides. Everything comes from the records that prefopt.train, prefopt.harness and
prefopt.alpaca leave in a run's folder, nothing from names or logs. Records that cannot be compared are refused. They
are written into records.jsonl, from which (runs_dir=FILE) the same tables and figures can be made without the runs.
"""

import html
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import PapersConfig, ReportConfig, parse
from prefopt.harness import SUITES
from prefopt.metrics import mean_and_error
from prefopt.paper_figures import draw_drift, draw_paths, draw_sensitivity, draw_spread
from prefopt.paths import check_folder, write_whole
from prefopt.points import (
    SIDES,
    Evaluated,
    Metric,
    Point,
    Value,
    accuracy_of,
    epoch_of,
    grouped,
    metric_of,
    model_names,
    peaks,
    plain,
    points_of,
    pooled,
    published_points,
    read_csv,
    read_evaluated,
    sft_accuracy,
    spreads,
    win_rate_of,
)
from prefopt.program import program
from prefopt.records import Record, keep, last_step, read_records
from prefopt.report import by_column_table, in_order, our_name, provenance
from prefopt.tables import Tabular


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    files: list[Path]


def same(ours: tuple[str, str], theirs: dict[str, str]) -> bool:
    """Whether a row of a published table is about this model and method."""
    return plain(ours[0]) == plain(theirs["model"]) and ours[1].split(" ")[0] == our_name(theirs["method"])


def beside(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, str]]
) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Our rows with the published one of the same model and method, then the published rows that none of ours has;
    what is missing is empty."""
    used: list[dict[str, str]] = []
    pairs: list[tuple[dict[str, Any], dict[str, str]]] = []
    for row in ours:
        match = next((t for t in theirs if same((row["model"], row["method"]), t)), {})
        used += [match] * bool(match)
        pairs.append((row, match))
    return pairs + [({"model": t["model"], "method": t["method"]}, t) for t in theirs if t not in used]


# Tables


def number(value: Value | None, digits: int = 2) -> str:
    """With its standard error; what was not measured is a dash."""
    if value is None:
        return "–"
    return f"{value[0]:.{digits}f}" + ("" if value[1] is None else f" ± {value[1]:.{digits}f}")


def peak_table(points: Sequence[Point], published: str, by: str, like: set[str], notes: list[str]) -> Tabular:
    """MMPO's table 1 (`by` accuracy: the win rate where LM accuracy peaks) or 2 (`by` win_rate: the reverse). `like`:
    which of the two is measured as the paper does, so that a difference means something."""
    selected = "peak_lm_accuracy" if by == "accuracy" else "peak_win_rate"
    theirs = [r for r in read_csv(published, "mmpo_tables_1_2.csv") if r["selected_by"] == selected]
    ours = [vars(p) for p in peaks(points, by)]
    headers, texts, rows = ["model", "method", "β", "epoch", "seeds"], [], []
    for heading in ("LM accuracy", "win rate"):
        headers += [f"{heading}, %", f"paper: {heading}", "difference"]
    for row, paper in beside(ours, theirs):
        numbers: dict[str, Any] = {key: row.get(key) for key in ("model", "method", "beta", "epoch", "seeds")}
        cells = [
            row["model"],
            row["method"],
            *("–" if numbers[k] is None else f"{numbers[k]:g}" for k in ("beta", "epoch", "seeds")),
        ]
        for key, column in (("accuracy", "lm_accuracy"), ("win_rate", "lc_win_rate")):
            value, printed = row.get(key), paper.get(column)
            difference = value[0] - float(printed) if value and printed and key in like else None
            cells += [number(value), printed or "–", "–" if difference is None else f"{difference:+.2f}"]
            numbers |= {key: value and value[0], f"{key}_se": value and value[1]}
            numbers |= {f"paper_{key}": printed, f"{key}_difference": difference}
        texts.append(cells)
        rows.append(numbers)
    name, what = (
        ("table_1", "Win rate at peak LM accuracy") if by == "accuracy" else ("table_2", "LM accuracy at peak win rate")
    )
    return Tabular(f"mmpo_{name}", headers, texts, rows, notes, what)


def spread_table(rows: list[dict[str, Any]], notes: list[str]) -> Tabular:
    def cell(value: Any) -> str:
        return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"

    keys = {
        "source": "source", "model": "model", "method": "method", "betas": "β", "epoch": "epoch", "lowest": "lowest, %",
        "highest": "highest, %", "spread": "spread", "se": "s.e.", "noise": "by noise alone",
    }  # fmt: skip
    texts = [[f"{r[k]:g}" if k == "epoch" else cell(r[k]) for k in keys] for r in rows]
    return Tabular(
        "mmpo_spread", list(keys.values()), texts, rows, notes, "Spread of the win rate over β at the last epoch"
    )


def policies_table(
    paper: str, found: Sequence[Evaluated], metric: Metric | None, models: dict[str, str], notes: list[str]
) -> list[Tabular]:
    """Every evaluated policy by itself, before means over seeds; none where none was evaluated."""
    headers = [
        "run",
        "model",
        "step",
        "epoch",
        "LM accuracy, %",
        f"{metric.name if metric else 'win rate'}, %",
        "commit",
    ]
    texts, rows = [], []
    for policy in found:
        rates = accuracy_of(policy), None if policy.run["objective"] == "sft" else win_rate_of(policy, metric)
        epoch = epoch_of(policy.run, policy.step)
        commits = ", ".join(sorted({commit(t["git"]) for t in [*policy.harness, *policy.alpaca]}))
        row = {"run": policy.run["name"], "model": models[policy.run["name"]], "step": policy.step, "epoch": epoch}
        texts.append([row["run"], row["model"], str(policy.step), f"{epoch:g}", *map(number, rates), commits])
        for key, value in zip(("accuracy", "win_rate"), rates, strict=True):
            row |= dict(zip((key, f"{key}_se"), value or (None, None), strict=True))
        rows.append(row | {"commit": commits})
    return [Tabular(f"{paper}_policies", headers, texts, rows, notes, "Evaluated policies")] if found else []


def results_table(
    name: str,
    title: str,
    records: Sequence[Record],
    points: Sequence[Point],
    theirs: list[dict[str, str]],
    metric: Metric | None,
    notes: list[str],
) -> Tabular:
    """Final figures of each method over its seeds, beside a table of the MaPPO paper (arXiv 2507.21183)."""
    columns = [c for c in theirs[0] if c not in ("model", "method")]
    models = model_names(records)
    ours: list[dict[str, Any]] = []
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model and r["objective"] != "sft"]
        for (method, value), seeds in grouped(members).items():
            own = [p for p in points if (p.model, p.method, p.beta) == (model, method, value)]
            ends = [(r["evaluations"][0], r["evaluations"][-1]) for r in seeds if r["evaluations"]]
            row: dict[str, Any] = {"model": model, "method": method, "beta": value, "seeds": len(seeds)}
            last = [p for p in own if p.epoch == epoch_of(seeds[0], last_step(seeds[0])) and p.seeds == len(seeds)]
            row["win_rate"] = last[0].win_rate if last else None
            row["oracle_reward"] = over(ends, lambda first, last: last["oracle_reward"])
            for side in SIDES:
                row[side] = over(ends, lambda first, last, key=f"{side}_logps": last[key] - first[key])
            ours.append(row)
    shown = {f"{metric.name if metric else 'win rate'}, %": "win_rate", "oracle reward": "oracle_reward"}
    shown |= {f"{side} log-prob drift": side for side in SIDES}
    texts, rows = [], []
    for row, paper in beside(ours, theirs):
        start = [
            row["model"],
            row["method"],
            f"{row['beta']:g}" if row.get("beta") else "–",
            str(row.get("seeds", "–")),
        ]
        numbers: dict[str, Any] = {k: row.get(k) for k in ("model", "method", "beta", "seeds")}
        for key in shown.values():
            numbers |= dict(zip((key, f"{key}_se"), row.get(key) or (None, None), strict=True))
        texts.append([*start, *(number(row.get(key), 3 if key == "oracle_reward" else 2) for key in shown.values()),
                      *(paper.get(c, "–") for c in columns)])  # fmt: skip
        rows.append(numbers | {f"paper_{c}": paper.get(c) for c in columns})
    heads = [f"paper: {c.replace('_', ' ')}" for c in columns]
    return Tabular(name, ["model", "method", "β", "seeds", *shown, *heads], texts, rows, notes, title)


def over(ends: Sequence[tuple[Record, Record]], figure: Callable[..., float]) -> Value | None:
    """Mean and standard error over seeds of a figure of the first and last evaluations; None where one lacks it."""
    try:
        mean, error = mean_and_error([figure(first, last) for first, last in ends])
    except (KeyError, ZeroDivisionError):
        return None
    return mean, error if len(ends) > 1 else None


# The paper's columns, as lm-eval's tasks and metrics. Which metric of a task it prints it does not say.
ACADEMIC = {
    "ifeval": ("ifeval", "prompt_level_strict_acc"),
    "gpqa": ("gpqa_main_zeroshot", "acc"),
    "mmlu": ("mmlu", "acc"),
    "hellaswag": ("hellaswag", "acc_norm"),
    "truthfulqa": ("truthfulqa_mc2", "acc"),
    "gsm8k": ("gsm8k", "exact_match,strict-match"),
}


def academic_table(records: Sequence[Record], published: str, notes: list[str]) -> Tabular:
    """The MaPPO paper's academic benchmarks, in percent: final policies, mean over seeds, and the models they began
    from (the paper's `it`), which `prefopt.harness checkpoints=initial` evaluates. Then `acc` of the tasks that are not
    among its benchmarks."""
    models = model_names(records)
    theirs = {task for task, _ in ACADEMIC.values()}
    others = sorted({t["task"] for r in records for t in r["harness"] if "acc" in t["metrics"]} - theirs)
    benchmarks = ACADEMIC | {task: (task, "acc") for task in others}
    groups: dict[tuple[str, str], list[list[Record]]] = {}
    for model in dict.fromkeys(models.values()):
        members = [r for r in records if models[r["name"]] == model]
        if initial := [t for r in members for t in r["harness"] if t["step"] == 0]:
            groups[model, "it"] = [initial]
        for (method, value), seeds in grouped(members).items():
            name = f"{method} β={value:g}" if value else method
            groups[model, name] = [[t for t in r["harness"] if t["checkpoint"] == "final"] for r in seeds]
    ours: list[dict[str, Any]] = []
    for (model, method), policies in groups.items():
        row: dict[str, Any] = {"model": model, "method": method}
        for column, (task, metric) in benchmarks.items():
            scores = [
                [(100 * m["value"], m["stderr"] and 100 * m["stderr"]) for t in told if t["task"] == task
                 for m in [t["metrics"].get(metric)] if m]
                for told in policies
            ]  # fmt: skip
            row[column] = pooled([own[0] if own else None for own in scores])
        if any(row[column] for column in benchmarks):
            ours.append(row)
    texts, rows = [], []
    for row, paper in beside(ours, read_csv(published, "mappo_academic.csv")):
        texts.append([row["model"], row["method"]])
        numbers: dict[str, Any] = {key: row[key] for key in ("model", "method")}
        for column in benchmarks:
            value = row.get(column)
            texts[-1] += [number(value, 1)] + [paper.get(column, "–")] * (column in ACADEMIC)
            numbers |= {column: value and value[0], f"{column}_se": value and value[1]}
            numbers |= {f"paper_{column}": paper.get(column)} if column in ACADEMIC else {}
        rows.append(numbers)
    headers = ["model", "method", *(h for column in ACADEMIC for h in (column, "paper")), *others]
    what = "; ".join(f"{c}: {metric.replace(',', ', ')} of {task}" for c, (task, metric) in benchmarks.items())
    what += limited([t for policies in groups.values() for told in policies for t in told])
    return Tabular(
        "mappo_academic", headers, texts, rows, [f"Ours, in percent: {what}.", *notes], "Academic benchmarks"
    )


def limited(told: Sequence[dict[str, Any]]) -> str:
    """Of how many rows these harness records are, where it is not all."""
    limits = {t["settings"]["limit"] for t in told} - {None}
    return "".join(f"; of each task the first {limit:g} rows" for limit in sorted(limits))


# Papers

Made = tuple[list[Tabular], list[Figure]]


def command(config: PapersConfig) -> str:
    given = {k: v for k, v in vars(config).items() if v is not None}
    texts = {k: f"[{','.join(v)}]" if isinstance(v, list) else v for k, v in given.items()}
    return shlex.join(["python", "-m", "prefopt.papers", *(f"{k}={v}" for k, v in texts.items())])


def origin(records: Sequence[Record], config: PapersConfig) -> list[str]:
    if not records:
        return [f"Made by `{command(config)}` from the published figures alone."]
    return provenance(list(records), command(config))


def mmpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 1 and 2 and figures 1 to 3 of the paper, and its claim that the choice of beta matters little."""
    found = read_evaluated(records, config)
    metric = metric_of(found)
    models = model_names(records)
    points = points_of(found, metric, models)
    if records and not points:
        raise UserError(
            f"no policy in {config.runs_dir} has been evaluated. Evaluate them first: python -m prefopt.harness and "
            "python -m prefopt.alpaca with run=RUN checkpoints=all"
        )
    published, sft = published_points(config.published), sft_accuracy(found, models)
    order = [plain(row["model"]) for row in read_csv(config.published, "mmpo_tables_1_2.csv")]  # by size
    points.sort(key=lambda p: order.index(plain(p.model)) if plain(p.model) in order else len(order))
    by_source = {"ours": points, "published": published}
    like = as_published(metric, found)
    drawn = {"ours": points} | ({"published": published} if not points or "win_rate" in like else {})  # one metric
    notes = [
        "Paper: length-controlled win rate of AlpacaEval 2 against the SFT model of the same size, mean of two judges; "
        "LM accuracy, mean of ten tasks; standard errors are not known. Differences are "
        "given where ours is the same metric.",
        *_what(metric, found),
        "A peak is the highest of all β and epochs, and for that reason alone too high by a part of its standard "
        "error, which is that of the one point.",
        *origin(records, config),
    ]
    notes_of_spread = [
        "Spread: the highest less the lowest win rate of all β at the last epoch; s.e. as if the two were independent. "
        "The last column is the spread that equal win rates would show on average if their errors were independent: an "
        "upper estimate, because all β share their questions.",
        "Published: length-controlled win rates by gpt-4o-mini alone, SimPO without length normalization. β = 1 is not "
        "in the paper's grid.",
        *_what(metric, []),
        *origin(records, config),
    ]
    both = any(p.accuracy and p.win_rate for p in points)
    caption = "One path for each method and β, larger β darker; dashed, 50 %. " + (
        "Bars: one standard error. Above, LM accuracy against win rate, an arrow for each step between evaluated "
        "epochs; dotted, the accuracy of the SFT model. Below, the win rate by epoch. "
        if both
        else "Win rate by epoch. "
    )
    alone = (
        "the published runs, length-controlled and by gpt-4o-mini alone, SimPO without length normalization. Their "
        "accuracies by epoch are not known, so "
    )
    if not points:
        caption += f"These are {alone}the paper's figures with accuracy cannot be drawn from them."
    elif "published" in drawn:
        caption += f"Faint: {alone}they have no place in a panel with accuracy."
    output, name = Path(config.output), metric.name if metric else "length-controlled win rate"
    spread = [row for source, own in by_source.items() for row in spreads(own, source)]
    tables = [peak_table(points, config.published, by, like, notes) for by in ("accuracy", "win_rate")]
    spread_caption = (
        "Win rates of all β at the last epoch, a bar from the lowest to the highest; hollow where they are published "
        "ones beside ours. A short bar near 0 % is no merit."
    )
    tables += [spread_table(spread, notes_of_spread)]
    tables += policies_table("mmpo", found, metric, models, [*_what(metric, found), *origin(records, config)])
    return tables, [
        Figure("Through the epochs", caption, draw_paths(points, sft, drawn.get("published", []), name, output)),
        Figure("Spread over β", spread_caption, draw_spread(drawn, output)),
    ]


def as_published(metric: Metric | None, found: Sequence[Evaluated]) -> set[str]:
    """Which of accuracy and win_rate is the paper's metric: the mean of its ten tasks in full, zero-shot; the
    length-controlled win rate, whoever the judge is."""
    told = [t for policy in found for t in policy.harness]
    whole = all(t["settings"]["limit"] is None and not t["settings"]["num_fewshot"] for t in told)
    accuracy = whole and {t["task"] for t in told} == set(SUITES["mmpo"])
    controlled = metric is not None and metric.key == "length_controlled_win_rate"
    return {name for name, holds in (("accuracy", accuracy), ("win_rate", controlled)) if holds}


def _what(metric: Metric | None, found: Sequence[Evaluated]) -> list[str]:
    """What our figures are."""
    normalized = {p.run["config"]["objective"].get("length_normalize") for p in found if p.run["objective"] == "simpo"}
    simpo = {"with" if each else "without" for each in normalized}
    tasks, rows = sorted({t["task"] for p in found for t in p.harness}), limited([t for p in found for t in p.harness])
    return [
        *([f"Ours: {metric.name}, {metric.about}."] if metric else []),
        *([f"Ours: LM accuracy, the mean acc of {', '.join(tasks)}{rows}."] if tasks else []),
        *([f"Ours: SimPO {' and '.join(sorted(simpo))} length normalization."] if simpo else []),
    ]


def mappo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Tables 2 and 3 of the paper, and the squeezing effect."""
    found = read_evaluated(records, config)
    metric = metric_of(found)
    models = model_names(records)
    points = points_of(found, metric, models)
    notes = [
        "Ours: means at the end of the runs ± their standard error over seeds; drifts are changes of the mean held-out "
        "log-prob since the start, in nats. The paper's figures stand beside ours where model and method are the same.",
        *_what(metric, []),
        *origin(records, config),
    ]
    titles = {"mappo_table_2": "MaPPO as a plug-in (table 2)", "mappo_table_3": "Main results (table 3)"}
    tables = [
        results_table(name, title, records, points, read_csv(config.published, f"{name}.csv"), metric, notes)
        for name, title in titles.items()
    ]
    tables.append(academic_table(records, config.published, origin(records, config)))
    tables += policies_table("mappo", found, metric, models, [*_what(metric, found), *origin(records, config)])
    caption = (
        "Mean log-prob of the held-out chosen (left) and rejected (right) completions, less its value before training: "
        "the mean over seeds, with a band of one standard error. Where both fall, probability has gone to other texts: "
        "the squeezing effect. Full: a base alone; dashed: with MaPPO."
    )
    return tables, [Figure("Log-prob drift", caption, draw_drift(records, Path(config.output), "mappo_drift"))]


def madpo(records: Sequence[Record], config: PapersConfig) -> Made:
    """Table 1 of the paper, and the sensitivity to each hyperparameter that was varied."""
    name, title = "madpo_table_1", "Oracle reward by data quality (table 1)"
    theirs = read_csv(config.published, f"{name}.csv")
    if not records:
        texts = [list(row.values()) for row in theirs]
        notes = ["Paper: mean reward of its own oracle.", *origin(records, config)]
        return [Tabular(name, [key.replace("_", " ") for key in theirs[0]], texts, list(theirs), notes, title)], []
    asked = ReportConfig("", "", "dataset.format.quality", str(Path(config.published) / f"{name}.csv"))
    table = by_column_table(list(records), asked)
    table = replace(table, name=name, title=title, notes=[table.notes[0], *origin(records, config)])
    caption = (
        "Final oracle reward over each hyperparameter that was varied: the mean over seeds, bars of one standard error "
        "(of one seed alone, that over its prompts)."
    )
    files = draw_sensitivity(records, Path(config.output), "madpo_sensitivity")
    return [table], [Figure("Sensitivity", caption, files)]


PAPERS: dict[str, tuple[str, Callable[[Sequence[Record], PapersConfig], Made]]] = {
    "mmpo": ("MMPO, arXiv 2510.22881", mmpo),
    "mappo": ("MaPPO, arXiv 2507.21183", mappo),
    "madpo": ("MADPO, arXiv 2510.05342", madpo),
}

# The page

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


def commit(git: dict[str, Any] | None) -> str:
    return "–" if git is None else git["commit"][:10] + "+" * git["dirty"]


def inline(svg: str, title: str) -> str:
    """An SVG file as an element of a page: without its prolog, its comments, and what names places outside."""
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def matching(pattern: str) -> list[Path]:
    """What the pattern stands for; itself where there is nothing of the kind."""
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) or [path]


@program("papers", PapersConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, PapersConfig)
    if config.paper not in PAPERS:
        raise UserError(f"paper must be {', '.join(PAPERS)}, is {config.paper!r}")
    check_folder("output", config.output)
    title, make = PAPERS[config.paper]
    records = in_order(read_records(*matching(config.runs_dir))) if config.runs_dir else []
    tables, figures = make(records, config)
    output = Path(config.output)
    files = [file for table in tables for file in table.write(output)] + [f for each in figures for f in each.files]
    target = output / f"{config.paper}.html"
    write_whole(target, page(title, tables, figures, records, origin(records, config)))
    files.append(target)
    for file in files + keep(records, config.runs_dir, output):
        print(file)


if __name__ == "__main__":
    main()
