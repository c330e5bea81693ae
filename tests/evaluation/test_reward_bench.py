"""RewardBench: its arithmetic by hand, LLMBar's real rows, and the same numbers as a run's own held-out evaluation."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.evaluation.config import RewardBenchConfig, check_reward_bench
from prefopt.evaluation.reward_bench import check_subjects, scores_of, subjects
from prefopt.evaluation.reward_bench_figures import (
    ROWS,
    SECTIONS,
    SUBSETS_2,
    format_results,
    mean_figure,
    row_score,
    summarize,
    ties_score,
)
from prefopt.evaluation.reward_bench_rows import Item, read_items
from prefopt.objectives.dpo import DPO
from prefopt.objectives.mappo import MaPPO
from prefopt.objectives.sft import SFT
from prefopt.objectives.simpo import SimPO
from prefopt.objectives.tdpo import TDPO
from prefopt.objectives.tis_dpo import TISDPO
from prefopt.reporting.summary import evaluation_columns
from prefopt.rewards.reward_model import LogLikelihood, RewardModel, keep_end
from prefopt.rewards.rows import requests_of
from prefopt.tracking.archive import read_records, write_archive
from tests.helpers.tiny import ROOT, SHARED, run_program

ROW = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}


def item(kind: str, correct: int = 1, subset: str = "Focus", name: str = "1") -> Item:
    return Item(name, subset, kind, [], correct)


def test_an_equal_reward_is_wrong_in_a_pair_and_shared_in_the_best_of_several():
    assert [row_score(item("pair"), rewards) for rewards in ([2, 1], [1, 1], [0, 1])] == [1, 0, 0]
    several = [[3, 1, 2, 0], [3, 3, 2, 0], [3, 3, 3, 3], [2, 3, 3, 0]]
    assert [row_score(item("best_of"), rewards) for rewards in several] == [1, 1 / 2, 1 / 4, 0]


def test_the_score_of_ties_in_closed_forms():
    ref = ("ref:1", 1, [3.0, 0.0])  # gap 3
    assert ties_score([ref, ("tied:1", 2, [3.0, 3.0, 0.0])]) == pytest.approx(1.01)  # no spread: tanh of infinity
    assert ties_score([("ref:1", 1, [1.0, 1.0]), ("tied:1", 2, [1.0, 1.0, 1.0])]) == 0.0  # 0 / 0 counts 0
    # Gap 0.5 below the spread of 1: accurate, and no margin.
    assert ties_score([ref, ("tied:1", 2, [2.0, 1.0, 0.5])]) == pytest.approx(0.6 + 0.01 * math.tanh(-0.5))
    # Gap 2 above the spread of 1, but that of ref:1 is 0.5: one of the two margins.
    close = ("ref:1", 1, [1.0, 0.5])
    assert ties_score([close, ("tied:1", 2, [4.0, 3.0, 1.0])]) == pytest.approx(0.8 + 0.01 * math.tanh(-0.5))
    # A ref without its tied counts for the accuracy of refs alone, which is 1/2 here.
    lone = ("ref:2", 1, [0.0, 1.0])
    assert ties_score([ref, lone, ("tied:1", 2, [3.0, 3.0, 0.0])]) == pytest.approx(1.01 - 0.15)
    assert ties_score([ref]) is None


@given(st.lists(st.integers(-5, 5), min_size=6, max_size=6), st.integers(1, 8), st.integers(-9, 9))
def test_the_score_of_ties_knows_no_scale_and_no_offset(rewards, scale, offset):
    """So beta, which multiplies an implicit reward, changes no figure."""
    moved = [scale * r + offset for r in rewards]
    both = [ties_score([("ref:7", 1, r[:3]), ("tied:7", 2, r[3:])]) for r in (rewards, moved)]
    assert both[0] == pytest.approx(both[1])


def test_the_overall_of_reward_bench_2_is_the_plain_mean_of_six():
    """Skywork-Reward-V2-Qwen3-0.6B's subsets, which are published as 61.3."""
    values = dict(zip(SUBSETS_2, (58.2, 40.0, 71.6, 84.4, 79.4, 34.0), strict=True))
    overall = mean_figure([{"value": v / 100, "standard_error": None, "n": 1} for v in values.values()])
    assert round(100 * overall["value"], 1) == 61.3


def synthetic(accuracies: dict[str, float]) -> dict:
    """The figures of RewardBench with all its rows, of which these shares are right."""
    items, rewards = [], []
    for section in SECTIONS.values():
        for name, weight in section.items():
            if name in accuracies:
                n = ROWS.get(name, weight)
                right = round(accuracies[name] * n)
                items += [item("pair", subset=name)] * n
                rewards += [[1.0, 0.0]] * right + [[0.0, 1.0]] * (n - right)
    return summarize(items, rewards)


def test_sections_are_weighted_and_the_overall_is_their_plain_mean():
    names = [name for section in SECTIONS.values() for name in section]
    accuracies = {name: round(0.4 + 0.02 * i, 2) for i, name in enumerate(names)}
    figures = synthetic(accuracies)
    assert figures["benchmark"] == "RewardBench"
    assert sum(f["n"] for f in figures["subsets"].values()) == 2985
    for section, weights in SECTIONS.items():
        shares = {name: figures["subsets"][name]["value"] for name in weights}
        assert figures["sections"][section]["value"] == pytest.approx(
            sum(weights[name] * shares[name] for name in weights) / sum(weights.values())
        )
    # In Reasoning, math and code count the same, though math has fewer rows.
    code = [figures["subsets"][name]["value"] for name in SECTIONS["Reasoning"] if name != "math-prm"]
    assert figures["sections"]["Reasoning"]["value"] == pytest.approx(
        (figures["subsets"]["math-prm"]["value"] + sum(code) / 6) / 2
    )
    four = [figures["sections"][name]["value"] for name in SECTIONS]
    assert figures["overall"]["value"] == pytest.approx(sum(four) / 4)
    p = figures["subsets"]["hep-go"]
    assert p["standard_error"] == pytest.approx(math.sqrt(p["value"] * (1 - p["value"]) / 164))


def test_a_section_that_is_not_whole_says_so_in_its_name():
    figures = synthetic({name: 0.5 for name in SECTIONS["Chat Hard"] if name != "mt-bench-hard"})
    assert (list(figures["sections"]), figures["overall"]) == (["Chat Hard (5 of 6 subsets)"], None)
    figures = summarize([item("pair", subset="mt-bench-easy")], [[1.0, 0.0]])
    assert list(figures["sections"]) == ["Chat (1 of 5 subsets) (not all rows of mt-bench-easy)"]
    two = [item("pair", subset=name) for name in ("mt-bench-easy", "mt-bench-med")]
    figures = summarize(two, [[1.0, 0.0]] * 2)
    assert list(figures["sections"]) == ["Chat (2 of 5 subsets) (not all rows of 2 subsets)"]


def test_a_table_of_all_subsets_fits_into_80_characters():
    figures = synthetic({name: 0.5 for section in SECTIONS.values() for name in section})
    labels = [f"dpo-smollm2-135m-train.jsonl-{i:08x}/final" for i in range(4)]
    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(format_results([(label, {"figures": figures}) for label in labels]))
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.split("│")] for line in lines]
    for name in ("RewardBench", *SECTIONS, *figures["subsets"]):
        # Two tables, of three checkpoints and of one, and no name is folded.
        assert [len(row) for row in rows if row[1:2] == [name]] == [6, 4]
    assert lines[-1] == "… is dpo-smollm2-135m-train.jsonl"


@pytest.mark.shared
def test_the_sections_are_the_packages():
    told = json.loads((SHARED / "judged" / "reward_bench" / "sections.json").read_text())
    weights = {section: {name: told["example_counts"][name] for name in names}
               for section, names in told["sections"].items()}  # fmt: skip
    assert weights == SECTIONS


@pytest.mark.shared
def test_llmbar_is_five_subsets_of_chat_hard():
    items = read_items(str(SHARED / "preferences" / "llmbar.jsonl"), None)
    rows = [json.loads(line) for line in (SHARED / "preferences" / "llmbar.jsonl").read_text().split("\n")[:-1]]
    for found, row in zip(items, rows, strict=True):
        assert [r.response for r in found.requests] == [row[f"output_{n}"] for n in (row["label"], 3 - row["label"])]
        assert found.requests[0].prompt == [{"role": "user", "content": row["input"]}]
    figures = summarize(items, [[float(len(found.requests[0].response)), 30.0] for found in items])
    expected = {name: n for name, n in SECTIONS["Chat Hard"].items() if name != "mt-bench-hard"}
    assert {name: figure["n"] for name, figure in figures["subsets"].items()} == expected
    (name, figure), = figures["sections"].items()  # fmt: skip
    assert name == "Chat Hard (5 of 6 subsets)"
    assert figure["value"] == pytest.approx(sum(len(i.requests[0].response) > 30 for i in items) / 419)


def write(file: Path, *rows: dict) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_rows_of_reward_bench_2(tmp_path):
    several = {"id": "12", "subset": "Math", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4", "5"]}
    ties = [
        several | {"id": "ref:3", "subset": "Ties"},
        several | {"id": "tied:3", "subset": "Ties", "chosen": ["2", "two"], "rejected": ["3"]},
    ]
    items = read_items(write(tmp_path / "rows.jsonl", several, *ties), None)
    assert [(i.kind, i.num_correct, [r.response for r in i.requests]) for i in items] == [
        ("best_of", 1, ["2", "3", "4", "5"]), ("ties", 1, ["2", "3", "4", "5"]), ("ties", 2, ["2", "two", "3"])
    ]  # fmt: skip
    figures = summarize(items, [[1, 0, 0, 0], [3, 0, 0, 0], [3, 3, 0]])
    assert figures["benchmark"] == "RewardBench 2"
    assert figures["subsets"]["Math"]["value"] == 1.0
    assert figures["subsets"]["Ties"]["value"] == pytest.approx(1.01)
    assert figures["overall"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "tie:1", "subset": "Ties", "prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "must be ref:NUMBER"),
        ({"input": "p", "output_1": "a", "output_2": "b", "label": 3}, "label must be 1 or 2"),
        ({"prompt": "p", "chosen": "a"}, r"rows\.jsonl, row 1 has no field 'rejected'"),
        ({"subset": "x", "prompt": "p", "chosen": 3, "rejected": "b"}, "field 'chosen' must be text"),
    ],
)
def test_a_row_that_is_none_is_named(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_items(write(tmp_path / "rows.jsonl", row), None)


def test_what_is_cut_is_the_beginning():
    text = TokenizedPair("", [7, 1, 2, 3], [4, 5], [])
    cut = keep_end(text, 4, None)
    assert (cut.prompt, cut.chosen) == ([2, 3], [4, 5])
    cut = keep_end(text, 4, 7)  # the BOS stays
    assert (cut.prompt, cut.chosen) == ([7, 3], [4, 5])
    cut = keep_end(TokenizedPair("", [7], [1, 2, 3, 4], []), 3, None)  # the rest needs a token before it
    assert (cut.prompt, cut.chosen) == ([2], [3, 4])


def test_the_implicit_reward_is_the_score_that_the_run_has_trained():
    dpo, simpo = DPO(beta=0.1), SimPO(beta=2.0, gamma_beta_ratio=0.5)
    others = SFT(), TDPO(0.1), TISDPO(0.1)
    assert [scores_of(o) for o in (dpo, simpo, MaPPO(base=simpo), *others)] == [dpo, simpo, simpo, None, None, None]


@pytest.fixture(scope="module")
def runs(tiny_folder, overrides, tmp_path_factory) -> Path:
    """Finished runs of a reward model and two policies, each with a policy in the middle."""
    folder = tmp_path_factory.mktemp("reward_bench")
    for name in ("reward", "dpo", "simpo"):
        process = run_program(*overrides(folder), f"objective={name}", "exports=2")
        assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def evaluated(runs, tiny_folder):
    """The held-out pairs of the runs as rows: the process, and the results by run and checkpoint."""
    process = bench(runs, tiny_folder)
    assert process.returncode == 0, process.stderr
    return process, results(runs)


def bench(runs: Path, tiny_folder: Path, *changes: str, cwd: Path = ROOT):
    rows = f"rows={tiny_folder / 'heldout.jsonl'}"
    common = [f"run={runs}/*", rows, "checkpoints=all", "precision=float32", "device=cpu"]
    changed = {change.partition("=")[0] for change in changes}
    kept = [c for c in common if c.partition("=")[0] not in changed]
    return run_program(*changes[:1], *kept, *changes[1:], program="reward_bench", cwd=cwd)


def results(runs: Path) -> dict[tuple[str, str], tuple[dict, list[dict]]]:
    found = {}
    for file in runs.glob("*/reward_bench/*/record.json"):
        record = json.loads(file.read_text())
        rewards = [json.loads(line) for line in (file.parent / "rewards.jsonl").read_text().splitlines()]
        found[file.parts[-4].partition("-")[0], record["checkpoint"]] = record, rewards
    return found


def test_rewards_are_those_of_the_runs_own_evaluations(runs, evaluated):
    """The head's, DPO's and SimPO's margins of every held-out pair, in the middle and at the end."""
    _, found = evaluated
    assert len(found) == 6
    for (name, checkpoint), (record, rows) in found.items():
        (run,) = runs.glob(f"{name}-*")
        step = record["step"]
        assert (checkpoint, step) in (("final", 4), ("step_0000002", 2))
        (file,) = (run / "heldout").glob(f"*{step}*")
        margins = {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}
        assert len(rows) == len(margins) == 6
        differences = [row["rewards"][0] - row["rewards"][1] for row in rows]
        expected = sorted(row["margin"] for row in margins.values())
        assert sorted(differences) == pytest.approx(expected, abs=1e-4)
        evaluations = json.loads((run / "record.json").read_text())["evaluations"]
        (accuracy,) = (evaluation["accuracy"] for evaluation in evaluations if evaluation["step"] == step)
        assert record["figures"]["overall"]["value"] == pytest.approx(accuracy)
        initial = json.loads((run / "record.json").read_text())["config"]["model"]["path"]
        assert (
            record["reward"]
            == {
                "reward": {"kind": "head"},
                "dpo": {"kind": "score of dpo", "reference": initial},
                "simpo": {"kind": "score of simpo", "reference": None},
            }[name]
        )
        assert record["texts"] == {"n": 12, "cut_from_the_left": 0, "max_length": 512}  # the model's own limit


@pytest.mark.slow
def test_what_has_a_record_is_not_computed_again(runs, evaluated, tiny_folder, tmp_path):
    process, _ = evaluated
    files = {f: f.stat().st_mtime_ns for f in runs.glob("*/reward_bench/*/re*")}
    again = bench(runs, tiny_folder)
    assert (again.returncode, again.stdout) == (0, process.stdout), again.stderr
    assert {f: f.stat().st_mtime_ns for f in runs.glob("*/reward_bench/*/re*")} == files
    # A sweep's job does the same work. Shorter texts are another result, and what was cut is said.
    copy = shutil.copytree(next(runs.glob("dpo-*")), tmp_path / "dpo", ignore=shutil.ignore_patterns("reward_bench"))
    cut = "-m", f"run={copy}", "max_length=16", "checkpoints=final"
    swept = bench(runs, tiny_folder, *cut, cwd=tmp_path)  # where its jobs' folders are
    assert swept.returncode == 0, swept.stderr
    assert "final: 12 of 12 texts were cut from the left to 16 tokens" in swept.stdout
    (record,) = (json.loads(f.read_text()) for f in copy.glob("reward_bench/*/record.json"))
    assert (record["settings"]["max_length"], record["texts"]["cut_from_the_left"]) == (16, 12)


def test_the_report_has_a_column_and_an_archive_keeps_it(runs, evaluated, tmp_path):
    records = read_records(runs)
    names = {name for record in records for name in evaluation_columns(record)}
    (name,) = names
    assert name.startswith("accuracy (heldout.jsonl ")
    archive = tmp_path / "records.jsonl"
    write_archive(records, archive)
    assert [evaluation_columns(r) for r in read_records(archive)] == [evaluation_columns(r) for r in records]
    assert "harness" not in json.loads(archive.read_text().splitlines()[0])


def test_results_of_two_splits_of_one_file_have_a_column_each():
    figures = {"benchmark": None, "sections": {}, "subsets": {}}
    results = [
        {
            "checkpoint": "final",
            "file": f"runs/r/reward_bench/final-rows-{split}/record.json",
            "rows": "rows.jsonl",
            "settings": {"rows": "ab" * 32, "max_length": 16, "precision": "float32", "split": split},
            "figures": figures | {"overall": {"value": value, "standard_error": None, "n": 4}},
        }
        for split, value in (("train", 0.5), ("test", 0.75))
    ]
    record = {"harness": [], "alpaca": [], "mtbench": [], "arena": [], "reward_bench": results}
    name = "accuracy (rows.jsonl abababab, 16 tokens, float32)"
    assert evaluation_columns(record) == {name: (50.0, None), f"{name} test": (75.0, None)}


def test_a_scorer_in_place_of_a_run(runs, evaluated, tiny_folder, tmp_path):
    (policy,) = runs.glob("reward-*/policy")
    arguments = ["scorer=reward_model", f"scorer.path={policy}", f"output={tmp_path / 'out'}", "run=null"]
    process = bench(runs, tiny_folder, *arguments, "checkpoints=final")
    assert process.returncode == 0, process.stderr
    (file,) = (tmp_path / "out").glob("policy-heldout-*/record.json")
    _, found = evaluated
    assert json.loads(file.read_text())["figures"] == found["reward", "final"][0]["figures"]


def test_log_likelihoods_add_up_to_one(tiny_folder):
    """Of all one-token completions, as the terminator and every other token: by the cache too."""
    scorer = LogLikelihood(ModelConfig("tiny", str(tiny_folder / "model")))
    texts = [TokenizedPair("", [5, 6, 7], [token], []) for token in range(320)]
    logps = scorer.compute(texts, "cpu", "float32", show=False)
    assert math.fsum(map(math.exp, logps)) == pytest.approx(1.0, abs=1e-5)
    assert scorer.compute(texts, "cpu", "float32", show=False) == logps
    (reward,) = scorer.rewards(requests_of("row 1", ROW)[:1], "cpu", "float32", show=False)
    assert reward < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run=nowhere", "rows=rows.jsonl"], "run=nowhere is no run's folder"),
        (["rows=x"], "give either run=FOLDER, or a reward model"),
        (["run=x", "rows=x", "scorer=vader"], "give either run=FOLDER, or a reward model"),
        (["rows=x.jsonl", "scorer=vader", "output=o"], "scorer: Vader is no model"),
        (["rows=x.jsonl", "scorer=hub_reward_model", "scorer.path=no/model"], "give output=FOLDER"),
        (["run=x", "rows=x", "checkpoints=some"], "checkpoints must be final or all"),
        (["run=x", "rows=x", "max_length=1"], "max_length must be at least 2 tokens"),
        (
            ["run=x", "rows=allenai/reward-bench", "split=filtered"],
            r"prefetch 'also=\[allenai/reward-bench\]'; or give",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    register(RewardBenchConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("reward_bench", changes), RewardBenchConfig)

    def check() -> None:
        check_reward_bench(config)
        check_subjects(config)

    with pytest.raises(UserError, match=message):
        check()


def test_an_adapter_of_a_reward_run_is_refused(runs, tmp_path):
    (run,) = runs.glob("reward-*")
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("policy", "reward_bench"))
    (copy / "policy").mkdir()
    told = {"base_model_name_or_path": "base", "revision": None}
    (copy / "policy" / "adapter_config.json").write_text(json.dumps(told))
    config = RewardBenchConfig(run=str(copy), checkpoints="final")
    with pytest.raises(UserError, match="is an adapter, and a reward model is read whole"):
        subjects(config)
    assert RewardModel("x", "terminator").label == "x"
