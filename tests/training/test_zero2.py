"""ZeRO-2 on two processes, on one, and the plain engine: one run, and checkpoints that pass between them."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import ENVIRONMENT, ROOT, SAMPLED, records, run_program
from tests.training import test_online

pytest.importorskip("deepspeed")


def torchrun(n: int, *args: str, module: str = "prefopt.train", env: dict[str, str] | None = None):
    import subprocess

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m", module]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run([*start, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def result(runs: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics and final weights of the one run below `runs`."""
    (record,) = records(runs)
    assert record["status"] == "finished", record["error"]
    folder = runs / record["name"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "policy" / "model.safetensors")


TIMING = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    (rows, weights), (expected_rows, expected_weights) = found, expected
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        for key in row.keys() - TIMING - {"split"}:
            if "logps" in key or "logratio" in key or "quantile" in key or key == "kl":  # sums over tokens
                assert row[key] == pytest.approx(expected_row[key], abs=2e-4), (row["step"], key)
            else:
                assert row[key] == pytest.approx(expected_row[key], abs=2e-5, rel=1e-4), (row["step"], key)
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        assert torch.allclose(value, expected_weights[name], atol=tolerance, rtol=0), name


# 7 pairs a step in micro-batches of one to three: the shares are uneven, and so are their numbers of micro-batches.
COMMON = ["steps=10", "batch_size=7", "eval_every=5", "save_every=5", "optimizer.eps=1e-3", "optimizer.lr=2e-3"]
LORA = ["peft=lora_attention_mlp", "peft.r=4", "peft.dropout=0", "reference=adapter_off", "merge_adapter=true"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["objective=dpo", *SAMPLED, "sampling.batch_size=2"],
        pytest.param(
            ["objective=beta_dpo", "objective.nll_weight=0.1", "objective.nll_per=chosen_token", *LORA],
            marks=pytest.mark.long,
        ),
        pytest.param(["objective=kto"], marks=pytest.mark.long),
        pytest.param(
            ["objective=mmpo", "objective.auxiliary_weight=0.5", "objective.micro_batch_size=2", "batch_size=6"],
            marks=pytest.mark.long,
        ),
        ["objective=sft", "gradient_checkpointing=true", "engine.offload_optimizer=true"],
    ],
    ids=["full", "step-lora", "mismatched", "micro_batch", "token-offload"],
)
def test_two_processes_one_and_the_plain_engine_run_the_same(options, overrides, tmp_path):
    cache = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    plain = [o for o in options if "offload" not in o]
    process = run_program(*overrides(tmp_path / "plain"), *COMMON, *plain, env=cache)
    assert process.returncode == 0, process.stderr
    expected = result(tmp_path / "plain")
    for n in (1, 2):
        process = torchrun(n, *overrides(tmp_path / f"zero{n}"), *COMMON, "engine=zero2", *options, env=cache)
        assert process.returncode == 0, process.stderr
        assert process.stderr.count("finished; the policy is in") == 1
        assert_same(result(tmp_path / f"zero{n}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], pytest.param(LORA, marks=pytest.mark.long)], ids=["full", "lora"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_run_goes_on_with_another_number_of_processes(first, lora, overrides, tmp_path):
    """0 processes: the plain engine. It is asked to stop, in the second process alone, and saves."""
    cache = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    options = [*COMMON, *lora, "objective._target_=tests.helpers.faulty.Faulty", "+objective.fault=stop"]
    mended = cache | {"MENDED": "1"}

    def start(n: int, runs: str, env: dict[str, str]):
        arguments = [*overrides(tmp_path / runs), *options]
        return torchrun(n, *arguments, "engine=zero2", env=env) if n else run_program(*arguments, env=env)

    assert start(0, "whole", mended).returncode == 0
    process = start(first, "parts", cache)
    assert process.returncode != 0
    (record,) = records(tmp_path / "parts")
    assert record["status"] == "interrupted", process.stderr
    assert "saved after step" in record["error"]
    process = start(2 - first, "parts", mended)
    assert process.returncode == 0, process.stderr
    assert "going on from step" in process.stderr
    assert_same(result(tmp_path / "parts"), result(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_train_online_as_one(tmp_path):
    """Two stages; the first one's responses and rewards are those of one process bit for bit."""
    test_online.make_models(tmp_path)
    found = []
    for n in (1, 2):
        runs, cache = tmp_path / f"runs{n}", {"PREFOPT_CACHE": str(tmp_path / f"cache{n}")}
        arguments = test_online.command(tmp_path, runs, "stages=2", "optimizer.eps=1e-3")
        if n == 1:
            process = run_program(*arguments, program="online", env=cache)
        else:
            process = torchrun(n, *arguments, "engine=zero2", module="prefopt.online", env=cache)
        assert process.returncode == 0, process.stderr
        assert process.stderr.count("/policy\n") == 3  # of two stages and of the whole, said once each
        folder, told = test_online.record(runs)
        assert told["status"] == "finished"
        scored = [(folder / f"stage_{k}" / "scored.jsonl.gz").read_bytes() for k in (1, 2)]
        found.append((scored, told["evaluations"], load_file(folder / "policy" / "model.safetensors")))
    (scored, rows, weights), (expected_scored, expected_rows, expected_weights) = found
    assert scored[0] == expected_scored[0]
    one, two = ([json.loads(line) for line in gzip.decompress(of[1]).splitlines()] for of in (scored, expected_scored))
    assert [row["responses"] for row in one] == [row["responses"] for row in two]
    assert_same((rows, weights), (expected_rows, expected_weights))


@pytest.mark.slow
def test_two_processes_sample_and_score_into_the_files_of_one(tmp_path):
    test_online.make_models(tmp_path)
    hardware = ["device=cpu", "precision=float32"]
    sample = ["model=hub", f"model.path={tmp_path / 'model'}", f"prompts={tmp_path / 'prompts.jsonl'}", *hardware]
    sample += ["samples_per_prompt=2", "sampling.max_new_tokens=6", "sampling.batch_size=6"]
    score = ["scorer=reward_model", f"scorer.path={tmp_path / 'reward'}", f"input={tmp_path / 'samples1.jsonl'}"]
    for n in (1, 2):
        cache = {"PREFOPT_CACHE": str(tmp_path / f"cache{n}")}
        for program, arguments in (("sample", sample), ("score", [*score, *hardware])):
            arguments = [*arguments, f"output={tmp_path / f'{program}s{n}.jsonl'}"]
            process = (
                torchrun(n, *arguments, module=f"prefopt.{program}", env=cache)
                if n > 1
                else run_program(*arguments, program=program, env=cache)
            )
            assert process.returncode == 0, process.stderr
            assert process.stderr.count("wrote 13 ") == 1
    for program in ("sample", "score"):
        one, two = ((tmp_path / f"{program}s{n}.jsonl").read_bytes() for n in (1, 2))
        assert one == two
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.lock"))


@pytest.mark.slow
def test_a_process_that_raises_ends_the_job_and_is_heard(overrides, tmp_path):
    options = ["objective._target_=tests.helpers.faulty.Faulty", "+objective.fault=raise_in_second", "engine=zero2"]
    process = torchrun(2, *overrides(tmp_path / "runs"), *options, env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode != 0
    assert "the fault in the objective" in process.stderr
    (record,) = records(tmp_path / "runs")
    assert record["status"] == "failed"
    assert "the fault in the objective" in record["error"]
    assert record["data"]  # what the first process had written is still there


def test_several_processes_need_an_engine_for_them(overrides, tmp_path):
    process = run_program(*overrides(tmp_path / "runs"), env={"WORLD_SIZE": "2", "RANK": "0"})
    assert process.returncode == 2
    assert "add engine=fsdp" in process.stderr
    process = run_program("-m", *overrides(tmp_path / "runs"), "engine=zero2", env={"WORLD_SIZE": "2", "RANK": "0"})
    assert process.returncode == 2
    assert "a sweep is started once" in process.stderr
