"""Claims: contrasts over seeds, corrected tests, verdicts."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from prefopt.errors import UserError
from prefopt.reporting.claims import CONTRADICTED, IDENTITY, SUPPORTED, UNDECIDED, answers, claims_table, read_claims
from prefopt.utils.stats import detectable, holm, mean_interval
from tests.helpers.tiny import ROOT, run_program
from tests.reporting.test_papers import harness, train

REWARDS = {"mmpo": [0.9, 0.8, 0.85, 0.95], "dpo": [0.5, 0.45, 0.6, 0.5]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods at four seeds, with given rewards."""
    folder = tmp_path / "lab" / "methods"
    for objective, rewards in REWARDS.items():
        for seed, reward in enumerate(rewards):
            run = train(folder, objective, 0.1, seed=seed)
            record = json.loads((run / "record.json").read_text())
            record["evaluations"][-1]["oracle_reward"] = reward
            (run / "record.json").write_text(json.dumps(record))
    return folder


def verdicts(tmp_path: Path, *claims: dict) -> list[dict]:
    common = {"says": "a", "where": "table 1", "folder": "methods", "metric": "oracle_reward"}
    content = {"paper": "P", "claims": [common | claim for claim in claims]}
    (tmp_path / "claims_p.yaml").write_text(yaml.safe_dump(content))
    found = answers(read_claims(str(tmp_path)), {"lab": str(tmp_path / "lab"), "paper": None})
    return claims_table(found, "command").rows


def difference(a: str, b: str) -> list[dict]:
    return [{"runs": {"objective": a}}, {"times": -1, "runs": {"objective": b}}]


def test_the_effect_is_the_paired_t_test_of_scipy(tmp_path, runs):
    (row,) = verdicts(tmp_path, {"contrast": difference("mmpo", "dpo"), "expects": "above"})
    ours, theirs = (np.array(REWARDS[name]) for name in ("mmpo", "dpo"))
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval()
    assert row["effect"] == pytest.approx((ours - theirs).mean())
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["p_value"] == row["p_holm"] == pytest.approx(expected.pvalue)
    assert (row["n"], row["scale"], row["verdict"]) == (4, "lab", SUPPORTED)


def test_verdicts(tmp_path, runs):
    above, below, apart, alike, far, none = verdicts(
        tmp_path,
        {"contrast": difference("mmpo", "dpo"), "expects": "above"},
        {"contrast": difference("mmpo", "dpo"), "expects": "below"},
        {"contrast": difference("mmpo", "dpo"), "expects": "equal", "margin": 0.01},
        {"contrast": difference("mmpo", "dpo"), "expects": "equal", "margin": 2.0},
        {"contrast": difference("mmpo", "dpo"), "expects": "equal", "margin": 0.35},
        {"contrast": difference("mmpo", "ipo"), "expects": "above"},
    )
    assert above["verdict"] == SUPPORTED
    assert below["verdict"] == CONTRADICTED
    assert apart["verdict"] == CONTRADICTED  # the whole interval is outside of the margin
    assert alike["verdict"] == SUPPORTED
    assert far["verdict"] == UNDECIDED
    assert (none["verdict"], none["n"], none["scale"]) == ("–", 0, "–")


def test_what_is_true_by_mathematics_is_held_against_the_runs(tmp_path, runs):
    node = {"expects": "equal", "mathematics": "tests/x.py"}
    same, other = verdicts(
        tmp_path,
        {"contrast": difference("mmpo", "mmpo"), "margin": 1e-9, **node},
        {"contrast": difference("mmpo", "dpo"), "margin": 1e-9, **node},
    )
    assert (same["verdict"], same["p_holm"]) == (IDENTITY, None)
    assert other["verdict"] == CONTRADICTED


def test_a_term_reduces_the_runs_of_a_seed(tmp_path, runs):
    for seed, reward in enumerate([0.7, 0.1, 0.85, 0.9]):  # dpo once more, at another beta
        run = train(runs, "dpo", 0.5, seed=seed)
        record = json.loads((run / "record.json").read_text())
        record["evaluations"][-1]["oracle_reward"] = reward
        (run / "record.json").write_text(json.dumps(record))
    spread, one, largest = verdicts(
        tmp_path,
        {"contrast": [{"runs": {"objective": "dpo"}, "over": "range"}], "expects": "above"},
        {"contrast": [{"runs": {"objective": "dpo", "objective.beta": 0.5}}], "expects": "above"},
        {"contrast": [{"runs": {"objective": "dpo"}, "over": "largest", "times": 2}], "expects": "above"},
    )
    assert spread["effect"] == pytest.approx(np.mean([0.2, 0.35, 0.25, 0.4]))
    assert one["effect"] == pytest.approx(np.mean([0.7, 0.1, 0.85, 0.9]))
    assert largest["effect"] == pytest.approx(2 * np.mean([0.7, 0.45, 0.85, 0.9]))


def test_the_peak_is_of_all_policies_of_a_seed(tmp_path):
    folder = tmp_path / "lab" / "methods"
    for seed in (0, 1):
        run = train(folder, "dpo", 0.1, seed=seed)
        harness(run, 10, 0.6 + seed / 10)
        harness(run, 20, 0.5)
    (row,) = verdicts(
        tmp_path, {"contrast": [{"peak": "lm_accuracy", "runs": {"objective": "dpo"}}], "expects": "above"}
    )
    assert row["effect"] == pytest.approx(np.mean([0.5 + 0.1 + seed / 10 for seed in (0, 1)]))  # the reward at step 10


def test_every_run_of_a_verdict_is_named(tmp_path, runs):
    from prefopt.reporting.claims import shares_table

    (tmp_path / "claims_p.yaml").write_text(
        yaml.safe_dump(
            {
                "paper": "P",
                "claims": [
                    {"says": "a", "where": "b", "folder": "methods", "metric": "oracle_reward", "expects": "above"}
                    | {"contrast": difference("mmpo", "dpo")}
                ],
            }
        )
    )
    found = answers(read_claims(str(tmp_path)), {"lab": str(tmp_path / "lab")})
    rows = list(csv.DictReader(shares_table(found).csv().splitlines()))
    assert {row["run"] for row in rows} == {folder.name for folder in runs.iterdir()}
    total = math.fsum(float(row["times"]) * float(row["value"]) for row in rows) / 4
    assert total == pytest.approx(claims_table(found, "").rows[0]["effect"])


def test_the_papers_claims_are_read_and_their_mathematics_has_its_test():
    papers = read_claims(str(ROOT / "results" / "published"))
    assert set(papers) == {"MMPO", "MaPPO", "MADPO"}
    named = {claim.mathematics for claims in papers.values() for claim in claims} - {""}
    there = (ROOT / "tests" / "objectives" / "test_objectives.py").read_text()
    assert named
    assert [name for name in named if f"def {name}(" not in there] == []


def test_the_committed_claims_are_what_the_committed_records_give(tmp_path):
    process = run_program(f"output={tmp_path}", program="claims", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    committed = ROOT / "results" / "lab"
    for name in ("claims.csv", "claims.md", "claims_runs.csv"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name
    verdicts = [row["verdict"] for row in csv.DictReader((committed / "claims.csv").open())]
    assert sum(verdict in (SUPPORTED, CONTRADICTED) for verdict in verdicts) >= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expects": "more"}, "expects must be above, below, equal"),
        ({"expects": "equal"}, "needs a margin"),
        ({"contrast": [{"over": "median"}], "expects": "above"}, "over must be mean"),
        ({"expects": "above", "mathematics": "x"}, "expected to be equal"),
        ({"expects": "above", "metrik": "x"}, "metrik"),
    ],
)
def test_a_bad_claim_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=f"claim 1: .*{message}"):
        verdicts(tmp_path, {"contrast": [{}]} | change)


def test_holm_and_the_smallest_effect():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
    # By simulation of the definition: a true mean of this size is found in about 80 % of samples.
    draws = np.random.default_rng(0).normal(size=(4000, 10))
    size = np.mean([detectable(row, 0.05, 0.8) for row in draws[:500]])
    found = stats.ttest_1samp(draws + size, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.05)


def test_values_without_spread_leave_no_doubt():
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0, 1.0, 0.0)
    assert mean_interval([0.0, 0.0])[3] == 1.0
