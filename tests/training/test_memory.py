"""The memory of a step, traced without values: closed forms, the step on real tensors, and what fits."""

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig, PeftConfig
from prefopt.data.tokenize import TokenizedPair
from prefopt.launch import fit as fit_module
from prefopt.launch.estimate import rows
from prefopt.launch.fit import USABLE, fit, same_memory, shape
from prefopt.models.chunked_logprobs import TILE
from prefopt.models.load import load_model, read_config
from prefopt.models.lora import train_mode
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.objectives.__main__ import objectives
from prefopt.objectives.base import Objective
from prefopt.objectives.dpo import DPO
from prefopt.objectives.grpo import GRPO
from prefopt.objectives.tdpo import TDPO
from prefopt.training import memory
from prefopt.training.memory import BUCKET, PeakBytes, TracedStep
from prefopt.training.step import accumulate_gradients
from tests.helpers.tiny import tiny_model
from tests.launch.test_estimate import config as composed

PAIRS = [TokenizedPair(str(i), [5] * 20, [6] * 30, [7] * 25, 0.9, 0.1, 1.0, [1.0] * 30, [0.5] * 25) for i in range(4)]
GROUPS = [dataclasses.replace(pair, others=[[8] * 40] * 3, other_rewards=[0.5] * 3) for pair in PAIRS]
LORA = {"peft": PeftConfig(["q_proj", "down_proj"], 4, 8, 0.1, False)}


@pytest.fixture(scope="module")
def base():
    """The config of a job on the CPU, composed once."""
    found = composed("precision=bfloat16", "device=cpu", "steps=10", "micro_batch_tokens=256", "batch_size=32")
    found.fill(DPO(0.1))
    return found


def values(layers: int = 2, **changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**sizes | {"vocab_size": 320, "num_hidden_layers": layers} | changes)


def test_a_tensor_counts_as_long_as_it_lives():
    with FakeTensorMode(), PeakBytes() as counted:
        a = torch.empty(1000)
        b = a + 1
        b.view(10, 100).add_(1)
        assert counted.now == counted.peak == 8000
        del b
        c = a * 2
        assert (counted.now, counted.peak) == (8000, 8000)
        d = c.double()
    assert (counted.now, counted.peak, len(d)) == (16_000, 16_000, 1000)


def test_weights_gradients_and_moments_are_arithmetic(base, tiny_folder):
    model = ModelConfig("tiny", str(tiny_folder / "model"))
    loaded = load_model(model, "cpu")
    n = sum(p.numel() for p in loaded.parameters())

    def found(processes=1, **changes):
        return TracedStep(dataclasses.replace(base, **changes), DPO(0.1), read_config(model), processes).memory(PAIRS)

    full = found()
    assert (full.weights, full.gradients, full.optimizer) == (4 * n, 4 * n, 8 * n)
    small = dataclasses.replace(base.optimizer, eight_bit=True)
    assert found(optimizer=small).optimizer == 2 * n
    shared = found(4, engine=dataclasses.replace(base.engine, name="zero2"))
    low = sum(m.weight.numel() for m in loaded.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert (shared.weights, shared.gradients, shared.optimizer) == (4 * n - 2 * low, n + 4 * BUCKET, 3 * n)

    lora = found(**LORA)
    vectors = sum(p.numel() for p in loaded.parameters() if p.ndim == 1)
    adapter = 2 * 4 * (32 + 32 + 32 + 64)
    assert lora.weights == 2 * n + 2 * vectors + 4 * adapter
    assert (lora.gradients, lora.optimizer) == (4 * adapter, 8 * adapter)

    # Two layers that are alike, and the embeddings, which are the head too: they are gathered in float32.
    parts = found(4, engine=dataclasses.replace(base.engine, name="fsdp"))
    shards, table = vectors * 4 + (n - vectors), 4 * (n - vectors - low)
    assert (parts.weights, parts.optimizer) == (shards + table + 2 * low, 2 * n)
    assert parts.gradients == n + table + (2 + 4) * low // 2
    gathered = shards + table + 2 * low + 2 * n
    assert parts.whole == max(4 * n, gathered)
    on_gpu = found(4, engine=dataclasses.replace(base.engine, name="fsdp"), device="cuda")
    assert on_gpu.whole == gathered  # it is loaded elsewhere
    assert found(reference="resident").weights == full.weights + 2 * n + 2 * vectors


# With the wide embeddings, their gradient takes more than the activations of a few layers, and less than those of all.
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 256, "vocab_size": 2**15}], ids=["narrow", "wide"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("changes", [{}, LORA | {"gradient_checkpointing": True}], ids=["full", "lora"])
def test_layers_that_are_alike_count_alike(changes, tied, sizes, base, monkeypatch):
    config, model = dataclasses.replace(base, **changes), values(20, tie_word_embeddings=tied, **sizes)
    few = TracedStep(config, DPO(0.1), model).activations(PAIRS)
    monkeypatch.setattr(memory, "TRACED_LAYERS", (20, 21))
    assert few == pytest.approx(TracedStep(config, DPO(0.1), model).activations(PAIRS), rel=0.01)


@pytest.mark.parametrize(
    ("layout", "objective", "pairs"),
    [("packed", DPO(0.1), PAIRS), ("padded", DPO(0.1), PAIRS), ("packed", GRPO(), GROUPS), ("padded", GRPO(), GROUPS)],
    ids=["packed", "padded", "packed-groups", "padded-groups"],
)
def test_the_same_bytes_are_counted_on_real_tensors(layout, objective, pairs, base):
    """By the step that trains, with gradients that are there already."""
    step = TracedStep(dataclasses.replace(base, layout=layout), objective, tiny_model(320).config)
    expected = step.activations(pairs)
    policy = tiny_model(320).eval()
    if layout == "packed":
        enable_packed_attention(policy)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    step.state.engine = memory.Shapes(policy)
    (micro_batch,) = step.state.collate([pairs])
    with PeakBytes() as counted, train_mode(policy), memory.autocast_weight_cache():
        accumulate_gradients(step.state, 0, [micro_batch])
    assert counted.peak == pytest.approx(expected, rel=0.02)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_every_kind_of_objective_can_be_traced(base):
    kinds = {(o.scope, tuple(sorted(o.needs)), o.completions, o.model_kind): o for _, o, _ in objectives()}
    resident = dataclasses.replace(base, reference="resident")
    found = {
        kind: TracedStep(resident if "sequential_kl" in o.needs else base, o, values()).activations(PAIRS)
        for kind, o in kinds.items()
    }
    assert min(found.values()) > 0
    assert {scope for scope, *_ in found} == {"pair", "micro_batch", "step"}
    assert {kind for *_, kind in found} == {"policy", "reward_model"}


@pytest.mark.parametrize("vocabulary", [2**15, 2**18])
def test_tdpos_kl_takes_tiles_of_the_vocabulary_and_no_matrix(base, vocabulary):
    config = dataclasses.replace(base, reference="resident")
    dpo, tdpo = (TracedStep(config, o, values(vocab_size=vocabulary)).activations(PAIRS) for o in (DPO(0.1), TDPO(0.1)))
    tile = 4 * TILE * sum(len(pair.chosen) + len(pair.rejected) for pair in PAIRS)
    assert 0 < tdpo - dpo <= 3 * tile


def test_a_step_grows_with_its_pairs_and_shrinks_with_what_makes_it_small(base):
    def found(pairs, **changes):
        return TracedStep(dataclasses.replace(base, **changes), DPO(0.1), values(12)).activations(pairs)

    one, two, four = (found(PAIRS[:n]) for n in (1, 2, 4))
    assert one < two < four
    assert found(PAIRS, gradient_checkpointing=True) < 0.7 * four
    assert found(PAIRS, device="cuda") < four  # no matrix of scores


def test_the_largest_micro_batch_that_fits_fits_and_twice_it_does_not(base, tiny_folder):
    limits = {"batch_size": 64, "max_prompt_tokens": 64, "max_completion_tokens": 64}
    config = dataclasses.replace(base, device="cuda", **limits)
    config.model = ModelConfig("tiny", str(tiny_folder / "model"))
    gib = 2**30

    def total(tokens):
        found = fit(dataclasses.replace(config, micro_batch_tokens=tokens), DPO(0.1), None, 1)
        assert found is not None
        assert (found.largest, found.remedies) == (None, {})
        return found.memory.total

    room = (total(1024) + total(2048)) / 2 / USABLE / gib
    for configured in (512, 2048):
        found = fit(dataclasses.replace(config, micro_batch_tokens=configured), DPO(0.1), room, 1)
        assert found is not None
        assert found.largest == 1024
    whole = fit(config, DPO(0.1), 1000, 1)
    assert whole is not None
    assert whole.longest_row == 64 * 3
    assert whole.largest is not None
    assert 64 * 64 * 3 <= whole.largest < 2 * 64 * 64 * 3  # all pairs of a step

    small = fit(config, DPO(0.1), total(64) * 0.5 / gib, 1)
    assert small is not None
    assert small.largest is None
    assert set(small.remedies) == set(fit_module.REMEDIES)
    assert small.remedies["gradient_checkpointing=true"] < small.memory.total


@pytest.mark.parametrize(("name", "read"), [("rloo", 5), ("sft", 1)])
def test_a_group_has_all_its_responses_where_the_objective_reads_them(name, read, tmp_path, tiny_folder):
    scores = ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3])
    lines = [{"prompt": "x" * 200, "responses": ["y" * 400] * len(r), "rewards": r} for r in scores]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"objective={name}", "dataset=samples", f"dataset.train={file}", "dataset.heldout_share=0", "model=hub"]
    options += ["dataset.format.pairing=group", f"model.path={tiny_folder / 'model'}", "device=cpu", "batch_size=8"]
    options += ["precision=float32", "micro_batch_tokens=64", "max_prompt_tokens=64", "max_completion_tokens=80"]
    config = composed(*options)
    objective = build(config.objective, Objective, "objective")
    config.fill(objective)
    assert rows(config.dataset) == (2, (50, 100, 100, 100, 50, 50))  # of a group of three, nothing in two places
    found = fit(config, objective, None, 1)
    assert found is not None
    assert found.longest_row == 64 + read * 80
    longest = TokenizedPair("", [0] * 64, [0] * 80, [0] * 80, 0.5, 0.5, others=[[0] * 80] * 3, other_rewards=[0.5] * 3)
    assert found.memory == TracedStep(config, objective, read_config(config.model)).memory([longest])


def test_jobs_that_differ_in_a_rate_take_the_same(base):
    other = dataclasses.replace(base, seed=3, optimizer=dataclasses.replace(base.optimizer, lr=1.0))
    assert same_memory(other, DPO(0.5)) == same_memory(base, DPO(0.1))
    assert same_memory(dataclasses.replace(base, layout="padded"), DPO(0.1)) != same_memory(base, DPO(0.1))


PUBLISHED = {
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "runs/paper/mmpo/sft/Llama-3.2-1B/policy": 1_235_814_400,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_models_that_are_not_here_have_the_shape_that_was_published(path):
    found = shape(ModelConfig("m", path))
    assert found is not None
    head = found.hidden_size // found.num_attention_heads
    attention = 2 * found.hidden_size**2 + 2 * found.hidden_size * found.num_key_value_heads * head
    biases = found.hidden_size + 2 * found.num_key_value_heads * head if found.model_type == "qwen2" else 0
    layer = attention + biases + 3 * found.hidden_size * found.intermediate_size + 2 * found.hidden_size
    tables = found.vocab_size * found.hidden_size * (1 if found.tie_word_embeddings else 2)
    assert tables + found.num_hidden_layers * layer + found.hidden_size == PUBLISHED[path]
    assert shape(ModelConfig("m", "lab/policy")) is None
