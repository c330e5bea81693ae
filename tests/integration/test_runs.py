"""Runs as a user starts them: whole processes of the tiny model, killed, repeated, and looked at."""

import json
import signal
import subprocess
import time
from dataclasses import asdict

import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import prefopt.tracking.run
from prefopt.data.collate import LAYOUTS
from prefopt.data.formats import Pairs
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import tokenize
from prefopt.models.logprobs import completion_rewards
from prefopt.tracking.provenance import git
from prefopt.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, command, records, run_program, save_tiny
from tests.training.test_loop import TIMING


def timeless(file) -> list[dict]:
    return [{k: v for k, v in json.loads(row).items() if k not in TIMING} for row in file.read_text().splitlines()]


def test_a_grid_trains_evaluates_and_leaves_records(grid):
    runs, process = grid
    assert process.returncode == 0, process.stderr
    found = records(runs)
    assert len(found) == 4
    assert "step 0: policy = reference (largest |log-ratio| 0), loss 0.693147 = 0.693147" in process.stderr
    for record in found:
        assert record["status"] == "finished"
        assert [e["step"] for e in record["evaluations"]] == [0, 2, 4]
        assert record["name"].startswith(f"{record['objective']}-model-train.jsonl-")
        assert record["data"]["train"] == {
            "items": 12,
            "kind": "pairs",
            "sources": {"train.jsonl": 12},
            "dropped": {},
            "kept": {},
        }
        assert record["initial_weights"] != record["final_weights"]
        assert len(record["data_digests"]["train"]) == 64
        assert record["versions"]["torch"] == torch.__version__
        assert record["machine"]["cores"] >= 1
        assert record["machine"]["threads"] >= 1
        first, last = record["evaluations"][0], record["evaluations"][-1]
        assert first["kl"] == pytest.approx(0, abs=1e-4)  # two copies of the same weights
        assert first["chosen_logratio"] == pytest.approx(0, abs=1e-4)
        assert last["samples"] == 6
        rows = timeless(runs / record["name"] / "metrics.jsonl")
        assert [(r["step"], r["split"]) for r in rows] == [
            (0, "heldout"), (1, "train"), (2, "train"), (2, "heldout"), (3, "train"), (4, "train"), (4, "heldout")
        ]  # fmt: skip
        samples = (runs / record["name"] / "samples" / "step_0000004.jsonl").read_text().splitlines()
        assert len(samples) == 6
        assert (runs / record["name"] / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert {"prompt", "response", "finished", "length", "reward", "logratio"} == set(json.loads(samples[0]))
    assert len({json.dumps(r["evaluations"][0]["oracle_reward"]) for r in found}) == 1


def test_the_exported_policy_loads_and_is_the_trained_one(grid, tiny_folder):
    runs, _ = grid
    folder = runs / records(runs)[0]["name"]
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32)
    assert not torch.equal(policy.get_input_embeddings().weight, start.get_input_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=False)
    assert policy(ids).logits.isfinite().all()
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step_0000004"]


def test_the_same_command_skips_what_is_finished(grid, overrides):
    runs, _ = grid
    before = {file: file.stat().st_mtime_ns for file in runs.glob("*/*") if "multirun" not in str(file)}
    again = run_program(*overrides(runs), *SAMPLED, "objective.beta=0.05")
    assert again.returncode == 0
    assert "finished, skipped" in again.stderr
    assert {f: f.stat().st_mtime_ns for f in runs.glob("*/*") if "multirun" not in str(f)} == before


# beta_dpo: two passes, and a state of its own
@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "beta_dpo"])
def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(objective, overrides, tmp_path):
    args = [f"objective={objective}", "steps=12", "eval_every=4", "save_every=3", "logger.csv=true"]
    whole = run_program(*overrides(tmp_path / "whole"), *args)
    assert whole.returncode == 0, whole.stderr
    runs = tmp_path / "killed"
    process = subprocess.Popen(command(*overrides(runs), *args), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(runs.glob("*/checkpoints/step_000000[369]")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert records(runs)[0]["status"] == "running"
    resumed = run_program(*overrides(runs), *args)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    (a,), (b,) = records(tmp_path / "whole"), records(runs)
    assert a["final_weights"] == b["final_weights"]
    weights = [load_file(root / a["name"] / "policy" / "model.safetensors") for root in (tmp_path / "whole", runs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    metrics = [timeless(root / a["name"] / "metrics.jsonl") for root in (tmp_path / "whole", runs)]
    assert metrics[0] == metrics[1]
    tables = [pandas.read_csv(root / a["name"] / "metrics.csv") for root in (tmp_path / "whole", runs)]
    pandas.testing.assert_frame_equal(*(table.drop(columns=list(TIMING)) for table in tables), check_exact=True)
    assert len(tables[0]) == len(metrics[0])
    assert a["evaluations"] == b["evaluations"]


def test_a_reward_model_trains_and_its_export_gives_the_same_scores(overrides, tiny_folder, tmp_path):
    process = run_program(*overrides(tmp_path), "objective=reward", "steps=8")
    assert process.returncode == 0, process.stderr
    assert "step 0: loss 0.693147 = 0.693147" in process.stderr
    (record,) = records(tmp_path)
    first, *_, last = record["evaluations"]
    assert first["tie_rate"] == 1
    assert last["accuracy"] == 1
    assert "kl" not in last
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / record["name"] / "policy", dtype=torch.float32
    )
    exported = AutoTokenizer.from_pretrained(tmp_path / record["name"] / "policy")
    # In the base pad is eos: by it transformers would read the wrong token.
    assert model.config.pad_token_id == exported.pad_token_id != exported.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    rows = [Pairs()(row) for _, row in read_rows(str(tiny_folder / "heldout.jsonl"))]
    pairs, *_ = tokenize(tokenizer, rows, 1800, 512)  # type: ignore[arg-type]
    for layout in ("padded", "prefix_shared"):
        ours = completion_rewards(model, LAYOUTS[layout].collate(pairs))
        theirs = [model(torch.tensor([p.prompt + c])).logits.item() for side in ("chosen", "rejected") for p in pairs
                  for c in [getattr(p, side)]]  # fmt: skip
        assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
    texts = [p.prompt + c for side in ("chosen", "rejected") for p in pairs for c in [getattr(p, side)]]
    assert len({len(text) for text in texts}) > 1
    for side in ("right", "left"):
        exported.padding_side = side
        together = model(**exported.pad({"input_ids": texts}, return_tensors="pt")).logits[:, 0]
        assert together.tolist() == pytest.approx(theirs, abs=1e-4), side
    margins = ours[: len(pairs)] - ours[len(pairs) :]
    assert last["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert last["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-4)


def test_a_reward_model_cannot_begin_from_another(overrides, tiny_folder, tmp_path):
    assert run_program(*overrides(tmp_path), "objective=reward").returncode == 0
    (record,) = records(tmp_path)
    again = run_program(*overrides(tmp_path), "objective=reward", f"model.path={tmp_path / record['name'] / 'policy'}")
    assert again.returncode == 2
    assert "already has one" in again.stderr


def test_the_identity_of_a_run(overrides, tmp_path, tiny_folder):
    """Where things are written and how they are shown is not part of it; numbers and data are."""
    from hydra import compose, initialize_config_dir

    from prefopt.config.parse import parse, register
    from prefopt.tracking.run import Run
    from prefopt.training.config import TrainConfig

    register(TrainConfig)

    def run_id(*changes: str, data: str = "d") -> str:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("train", [*overrides(tmp_path), *changes]), TrainConfig)
        return Run(asdict(config), "dpo", {"train": data}).id

    base = run_id()
    assert base == run_id("runs_dir=elsewhere") == run_id("logger=progress") == run_id("save_every=2")
    assert base == run_id("micro_batch_tokens=1") == run_id("gradient_checkpointing=true") == run_id("nonfinite=skip")
    others = [run_id("objective.beta=0.2"), run_id("seed=1"), run_id("batch_size=2"), run_id(data="e")]
    assert len({base, *others}) == 5


def test_other_weights_under_the_same_name_are_refused(overrides, tiny_folder, tmp_path):
    from tests.helpers.tiny import save_tiny

    model = save_tiny(tmp_path / "model")
    args = [*overrides(tmp_path / "runs"), f"model.path={model}", "steps=2"]
    assert run_program(*args).returncode == 0
    file = next((tmp_path / "runs").glob("*/record.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    (file.parent / "checkpoints" / "step_0000001").mkdir(parents=True)
    save_tiny(model, seed=5)
    process = run_program(*args)
    assert process.returncode == 2
    assert "was begun from another model than there is now (changed: its weights)" in process.stderr


def test_a_bad_job_keeps_the_grid_from_starting(overrides, tmp_path):
    process = run_program("-m", *overrides(tmp_path), "steps=1", "objective.beta=-1,0.1")
    assert process.returncode == 2
    assert "objective.beta=-1: objective.beta must be positive, got -1.0" in process.stderr
    assert records(tmp_path) == []


def test_a_run_that_breaks_records_why(overrides, tmp_path):
    process = run_program(*overrides(tmp_path), "optimizer.lr=1e30", "optimizer.max_grad_norm=0")
    assert process.returncode == 2
    assert "not finite; the step was refused" in process.stderr
    (record,) = records(tmp_path)
    assert record["status"] == "failed"
    assert "not finite" in record["error"]


def test_wandb_offline_gets_the_metrics(overrides, tmp_path):
    pytest.importorskip("wandb")
    process = run_program(*overrides(tmp_path), "logger=wandb", "logger.progress=false", "steps=1")
    assert process.returncode == 0, process.stderr
    (record,) = records(tmp_path)
    assert list((tmp_path / record["name"]).glob(f"wandb/offline-run-*-{record['id']}/*.wandb"))


def test_checkpoints_are_whole_or_not_there(tmp_path):
    tensors = {"weights": {"a": torch.ones(3)}, "moments": {"a/exp_avg": torch.zeros(3)}}
    save_checkpoint(tmp_path, 1, tensors, {})
    save_checkpoint(tmp_path, 2, tensors, {"note": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000001", "step_0000002"]
    (tmp_path / "step_0000003.tmp").mkdir()  # what a kill during a save leaves
    latest = latest_checkpoint(tmp_path)
    assert latest
    loaded, meta = load_checkpoint(latest)
    assert meta == {"step": 2, "note": 1}
    assert all(torch.equal(loaded[g][k], tensors[g][k]) for g in tensors for k in tensors[g])
    save_checkpoint(tmp_path, 3, tensors, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000002", "step_0000003"]


def test_a_run_without_patience_left_ends_with_its_best_weights(overrides, tiny_folder, tmp_path):
    """The held-out pairs are the training pairs, sides exchanged, so their loss rises from the first step on."""
    rows = [json.loads(line) for line in (tiny_folder / "train.jsonl").read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    changes = [f"dataset.heldout={tmp_path / 'swapped.jsonl'}", "dataset.policies.prompt_in_heldout=keep"]
    process = run_program(*overrides(tmp_path / "runs"), *changes, "patience=2", "eval_every=1")
    assert process.returncode == 0, process.stderr
    assert "patience: the held-out loss was lowest after step 0" in process.stderr
    (record,) = records(tmp_path / "runs")
    assert record["final_weights"] == record["initial_weights"]
    metrics = [
        json.loads(line) for line in (tmp_path / "runs" / record["name"] / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in metrics if row["split"] == "heldout"] == [0, 1, 2]  # of 4 steps
    assert [row["step"] for row in record["evaluations"]] == [0]
    without = run_program(
        *overrides(tmp_path / "runs"), "dataset.heldout=null", "dataset.heldout_share=0", "patience=2"
    )
    assert without.returncode == 2
    assert "patience watches the held-out loss, and no pairs are held out" in without.stderr


def test_another_model_as_reference(overrides, tiny_folder, tmp_path):
    """It is what log-ratios are to; cached and resident agree."""
    other = save_tiny(tmp_path / "other", seed=1)
    found = []
    for mode in ("cached", "resident"):
        runs = tmp_path / mode
        process = run_program(*overrides(runs), f"reference_model={other}", f"reference={mode}")
        assert process.returncode == 0, process.stderr
        (record,) = records(runs)
        found.append(record)
        assert abs(record["evaluations"][0]["chosen_logratio"]) > 0.01
    assert found[0]["evaluations"] == found[1]["evaluations"]
    assert found[0]["final_weights"] == found[1]["final_weights"]
    refused = run_program(*overrides(tmp_path), f"reference_model={other}", "objective=reward")
    assert refused.returncode == 2
    assert "has no reference_model: leave it out" in refused.stderr


def test_only_changes_of_the_code_are_changes(tmp_path, monkeypatch):
    package, results = tmp_path / "prefopt", tmp_path / "results"
    for folder in (package, results):
        folder.mkdir()
        (folder / "file").write_text("1")
    do = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org"]
    for what in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*do, *what], check=True)
    monkeypatch.setattr(prefopt.tracking.provenance, "PACKAGE", package)
    (results / "file").write_text("2")
    (tmp_path / "link").symlink_to(results)
    assert not git.__wrapped__()["dirty"]
    (package / "new.py").write_text("")
    assert git.__wrapped__()["dirty"]
