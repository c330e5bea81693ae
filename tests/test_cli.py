"""Bad input: a non-zero exit code, one clear message, no traceback, nothing written, no model loaded."""

import json
import subprocess

import pytest

from prefopt.data.sources import read_rows
from prefopt.posthoc.oracle import Vader
from tests.tiny import ROOT, records, run_program, tiny_overrides, write_pairs


def refused(process: subprocess.CompletedProcess[str], *parts: str) -> None:
    output = process.stdout + process.stderr
    assert process.returncode != 0, output
    assert "Traceback" not in output
    for part in parts:
        assert part in output, f"{part!r} not in:\n{output}"


CASES = {
    "group choice": (["objective=nonsense"], ["Could not find 'objective/nonsense'", "dpo", "mmpo", "simpo"]),
    "group choice of a sweep": (["-m", "objective=dpo,nonsense"], ["Could not find 'objective/nonsense'"]),
    "key": (["sead=1"], ["Could not override 'sead'"]),
    "key with plus": (["+sead=1"], ["unknown key sead. Did you mean seed?"]),
    "nested key with plus": (["+optimizer.lrr=1"], ["unknown key optimizer.lrr. Did you mean optimizer.lr?"]),
    "several at once": (["+a=1", "+model.b=2"], ["unknown key a.", "unknown key model.b."]),
    "objective's key": (["objective.gamma=1"], ["Could not override 'objective.gamma'"]),
    "objective's key with plus": (["+objective.gamma=1"], ["unknown key objective.gamma"]),
    "another objective's key": (["objective=simpo", "+objective.label_smoothing=0.1"], ["objective.label_smoothing"]),
    "a key of a relative": (["objective=ipo", "objective.label_smoothing=0.1"], ["Could not override 'objective.lab"]),
    "unused alpha": (["objective=f_dpo", "objective.alpha=0.5"], ["objective.alpha must be null unless divergence="]),
    "base": (["objective=mappo", "objective/base=nonsense"], ["Could not find 'objective/base/nonsense'", "simpo"]),
    "base of another kind": (["objective=mappo", "objective/base=sft"], ["Could not find 'objective/base/sft'", "dpo"]),
    "base by target": (
        ["objective=mappo", "objective.base._target_=prefopt.objectives.sft.SFT"],
        ["objective.base._target_", "derived from Pairwise"],
    ),
    "base's value": (["objective=mappo", "objective.base.beta=0"], ["objective.base.beta must be positive, got 0.0"]),
    "base of no wrapper": (["objective=dpo", "objective/base=dpo"], ["Could not override 'objective/base'"]),
    "alarm": (["squeeze_alarm=0"], ["squeeze_alarm must be positive, or null"]),
    "type": (["steps=many"], ["steps", "Integer"]),
    "float for int": (["steps=1.5"], ["steps", "Integer"]),
    "objective's type": (["objective.beta=strong"], ["objective.beta", "Float"]),
    "objective's value": (["objective.beta=-1"], ["objective.beta must be positive, got -1.0"]),
    "target": (["objective._target_=prefopt.objectives.nope.Nope"], ["objective._target_", "cannot import"]),
    "target of another kind": (["objective._target_=prefopt.optim.Cosine"], ["must be a dataclass derived from Obj"]),
    "zero steps": (["steps=0"], ["steps must be at least 1, is 0"]),
    "steps and epochs": (["epochs=2"], ["give steps or epochs, and null for the other one"]),
    "neither steps nor epochs": (["steps=null"], ["give steps or epochs"]),
    "several values at once": (["steps=0", "optimizer.lr=0"], ["steps must be at least 1", "optimizer.lr must be"]),
    "micro-batches": (
        ["objective=mmpo", "batch_size=4", "objective.micro_batch_size=3"],
        ["must be a multiple of objective.micro_batch_size=3"],
    ),
    "device": (["device=cuda:7"], ["device 'cuda:7' is not there", "auto, cpu"]),
    "precision": (["precision=float16"], ["precision must be auto, bfloat16 or float32"]),
    "layout": (["layout=dense"], ["layout must be packed or prefix_shared or padded, is 'dense'"]),
    "temperature": (["sampling.temperature=-1"], ["sampling.temperature must not be negative"]),
    "warm-up": (["schedule.warmup=1.5"], ["schedule.warmup must be a share"]),
    "missing value": (["dataset=jsonl", "dataset.name=x"], ["no value for dataset.train", "dataset.train=VALUE"]),
    "missing file": (["dataset=jsonl", "dataset.train=no.jsonl"], ["data file no.jsonl does not exist"]),
    "missing package": (["model.path=package://no_such_package/x.gguf"], ["no_such_package is not installed"]),
    "missing model": (["model=hub", "model.path=no/such-model"], ["can be loaded from model.path=no/such"]),
    "missing GGUF": (["model=hub", "model.path=nothing.gguf"], ["model file nothing.gguf does not exist"]),
    "launcher of one run": (["launcher=slurm"], ["a launcher is for a sweep: add -m"]),
    "dry run of one run": (["--dry-run"], ["--dry-run shows the jobs of a sweep: python -m prefopt.train -m"]),
    "two launchers": (["-m", "launcher=local,slurm"], ["the jobs of a sweep have one launcher"]),
    "Hydra's launcher": (["-m", "hydra/launcher=basic"], ["choose one by launcher=NAME"]),
    "launcher's key": (["-m", "+launcher.jobs=3", "seed=1,2"], ["unknown key launcher.jobs"]),
    "oracle without prompts": (["dataset.heldout=null"], ["dataset.heldout is null"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_command_lines(case, tmp_path):
    arguments, messages = CASES[case]
    refused(run_program(*arguments, f"runs_dir={tmp_path}/runs"), *messages)
    assert not list(tmp_path.glob("runs/*/record.json"))


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


@pytest.mark.parametrize(
    ("rows", "changes", "messages"),
    [
        ("", [], ["is empty"]),
        ('{"prompt": "Hi", "chosen": "x", "rejected": "y"}\n{"prompt": "Hi"}', [], ["bad.jsonl, row 2 has no field"]),
        ('{"prompt": "Hi", "chosen": "x", "rejected": "x"}', [], ["nothing is left", "identical: 1"]),
        ('{"prompt": "Hi", "chosen": " ", "rejected": "x"}', [], ["nothing is left", "empty_completion: 1"]),
        ('{"prompt": "Hi", "chosen": "y", "rejected": "x"}', ["max_prompt_tokens=3"], ["prompt_too_long 6"]),
    ],
)  # fmt: skip
def test_bad_data_files(rows, changes, messages, tiny_folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text(rows)
    base = tiny_overrides(tiny_folder / "model", tiny_folder, tmp_path / "runs")
    refused(run_program(*base, f"dataset.train={tmp_path / 'bad.jsonl'}", *changes), *messages)
    assert not list(tmp_path.glob("runs/*/record.json"))


def test_sample_refuses_rows_without_a_prompt(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"question": "Hi"}')
    arguments = [f"prompts={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    refused(run_program(*arguments, program="sample"), "prompts.jsonl, row 1 has no field 'prompt'")
    assert not (tmp_path / "out.jsonl").exists()


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
        assert row["rewards"] == row["rewards_01"] == [Vader()([], response) for response in row["responses"]]


def test_score_wants_a_scorer(tmp_path):
    process = run_program(f"input={tmp_path}/x.jsonl", f"output={tmp_path}/y.jsonl", program="score")
    assert process.returncode != 0
    assert "scorer" in process.stderr
    named = run_program(f"input={tmp_path}/x.jsonl", f"output={tmp_path}/y.jsonl", "scorer=vader", program="score")
    refused(named, "x.jsonl does not exist")


def test_report_without_runs_says_how_to_get_one(tmp_path):
    arguments = [f"runs_dir={tmp_path}", f"output={tmp_path / 'report'}"]
    refused(run_program(*arguments, program="report"), "no finished run in", "python -m prefopt.train")
    assert not (tmp_path / "report").exists()


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


@pytest.mark.parametrize("program", ["train", "sample", "score", "online", "report", "harness", "alpaca", "compare"])
def test_help_lists_the_choices(program):
    process = run_program("--help", program=program)
    assert process.returncode == 0
    if program == "train":
        assert "objective: beta_dpo, cal_dpo, cpo, dpo, f_dpo" in process.stdout


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda f: str(f.relative_to(ROOT / "conf"))
)
def test_every_yaml_opens_with_the_command_that_uses_it(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# python -m prefopt.") or file.stem == "common"
