"""Paired differences: two methods over the same held-out prompts, questions and seeds."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.evaluation.arena_figures import games_of, question_values
from prefopt.evaluation.benchmark_files import ARENA_HARD
from prefopt.evaluation.results import FIGURE_SETTINGS
from prefopt.reporting.config import ReportConfig
from prefopt.reporting.differences import sides_differ
from prefopt.reporting.labels import flat_config, labels
from prefopt.reporting.tables import Column, Tabular, format_interval, format_p, format_rows
from prefopt.tracking.archive import Record, last_step
from prefopt.tracking.metrics import item_file
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.stats import paired_difference
from prefopt.utils.store import read_sealed_lines

COLUMNS = (
    Column("measure", "measure", text=True),
    Column("a", "A", 3),
    Column("b", "B", 3),
    Column("difference", "A − B", 3, signed=True),
    Column("interval", "95 % interval", text=True),
    Column("p", "p", text=True),
    Column("n", "n"),
    Column("seeds", "seeds"),
)

# The settings of MT-Bench and Arena-Hard that two results share whose values compare.
JUDGED_SETTINGS = ("judge", "files", "baseline", "questions", "max_new_tokens")


def paired_table(records: Sequence[Record], config: ReportConfig) -> Tabular:
    """The differences of `config.compare`, a row for each measure that both have for the same items.

    Runs of a method are paired by seed, and their values by item (prompt, question); an item's difference is its mean
    over the seeds. Raises UserError where the two name no runs, the same ones, or runs of other data or without a
    common seed, and where their folders hold nothing per item.
    """
    if len(config.compare) != 2:
        raise UserError(f"compare={config.compare}: two methods or runs are compared: compare=[A,B]")
    a, b = (_runs_of(name, records) for name in config.compare)
    names = [sorted(r["name"] for r in side.values()) for side in (a, b)]
    if names[0] == names[1]:
        raise UserError(f"compare=[{','.join(config.compare)}]: both name the same runs: {', '.join(names[0])}")
    if not (seeds := sorted(a.keys() & b.keys())):
        raise UserError(f"compare: the two have no seed in common: {sorted(a)} and {sorted(b)}")
    for seed in seeds:
        for what in ("dataset.name", "dataset.heldout"):
            left, right = (flat_config(side[seed]).get(what) for side in (a, b))
            if left != right:
                raise UserError(
                    f"compare: {what} is {left} for {config.compare[0]} and {right} for {config.compare[1]}"
                )

    frames = [pd.concat({seed: pd.DataFrame(item_values(side[seed])) for seed in seeds}) for side in (a, b)]
    rows = []
    for measure in [m for m in frames[0] if m in frames[1]]:
        both = pd.concat([f[measure] for f in frames], axis=1, keys=["a", "b"], join="inner").dropna()
        if both.empty:
            continue
        items = both.groupby(level=1).mean()
        mean, low, high, p = paired_difference((items["a"] - items["b"]).to_numpy(dtype=float))
        row = {
            "measure": measure.partition("\0")[0],
            "a": items["a"].mean(),
            "b": items["b"].mean(),
            "difference": mean,
        }
        row |= {"low": low, "high": high, "interval": format_interval(low, high, 3), "p_value": p, "p": format_p(p)}
        rows.append(row | {"n": len(items), "seeds": both.index.get_level_values(0).nunique()})
    if not rows:
        folders = ", ".join(str(r.get("folder", r["name"])) for side in (a, b) for r in side.values())
        raise UserError(
            f"compare: {folders} hold no values per prompt that both have (heldout/, samples/, alpaca/, harness/, …). "
            "An archive has none: give the runs' own folders as runs_dir."
        )
    notes = [
        f"A: {config.compare[0]}. B: {config.compare[1]}.",
        "Means over n items (held-out pairs, prompts, questions), each a mean over the seeds that both have. The "
        "interval is a bootstrap of the items' differences, p that of a two-sided test by permutation (of the signs of "
        "the differences). Both tell of other items, not of other training seeds.",
        sides_differ([a[seed] for seed in seeds], [b[seed] for seed in seeds]),
    ]
    return Tabular("paired", COLUMNS, format_rows(COLUMNS, rows), rows, notes, "Paired differences")


def _runs_of(name: str, records: Sequence[Record]) -> dict[int, Record]:
    """The runs that `name` names, by seed: a run by its folder, name or id, or all runs of a method by its label or
    objective. Raises UserError for none, and where two have one seed."""
    methods = labels(list(records), without=("seed",))
    folder = Path(name).name
    ways = (
        [r for r in records if r["name"] == folder or r.get("id") == name or r["name"].endswith(f"-{name}")],
        [r for r, method in zip(records, methods, strict=True) if method == name],
        [r for r in records if r["objective"] == name],
    )
    found: list[Record] = next(filter(None, ways), [])
    if not found:
        raise UserError(f"compare: there is no run or method {name}. There are: {'; '.join(dict.fromkeys(methods))}")
    by_seed: dict[int, Record] = {}
    for record in found:
        if by_seed.setdefault(record["config"]["seed"], record) is not record:
            own = [m for r, m in zip(records, methods, strict=True) if r in found]
            raise UserError(
                f"compare: {name} names several runs of seed {record['config']['seed']}. Say which: "
                f"{'; '.join(dict.fromkeys(own))}"
            )
    return by_seed


def item_values(record: Record) -> dict[str, pd.Series]:
    """What a run's folder holds per item of its final policy, by measure: accuracy and margins of the held-out pairs,
    the samples' rewards, log-ratios to the reference and whether they ended, AlpacaEval's preferences, and the
    harness's tasks, MT-Bench's ratings and Arena-Hard's win rates. {} for a run of an archive."""
    if "folder" not in record:
        return {}
    folder = Path(record["folder"])
    measures = _pair_values(record, folder)
    samples = item_file(folder, "samples", last_step(record))
    if samples.is_file():
        frame = pd.DataFrame(_lines(samples))
        index = _keys(frame["prompt"])
        for key, measure in (
            ("reward", "oracle reward"), ("logratio", "KL to reference (nats)"), ("length", "length (tokens)"),
            ("finished", "answers that end"),
        ):  # fmt: skip
            if key in frame and frame[key].notna().all():
                measures[measure] = pd.Series(frame[key].astype(float).to_numpy(), index)

    for result in record["alpaca"]:
        if result["checkpoint"] == "final":
            rows, _ = read_sealed_lines(Path(result["file"]).with_name("annotations.json"))
            wins = [100.0 * (row["preference"] - 1.0) for row in rows]
            who = f"win rate ({result['judge']['name']}, against {result['baseline']['name']}), %"
            settings = {k: v for k, v in result["settings"].items() if k != "sampling"}
            who = _under(who, settings, result["judge"], result["settings"]["sampling"], result["baseline"]["weights"])
            measures[who] = pd.Series(wins, _keys(pd.Series([row["instruction"] for row in rows])))
    return measures | dict(_judged_values(record)) | dict(_task_values(record))


def _pair_values(record: Record, folder: Path) -> dict[str, pd.Series]:
    """Of each held-out pair whether the final policy's objective is right, its margin, which compares with those of the
    same objective alone, and how much more likely the chosen completion is."""
    file = item_file(folder, "heldout", last_step(record))
    if not file.is_file():
        return {}
    frame = pd.DataFrame(_lines(file))
    index = _keys(frame["id"])
    measures = {}
    if "margin" in frame:
        measures["held-out accuracy"] = pd.Series((frame["margin"] > 0).astype(float).to_numpy(), index)
        measures[_under("margin", record["config"]["objective"])] = pd.Series(frame["margin"].to_numpy(), index)
    if "chosen_logps" in frame and "rejected_logps" in frame:
        difference = frame["chosen_logps"] - frame["rejected_logps"]
        measures["log-prob, chosen less rejected (nats)"] = pd.Series(difference.to_numpy(), index)
    return measures


def _judged_values(record: Record) -> Iterator[tuple[str, pd.Series]]:
    """MT-Bench's mean rating of each question, and of each question of Arena-Hard its part of the win rate."""
    for kind in ("mtbench", "arena"):
        for result in record[kind]:
            if result["checkpoint"] != "final":
                continue
            rows, _ = read_sealed_lines(Path(result["file"]).with_name("judgments.jsonl"))
            settings = {k: v for k, v in result["settings"].items() if k in JUDGED_SETTINGS}
            name = _under(result["metric"] + (", %" if kind == "arena" else ""), settings)
            if kind == "mtbench":
                frame = pd.DataFrame(rows).query("score != -1")  # -1: a missing one
                values = frame.groupby("question_id")["score"].mean()
                yield name, pd.Series(values.to_numpy(dtype=float), [str(question) for question in values.index])
            else:
                both = {row["uid"]: tuple(game["score"] for game in row["games"]) for row in rows}
                drops_rows = ARENA_HARD[result["settings"]["version"]].drops_rows
                games = {uid: found for uid, verdicts in both.items() if (found := games_of([verdicts], drops_rows))}
                yield name, pd.Series(question_values([found[0] for found in games.values()]), list(games))


def _task_values(record: Record) -> Iterator[tuple[str, pd.Series]]:
    """`acc` per document of each task of the harness, of lm-eval's own files of the final policy."""
    for result in record["harness"]:
        files = Path(result["file"]).parent / "lm_eval" / result.get("lm_eval_files", "-")
        for file in sorted(files.glob("samples_*.jsonl")) if result["checkpoint"] == "final" else []:
            rows = _lines(file)
            if rows and all("acc" in row for row in rows):
                task = file.name.removeprefix("samples_").rpartition("_")[0]
                values = [100.0 * row["acc"] for row in rows]
                documents = [f"{row['doc_id']} {row.get('doc_hash')}" for row in rows]
                how = {key: result["settings"].get(key) for key in FIGURE_SETTINGS if key != "limit"}
                yield _under(f"acc of {task}, %", how), pd.Series(values, documents)


def _under(measure: str, *conditions: Any) -> str:
    """A measure's key: its name, and a digest of the conditions under which alone its values compare."""
    return f"{measure}\0{fingerprint(list(conditions))}"


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError, which names it, for one that is damaged."""
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Bring it back.") from None


def _keys(prompts: "pd.Series[Any]") -> list[str]:
    """A key for each prompt (a text, or the messages of a chat). One that comes again gets the number of its turn."""
    texts = prompts.map(lambda prompt: json.dumps(prompt, sort_keys=True))
    return [f"{text} {turn}" for text, turn in zip(texts, texts.groupby(texts).cumcount(), strict=True)]
