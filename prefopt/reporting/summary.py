"""The table of runs: one row each, over seeds, or by the values of a key."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.results import accuracy_percent
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.labels import flat_config, labels
from prefopt.reporting.published import _of_paper, _paper, read_published
from prefopt.reporting.tables import Tabular
from prefopt.tracking.archive import Record, beta
from prefopt.utils.stats import mean_and_error


def evaluation_columns(record: Record) -> dict[str, tuple[float, float | None]]:
    """What prefopt.harness and prefopt.alpaca have found of a run's final policy: percentages and standard errors. A
    figure's name says the tasks, or the judge and the baseline, so that no two kinds share a column."""
    suites: dict[str, list[Record]] = {}
    for told in record["harness"]:
        if told["checkpoint"] == "final" and "acc" in told["metrics"]:
            suites.setdefault(json.dumps(told["settings"], sort_keys=True), []).append(told)
    found: dict[str, tuple[float, float | None]] = {}
    for settings, suite in suites.items():
        tasks, how = [t["task"] for t in suite], json.loads(settings)
        what = ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
        extra = [f"{k} {how[k]}" for k in ("limit", "num_fewshot") if how[k] is not None]
        extra += ["chat template"] * how["chat_template"]
        found[f"mean acc of {'; '.join([what, *extra])}"] = accuracy_percent(suite)
    for told in record["alpaca"]:
        if told["checkpoint"] != "final":
            continue
        of = f"{told['judge']['name']}, against {told['baseline']['name']}, {told['figures']['n']} questions"
        for figure, value, se in (
            ("win rate", "win_rate", "standard_error"),
            ("length-controlled win rate", "length_controlled_win_rate", "lc_standard_error"),
        ):
            name = f"{figure} ({of})"
            if name in found:  # the same with other settings
                name += f" {Path(told['file']).parent.name.rpartition('-')[2]}"
            if value in told["figures"]:
                found[name] = told["figures"][value], told["figures"][se]
    return found


COLUMNS = {
    "run": "run",
    "objective": "objective",
    "beta": "β",
    "accuracy": "held-out accuracy",
    "heldout_loss": "held-out loss",  # of reward models, whose losses alone can be compared with each other's
    "calibration_error": "calibration error",
    "oracle_reward": "oracle reward ± s.e.",
    "kl": "KL to reference ± s.e. (nats)",
    "chosen_logps_drift": "chosen log-prob drift (nats)",
    "sample_length": "length (tokens)",
}


def table_rows(records: list[Record]) -> list[dict[str, Any]]:
    """One row per initial policy, then one per run; numbers as they are. A row's `*_se` stands beside its mean.

    The drift is the mean log-prob of the held-out chosen completions at the end minus that at the start.
    """
    rows = []
    seen = set()
    for record in records:
        key = record["initial_weights"], record["config"]["dataset"]["name"], record["config"]["seed"]
        if key not in seen and record["evaluations"]:
            seen.add(key)
            row = _row(record["evaluations"][0], record["evaluations"][0])
            name = f"initial policy ({record['config']['model']['name']})"
            # Before training, accuracy is a matter of the objective's scores alone: a tie, or the reference's opinion.
            rows.append(row | {"run": "", "objective": name, "beta": None, "accuracy": None})
    for record, label in zip(records, labels(records), strict=True):
        evaluations = record["evaluations"] or [{}]
        row = _row(evaluations[-1], evaluations[0])
        # beta has a column of its own; what else tells the run apart stays with the objective's name.
        objective = " ".join(part for part in label.split(" ") if not part.startswith("β="))
        rows.append(row | {"run": record["name"], "objective": objective, "beta": beta(record)})
    names = posthoc_names(records)
    own: dict[str, dict[str, Any]] = {r["name"]: evaluation_columns(r) for r in records}
    for row in rows:
        for name in names:
            row[name], row[f"{name}_se"] = own.get(row["run"], {}).get(name, (None, None))
    return rows


def posthoc_names(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in evaluation_columns(record)))


def main_table(rows: list[dict[str, Any]], records: list[Record], config: ReportConfig) -> Tabular:
    """`table_rows` as people read them, with where they came from; the run comes last. A column for which no run has a
    figure is left out, and an initial policy of which nothing was measured."""
    names = posthoc_names(records)
    headings = {c: heading for c, heading in COLUMNS.items() if c != "run"}
    headings |= {name: f"{name}, %" for name in names} | {"run": COLUMNS["run"]}
    shown = [format_row(row, names) for row in rows]
    own = [line for line in shown if line["run"] != "–"]
    columns = [c for c in headings if c == "objective" or any(line[c] != "–" for line in own)]
    texts = [[line[c] for c in columns] for line in shown]
    texts = [text for text in texts if any(cell != "–" for cell in text[1:])]
    return Tabular("table", [headings[c] for c in columns], texts, rows, provenance(records, command(config)))


MEASURES = ("accuracy", "oracle_reward", "kl", "chosen_logps_drift", "sample_length")


def over_seeds(records: list[Record]) -> list[dict[str, Any]]:
    """A row per method whose runs differ in nothing but their seed: n, and of each of FIGURES, as they are at the end,
    the mean over seeds and its standard error (None for one alone)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record, name in zip(records, labels(records, without=("seed",)), strict=True):
        evaluations = record["evaluations"] or [{}]
        groups.setdefault(name, []).append(_row(evaluations[-1], evaluations[0]))
    rows = []
    for name, finals in groups.items():
        row: dict[str, Any] = {"method": name, "n": len(finals)}
        for figure in MEASURES:
            values = [f[figure] for f in finals if f[figure] is not None]
            mean, error = mean_and_error(values) if len(values) == len(finals) else (None, None)
            row |= {figure: mean, f"{figure}_se": error if len(values) > 1 else None}
        rows.append(row)
    return rows


def over_seeds_table(records: list[Record], config: ReportConfig) -> Tabular | None:
    """None where no two runs differ in their seed alone."""
    rows = over_seeds(records)
    if all(row["n"] == 1 for row in rows):
        return None
    digits = dict(zip(MEASURES, (2, 3, 2, 2, 1), strict=True))

    def cell(row: dict[str, Any], figure: str) -> str:
        if row[figure] is None:
            return "–"
        error = row[f"{figure}_se"]
        return f"{row[figure]:.{digits[figure]}f}" + ("" if error is None else f" ± {error:.{digits[figure]}f}")

    # Beside the table with `columns`, which has figures of the same kind, they are shown there.
    published = {} if config.columns else read_published(config)
    theirs = list(next(iter(published.values()))) if published else []
    headers = ["method", "seeds", *(COLUMNS[f].replace(" ± s.e.", "") for f in MEASURES), *map(_of_paper, theirs)]
    papers = [_paper(published, r["method"]) for r in rows]
    texts = [
        [r["method"], str(r["n"]), *(cell(r, f) for f in MEASURES), *(paper.get(name, "–") for name in theirs)]
        for r, paper in zip(rows, papers, strict=True)
    ]
    notes = [
        "Means at the end of the runs ± their standard error over training seeds. All seeds are evaluated on the same "
        "held-out prompts, whose choice is a further error that these do not show."
        + (f" The paper's figures ({config.published}) are other metrics of another model." if published else ""),
        *provenance(records, command(config)),
    ]
    return Tabular("over_seeds", headers, texts, rows, notes)


def by_column(records: list[Record], key: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The values of `key`, and a row per method: {"method", value: {"mean", "se", "n", "over_prompts"}} of the final
    oracle reward over the runs that differ in nothing but their seed. `se` is that over seeds (None for one alone),
    `over_prompts` the median of the runs' own standard errors over the held-out prompts.

    Raises UserError where runs lack the key or an oracle.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    values: list[str] = []
    flat = [flat_config(r) for r in records]
    for record, config, name in zip(records, flat, labels(records, without=("seed", "dataset.name", key)), strict=True):
        if key not in config or not record["evaluations"] or "oracle_reward" not in record["evaluations"][-1]:
            raise UserError(f"run {record['name']} has no {key}, or was not evaluated by an oracle: it fits no column.")
        value = str(config[key])
        values += [value] * (value not in values)
        found.setdefault(name, {}).setdefault(value, []).append(record["evaluations"][-1])
    rows = []
    for name, columns in found.items():
        row: dict[str, Any] = {"method": name}
        for value, finals in columns.items():
            mean, error = mean_and_error([f["oracle_reward"] for f in finals])
            over_prompts = statistics.median(f["oracle_reward_se"] for f in finals)
            se = error if len(finals) > 1 else None
            row[value] = {"mean": mean, "se": se, "n": len(finals), "over_prompts": over_prompts}
        rows.append(row)
    return values, rows


def by_column_table(records: list[Record], config: ReportConfig) -> Tabular:
    """`config.published`: a CSV whose first column names the method, and whose others are shown beside ours."""
    assert config.columns
    values, rows = by_column(records, config.columns)
    published = read_published(config)
    theirs = list(next(iter(published.values()))) if published else []
    if all(any(column.startswith(value) for column in theirs) for value in values):  # in the paper's order
        values.sort(key=lambda value: next(i for i, column in enumerate(theirs) if column.startswith(value)))
    headers = ["method", *values, *map(_of_paper, theirs)]
    texts: list[list[str]] = []
    table: list[dict[str, Any]] = []
    for row in rows:
        paper = _paper(published, row["method"])
        shown = []
        for value in values:
            cell = row.get(value)
            error = "" if cell is None or cell["se"] is None else f" ± {cell['se']:.3f}"
            shown.append("–" if cell is None else f"{cell['mean']:.3f}{error} (n {cell['n']})")
            if cell:
                table.append({"method": row["method"], config.columns: value, **cell})
        texts.append([row["method"], *shown, *(paper.get(name, "–") for name in theirs)])
    first = records[0]["evaluations"][0]
    error = statistics.median(t["over_prompts"] for t in table)
    notes = [
        f"Final oracle reward, mean over n seeds ± its standard error over seeds. A run's own standard error over its "
        f"{first['samples']} held-out prompts, which are the same for all, is {error:.3f} (median). The initial policy "
        f"has {first['oracle_reward']:.3f} ± {first['oracle_reward_se']:.3f}."
        + (" The paper's figures are rewards of another oracle on another scale." if published else ""),
        *provenance(records, command(config)),
    ]
    return Tabular("by_column", headers, texts, table, notes)


def format_row(row: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
    """A row as text, with its post-hoc figures `names`: what was not measured is a dash."""

    def number(key: str, digits: int) -> str:
        value = row.get(key)
        if value is None or math.isnan(value):
            return "–"
        error = row.get(f"{key}_se")
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    return {
        "run": row["run"] or "–",
        "objective": row["objective"],
        "beta": "–" if row["beta"] is None else f"{row['beta']:g}",
        "accuracy": number("accuracy", 2),
        "heldout_loss": number("heldout_loss", 3),
        "calibration_error": number("calibration_error", 3),
        "oracle_reward": number("oracle_reward", 3),
        "kl": number("kl", 2),
        "chosen_logps_drift": number("chosen_logps_drift", 2),
        "sample_length": number("sample_length", 1),
        **{name: number(name, 1) for name in names},
    }


def command(config: ReportConfig) -> str:
    keys = ("runs_dir", "output", "columns", "published")
    given = [f"{key}={getattr(config, key)}" for key in keys if getattr(config, key) is not None]
    return f"python -m prefopt.report {' '.join(given)}"


def provenance(records: list[Record], command: str) -> list[str]:
    """Sentences that say from what a table was made, where, and by which command."""
    machines = {json.dumps(r["machine"]): r["machine"] for r in records}.values()
    places = "; ".join(
        f"{m['cores']} cores of {m['processor']} ({m['instructions']}), {m['memory_gib']:.0f} GiB"
        + (f", {', '.join(m['gpus'])}" if m["gpus"] else "")
        for m in machines
    )
    commits = {f"{r['git']['commit'][:10]}{' with changes' if r['git']['dirty'] else ''}" for r in records if r["git"]}
    versions = {f"torch {r['versions']['torch']}, transformers {r['versions']['transformers']}" for r in records}
    evaluated = records[0]["evaluations"][-1] if records[0]["evaluations"] else {}
    pairs, sampled = evaluated.get("n"), ""
    if "samples" in evaluated:
        sampled = f", oracle reward and KL over {evaluated['samples']} responses, one to each held-out prompt; "
        sampled += "s.e. over these"
    return [
        f"Made by `{command}` from {len(records)} runs ({sum(r['seconds'] for r in records) / 60:.1f} minutes; of a "
        "resumed run, its last sitting).",
        f"Machine: {places}; precision {', '.join(sorted({r['config']['precision'] for r in records}))}.",
        f"Commit: {', '.join(sorted(commits)) or 'not in a git checkout'}; {'; '.join(sorted(versions))}.",
        *([f"Accuracy over {pairs} held-out pairs{sampled}, with one training seed per run."] if pairs else []),
    ]


def _row(last: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    drift = last["chosen_logps"] - first["chosen_logps"] if "chosen_logps" in last else None
    calibration = last.get("calibration_error")
    own = {} if calibration is None else {"heldout_loss": last["loss"], "calibration_error": calibration}
    return {
        "run": None,
        "objective": None,
        "beta": None,
        "accuracy": last.get("accuracy"),
        **{key: last.get(key) for key in ("oracle_reward", "oracle_reward_se", "kl", "kl_se")},
        "chosen_logps_drift": drift,
        "sample_length": last.get("sample_length"),
        "step": last.get("step"),
        **own,
    }
