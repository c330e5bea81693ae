"""Claims of papers, and what our runs say of them: an effect over seeds, its interval, and a verdict.

A claim is data: `claims_PAPER.yaml` beside the published figures. It names a metric and a contrast, a sum of weighted
terms. A term is a method's value for one training seed: the mean, or another reduction, of the metric over its runs of
that seed. The effect is the contrast's mean over the seeds that all terms have, so terms are paired by seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.reporting.config import PapersConfig
from prefopt.reporting.evaluated import accuracy_of, metric_of, read_evaluated, win_rate_of
from prefopt.reporting.labels import flat_config
from prefopt.reporting.tables import MISSING, Column, Tabular, format_interval, format_p, format_rows, format_value
from prefopt.tracking.archive import Record, last_step, read_records
from prefopt.utils.stats import detectable, holm, mean_interval

SUPPORTED, CONTRADICTED = "supported", "contradicted"
UNDECIDED, IDENTITY = "undecided at this power", "true by mathematics"
ALPHA = 0.05  # of all tests of a table together (Holm)
POWER = 0.8  # at which the smallest effect is said
EXPECTS = ("above", "below", "equal")
REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "range": lambda values: max(values) - min(values),
    "largest": max,
    "smallest": min,
}
Point = dict[str, float]  # what a policy measured, by metric


@dataclass(frozen=True)
class Term:
    """One method's part of a contrast.

    runs: dotted config keys (or `objective`, its name) and the value that its runs have, or a list of such values.
    over: how the values of one seed's runs become one: a key of REDUCTIONS.
    peak: a metric; of all the policies of the seed's runs the one where it is highest, in place of the final ones.
    metric: in place of the claim's.
    """

    runs: dict[str, Any] = field(default_factory=dict)
    times: float = 1.0
    over: str = "mean"
    peak: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how runs can answer it.

    says, where: the claim in our words, and its place in the paper.
    folder: of the runs, below that of a scale.
    metric: a key of a run's evaluations, `lm_accuracy` (harness) or `win_rate` (alpaca), both in percent.
    expects: the effect is above 0, below it, or equal: within ± `margin` of it.
    mathematics: the test that shows why the effect is 0 whatever the data. Then `margin` is for rounding.
    """

    says: str
    where: str
    folder: str
    metric: str
    contrast: list[Term]
    expects: str
    margin: float = 0.0
    mathematics: str = ""


@dataclass(frozen=True)
class Answer:
    """What the runs of one scale say: the contrast's value by seed, and every run's share in it."""

    claim: Claim
    paper: str
    scale: str
    effects: dict[int, float]
    shares: list[dict[str, Any]]


def read_claims(folder: str) -> dict[str, list[Claim]]:
    """The claims of each paper, by its name, from the files claims_*.yaml in `folder`. Raises UserError for a file that
    cannot be read as claims, naming the claim."""
    files = sorted(Path(folder).glob("claims_*.yaml"))
    if not files:
        raise UserError(f"published={folder}: there is no claims_*.yaml in it")
    papers: dict[str, list[Claim]] = {}
    for file in files:
        where = str(file)
        try:
            content = yaml.safe_load(file.read_text())
            papers[content["paper"]] = claims = []
            for number, node in enumerate(content["claims"], start=1):
                where = f"{file}, claim {number}"
                claims.append(_claim(node))
        except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
    return papers


def _claim(node: Mapping[str, Any]) -> Claim:
    claim = Claim(**{**node, "contrast": [Term(**term) for term in node["contrast"]]})
    if claim.expects not in EXPECTS:
        raise ValueError(f"expects must be {', '.join(EXPECTS)}, is {claim.expects!r}")
    if claim.expects == "equal" and not claim.margin > 0:
        raise ValueError("what is expected to be equal needs a margin above 0")
    if claim.mathematics and claim.expects != "equal":
        raise ValueError("what is true by mathematics is expected to be equal, within a margin for rounding")
    for term in claim.contrast:
        if term.over not in REDUCTIONS:
            raise ValueError(f"over must be {', '.join(REDUCTIONS)}, is {term.over!r}")
    return claim


def answers(papers: Mapping[str, Sequence[Claim]], scales: Mapping[str, str | None]) -> list[Answer]:
    """Every claim at every scale for which its folder holds finished runs; a claim without any comes once, with none.

    `scales`: by name, the folder in which the claims' folders are. A claim's folder holds runs, or records.jsonl.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    points: dict[str, dict[int, Point]] = {}
    result = []
    for paper, claims in papers.items():
        for claim in claims:
            own = []
            for scale, root in scales.items():
                key = scale, claim.folder
                if key not in found:
                    found[key] = _records(Path(root) / claim.folder) if root else []
                    points |= _points(found[key])
                if found[key]:
                    effects, shares = contrast(claim, found[key], points)
                    own.append(Answer(claim, paper, scale, effects, shares))
            result += [answer for answer in own if answer.effects] or [Answer(claim, paper, MISSING, {}, [])]
    return result


def _records(folder: Path) -> list[Record]:
    archive = folder / "records.jsonl"
    if archive.is_file():
        return read_records(archive)
    return read_records(folder) if any(folder.glob("*/record.json")) else []


def _points(records: Sequence[Record]) -> dict[str, dict[int, Point]]:
    """By run and step, what every evaluation of its policies measured."""
    points: dict[str, dict[int, Point]] = {}
    for record in records:
        for row in record["evaluations"]:
            numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
            points.setdefault(record["name"], {})[row["step"]] = numbers
    evaluated = read_evaluated(records, PapersConfig(paper="", output="", published=""))
    metric = metric_of(evaluated)
    for policy in evaluated:
        point = points.setdefault(policy.run["name"], {}).setdefault(policy.step, {})
        for key, value in (("lm_accuracy", accuracy_of(policy)), ("win_rate", win_rate_of(policy, metric))):
            if value is not None:
                point[key] = value[0]
    return points


def contrast(
    claim: Claim, records: Sequence[Record], points: Mapping[str, Mapping[int, Point]]
) -> tuple[dict[int, float], list[dict[str, Any]]]:
    """The contrast by seed, for the seeds in which every term has a value; and a row for each run that has a part in
    it."""
    values: list[dict[int, float]] = []
    shares = []
    for number, term in enumerate(claim.contrast, start=1):
        by_seed: dict[int, list[float]] = {}
        for seed, run, step, value in _values(term, claim, records, points):
            by_seed.setdefault(seed, []).append(value)
            shares.append({"term": number, "times": term.times, "seed": seed, "run": run, "step": step, "value": value})
        values.append({seed: REDUCTIONS[term.over](parts) for seed, parts in by_seed.items()})
    seeds = sorted(set.intersection(*(set(part) for part in values)))
    weights = [term.times for term in claim.contrast]
    effects = {seed: math.fsum(w * part[seed] for w, part in zip(weights, values, strict=True)) for seed in seeds}
    return effects, [share for share in shares if share["seed"] in effects]


def _values(
    term: Term, claim: Claim, records: Sequence[Record], points: Mapping[str, Mapping[int, Point]]
) -> Iterator[tuple[int, str, int, float]]:
    """(seed, run, step, value) of the policies that count for a term: the final one of each run, or the peak's."""
    metric = term.metric or claim.metric
    candidates: dict[int, list[tuple[float, str, int, float]]] = {}
    for record in records:
        if not _matches(record, term.runs):
            continue
        name, seed = record["name"], record["config"]["seed"]
        if term.peak is None:
            final = points[name].get(last_step(record), {})
            if metric in final:
                yield seed, name, last_step(record), final[metric]
            continue
        for step, point in points[name].items():
            if term.peak in point and metric in point:
                candidates.setdefault(seed, []).append((point[term.peak], name, step, point[metric]))
    for seed, policies in candidates.items():
        yield seed, *max(policies)[1:]


def _matches(record: Record, runs: Mapping[str, Any]) -> bool:
    flat = flat_config(record) | {"objective": record["objective"]}
    return all(flat.get(key) in (value if isinstance(value, list) else [value]) for key, value in runs.items())


def judge(found: Sequence[Answer]) -> list[dict[str, Any]]:
    """A row for each answer: effect, interval, p, verdict. The p of all answers are corrected together (Holm)."""
    rows = [_row(answer) for answer in found]
    tested = [row for row in rows if row["p_value"] is not None]
    for row, corrected in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    for row, answer in zip(rows, found, strict=True):
        row["verdict"] = _verdict(row, answer.claim)
    return rows


def _row(answer: Answer) -> dict[str, Any]:
    claim, effects = answer.claim, list(answer.effects.values())
    row: dict[str, Any] = {"paper": answer.paper, "claim": claim.says, "where": claim.where, "scale": answer.scale}
    row |= {"metric": claim.metric, "contrast": describe(claim), "n": len(effects)}
    row |= dict.fromkeys(("effect", "low", "high", "p_value", "p_holm", "detectable", "largest"))
    if effects:
        row["effect"] = math.fsum(effects) / len(effects)
        row["largest"] = max(map(abs, effects))
    if len(effects) > 1:
        _, row["low"], row["high"], p = mean_interval(effects)
        row["detectable"] = detectable(effects, ALPHA, POWER)
        if claim.expects == "equal":  # two one-sided tests
            p = max(
                mean_interval(effects, -claim.margin, "greater")[3], mean_interval(effects, claim.margin, "less")[3]
            )
        if not claim.mathematics:
            row["p_value"] = p
    return row


def _verdict(row: Mapping[str, Any], claim: Claim) -> str:
    if claim.mathematics:
        return IDENTITY if (row["largest"] or 0.0) <= claim.margin else CONTRADICTED
    if row["p_holm"] is None:  # no two seeds
        return MISSING
    significant = row["p_holm"] < ALPHA
    if claim.expects == "equal":
        outside = row["low"] > claim.margin or row["high"] < -claim.margin
        return SUPPORTED if significant else CONTRADICTED if outside else UNDECIDED
    if not significant:
        return UNDECIDED
    return SUPPORTED if (row["effect"] > 0) == (claim.expects == "above") else CONTRADICTED


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's figures as people read them, with so many digits that an interval has three that count."""
    effect, low, high, p, smallest = (
        math.nan if row[key] is None else row[key] for key in ("effect", "low", "high", "p_holm", "detectable")
    )
    width = abs(effect) if math.isnan(low) or low == high else high - low
    digits = min(6, max(0, 2 - math.floor(math.log10(width)))) if width > 0 else 3
    return {
        "effect": format_value(effect, None, digits, signed=True).replace("-", "−"),
        "interval": format_interval(low, high, digits),
        "p": format_p(p),
        "detectable": format_value(smallest, None, digits),
    }


def describe(claim: Claim) -> str:
    """The contrast in a line: "win_rate: mmpo − dpo"."""
    text = ""
    for term in claim.contrast:
        sign = "−" if term.times < 0 else "+"
        size = "" if abs(term.times) == 1 else f"{abs(term.times):g} × "
        names = "objective", "objective.base._target_", "dataset.name"  # said without their key
        keys = [_listed(v) if k in names else f"{k.rpartition('.')[2]}={_listed(v)}" for k, v in term.runs.items()]
        how = [] if term.over == "mean" else [f"{term.over} over its runs"]
        how += [f"at the highest {term.peak}"] if term.peak else []
        how += [term.metric] if term.metric else []
        what = " ".join(keys) + (f" ({', '.join(how)})" if how else "")
        text += f" {sign} {size}{what}" if text else f"{'−' if sign == '−' else ''}{size}{what}"
    return text


def _listed(value: Any) -> str:
    return "|".join(map(str, value)) if isinstance(value, list) else str(value)


def claims_table(found: Sequence[Answer], made_by: str) -> Tabular:
    """The claims with their verdicts, a row for each claim and scale."""
    rows = judge(found)
    columns = [
        Column("paper", "paper", text=True),
        Column("claim", "claim", text=True),
        Column("where", "where", text=True),
        Column("scale", "scale", text=True),
        Column("metric", "metric", text=True),
        Column("contrast", "contrast", text=True),
        Column("effect", "effect"),
        Column("interval", "95 % interval", text=True),
        Column("p", "p (Holm)", text=True),
        Column("n", "n"),
        Column("detectable", "smallest effect"),
        Column("verdict", "verdict", text=True),
    ]
    notes = [
        "The effect is the contrast's mean over n training seeds, each with all terms; the interval is Student's over "
        "these seeds. p is two-sided by Student's t, of an equality that of two one-sided tests, corrected for all "
        f"rows of the table together (Holm). A verdict needs p < {ALPHA:g}.",
        f"The smallest effect is one that a test of this n would have shown with a chance of {POWER:.0%} at the spread "
        "seen, without the correction.",
        "True by mathematics: equal whatever the data; a test shows it, and the runs agree within rounding.",
    ]
    texts = format_rows(columns, [row | _texts(row) for row in rows])
    return Tabular("claims", columns, texts, rows, notes, "The papers' claims", [f"Made by `{made_by}`."])


def shares_table(found: Sequence[Answer]) -> Tabular:
    """Which runs each effect came from: a row for each run's share in a claim."""
    columns = [
        Column("paper", "paper", text=True),
        Column("claim", "claim", text=True),
        Column("scale", "scale", text=True),
        Column("term", "term"),
        Column("times", "times"),
        Column("seed", "seed"),
        Column("run", "run", text=True),
        Column("step", "step"),
        Column("value", "value"),
    ]
    rows = [
        {"paper": answer.paper, "claim": answer.claim.says, "scale": answer.scale, **share}
        for answer in found
        for share in answer.shares
    ]
    return Tabular("claims_runs", columns, format_rows(columns, rows), rows, title="Which runs each effect came from")
