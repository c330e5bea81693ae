"""What goes with which engine: runs of the program in two processes against one process of the plain engine."""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import Interrupted
from prefopt.models import load
from prefopt.models.safe_weights import load_pretrained
from prefopt.training.build import build_engine, build_policy
from prefopt.training.config import check, resolve
from prefopt.training.fsdp import parts_of
from prefopt.training.memory import PeakBytes
from prefopt.training.setup import build_components, prepare_run, run
from prefopt.utils import signals
from prefopt.utils.distributed import rank
from tests.helpers.tiny import SAMPLED, records, save_tiny, tiny_model, tiny_overrides, tiny_tokenizer, write_pairs
from tests.launch.test_estimate import config as composed
from tests.training.ranks_cases import in_processes

STEPS = [
    "steps=4",
    "batch_size=7",
    "eval_every=2",
    "save_every=2",
    "engine.hang_s=400",
    "optimizer.eps=1e-3",
    "optimizer.lr=2e-3",
]
LORA = ["peft=lora_attention_mlp", "peft.r=4", "peft.dropout=0.1", "merge_adapter=true"]
TIMING = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    os.environ["PREFOPT_CACHE"] = str(place / "cache")
    save_tiny(place / "model")
    write_pairs(place / "train.jsonl", 12)
    write_pairs(place / "heldout.jsonl", 6, start=100)
    return place


def train(n: int, folder: Path, runs: Path, options: list[str], stop: bool = False) -> None:
    """The run of `options` in `n` processes. `stop`: it is asked to stop in its first step."""
    arguments = [*tiny_overrides(folder / "model", folder, runs), *STEPS, *options]
    in_processes(n, functools.partial(_train, arguments, stop), runs.with_suffix(".meet"))


def _train(arguments: list[str], stop: bool) -> None:
    torch.set_num_threads(1)
    signals.install_handlers = lambda: None
    signals.stop_requested = lambda: stop
    config = composed(*arguments)
    check(config)
    resolve(config)
    with contextlib.suppress(Interrupted):
        run(prepare_run(config))


def result(runs: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    (record,) = records(runs)
    assert record["status"] == "finished", record["error"]
    place = runs / record["name"]
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(place / "policy" / "model.safetensors")


def assert_same(found, expected, tolerance: float = 2e-4) -> None:
    """`tolerance` is that of a metric. With bfloat16, too, sums are of float32, and the weights agree as closely. But
    one of them may lie where its last bit decides how it is rounded, which moves a log-prob by some 1e-3."""
    (rows, weights), (expected_rows, expected_weights) = found, expected
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        for key in row.keys() - TIMING - {"split", "reliability"}:
            assert row[key] == pytest.approx(expected_row[key], abs=tolerance, rel=1e-4), (row["step"], key)
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        assert torch.allclose(value, expected_weights[name], atol=1e-5, rtol=0), name


FEATURES = {
    "full": [],
    "samples": [*SAMPLED, "sampling.batch_size=2"],
    "step": ["objective=beta_dpo", "objective.nll_weight=0.1", "objective.nll_per=chosen_token"],
    "micro_batch": ["objective=mmpo", "objective.auxiliary_weight=0.5", "objective.micro_batch_size=2", "batch_size=6"],
    "mismatched": ["objective=kto"],
    "mismatched-off": ["objective=kto", "reference=adapter_off", *LORA],
    "resident": ["reference=resident"],
    "kl": ["objective=tdpo", "reference=resident"],
    "kl-off": ["objective=tdpo", "reference=adapter_off", *LORA],
    "values": ["objective=svpo"],
    "values-off": ["objective=svpo", "reference=adapter_off", *LORA],
    "checkpointing": ["gradient_checkpointing=true"],
    "padded": ["layout=padded", "logits=dense"],
    "prefix_shared": ["layout=prefix_shared"],
    "reward_model": ["objective=reward"],
    "sft": ["objective=sft", "patience=1", "optimizer.lr=0.02"],
    "exports": ["exports=2"],
    "lora": LORA,
    "lora-off": [*LORA, "reference=adapter_off", *SAMPLED, "gradient_checkpointing=true"],
    "lora-step": [*LORA, "reference=adapter_off", "objective=beta_dpo"],
    "lora-reward": [*LORA, "objective=reward"],
    "bf16": ["precision=bfloat16"],
    "bf16-lora": [*LORA, "precision=bfloat16", "reference=adapter_off"],
}


PLAIN: dict[str, Any] = {}  # what the plain engine has found, by feature


@pytest.fixture
def plain(folder, tmp_path_factory):
    """plain(feature) -> the result of the plain engine."""

    def found(feature: str):
        if feature not in PLAIN:
            runs = tmp_path_factory.mktemp(feature) / "runs"
            train(1, folder, runs, FEATURES[feature])
            PLAIN[feature] = result(runs)
        return PLAIN[feature]

    return found


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
@pytest.mark.parametrize("feature", FEATURES)
def test_two_processes_train_as_one(engine, feature, plain, folder, tmp_path):
    train(2, folder, tmp_path / "runs", [f"engine={engine}", *FEATURES[feature]])
    found, expected = result(tmp_path / "runs"), plain(feature)
    assert_same(found, expected, 2e-3 if feature.startswith("bf16") else 2e-4)


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}


def measure_load(arguments: list[str], folder: Path) -> None:
    """Write down the bytes that this process holds at most while its engine is made, what it keeps of them, how often
    it reads weights, and in the main process whether all shards together are the weights that it has read."""
    torch.set_num_threads(1)
    config = composed(*arguments)
    check(config)
    resolve(config)
    objective, *_ = build_components(config)
    read = []
    with pytest.MonkeyPatch.context() as patch, PeakBytes() as counted:
        patch.setattr(load, "load_pretrained", lambda *a, **k: (read.append(1), load_pretrained(*a, **k))[1])
        policy, digest = build_policy(config, objective, load.load_tokenizer(config.model))
        engine = build_engine(config, objective, policy)
    kept = sum(values.nbytes for values in engine.local().values())
    with engine.gathered() as whole:
        same = load.weights_digest(whole) == digest if rank() == 0 else None
    found = {"peak": counted.peak, "kept": kept, "read": len(read), "same": same}
    (folder / f"{rank()}.json").write_text(json.dumps(found))


def test_the_main_process_alone_reads_the_model_and_no_other_holds_it_whole(tmp_path):
    """A checkpoint in bfloat16 whose embeddings are tied, and fewer than the tokenizer's tokens."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer) - 9, **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl", 12)
    write_pairs(tmp_path / "heldout.jsonl", 6, start=100)
    arguments = tiny_overrides(tmp_path / "model", tmp_path, tmp_path / "runs")
    arguments += ["engine=fsdp", "model.resize_embeddings=true"]
    in_processes(4, functools.partial(measure_load, arguments, tmp_path), tmp_path / "meet")
    main, *others = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(4))
    assert (main["read"], main["same"]) == (1, True)
    parts = [4 * sum(p.numel() for p in own) for _, own, _ in parts_of(tiny_model(len(tokenizer), **WIDE), "float32")]
    for found in others:
        assert found["read"] == 0
        assert found["peak"] < 1.05 * (found["kept"] + max(parts)) < 0.5 * sum(parts)


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "engines", [("single", "fsdp"), ("fsdp", "single"), ("zero2", "fsdp"), ("fsdp", "zero2")], ids="-".join
)
def test_a_run_goes_on_with_another_engine(engines, lora, plain, folder, tmp_path):
    for engine, stop in zip(engines, (True, False), strict=True):
        options = [f"engine={engine}", *lora]
        train(1 if engine == "single" else 2, folder, tmp_path / "runs", options, stop)
    assert_same(result(tmp_path / "runs"), plain("lora" if lora else "full"))


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_bfloat16_with_float32_masters_has_the_loss_curve_of_float32(engine, folder, tmp_path):
    """Over 200 steps, from a loss of log 2 to one near 0."""
    long = ["steps=200", "eval_every=200", "save_every=200", "optimizer.lr=5e-4", "optimizer.eps=1e-8"]
    train(1, folder, tmp_path / "float32", long)
    train(2, folder, tmp_path / "bfloat16", [*long, f"engine={engine}", "precision=bfloat16"])
    expected, found = (
        torch.tensor([row["loss"] for row in result(tmp_path / name)[0] if row["split"] == "train"])
        for name in ("float32", "bfloat16")
    )
    assert len(expected) == 200
    assert expected[-20:].mean() < 0.2
    assert (found - expected).abs().max() < 0.05
