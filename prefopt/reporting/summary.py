"""The table of runs: one row each, over seeds, or by the values of a key."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.evaluation.results import FIGURE_SETTINGS, accuracy_percent
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.differences import settings_note
from prefopt.reporting.evaluated import Value, flatten_value, mean_over_seeds
from prefopt.reporting.labels import flat_config, labels
from prefopt.reporting.published import figures_of_method, paper_heading, read_published
from prefopt.reporting.tables import MISSING, Column, Tabular, format_rows, format_value
from prefopt.tracking.archive import Record, beta
from prefopt.utils.fingerprint import fingerprint

# A column for which no run has a figure is left out of the table of runs. `main_table` puts the post-hoc evaluations
# behind these, and the run's name last.
COLUMNS = {
    column.key: column
    for column in (
        Column("objective", "objective", text=True),
        Column("beta", "β"),
        Column("accuracy", "held-out accuracy", 2),
        Column("heldout_loss", "held-out loss", 3),  # of reward models alone: other objectives' losses do not compare
        Column("calibration_error", "calibration error", 3),
        Column("oracle_reward", "oracle reward ± s.e.", 3, error=True),
        Column("kl", "KL to reference ± s.e. (nats)", 2, error=True),
        Column("chosen_logps_drift", "chosen log-prob drift (nats)", 2),
        Column("sample_length", "length (tokens)", 1),
        Column("sample_grammatical", "grammatical", 3, error=True),  # the laboratory's alone
    )
}
RUN = Column("run", "run", text=True)
# Over seeds each of these has an error, so their headings do not say it.
MEASURES = [
    replace(COLUMNS[key], heading=COLUMNS[key].heading.replace(" ± s.e.", ""), error=True)
    for key in ("accuracy", "oracle_reward", "kl", "chosen_logps_drift", "sample_length", "sample_grammatical")
]


def evaluation_columns(record: Record) -> dict[str, Value]:
    """The results of prefopt.harness and prefopt.alpaca for a run's final policy: percentages and standard errors. A
    column's name says the tasks, or the judge and the baseline, so that no two kinds share a column."""
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
            name = f"{figure} ({what})"
            if name in columns:  # the same with other settings: the folder's name ends with their digest
                name += f" {Path(result['file']).parent.name.rpartition('-')[2]}"
            if value in figures:
                columns[name] = figures[value], figures[error]
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
    initial = set()
    for record in records:
        key = record["initial_weights"], record["config"]["dataset"]["name"], record["config"]["seed"]
        if key not in initial and record["evaluations"]:
            initial.add(key)
            row = _row(record["evaluations"][0], record["evaluations"][0])
            name = f"initial policy ({record['config']['model']['name']})"
            # Before training, accuracy is a matter of the objective's scores alone: a tie, or the reference's opinion.
            rows.append(row | {"run": "", "objective": name, "beta": None, "accuracy": None})

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
    """`table_rows` as people read them, with where they came from; the run comes last. A column for which no run has a
    figure is left out, and an initial policy of which nothing was measured."""
    evaluations = [Column(name, f"{name}, %", 1, error=True) for name in evaluation_names(records)]
    columns = [*COLUMNS.values(), *evaluations, RUN]
    runs = [row for row in rows if row["run"]]
    columns = [c for c in columns if c.key == "objective" or any(c.format(row) != MISSING for row in runs)]
    texts = [cells for cells in format_rows(columns, rows) if any(cell != MISSING for cell in cells[1:])]
    return Tabular("table", columns, texts, rows, provenance(records, command(config)))


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
    # With `columns`, the published figures stand in that table, beside ours of the same kind.
    published = {} if config.columns else read_published(config)
    theirs = list(next(iter(published.values()))) if published else []
    columns = [
        Column("method", "method", text=True),
        Column("n", "seeds"),
        *(measure for measure in MEASURES if measure.key in rows[0]),
        *(Column(f"paper_{name}", paper_heading(name)) for name in theirs),
    ]
    papers = [figures_of_method(published, row["method"]) for row in rows]
    beside = [row | {f"paper_{k}": v for k, v in paper.items()} for row, paper in zip(rows, papers, strict=True)]
    note = (
        "Means at the end of the runs ± their standard error over training seeds. All seeds are evaluated on the same "
        "held-out prompts, whose choice is a further error that these do not show."
    )
    if published:
        note += f" The paper's figures ({config.published}) are other metrics of another model."
    notes = [note, *provenance(records, command(config))]
    return Tabular("over_seeds", columns, format_rows(columns, beside), rows, notes)


def by_column(records: list[Record], key: str) -> list[dict[str, Any]]:
    """The final oracle reward of each method for each value of `key`, over the runs that differ in nothing but their
    seed: a row for each pair of the two that occurs.

    A row has method; `key`, the value as text; mean; se, its standard error over seeds (None for one alone); n, their
    number; over_prompts, the median of the runs' standard errors over the held-out prompts.

    Raises UserError where runs lack the key or an oracle.
    """
    finals = []
    for record, method in zip(records, labels(records, without=("seed", "dataset.name", key)), strict=True):
        config, last = flat_config(record), (record["evaluations"] or [{}])[-1]
        if key not in config or "oracle_reward" not in last:
            raise UserError(f"run {record['name']} has no {key}, or was not evaluated by an oracle: it fits no column.")
        finals.append((method, str(config[key]), last["oracle_reward"], last["oracle_reward_se"]))

    frame = pd.DataFrame(finals, columns=["method", "value", "reward", "error"])
    rows = []
    for (method, value), seeds in frame.groupby(["method", "value"], sort=False):
        mean, error = mean_over_seeds(seeds["reward"]) or (None, None)
        row = {"method": method, key: value, "mean": mean, "se": error, "n": len(seeds)}
        rows.append(row | {"over_prompts": statistics.median(seeds["error"])})
    return rows


def by_column_table(records: list[Record], config: ReportConfig) -> Tabular:
    """`by_column`, a row per method and a column per value of `config.columns`.

    `config.published`: a CSV whose column `method` names the method, and whose others are shown beside ours.
    """
    assert config.columns
    key = config.columns
    rows = by_column(records, key)
    published = read_published(config)
    theirs = list(next(iter(published.values()))) if published else []
    methods, values = (list(dict.fromkeys(row[column] for row in rows)) for column in ("method", key))
    if all(any(column.startswith(value) for column in theirs) for value in values):  # in the paper's order
        values.sort(key=lambda value: next(i for i, column in enumerate(theirs) if column.startswith(value)))
    rows.sort(key=lambda row: (methods.index(row["method"]), values.index(row[key])))

    cells = {(row["method"], row[key]): f"{format_value(row['mean'], row['se'], 3)} (n {row['n']})" for row in rows}
    texts = []
    for method in methods:
        paper = figures_of_method(published, method)
        ours = [cells.get((method, value), MISSING) for value in values]
        texts.append([method, *ours, *(paper.get(name, MISSING) for name in theirs)])
    columns = [
        Column("method", "method", text=True),
        *(Column(value, value) for value in values),
        *(Column(f"paper_{name}", paper_heading(name)) for name in theirs),
    ]

    first = records[0]["evaluations"][0]
    over_prompts = statistics.median(row["over_prompts"] for row in rows)
    note = (
        f"Final oracle reward, mean over n seeds ± its standard error over seeds. A run's own standard error over its "
        f"{first['samples']} held-out prompts, which are the same for all, is {over_prompts:.3f} (median). The initial "
        f"policy has {format_value(first['oracle_reward'], first['oracle_reward_se'], 3)}."
    )
    if published:
        note += " The paper's figures are rewards of another oracle on another scale."
    return Tabular("by_column", columns, texts, rows, [note, *provenance(records, command(config))])


def command(config: ReportConfig) -> str:
    """The command that makes these tables, for the notes below them."""
    keys = ("runs_dir", "output", "columns", "published")
    arguments = [f"{key}={getattr(config, key)}" for key in keys if getattr(config, key) is not None]
    return f"python -m prefopt.report {' '.join(arguments)}"


def provenance(records: list[Record], command: str) -> list[str]:
    """Sentences that say what the methods do not share, and from what a table was made, where, by which command."""
    machines = {json.dumps(r["machine"]): r["machine"] for r in records}.values()
    places = "; ".join(
        f"{m['cores']} cores of {m['processor']} ({m['instructions']}), {m['memory_gib']:.0f} GiB"
        + (f", {', '.join(map(str, m['gpus']))}" if m["gpus"] else "")
        for m in machines
    )
    commits = {f"{r['git']['commit'][:10]}{' with changes' if r['git']['dirty'] else ''}" for r in records if r["git"]}
    versions = {f"torch {r['versions']['torch']}, transformers {r['versions']['transformers']}" for r in records}
    evaluated = records[0]["evaluations"][-1] if records[0]["evaluations"] else {}
    pairs, sampled = evaluated.get("n"), ""
    if "samples" in evaluated:
        sampled = f", oracle reward and KL over {evaluated['samples']} responses, one to each held-out prompt; "
        sampled += "s.e. over these"
    note = settings_note(records)
    return [
        *([note] if note else []),
        f"Made by `{command}` from {len(records)} runs ({sum(r['seconds'] for r in records) / 60:.1f} minutes; of a "
        "resumed run, its last sitting).",
        f"Machine: {places}; precision {', '.join(sorted({r['config']['precision'] for r in records}))}.",
        f"Commit: {', '.join(sorted(commits)) or 'not in a git checkout'}; {'; '.join(sorted(versions))}.",
        *([f"Accuracy over {pairs} held-out pairs{sampled}, with one training seed per run."] if pairs else []),
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
        "accuracy": last.get("accuracy"),
        **{key: last.get(key) for key in ("oracle_reward", "oracle_reward_se", "kl", "kl_se")},
        "chosen_logps_drift": last["chosen_logps"] - first["chosen_logps"] if "chosen_logps" in last else None,
        "sample_length": last.get("sample_length"),
        **{key: last.get(key) for key in ("sample_grammatical", "sample_grammatical_se") if key in last},
        "step": last.get("step"),
    }
    if last.get("calibration_error") is not None:  # a reward model
        row |= {"heldout_loss": last["loss"], "calibration_error": last["calibration_error"]}
    return row
