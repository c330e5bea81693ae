"""The table of runs: one row each, over seeds, or by the values of a key."""

import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.evaluation.results import FIGURE_SETTINGS, accuracy_percent
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.differences import comparison_notes
from prefopt.reporting.evaluated import Value, aggregate_seeds, counts, flatten_value, main_measure, mean_over_seeds
from prefopt.reporting.labels import flat_config, labels
from prefopt.reporting.tables import MISSING, Column, Tabular, format_rows, format_value
from prefopt.tracking.archive import RESULTS, Record, beta
from prefopt.tracking.record import heldout_accuracy
from prefopt.utils.fingerprint import fingerprint

# A column for which no run has a figure is left out of the table of runs. `main_table` puts the post-hoc evaluations
# behind these. The runs' names are in the CSV alone.
COLUMNS = {
    column.key: column
    for column in (
        Column("objective", "objective", text=True),
        Column("beta", "β"),
        Column("accuracy", "held-out accuracy ± s.e.", 2, error=True),
        Column("heldout_loss", "held-out loss", 3),  # of reward models alone: other objectives' losses do not compare
        Column("calibration_error", "calibration error", 3),
        Column("oracle_reward", "oracle reward ± s.e.", 3, error=True),
        Column("kl", "KL to reference ± s.e. (nats)", 2, error=True),
        Column("chosen_logps_drift", "chosen log-prob drift (nats)", 2),
        Column("sample_length", "length (tokens)", 1),
        Column("sample_grammatical", "grammatical", 3, error=True),  # the laboratory's alone
    )
}
# Over seeds each of these has an error, so their headings do not say it.
MEASURES = [
    replace(COLUMNS[key], heading=COLUMNS[key].heading.replace(" ± s.e.", ""), error=True)
    for key in ("accuracy", "oracle_reward", "kl", "chosen_logps_drift", "sample_length", "sample_grammatical")
]

JUDGED = {"mtbench": "score", "arena": "win_rate"}  # the figures of the judged benchmarks

OPTIONAL = ("oracle_reward", "sample_grammatical")  # no column where no run has them


def evaluation_columns(record: Record) -> dict[str, Value]:
    """The results of the programs that evaluate for a run's final policy, and their standard errors: ratings of
    MT-Bench, and percentages. A column's name says the tasks, the judge and the baseline, or the rows, so that no two
    kinds share a column."""
    suites: dict[str, list[Record]] = {}
    for result in record["harness"]:
        if result["checkpoint"] == "final" and "acc" in result["metrics"]:
            suites.setdefault(json.dumps(result["settings"], sort_keys=True), []).append(result)

    columns: dict[str, Value] = {}
    for settings, suite in suites.items():
        tasks, how = [t["task"] for t in suite], json.loads(settings)
        parts = [", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"]
        parts += [_setting(key, how[key]) for key in FIGURE_SETTINGS if how.get(key) not in (None, False)]
        columns[f"mean acc of {'; '.join(parts)}"] = accuracy_percent(suite)

    for result in record["alpaca"]:
        if result["checkpoint"] != "final":
            continue
        figures = result["figures"]
        what = f"{result['judge']['name']}, against {result['baseline']['name']}, {figures['n']} questions"
        for figure, value, error in (
            ("win rate", "win_rate", "standard_error"),
            ("length-controlled win rate", "length_controlled_win_rate", "lc_standard_error"),
        ):
            if value in figures:
                columns[_distinct(f"{figure} ({what})", result, columns)] = figures[value], figures[error]

    for kind, figure in JUDGED.items():
        for result in record[kind]:
            if result["checkpoint"] == "final":
                name, figures = _distinct(result["metric"], result, columns), result["figures"]
                columns[name] = figures[figure], figures["standard_error"]

    for result in record["reward_bench"]:
        if result["checkpoint"] == "final":
            columns |= {_distinct(k, result, columns): value for k, value in reward_bench_columns(result).items()}
    return columns


def _distinct(name: str, result: Record, columns: Mapping[str, Value]) -> str:
    """The name of a result's column. Where another result, of other settings, has that name, the digest of the settings
    is added, with which the name of the result's folder ends."""
    return f"{name} {Path(result['file']).parent.name.rpartition('-')[2]}" if name in columns else name


def reward_bench_columns(result: Record) -> dict[str, Value]:
    """The figure over all rows and those of the sections; where there is neither, those of the subsets."""
    figures, how = result["figures"], result["settings"]
    overall = {figures["benchmark"] or "accuracy": figures["overall"]} if figures["overall"] else {}
    columns = {}
    for name, figure in ({**overall, **figures["sections"]} or figures["subsets"]).items():
        if figure["value"] is not None:
            error = figure["standard_error"]
            what = f"{Path(result['rows']).name} {how['rows'][:8]}, {how['max_length']} tokens, {how['precision']}"
            columns[f"{name} ({what})"] = 100 * figure["value"], None if error is None else 100 * error
    return columns


def _setting(key: str, value: Any) -> str:
    """A setting of an evaluation in a column's name. A long text is its beginning and a digest."""
    text = key if value is True else f"{key} {value}"
    return text if len(text) <= 60 else f"{text[:48]}… ({fingerprint(value)[:8]})"


def evaluation_names(records: list[Record]) -> list[str]:
    """The names of all `evaluation_columns`, in the order in which they come up."""
    return list(dict.fromkeys(name for record in records for name in evaluation_columns(record)))


def table_rows(records: list[Record]) -> list[dict[str, Any]]:
    """One row per initial policy, then one per run; numbers as they are. A row's `*_se` stands beside its mean.

    The drift is the mean log-prob of the held-out chosen completions at the end minus that at the start.
    """
    rows = []
    first: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = record["initial_weights"], record["config"]["dataset"]["name"], record["config"]["seed"]
        if record["evaluations"]:
            first.setdefault(key, record)
    several = [len({key[i] for key in first}) > 1 for i in (1, 2)]  # data, seeds
    for (_, data, seed), record in first.items():
        start = record["evaluations"][0]
        name = f"initial policy ({record['config']['model']['name']})"
        name += f" on {data}" * several[0] + f" seed={seed}" * several[1]
        # Before training, accuracy is a matter of the objective's scores alone: a tie, or the reference's opinion.
        rows.append(_row(start, start) | {"run": "", "objective": name, "beta": None} | flatten_value("accuracy", None))

    for record, label in zip(records, labels(records), strict=True):
        # beta has its own column; what else tells the run apart stays with the objective's name.
        objective = " ".join(part for part in label.split(" ") if not part.startswith("β="))
        rows.append(_final_row(record) | {"run": record["name"], "objective": objective, "beta": beta(record)})

    names = evaluation_names(records)
    evaluations = {record["name"]: evaluation_columns(record) for record in records}
    for row in rows:
        for name in names:
            row.update(flatten_value(name, evaluations.get(row["run"], {}).get(name)))
    return rows


def main_table(rows: list[dict[str, Any]], records: list[Record], config: ReportConfig) -> Tabular:
    """`table_rows` as people read them, with where they came from. A column for which no run has a figure is left out,
    and an initial policy of which nothing was measured."""
    ratings = {result["metric"] for record in records for result in record["mtbench"]}
    evaluations = [
        Column(name, f"{name}, of 10", 2, error=True)
        if any(name.startswith(metric) for metric in ratings)
        else Column(name, f"{name}, %", 1, error=True)
        for name in evaluation_names(records)
    ]
    runs = [row for row in rows if row["run"]]
    columns = [
        c for c in (*COLUMNS.values(), *evaluations)
        if c.key == "objective" or any(c.format(row) != MISSING for row in runs)
    ]  # fmt: skip
    texts = [cells for cells in format_rows(columns, rows) if any(cell != MISSING for cell in cells[1:])]
    origin = provenance(records, command(config))
    return Tabular("table", columns, texts, rows, measured(records), "The runs at their end", origin)


def over_seeds(records: list[Record]) -> list[dict[str, Any]]:
    """A row per method whose runs differ in nothing but their seed: n, and of each of MEASURES, as they are at the end,
    the mean over seeds and its standard error (None for one alone)."""
    finals = pd.DataFrame([_final_row(record) for record in records], dtype=object)
    finals["method"] = labels(records, without=("seed",))
    rows = []
    for method, seeds in finals.groupby("method", sort=False):
        row: dict[str, Any] = {"method": method, "n": len(seeds)}
        for measure in MEASURES:
            if measure.key in seeds:
                row |= flatten_value(measure.key, mean_over_seeds(seeds[measure.key]))
        rows.append(row)
    return rows


def over_seeds_table(records: list[Record], config: ReportConfig) -> Tabular | None:
    """None where no two runs differ in their seed alone."""
    rows = over_seeds(records)
    if all(row["n"] == 1 for row in rows):
        return None
    there = [c for c in MEASURES if c.key not in OPTIONAL or any(c.format(row) != MISSING for row in rows)]
    columns = [Column("method", "method", text=True), Column("n", "seeds"), *there]
    note = (
        "Means at the end of the runs ± their standard error over training seeds. All seeds are evaluated on the same "
        "held-out prompts, whose choice is a further error that these do not show."
    )
    notes = [note, *comparison_notes(records)]
    origin = provenance(records, command(config))
    return Tabular("over_seeds", columns, format_rows(columns, rows), rows, notes, "Means over seeds", origin)


def by_column(records: list[Record], key: str) -> list[dict[str, Any]]:
    """The final oracle reward of each method for each value of `key` (without any oracle: the held-out accuracy), over
    the runs that differ in nothing but their seed: a row for each pair of the two that occurs.

    A row has method; `key`, the value as text; mean; se, its standard error over seeds (None for one alone); n, their
    number; over_prompts, the median of the runs' standard errors over the held-out prompts (pairs).

    Raises UserError where runs lack the key or the figure.
    """
    finals = []
    measure, name = main_measure(records)
    for record, method in zip(records, labels(records, without=("seed", "dataset.name", key)), strict=True):
        config, last = flat_config(record), _final_row(record)
        if key not in config or last[measure] is None:
            raise UserError(f"run {record['name']} has no {key if key not in config else name}: it fits no column.")
        finals.append((method, str(config[key]), last[measure], last[f"{measure}_se"]))

    frame = pd.DataFrame(finals, columns=["method", "value", "figure", "error"])
    rows = []
    for (method, value), seeds in frame.groupby(["method", "value"], sort=False):
        mean, error = mean_over_seeds(seeds["figure"]) or (None, None)
        row = {"method": method, key: value, "mean": mean, "se": error, "n": len(seeds)}
        rows.append(row | {"over_prompts": statistics.median(seeds["error"])})
    return rows


def by_column_table(records: list[Record], key: str, command: str) -> Tabular:
    """`by_column`, a row per method and a column per value of `key`; `command` made it."""
    rows = by_column(records, key)
    methods, values = (list(dict.fromkeys(row[column] for row in rows)) for column in ("method", key))
    rows.sort(key=lambda row: (methods.index(row["method"]), values.index(row[key])))
    cells = {(row["method"], row[key]): f"{format_value(row['mean'], row['se'], 3)} (n {row['n']})" for row in rows}
    texts = [[method, *(cells.get((method, value), MISSING) for value in values)] for method in methods]
    columns = [Column("method", "method", text=True), *(Column(value, value) for value in values)]

    starts = {record["initial_weights"]: record["evaluations"][0] for record in records}
    first, (measure, name) = records[0]["evaluations"][0], main_measure(records)
    items = f"{first['samples']} held-out prompts" if measure == "oracle_reward" else f"{first['n']} held-out pairs"
    over_items = statistics.median(row["over_prompts"] for row in rows)
    note = (
        f"Mean over n seeds ± its standard error over seeds. A run's own standard error over its {items}, which are "
        f"the same for all, is {over_items:.3f} (median)."
    )
    if measure == "oracle_reward":
        own = [(start[measure], start[f"{measure}_se"]) for start in starts.values()]
        policies = "The initial policy has" if len(own) == 1 else f"The {len(own)} initial policies have"
        mean, error = aggregate_seeds(own) or (None, None)
        note += f" {policies} {format_value(mean, error, 3)}."
    notes = [note, *comparison_notes(records)]
    title = f"Final {name} by {key}"
    return Tabular("by_column", columns, texts, rows, notes, title, provenance(records, command))


def command(config: ReportConfig) -> str:
    """The command that makes these tables, for the lines below them."""
    keys = ("runs_dir", "output", "columns")
    arguments = [f"{key}={getattr(config, key)}" for key in keys if getattr(config, key) is not None]
    if config.compare:
        names = ",".join(f'"{name}"' if re.search(r"[ ,=]", name) else name for name in config.compare)
        arguments.append(f"compare=[{names}]")
    return shlex.join(["python", "-m", "prefopt.report", *arguments])


def measured(records: Sequence[Record]) -> list[str]:
    """Sentences on what the figures at the end of the runs are: over how many pairs and prompts, what ± is, and which
    settings the methods do not share."""
    ends = [record["evaluations"][-1] for record in records if record["evaluations"]]
    notes = []
    if pairs := counts(end.get("n") for end in ends):
        notes.append(f"Accuracy over {pairs} held-out pairs, where a tie is not right.")
    if prompts := counts(end.get("samples") for end in ends):
        what = "Oracle reward and KL" if main_measure(records)[0] == "oracle_reward" else "KL"
        notes.append(f"{what} over {prompts} responses, one to each held-out prompt.")
    if notes:
        notes.append("± is one standard error over these. One training seed per run.")
    if any(record[kind] for record in records for kind in RESULTS):
        notes.append("Of accuracies over tasks, win rates and ratings, ± is one standard error over their questions.")
    return [" ".join(notes)] * bool(notes) + comparison_notes(records)


def provenance(records: Sequence[Record], command: str) -> list[str]:
    """Sentences that say from what a table was made, where, and by which command."""
    machines = {json.dumps(r["machine"]): r["machine"] for r in records}.values()
    places = "; ".join(
        f"{m['cores']} cores of {m['processor']} ({m['instructions']}), {m['memory_gib']:.0f} GiB"
        + (f", {', '.join(map(str, m['gpus']))}" if m["gpus"] else "")
        for m in machines
    )
    commits = {f"{r['git']['commit'][:10]}{' with changes' if r['git']['dirty'] else ''}" for r in records if r["git"]}
    versions = {f"torch {r['versions']['torch']}, transformers {r['versions']['transformers']}" for r in records}
    return [
        f"Made by `{command}` from {len(records)} runs ({sum(r['seconds'] for r in records) / 60:.1f} minutes; of a "
        "resumed run, its last sitting).",
        f"Machine: {places}; precision {', '.join(sorted({r['config']['precision'] for r in records}))}.",
        f"Commit: {', '.join(sorted(commits)) or 'not in a git checkout'}; {'; '.join(sorted(versions))}.",
    ]


def _final_row(record: Record) -> dict[str, Any]:
    """The figures at the end of a run; of one that was not evaluated, None for each."""
    evaluations = record["evaluations"] or [{}]
    return _row(evaluations[-1], evaluations[0])


def _row(last: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation, `last`, and the drift since `first`; run, objective and beta are for the caller."""
    row = {
        "run": None,
        "objective": None,
        "beta": None,
        **flatten_value("accuracy", heldout_accuracy(last)),
        **{key: last.get(key) for key in ("oracle_reward", "oracle_reward_se", "kl", "kl_se")},
        "chosen_logps_drift": last["chosen_logps"] - first["chosen_logps"] if "chosen_logps" in last else None,
        "sample_length": last.get("sample_length"),
        **{key: last.get(key) for key in ("sample_grammatical", "sample_grammatical_se") if key in last},
        "step": last.get("step"),
    }
    if last.get("calibration_error") is not None:  # a reward model
        row |= {"heldout_loss": last["loss"], "calibration_error": last["calibration_error"]}
    return row
