"""What a run says of its size before its first step, and of its time after the first ones."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prefopt.data.cache import Limits, prepare_dataset
from prefopt.objectives.dpo import DPO
from prefopt.objectives.sft import SFT
from prefopt.tracking.status import age
from prefopt.training.checkpoint import checkpoint_bytes, state_bytes
from prefopt.training.outlook import Pace, size_lines
from tests.data.test_cache import dataset as dataset  # a fixture
from tests.helpers.tiny import tiny_tokenizer


def config(**values) -> SimpleNamespace:
    defaults = {"total_steps": 20, "epochs": None, "batch_size": 6, "eval_every": 5, "layout": "packed"}
    return SimpleNamespace(**defaults | values)


def test_the_size_counts_each_token_as_the_layout_computes_it(dataset):
    train = prepare_dataset(dataset, tiny_tokenizer(), Limits(1800, 512), lambda *_: None, show=False)["train"]
    prompts, chosen, rejected = (
        sum(len(getattr(p, side)) for p in train.pairs) for side in ("prompt", "chosen", "rejected")
    )
    for layout, objective, once in (
        ("packed", DPO(beta=0.1), prompts + chosen + rejected),
        ("padded", DPO(beta=0.1), 2 * prompts + chosen + rejected),
        ("padded", SFT(), prompts + chosen),
    ):
        first, second = size_lines(config(layout=layout), objective, train, 6)
        # 20 steps of 6 are 10 passes over the 12 pairs.
        assert first.startswith(f"12 pairs, 10 epochs: 20 steps of 6, {10 * once:,} tokens of prompts and completions")
        assert second == "6 held out, evaluated before the first step and every 5"
    assert size_lines(config(epochs=1.0, total_steps=2), DPO(beta=0.1), train, 0)[0].startswith("12 pairs, 1 epoch: 2")
    assert size_lines(config(), DPO(beta=0.1), train, 0)[1] == "none held out"


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("prefopt"), "propagate", True)
    return lambda: " ".join(message.strip() for message in caplog.messages)


@pytest.mark.parametrize("start", [0, 7])
def test_the_time_that_is_left_is_steps_and_evaluations(start, said):
    """A first step of 60 s, which warms up, then 2 s each; evaluations of 30 s after 10 steps of 3 pairs, 15, 20."""
    pace = Pace(config(batch_size=3, total_steps=start + 13), start)
    for n in range(1, 13):
        done = start + n
        pace.step(done, {"pairs_per_second": 3 / (60 if n == 1 else 2), "peak_memory_gib": 1.25})
        if done % 5 == 0:
            pace.evaluation(done, 30.0)
    # After 4 steps: 9 of 2 s. After the next evaluation but that within the first steps: those left, and the last one.
    evaluated = {0: 5, 7: 15}[start]
    left, more = start + 13 - evaluated, {0: 2, 7: 1}[start]
    assert said() == (
        "about 18 s left: 9 steps at 1.5 pairs/s, evaluations not counted; at most 1.2 GiB of memory so far "
        f"about {age(left * 2 + more * 30)} left: {left} steps at 1.5 pairs/s, "
        f"{more} evaluation{'s' * (more > 1)} of 30 s counted"
    )


def test_a_run_of_few_steps_says_nothing_of_its_time(said):
    pace = Pace(config(total_steps=4), 0)
    for done in range(1, 5):
        pace.step(done, {"pairs_per_second": 1.0, "peak_memory_gib": 1.0})
        pace.evaluation(done, 1.0)
    assert said() == ""


def test_the_memory_is_weights_gradients_and_moments():
    """Of 30 weights 20 are trained; 10 are in 16 bits."""
    policy = nn.ModuleList([nn.Linear(5, 4, bias=False), nn.Linear(5, 2, bias=False)])
    policy[1].requires_grad_(False).to(torch.bfloat16)
    engine = SimpleNamespace(sharded=False, policy=policy, parameters=dict(policy[0].named_parameters()))
    sync = SimpleNamespace(every=None)
    settings = SimpleNamespace(
        optimizer=SimpleNamespace(eight_bit=False), reference="cached", patience=None, reference_sync=sync
    )
    assert state_bytes(settings, engine) == 20 * 4 + 10 * 2 + 20 * 4 + 20 * 8
    assert checkpoint_bytes(settings, engine) == 20 * 12
    settings.reference = "resident"
    assert state_bytes(settings, engine) == 2 * (20 * 4 + 10 * 2) + 20 * 12
