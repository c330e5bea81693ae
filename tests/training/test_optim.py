from dataclasses import replace

import pytest
import torch
from transformers import get_scheduler

from prefopt.config.schema import OptimizerConfig
from prefopt.models.logprobs import autocast
from prefopt.training.checkpoint import load_checkpoint, save_checkpoint
from prefopt.training.engine import Engine
from prefopt.training.optim import Constant, Cosine, Linear, adamw
from tests.helpers.tiny import tiny_model

CONFIG = OptimizerConfig(lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)


def test_cosine_by_hand():
    schedule = Cosine(warmup=0.2, final=0.1)
    assert [schedule(step, 10) for step in (0, 1, 2)] == pytest.approx([0.5, 1.0, 1.0])
    assert schedule(6, 10) == pytest.approx(0.1 + 0.9 / 2)
    assert 0.1 < schedule(9, 10) < 0.2
    assert Cosine(warmup=0.0)(0, 1) == 1.0
    assert [Cosine(warmup=4)(step, 40) for step in range(40)] == [Cosine(warmup=0.1)(step, 40) for step in range(40)]
    assert Cosine(warmup=100)(3, 4) == 1  # a run that is over before


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (Cosine(warmup=0), "cosine"),
        (Linear(warmup=0), "linear"),
        (Constant(warmup=0), "constant"),
    ],
)
def test_schedules_are_those_of_transformers(schedule, name):
    """Behind the warm-up; in it, transformers' first step has a learning rate of 0."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [schedule(step, 10) for step in range(10)] == pytest.approx(expected)


def test_linear_and_constant_by_hand():
    linear = Linear(warmup=0.2, final=0.1)
    assert [linear(step, 10) for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.55])
    assert [Constant(warmup=4)(step, 10) for step in range(10)] == [0.25, 0.5, 0.75, *[1.0] * 7]
    with pytest.raises(ValueError, match="warmup must be a share"):
        Constant(warmup=1.5)
    with pytest.raises(ValueError, match="final must be a share"):
        Linear(warmup=0, final=2)


def test_matrices_decay_and_vectors_do_not():
    model = tiny_model(50)
    decayed, plain = adamw(model, CONFIG).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_low_precision_master_weights_are_refused():
    with pytest.raises(TypeError, match="float32"):
        adamw(tiny_model(50).bfloat16(), CONFIG)


def test_a_tiny_learning_rate_still_moves_float32_weights():
    engine = Engine(tiny_model(50), CONFIG)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    with autocast(engine.device, "bfloat16"):
        loss = engine.policy(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss
    engine.backward(loss)
    engine.step(5e-7)
    assert all(not torch.equal(p, before[name]) for name, p in engine.parameters.items())


@pytest.mark.parametrize(("limit", "after"), [(0.5, 0.5), (0.0, 20.0)])
def test_clipping_reports_the_norm_before(limit, after):
    model = tiny_model(50)
    engine = Engine(model, OptimizerConfig(1e-3, [0.9, 0.99], 1e-8, 0.0, limit))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    next(model.parameters()).grad[0, 0] = 20.0  # type: ignore[index]
    assert engine.clip_gradients().item() == pytest.approx(20.0)
    assert next(model.parameters()).grad[0, 0].item() == pytest.approx(after, rel=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_engine_state_round_trip_continues_bit_for_bit(eight_bit, tmp_path):
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    config = replace(CONFIG, eight_bit=eight_bit)

    def step(engine: Engine) -> None:
        ids = torch.tensor([[1, 2, 3, 4]])
        engine.backward(engine.policy(ids, labels=ids).loss)
        engine.clip_gradients()
        engine.step(1e-3)

    # Matrices of 8,192 weights: bitsandbytes keeps those of less than 4,096 in 32 bits.
    first = Engine(tiny_model(50, intermediate_size=256), config)
    step(first)
    save_checkpoint(tmp_path, 1, first.state(), {})
    second = Engine(tiny_model(50, seed=1, intermediate_size=256), config)
    second.load_state(load_checkpoint(tmp_path / "step_0000001")[0])
    quantized = [m for m in second.state()["moments"].values() if m.dtype == torch.uint8]
    assert bool(quantized) == eight_bit
    for engine in (first, second):
        step(engine)
    for a, b in zip(first.parameters.values(), second.parameters.values(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused():
    engine = Engine(tiny_model(50), CONFIG)
    state = engine.state()
    state["weights"].pop(next(iter(state["weights"])))
    with pytest.raises(KeyError, match="parameters differ"):
        engine.load_state(state)
