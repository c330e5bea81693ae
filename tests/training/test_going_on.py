"""Going on from a finished run: the run of that length from the start, where the learning rate allows it, and refused
where it is another run."""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.errors import UserError
from prefopt.tracking.metrics import PER_ITEM
from prefopt.training import going_on
from prefopt.training.checkpoint import complete_checkpoints, tidy_checkpoints
from prefopt.training.config import TrainConfig
from prefopt.training.setup import RunPlan, prepare_run
from tests.helpers.forks import At
from tests.helpers.forks import run as run_killed
from tests.helpers.tiny import ENVIRONMENT, ROOT, records, run_program
from tests.integration.test_runs import timeless

CONSTANT = ("schedule=constant", "dataset.oracle={_target_: prefopt.rewards.scorers.Vader}")
CONSTANT += ("sampling.prompts=4", "sampling.max_new_tokens=4")


@pytest.fixture(scope="module")
def short(overrides, tmp_path_factory) -> Path:
    """The folder of a finished run of 4 steps with a constant learning rate."""
    runs = tmp_path_factory.mktemp("short")
    process = run_program(*overrides(runs), *CONSTANT)
    assert process.returncode == 0, process.stderr
    return runs / records(runs)[0]["name"]


@pytest.fixture
def copied(short, tmp_path) -> Path:
    """`short` in a runs_dir of the test's own."""
    return Path(shutil.copytree(short, tmp_path / "runs" / short.name))


@pytest.fixture
def planned(overrides, tmp_path):
    """planned(*changes) -> what prefopt.train would do."""
    register(TrainConfig)

    def plan(*changes: str) -> RunPlan:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("train", [*overrides(tmp_path / "runs"), *CONSTANT, *changes]), TrainConfig)
        return prepare_run(config)

    return plan


def edit(folder: Path, **facts) -> None:
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | facts))


def unwrapped(said: str) -> str:
    """The messages of a program on one line."""
    return " ".join(line.partition(" INFO ")[2].strip() for line in said.splitlines())


def steps_of(folder: Path, split: str) -> list[int]:
    return [row["step"] for row in timeless(folder / "metrics.jsonl") if row["split"] == split]


def test_a_longer_run_is_bit_for_bit_the_one_of_that_length(copied, overrides, tmp_path):
    """By epochs, of 12 pairs: 4 steps of 4 pairs are 1 1/3."""
    longer = (*CONSTANT, "steps=null", "epochs=2")
    process = run_program(*overrides(copied.parent), *longer)
    assert process.returncode == 0, process.stderr
    said = unwrapped(process.stderr)
    assert f"going on from {copied}, which has taken 4 of the 6 steps" in said
    assert "the learning rate was the same so far: this is the run that epochs=2 is from the start" in said
    assert "12 pairs, 2 epochs: 6 steps of 4, " in said
    assert "6 held out, evaluated before the first step and every 2" in said
    whole = run_program(*overrides(tmp_path / "whole"), *longer)
    assert whole.returncode == 0, whole.stderr

    (expected,) = records(tmp_path / "whole")
    (found,) = (record for record in records(copied.parent) if record["name"] == expected["name"])
    assert found["final_weights"] == expected["final_weights"]
    assert found["continued_from"] == {"run": copied.name, "step": 4, "same_as_from_the_start": True}
    assert expected["continued_from"] is None
    folders = [root / expected["name"] for root in (copied.parent, tmp_path / "whole")]
    assert steps_of(folders[0], "train") == [1, 2, 3, 4, 5, 6]
    metrics = [timeless(folder / "metrics.jsonl") for folder in folders]
    assert metrics[0] == metrics[1]
    assert found["evaluations"] == expected["evaluations"]
    for kind in PER_ITEM:
        items = [{file.name: file.read_text() for file in (folder / kind).iterdir()} for folder in folders]
        assert items[0] == items[1]
    for folder in (copied, *folders):  # each keeps its last checkpoint, whole
        (last,) = (folder / "checkpoints").iterdir()
        assert going_on.damage(last) is None
    again = run_program(*overrides(copied.parent), *longer)
    assert "finished, skipped" in again.stderr


def test_another_learning_rate_so_far_is_said(copied, planned):
    plan = planned("steps=8", f"resume={copied}", "schedule=cosine")
    assert plan.origin
    warmup = round(0.1 * 8)
    share = 0.5 * (1 + math.cos(math.pi * (4 - warmup) / (8 - warmup)))
    assert plan.origin.rates == (1e-3, pytest.approx(1e-3 * share))
    text = "\n".join(going_on.describe(plan.origin, plan.config))
    assert f"the learning rate falls from 0.001 to {1e-3 * share:.2g}, as cosine over steps=8 has it there" in text
    assert "this is not the run that steps=8 is from the start (for that one: resume=null)" in text
    assert plan.origin.facts["same_as_from_the_start"] is False
    # What has gone on from such a run is not the run from the start either.
    edit(copied, continued_from={"run": "x", "step": 2, "same_as_from_the_start": False})
    following = planned("steps=8")
    assert following.origin
    assert not following.origin.same_so_far


def test_the_longest_shorter_run_is_found_by_itself(copied, planned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("prefopt"), "propagate", True)
    assert planned("steps=3").origin is None
    for other in ("seed=1", "batch_size=3", "objective=ipo", "schedule=cosine", "optimizer.lr=2e-3", "resume=null"):
        assert planned("steps=6", other).origin is None, other
    for same in ("eval_every=3", "save_every=2", "micro_batch_tokens=64", "keep_checkpoint=false"):
        origin = planned("steps=6", same).origin
        assert origin is not None
        assert (origin.folder, origin.step, origin.steps) == (copied, 4, 6), same

    longer = shutil.copytree(copied, copied.with_name(f"{copied.name[:-8]}00000000"))
    edit(longer, config=json.loads((copied / "record.json").read_text())["config"] | {"steps": 5})
    (longer / "checkpoints" / "step_0000004").rename(longer / "checkpoints" / "step_0000005")
    meta = longer / "checkpoints" / "step_0000005" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"step": 5}))
    origin = planned("steps=6").origin
    assert origin is not None
    assert origin.folder == longer
    caplog.clear()
    tidy_checkpoints(longer / "checkpoints", keep=False)
    origin = planned("steps=6").origin
    assert origin is not None
    assert origin.folder == copied
    assert f"not going on from {longer}, which has taken 5 steps: {longer} has no checkpoint any more" in caplog.text


def changed_data(folder: Path) -> None:
    edit(folder, data_digests={"train": "0" * 64, "heldout": "0" * 64})


def ended_by_patience(folder: Path) -> None:
    config = json.loads((folder / "record.json").read_text())["config"]
    edit(folder, config=config | {"steps": 5})


@pytest.mark.parametrize(
    ("harm", "changes", "reason"),
    [
        (
            None,
            ["seed=1", "objective.beta=0.3"],
            "objective.beta: 0.1, here 0.3; seed: 0, here 1. Give its own settings",
        ),
        (None, ["dataset.heldout=null"], "trained on other data"),
        (changed_data, [], "trained on other data"),
        (lambda folder: edit(folder, status="interrupted"), [], "is interrupted: let its own command finish it first"),
        (lambda folder: edit(folder, model={"its weights": "0"}), [], r"another model .*\(changed: its weights\)"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), [], "no checkpoint any more; keep_checkpoint=true"),
        (ended_by_patience, [], "was ended by patience=None, after 4 of 5 steps"),
        (None, ["steps=4", "optimizer.lr=2e-3"], "has taken 4 steps, and this run takes 4"),
        (None, ["resume=nowhere"], "nowhere is no run's folder: it holds no record.json"),
    ],
)
def test_a_run_that_is_another_one_is_refused(copied, planned, harm, changes, reason):
    if harm:
        harm(copied)
    with pytest.raises(UserError, match=f"resume=.*{reason}"):
        planned("steps=6", f"resume={copied}", *changes)


def test_a_run_is_named_by_its_folder_or_its_name(copied, planned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("prefopt"), "propagate", True)
    for name in (copied, copied.name):
        origin = planned("steps=6", f"resume={name}", "optimizer.lr=5e-4").origin
        assert origin is not None
        assert not origin.same_so_far
    assert planned(f"resume={copied}").origin is None
    assert "is the run of this very command, which goes on without it" in caplog.text
    edit(copied, config=json.loads((copied / "record.json").read_text())["config"] | {"exports": 2})
    with pytest.raises(UserError, match="is past step 3, whose policy exports=2 asks for"):
        planned("steps=6", "exports=2", f"resume={copied}")


def test_a_run_that_is_there_is_not_begun_in_another_way(copied, planned):
    run = planned("steps=6").run
    run.folder.mkdir()
    edit_or_make = {"status": "interrupted", "continued_from": {"run": copied.name, "step": 4}}
    (run.folder / "record.json").write_text(json.dumps(edit_or_make))
    shutil.copytree(copied / "checkpoints", run.folder / "checkpoints")
    assert planned("steps=6").origin is None  # it goes on from its own checkpoint
    assert planned("steps=6", f"resume={copied}").origin is None
    with pytest.raises(UserError, match=f"was continued from {copied.name}: to train it from the start, move"):
        planned("steps=6", "resume=null")
    (run.folder / "record.json").write_text(json.dumps({"status": "interrupted"}))
    with pytest.raises(UserError, match="is there already, begun from the start: move the folder away"):
        planned("steps=6", f"resume={copied}")


def test_wherever_it_is_killed_while_it_takes_over_it_ends_the_same(copied, overrides, tmp_path):
    arguments = [*overrides(copied.parent), *CONSTANT, "steps=6"]
    moments = [
        At("prefopt.training.going_on:atomic_write"),  # recorded, and nothing is there yet
        At("prefopt.training.going_on:remove"),  # with the metrics
        At("prefopt.training.going_on:_link", 11),  # in the middle of the checkpoint: after 3 samples and 3 held-out
        At("prefopt.training.loop:resume"),  # all taken over
    ]
    for moment in moments:
        code, said = run_killed(tmp_path / "log", *arguments, env=ENVIRONMENT, at=moment)
        assert code == -9, said
    code, said = run_killed(tmp_path / "log", *arguments, env=ENVIRONMENT)
    assert code == 0, said
    assert "going on from step 4 of 6" in said
    (record,) = (r for r in records(copied.parent) if r["config"]["steps"] == 6)
    assert record["continued_from"]["run"] == copied.name
    assert steps_of(copied.parent / record["name"], "train") == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_not_taken_over(copied, overrides):
    file = copied / "checkpoints" / "step_0000004" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    process = run_program(*overrides(copied.parent), *CONSTANT, "steps=6")
    assert process.returncode == 2
    assert "step_0000004 is damaged: weights.safetensors" in process.stderr
    assert "train from the start by resume=null" in process.stderr


def test_without_hard_links_files_are_copied(copied, planned, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    plan = planned("steps=6")
    assert plan.origin
    plan.run.folder.mkdir()
    monkeypatch.setattr(os, "link", no_links)
    going_on.seed(plan.run, plan.origin)
    (checkpoint,) = complete_checkpoints(plan.run.checkpoints)
    assert going_on.damage(checkpoint) is None
    assert (checkpoint / "meta.json").stat().st_nlink == 1


@pytest.mark.slow  # processes of their own
def test_a_sweep_goes_on_job_by_job_and_its_jobs_keep_what_was_decided(copied, overrides):
    """Three lengths at once: each goes on from what was finished when the sweep was planned, whichever ends first."""
    process = run_program("-m", *overrides(copied.parent), *CONSTANT, "steps=4,5,6")
    assert process.returncode == 0, process.stderr
    assert f"from the end of {copied.name}" in process.stdout
    origins = {r["config"]["steps"]: (r.get("continued_from") or {}).get("step") for r in records(copied.parent)}
    assert origins == {4: None, 5: 4, 6: 4}
