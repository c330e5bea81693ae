"""The programs from the command line, as processes of their own. What they refuse: test_bad_input.py."""

import json
import subprocess

import pytest

from prefopt.data.sources import read_rows
from prefopt.rewards.scorers import Vader
from tests.helpers.rewards import rewards_of
from tests.helpers.tiny import ROOT, records, run_program, write_pairs


def refused(process: subprocess.CompletedProcess[str], *parts: str) -> None:
    output = process.stdout + process.stderr
    assert process.returncode != 0, output
    assert "Traceback" not in output
    for part in parts:
        assert part in output, f"{part!r} not in:\n{output}"


def test_an_objective_that_needs_rewards_says_which_are_missing(tiny_folder, tmp_path):
    rows = [json.loads(line) for line in (tiny_folder / "train.jsonl").read_text().splitlines()]
    bare, high = tmp_path / "bare.jsonl", tmp_path / "high.jsonl"
    bare.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) + "\n" for row in rows))
    high.write_text("".join(json.dumps(row | {"chosen_reward": 8.5}) + "\n" for row in rows))
    overrides = [
        "model=hub",
        f"model.path={tiny_folder}/model",
        "dataset=jsonl",
        f"runs_dir={tmp_path}/runs",
        "objective=mappo",
    ]
    refused(
        run_program(*overrides, f"dataset.train={bare}", f"dataset.heldout={bare}"),
        "mappo_dpo needs the prior rewards of both completions, and 12 of 12 heldout items have none",
        "chosen_reward and rejected_reward",
    )
    refused(
        run_program(*overrides, f"dataset.train={high}", f"dataset.heldout={high}"),
        "needs rewards in [0, 1]",
        "of the heldout split has 8.5",
        "+dataset.columns.rewards=rewards_01",
    )


def test_sample_writes_what_the_data_format_reads(tiny_folder, tmp_path):
    prompts = write_pairs(tmp_path / "prompts.jsonl", 3, split="train")
    output = tmp_path / "out.jsonl.gz"
    arguments = ["model=hub", f"model.path={tiny_folder / 'model'}", f"prompts={prompts}", f"output={output}"]
    more = ["samples_per_prompt=4", "sampling.max_new_tokens=6"]
    process = run_program(*arguments, *more, program="sample")
    assert process.returncode == 0, process.stderr
    rows = [row for _, row in read_rows(str(output))]
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    for row in rows:
        assert len(row["responses"]) == len(row["finished"]) == 4
        assert row["split"] == "train"
    assert not list(tmp_path.glob("*.partial"))
    first = output.read_bytes()
    assert run_program(*arguments, *more, program="sample").returncode == 0
    assert output.read_bytes() == first
    scored = tmp_path / "scored.jsonl"
    process = run_program(f"input={output}", f"output={scored}", "scorer=vader", program="score")
    assert process.returncode == 0, process.stderr
    for _, row in read_rows(str(scored)):
        assert row["rewards"] == row["rewards_01"] == rewards_of(Vader(), *row["responses"])

    # Responses that a row has already come after the new ones, where that is asked for. Their rewards go.
    more = [f"output={tmp_path / 'more.jsonl'}", "samples_per_prompt=1", "sampling.max_new_tokens=6", "seed=1"]
    for keep in (False, True):
        again = [*arguments[:2], f"prompts={scored}", *more, f"keep_responses={keep}"]
        assert run_program(*again, program="sample").returncode == 0
        for earlier, (_, row) in zip(rows, read_rows(str(tmp_path / "more.jsonl")), strict=True):
            assert set(row) == set(earlier)
            assert row["responses"][1:] == (earlier["responses"] if keep else [])
            assert row["finished"][1:] == (earlier["finished"] if keep else [])
    process = run_program(*arguments[:2], f"prompts={prompts}", *more, "keep_responses=true", program="sample")
    assert process.returncode == 2
    assert "row 1, has no responses to keep" in process.stderr


def test_epochs_are_the_steps_that_they_take(overrides, tmp_path):
    """12 pairs, 5 a step: two epochs are five steps, of which the last goes a pair beyond."""
    found = []
    for name, length in (("epochs", ["steps=null", "epochs=2"]), ("steps", ["steps=5"])):
        process = run_program(*overrides(tmp_path / name), *length, "batch_size=5", "exports=3")
        assert process.returncode == 0, process.stderr
        (record,) = records(tmp_path / name)
        assert record["config"]["steps"] == 5
        folder = tmp_path / name / record["name"]
        assert sorted(f.name for f in (folder / "policies").iterdir()) == ["step_0000002", "step_0000003"]
        found.append(record["final_weights"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda f: str(f.relative_to(ROOT / "conf"))
)
def test_every_yaml_opens_with_the_command_that_uses_it(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# python -m prefopt.") or file.stem == "common"
