"""What a CPU cannot show: layouts, log-probs, references, engines and memory on a GPU.

    make test-gpu                                              # on a machine with a GPU
    python -m pytest -m gpu tests/gpu                          # in an environment of your own
    PREFOPT_TEST_DEVICE=cpu python -m pytest -m gpu tests/gpu  # the tests themselves, where there is no GPU

It has not been run on a GPU yet.
"""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from prefopt.config.schema import PeftConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.tokenize import TokenizedPair
from prefopt.models import packed_attention
from prefopt.models.frozen import freeze
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.lora import add_adapter
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff, Resident, cached, rounding
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.dpo import DPO
from prefopt.training.engine import Engine
from prefopt.training.memory import TracedStep
from prefopt.training.state import TrainState
from prefopt.training.step import accumulate_gradients, train_step
from tests.gpu.measured import check
from tests.helpers.tiny import run_program, tiny_overrides
from tests.training.test_loop import make_train_state

DEVICE = os.environ.get("PREFOPT_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral, window 16": MistralConfig(**SIZES, sliding_window=16),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2, soft caps": Gemma2Config(**SIZES, sliding_window=16, query_pre_attn_scalar=64),
}
DPO_01 = DPO(0.1)
LORA = PeftConfig(["q_proj", "v_proj"], 8, 16, 0.0, False)


def model_of(config: object, device: str = DEVICE) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()  # type: ignore[no-any-return]


def state_of(
    model: PreTrainedModel, folder, precision: str, layout: str = "packed", objective=DPO_01, tokens: int = 300,
    logits: str = "tiled", reference: str = "resident",
) -> TrainState:  # fmt: skip
    """A run of `model`, whose weights have moved a little away from the reference's."""
    state = make_train_state(objective, folder, precision=precision, logits=logits, micro_batch_tokens=tokens)
    score = LogprobComputer(precision, logits == "tiled")
    if layout == "packed":
        enable_packed_attention(model)
    state.layout = LAYOUTS[layout]
    if reference == "adapter_off":
        freeze(model, precision)
        add_adapter(model, LORA, 0)
        state.reference = AdapterOff(model, score)
    elif reference == "cached":
        pairs = state.train_pairs
        state.reference = cached(model, f"{DEVICE}-{precision}", pairs, state.layout, tokens, score, None, False)  # type: ignore[arg-type]
    else:
        state.reference = Resident.copy_of(model, score)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    state.engine = Engine(model, state.config.optimizer)
    return state


def one_step(state: TrainState) -> dict[str, torch.Tensor]:
    """The policy's log-probs in the order of the pairs' ids, (2B,), and the whole gradient; float32 on the CPU."""
    micro_batches = state.micro_batches(state.train_pairs[:8])
    scored = accumulate_gradients(state, 0, micro_batches)
    ids = [pair.id for micro_batch in micro_batches for pair in micro_batch.pairs]
    order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
    sides = [
        torch.cat([getattr(inputs, f"policy_{side}_logps") for inputs, _ in scored]).detach().cpu()[order]
        for side in ("chosen", "rejected")
    ]
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in state.engine.parameters.values()])  # type: ignore[union-attr]
    state.engine.discard()
    return {"logps": torch.cat(sides), "gradient": gradient}


def compare(what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], precision: str) -> None:
    """Log-probs within what rounding explains (`rounding`; of these completions of at least 8 tokens), and gradients
    that point to the same side."""
    limit = rounding(precision, torch.tensor(8.0)).item()
    check(f"{what}, {precision}: log-probs, nats", (found["logps"] - expected["logps"]).abs().max().item(), limit)
    cosine = torch.cosine_similarity(found["gradient"].double(), expected["gradient"].double(), 0).item()
    check(f"{what}, {precision}: gradient, 1 - cosine", 1 - cosine, 1e-4 if precision == "float32" else 0.02)


@pytest.mark.parametrize("name", MODELS)
def test_layouts_and_precisions_agree_with_float32_in_padded_rows_on_the_cpu(name, tmp_path):
    expected = one_step(state_of(model_of(MODELS[name], "cpu"), tmp_path, "float32", "padded", logits="dense"))
    for precision in ("float32", "bfloat16"):
        for layout in LAYOUTS:
            if layout == "prefix_shared" and getattr(MODELS[name], "sliding_window", None):
                continue  # a run refuses it: a row with two completions has no one window
            found = one_step(state_of(model_of(MODELS[name]), tmp_path, precision, layout))
            compare(f"{name}, {layout}", found, expected, precision)


@pytest.mark.skipif(not ON_GPU, reason="the kernel for variable lengths is a GPU's")
@pytest.mark.parametrize("name", ["llama", "mistral, window 16"])
def test_packed_rows_take_the_kernel_for_variable_lengths(name, tmp_path, monkeypatch):
    calls = []
    original = packed_attention._varlen
    monkeypatch.setattr(packed_attention, "_varlen", lambda *args: calls.append(1) or original(*args))
    found = one_step(state_of(model_of(MODELS[name]), tmp_path, "bfloat16"))
    assert len(calls) > 0
    monkeypatch.setattr(packed_attention, "VARLEN_DEVICES", set())
    compare(
        f"{name}, varlen against segments",
        found,
        one_step(state_of(model_of(MODELS[name]), tmp_path, "bfloat16")),
        "bfloat16",
    )


@pytest.mark.parametrize("logits", ["tiled", "dense"])
@pytest.mark.parametrize("objective", [DPO(0.1), BetaDPO(0.1)], ids=["single pass", "two passes"])
def test_micro_batches_add_up(logits, objective, tmp_path):
    steps = [
        one_step(state_of(model_of(MODELS["llama"]), tmp_path, "float32", objective=objective, tokens=n, logits=logits))
        for n in (10_000, 150)
    ]
    compare(f"{logits}, {type(objective).__name__}: many micro-batches", steps[1], steps[0], "float32")


def test_references_agree(tmp_path, monkeypatch):
    """The log-probs of each form, at a policy that is the reference: the loss is log 2 whatever the form."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    for precision in ("float32", "bfloat16"):
        for form in ("resident", "cached", "adapter_off"):
            state = state_of(model_of(MODELS["llama"]), tmp_path, precision, reference=form)
            (micro_batch,) = state.micro_batches(state.train_pairs[:2])
            batch = micro_batch.batch.to(state.engine.device)
            found = state.reference.logps(micro_batch.pairs, batch).sums.cpu()  # type: ignore[union-attr]
            untouched = model_of(MODELS["llama"], "cpu")
            enable_packed_attention(untouched)
            with torch.no_grad():
                expected = LogprobComputer("float32")(untouched, micro_batch.batch).sums
            what = f"reference={form}, {precision}: log-probs, nats"
            check(what, (found - expected).abs().max().item(), rounding(precision, torch.tensor(8.0)).item())


@pytest.mark.skipif(not ON_GPU, reason="a CPU does not queue")
@pytest.mark.parametrize("objective", [DPO(0.1), BetaDPO(0.1)], ids=["single pass", "two passes"])
def test_the_host_does_not_wait_inside_a_step(objective, tmp_path):
    state = state_of(model_of(MODELS["llama"]), tmp_path, "bfloat16", objective=objective)
    one_step(state)  # kernels are loaded
    micro_batches = state.micro_batches(state.train_pairs[:8])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate_gradients(state, 0, micro_batches)
        state.engine.clip_gradients()
        state.engine.step(1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_repeats(tmp_path):
    """docs/reliability.md promises bits on a CPU alone; on a GPU this says how far two runs are apart."""
    ends = []
    for _ in range(2):
        state = state_of(model_of(MODELS["llama"]), tmp_path, "bfloat16")
        for step in range(1, 4):  # before step 0 a run checks that policy and reference agree
            metrics = train_step(state, step, state.step_micro_batches(step))
        ends.append(metrics["loss"])
    check("the same three steps twice, bfloat16: loss", abs(ends[0] - ends[1]), 1e-3 if ON_GPU else 0)


@pytest.mark.skipif(not ON_GPU, reason="benchmarks.memory measures the CPU")
@pytest.mark.parametrize("form", ["full", "lora", "full, checkpointing"])
def test_a_dry_run_knows_the_memory(form, tmp_path):
    """Of a model whose step takes gigabytes, so that what CUDA takes for itself is small beside it."""
    shape = SIZES | {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    values = LlamaConfig(**shape | {"num_attention_heads": 16, "num_key_value_heads": 4})
    draw = torch.Generator().manual_seed(0)
    pairs = [
        TokenizedPair(str(i), *(torch.randint(10, 30_000, (n,), generator=draw).tolist() for n in (400, 300, 300)))
        for i in range(8)
    ]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = model_of(values)
    reference = "adapter_off" if form == "lora" else "resident"
    state = state_of(model, tmp_path, "bfloat16", reference=reference)
    changes = {"device": DEVICE, "peft": LORA if form == "lora" else PeftConfig([], 0, 0, 0.0, False)}
    changes |= {"reference": reference, "gradient_checkpointing": "checkpointing" in form, "layout": "packed"}
    config = replace(state.config, **changes)
    if config.gradient_checkpointing:
        from prefopt.models.lora import checkpoint_activations

        checkpoint_activations(model)
    expected = TracedStep(config, DPO(0.1), values).memory(pairs).total
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        accumulate_gradients(state, step, state.collate([pairs, pairs]))
        state.engine.step(1e-5)
    measured = torch.cuda.max_memory_allocated() - before
    check(f"memory, {form}: |estimate / measured - 1|", abs(expected / measured - 1), 0.1)


def train(data: Path, runs: Path, *more: str) -> Path:
    """The folder of a run of the tiny model, in a process of its own."""
    own = ("device=", "precision=", "sampling.")
    common = [key for key in tiny_overrides(data / "model", data, runs) if not key.startswith(own)]
    process = run_program(*common, f"device={DEVICE}", *more, env={"TOKENIZERS_PARALLELISM": "false"})
    assert process.returncode == 0, process.stderr
    (folder,) = (file.parent for file in runs.glob("*/record.json"))
    return folder


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if row["split"] == "train"])


def test_a_run_samples_evaluates_and_leaves_a_policy_for_any_machine(tiny_folder, tmp_path):
    samples = ("sampling.prompts=4", "sampling.max_new_tokens=6")
    first, second = (train(tiny_folder, tmp_path / name, "precision=auto", *samples) for name in "ab")
    check("the same run twice: losses", (losses(first) - losses(second)).abs().max().item(), 1e-3 if ON_GPU else 0)
    weights = load_file(first / "policy" / "model.safetensors")
    policy = AutoModelForCausalLM.from_pretrained(first / "policy")
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in weights.items())
    assert len((first / "samples" / "step_0000004.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero2_in_one_process_is_the_plain_engine(tiny_folder, tmp_path):
    plain, zero2 = (
        losses(train(tiny_folder, tmp_path / name, "precision=float32", "sampling.prompts=0", f"engine={name}"))
        for name in ("single", "zero2")
    )
    check("engine=zero2 in one process: losses", (plain - zero2).abs().max().item(), 1e-3 if ON_GPU else 1e-5)
