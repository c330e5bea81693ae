"""Layouts x logits x references x micro-batches: one optimizer step's losses, log-probs and gradients are the same.

In float32 on a tiny model; tests/integration/test_slow.py has the bound for bfloat16 on SmolLM2-135M.
"""

import copy
import itertools
from dataclasses import dataclass, fields, replace

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.config.schema import OptimizerConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.mismatch import with_mismatched
from prefopt.models.frozen import VALUE_HEAD
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.lora import checkpoint_activations, train_mode
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff, Resident, cached
from prefopt.objectives.base import PairInputs
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.ld_dpo import LDDPO
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.sft import SFT
from prefopt.objectives.svpo import SVPO
from prefopt.objectives.tdpo import TDPO
from prefopt.objectives.tis_dpo import TISDPO
from prefopt.objectives.wpo import WPO
from prefopt.training.step import accumulate_gradients, train_step
from tests.training.test_loop import make_train_state


def with_adapter(train_state):
    """LoRA on the policy, whose trainable weights it replaces; not zero, so that policy and reference differ."""
    policy = train_state.engine.policy
    torch.manual_seed(1)
    policy.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    if hasattr(policy, VALUE_HEAD):
        torch.nn.init.normal_(policy.value_head.requires_grad_(True).weight, std=0.3)
    train_state.engine.parameters = {n: p for n, p in train_state.engine.policy.named_parameters() if p.requires_grad}
    return train_state


FURTHER = {"prefixes": "prefixes", "token_weights": "weighted"}
WEIGHTS = [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25]


def one_step(
    objective, tmp_path, layout: str, logits: str, mode: str, tokens: int, weights: list[float] = WEIGHTS
) -> dict[str, torch.Tensor]:
    """Everything that a step computes, by name; log-probs in the order of the pairs' ids."""
    train_state = make_train_state(objective, tmp_path, logits=logits, micro_batch_tokens=tokens)
    weighted = zip(train_state.train_pairs[:7], weights, strict=True)
    train_state.train_pairs[:7] = [replace(pair, weight=weight) for pair, weight in weighted]
    train_state.layout, policy = LAYOUTS[layout], train_state.engine.policy
    if layout == "packed":
        enable_packed_attention(policy)
    score = LogprobComputer("float32", logits == "tiled")
    if mode == "resident":
        train_state.reference = Resident.copy_of(policy, score)
    elif mode == "cached" and objective.completions == ("chosen", "rejected"):
        pairs = list(train_state.train_pairs)
        if "mismatched" in objective.needs:
            pairs += [p.mismatched for p in with_mismatched(pairs[:7])]
        train_state.reference = cached(
            policy,
            layout,
            pairs,
            train_state.layout,
            200,
            score,
            lambda: policy,
            show=False,
            further=[name for need, name in FURTHER.items() if need in objective.needs],
        )
    with_adapter(train_state)
    if mode == "adapter_off":
        train_state.reference = AdapterOff(policy, score)
    micro_batches = train_state.micro_batches(train_state.train_pairs[:7])
    assert (len(micro_batches) == 1) == (tokens > 1000)
    scored = accumulate_gradients(train_state, 0, micro_batches)
    order = [p.id for m in micro_batches for p in m.pairs]
    places = torch.tensor(sorted(range(7), key=lambda i: order[i]))
    result = {n: p.grad for n, p in train_state.engine.parameters.items()}
    for name in scored[0][0].tensors():
        result[name] = torch.cat([getattr(inputs, name) for inputs, _ in scored])[places]
    result["losses"] = torch.cat([output.losses.detach() for _, output in scored])[places]
    return result


@dataclass(frozen=True)
class OverTheStep(TDPO):
    """The KL in two passes."""

    scope = "step"


@dataclass(frozen=True)
class WeightedOverTheStep(TISDPO):
    """Weighted log-probs in two passes."""

    scope = "step"


OBJECTIVES = {
    "dpo": DPO(0.5),
    "beta_dpo": BetaDPO(0.5, nll_weight=0.1),
    "mmpo-entropy": MMPO(0.1, normalization="none", auxiliary_weight=0.5, entropy_bonus=True),
    "kto": KTO(0.5),
    "wpo": WPO(0.5, max_weight=None),
    "ld_dpo": LDDPO(0.5, alpha=0.3),
    "tis_dpo": TISDPO(0.5),
    "tis_dpo-step": WeightedOverTheStep(0.5),
    "svpo": SVPO(0.5, margin=0.5),
    "tdpo": TDPO(0.5, alpha=1.0, stop_gradient=False),
    "tdpo-step": OverTheStep(0.5),
    "sft": SFT(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_way_to_compute_a_step_gives_the_same_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    ways = itertools.product(LAYOUTS, ("tiled", "dense"), ("resident", "cached", "adapter_off"), (300, 10_000))
    expected = one_step(OBJECTIVES[name], tmp_path, "padded", "dense", "resident", 10_000)
    assert expected["losses"].std() > 0
    for way in ways:
        if "cached" in way and "sequential_kl" in OBJECTIVES[name].needs:
            continue  # refused: tests/models/test_reference.py
        found = one_step(OBJECTIVES[name], tmp_path, *way)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            scale = max(1.0, value.abs().max().item())
            assert torch.allclose(found[key], value, atol=1e-5 * scale, rtol=1e-4), (way, key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [1, 2])
def test_tdpo_is_its_formula_on_full_logits(form, layout, tmp_path):
    """Losses and gradients of all weights against float64, each completion alone in the model's own forward pass. With
    gradient checkpointing."""
    objective = TDPO(0.5, alpha=1.0, stop_gradient=False) if form == 1 else TDPO(0.5, alpha=0.5)
    train_state = make_train_state(objective, tmp_path)
    policy, frozen = train_state.engine.policy, train_state.reference.frozen
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact, exact_reference = copy.deepcopy(policy).double(), copy.deepcopy(frozen).double()

    def ratio_and_kl(prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = [
            m(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] for m in (exact, exact_reference)
        ]
        p, q = (x.log_softmax(-1) for x in logits)
        return (p - q)[range(len(completion)), completion].sum(), (q.exp() * (q - p)).sum()

    train_state.layout = LAYOUTS[layout]
    for model in (policy, frozen):
        enable_packed_attention(model)
    checkpoint_activations(policy)
    micro_batches = train_state.micro_batches(train_state.train_pairs[:5])
    assert len(micro_batches) > 1
    with train_mode(policy):
        scored = accumulate_gradients(train_state, 0, micro_batches)

    losses = []
    for pair in (pair for micro_batch in micro_batches for pair in micro_batch.pairs):
        (u_w, d_w), (u_l, d_l) = (ratio_and_kl(list(pair.prompt), list(c)) for c in (pair.chosen, pair.rejected))
        d_w = d_w if form == 1 else d_w.detach()
        losses.append(-logsigmoid(0.5 * (u_w - u_l - objective.alpha * (d_l - d_w))))
    torch.stack(losses).mean().backward()
    found = torch.cat([output.losses.detach() for _, output in scored])
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    assert min(inputs.rejected_kl.min() for inputs, _ in scored) > 0.1
    for p, expected in zip(policy.parameters(), exact.parameters(), strict=True):
        scale = expected.grad.abs().max().item()
        assert torch.allclose(p.grad.double(), expected.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["dpo", "beta_dpo", "sft"])
def test_a_weight_multiplies_the_loss_of_its_pair(name, tmp_path):
    """And so its gradient, whatever the scope: that of the weighted step is the sum of the single pairs'."""
    way = OBJECTIVES[name], tmp_path, "padded", "dense", "resident", 300
    plain, weighted = one_step(*way, [1.0] * 7), one_step(*way)
    assert sorted(weighted["weights"].tolist()) == sorted(WEIGHTS)
    assert torch.equal(weighted["losses"], plain["losses"] * weighted["weights"])
    alone = [one_step(*way, [w * (i == j) for j, w in enumerate(WEIGHTS)]) for i in range(7)]
    gradients = weighted.keys() - {field.name for field in fields(PairInputs)} - {"losses"}
    assert gradients
    for name in gradients:
        assert torch.allclose(sum(one[name] for one in alone), weighted[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_weights_of_1_are_dpo_to_the_bit(layout, tmp_path):
    """Losses and gradients."""
    ways = []
    for objective in (DPO(0.5), TISDPO(0.5)):
        train_state = with_adapter(make_train_state(objective, tmp_path))
        train_state.layout = LAYOUTS[layout]
        for model in (train_state.engine.policy, train_state.reference.frozen):
            enable_packed_attention(model)
        ones = [
            replace(p, chosen_token_weights=[1.0] * len(p.chosen), rejected_token_weights=[1.0] * len(p.rejected))
            for p in train_state.train_pairs[:7]
        ]
        scored = accumulate_gradients(train_state, 0, train_state.micro_batches(ones))
        ways.append([output.losses for _, output in scored])
        ways[-1] += [p.grad for p in train_state.engine.parameters.values()]
    assert ways[0][0].std() > 0
    for dpo, tis_dpo in zip(*ways, strict=True):
        assert torch.equal(dpo, tis_dpo)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tis_dpo_is_its_formula_token_by_token(layout, tmp_path):
    """Losses and gradients of all weights against float64, each completion alone in the model's own forward pass."""
    train_state = with_adapter(make_train_state(TISDPO(0.5), tmp_path))
    policy, frozen = train_state.engine.policy, train_state.reference.frozen
    exact, exact_reference = copy.deepcopy(policy).double(), copy.deepcopy(frozen).double()

    def ratio(prompt: list[int], completion: list[int], weights: list[float]) -> torch.Tensor:
        logits = [
            m(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] for m in (exact, exact_reference)
        ]
        p, q = (x.log_softmax(-1)[range(len(completion)), completion] for x in logits)
        return (torch.tensor(weights).double() * (p - q)).sum()

    train_state.layout = LAYOUTS[layout]
    for model in (policy, frozen):
        enable_packed_attention(model)
    micro_batches = train_state.micro_batches(train_state.train_pairs[:5])
    assert len(micro_batches) > 1
    scored = accumulate_gradients(train_state, 0, micro_batches)

    losses = []
    for pair in (pair for micro_batch in micro_batches for pair in micro_batch.pairs):
        u_w = ratio(list(pair.prompt), list(pair.chosen), pair.chosen_token_weights)
        u_l = ratio(list(pair.prompt), list(pair.rejected), pair.rejected_token_weights)
        losses.append(-logsigmoid(0.5 * (u_w - u_l)))
    torch.stack(losses).mean().backward()
    found = torch.cat([output.losses.detach() for _, output in scored])
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in train_state.engine.parameters.items():
        scale = gradients[name].abs().max().item()
        assert torch.allclose(p.grad.double(), gradients[name], rtol=1e-3, atol=1e-4 * scale), name


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor's value read, or a shape that depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.partition(".")[0] in self.WAITING:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
def test_nothing_waits_for_the_device_inside_a_step(name, layout, tmp_path):
    """On a GPU each of these would stop the queue of kernels. The metrics leave as one tensor, after the gradients. (In
    padded rows transformers looks at the mask's values.)"""
    train_state = make_train_state(OBJECTIVES[name], tmp_path)
    train_state.layout = LAYOUTS[layout]
    for model in (train_state.engine.policy, train_state.reference.frozen):
        enable_packed_attention(model)
    micro_batches = train_state.step_micro_batches(0)
    assert len(micro_batches) > 1
    with Waits() as waits:
        accumulate_gradients(train_state, 0, micro_batches)
        train_state.engine.clip_gradients()
    assert waits.calls == []
    with Waits() as all_waits:
        assert torch.ones(1).item() == 1  # they are seen
    assert all_waits.calls


def test_a_whole_step_is_the_same_in_every_layout(tmp_path):
    """Weights after three optimizer steps."""
    results = []
    for layout in LAYOUTS:
        # Adam divides by the gradient's size; without a large eps, one that is nearly zero would move by its rounding.
        train_state = make_train_state(
            DPO(0.5), tmp_path, optimizer=OptimizerConfig(1e-2, [0.9, 0.999], 1e-2, 0.0, 1.0)
        )
        before = train_state.engine.policy.get_input_embeddings().weight.detach().clone()
        train_state.layout = LAYOUTS[layout]
        for model in (train_state.engine.policy, train_state.reference.frozen):
            enable_packed_attention(model)
        for step in range(3):
            train_step(train_state, step, train_state.step_micro_batches(step))
        assert (train_state.engine.policy.get_input_embeddings().weight - before).abs().max() > 1e-3
        results.append({n: p.detach() for n, p in train_state.engine.policy.named_parameters()})
    for other in results[1:]:
        for n, p in results[0].items():
            assert torch.allclose(p, other[n], atol=1e-5), n
