"""Every objective in conf/objective/, found by glob so that a new one cannot escape; then each one's closed form."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import logsigmoid

from prefopt import UserError
from prefopt.config import build
from prefopt.objectives.base import Objective, PairInputs
from prefopt.objectives.dpo import DPO
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.simpo import SimPO
from tests.tiny import ROOT

CONFIGS = sorted((ROOT / "conf" / "objective").glob("*.yaml"))
OBJECTIVES = [pytest.param(build(OmegaConf.load(c), Objective, "objective"), id=c.stem) for c in CONFIGS] + [
    pytest.param(DPO(0.3, label_smoothing=0.1), id="dpo-smoothed"),
    pytest.param(SimPO(2.0, 0.5, length_normalize=False), id="simpo-sums"),
    pytest.param(MMPO(0.1, length_normalize=True), id="mmpo-length"),
    pytest.param(MMPO(0.1, entropy_bonus=True), id="mmpo-entropy"),
    pytest.param(MMPO(0.1, entropy_bonus=True, length_normalize=True), id="mmpo-entropy-length"),
    pytest.param(MMPO(0.1, auxiliary_weight=0.0), id="mmpo-no-auxiliary"),
    pytest.param(MMPO(0.1, normalize_rewards=False), id="mmpo-raw"),
]


def inputs(objective: Objective | None = None, n: int = 4, scale: float = 10.0, seed: int = 0) -> PairInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return -scale * torch.rand(n, generator=generator, dtype=torch.float64)

    needs = objective.needs if objective else frozenset({"reference", "rewards", "entropies"})
    values = {
        "policy_chosen_logps": draw().requires_grad_(),
        "policy_rejected_logps": draw().requires_grad_(),
        "chosen_lengths": torch.arange(1, n + 1).double(),
        "rejected_lengths": torch.arange(n, 0, -1).double(),
    }
    if "reference" in needs:
        values |= {"reference_chosen_logps": draw(), "reference_rejected_logps": draw()}
    if "rewards" in needs:
        values |= {"chosen_rewards": -draw() / scale, "rejected_rewards": -draw() / scale}
    if "entropies" in needs:
        values |= {"chosen_entropies": -draw().requires_grad_(), "rejected_entropies": -draw().requires_grad_()}
    return PairInputs(**values)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_right_in_float64(objective):
    x = inputs(objective)
    names = [f.name for f in dataclasses.fields(x) if getattr(x, f.name) is not None and "lengths" not in f.name]
    differentiable = [n for n in names if n.startswith("policy") or n.endswith("entropies")]
    tensors = [getattr(x, n).detach().requires_grad_() for n in differentiable]
    assert torch.autograd.gradcheck(
        lambda *values: objective(dataclasses.replace(x, **dict(zip(differentiable, values, strict=True)))).losses,
        tensors,
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_extreme_logratios(objective, sign):
    x = inputs(objective, scale=1.0)
    x = dataclasses.replace(
        x,
        policy_chosen_logps=(x.policy_chosen_logps.detach().float() + min(0, sign) * 1e4).requires_grad_(),
        policy_rejected_logps=(x.policy_rejected_logps.detach().float() - max(0, sign) * 1e4).requires_grad_(),
    )
    output = objective(x)
    output.losses.sum().backward()
    for tensor in (output.losses, x.policy_chosen_logps.grad, x.policy_rejected_logps.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pair_scope_loss_does_not_look_at_other_pairs(objective):
    x, n = inputs(objective), 4
    whole = objective(x).losses
    single = torch.cat(
        [
            objective(
                PairInputs(
                    **{
                        f.name: value[i : i + 1]
                        for f in dataclasses.fields(x)
                        if (value := getattr(x, f.name)) is not None
                    }
                )
            ).losses
            for i in range(n)
        ]
    )
    assert torch.equal(whole, single) == (objective.scope == "pair")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_carry_no_gradient_and_have_the_shape(objective):
    output = objective(inputs(objective))
    assert output.losses.shape == output.chosen_scores.shape == output.rejected_scores.shape == (4,)
    assert not output.chosen_scores.requires_grad
    assert not output.rejected_scores.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_step0_loss_is_what_equal_policy_and_reference_give(objective):
    if objective.step0_loss is None:
        pytest.skip("no such constant")
    x = inputs(objective)
    x = dataclasses.replace(
        x, reference_chosen_logps=x.policy_chosen_logps, reference_rejected_logps=x.policy_rejected_logps
    )
    assert objective(x).losses.tolist() == pytest.approx([objective.step0_loss] * 4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_yaml_opens_with_its_command_and_lists_every_field(config: Path):
    assert config.read_text().startswith(f"# python -m prefopt.train objective={config.stem}")
    node = OmegaConf.load(config)
    fields = {f.name for f in dataclasses.fields(build(node, Objective, "objective"))}  # type: ignore[arg-type]
    assert set(node) - {"_target_"} == fields


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_unknown_fields_are_refused(config: Path):
    node = OmegaConf.merge(OmegaConf.load(config), {"nonsense": 1})
    with pytest.raises(UserError, match=r"unknown key objective\.nonsense"):
        build(node, Objective, "objective")


def test_dpo_closed_form():
    x = inputs()
    output = DPO(0.3)(x)
    for i in range(4):
        u_w = x.policy_chosen_logps[i].item() - x.reference_chosen_logps[i].item()
        u_l = x.policy_rejected_logps[i].item() - x.reference_rejected_logps[i].item()
        assert output.losses[i].item() == pytest.approx(math.log(1 + math.exp(-0.3 * (u_w - u_l))))
        assert output.chosen_scores[i].item() == pytest.approx(0.3 * u_w)
        assert output.rejected_scores[i].item() == pytest.approx(0.3 * u_l)


def test_dpo_label_smoothing_mixes_both_labels():
    x = inputs()
    swapped = dataclasses.replace(
        x,
        policy_chosen_logps=x.policy_rejected_logps,
        policy_rejected_logps=x.policy_chosen_logps,
        reference_chosen_logps=x.reference_rejected_logps,
        reference_rejected_logps=x.reference_chosen_logps,
    )
    mixed = 0.8 * DPO(0.3)(x).losses + 0.2 * DPO(0.3)(swapped).losses
    assert torch.allclose(DPO(0.3, label_smoothing=0.2)(x).losses, mixed)


def test_simpo_closed_form_and_gamma_from_the_ratio():
    objective = SimPO(beta=2.5, gamma_beta_ratio=0.55)
    assert objective.gamma == pytest.approx(1.375)
    x = inputs(objective)
    means = x.policy_chosen_logps / x.chosen_lengths, x.policy_rejected_logps / x.rejected_lengths
    assert torch.allclose(objective(x).losses, -logsigmoid(2.5 * means[0] - 2.5 * means[1] - 1.375))
    sums = x.policy_chosen_logps - x.policy_rejected_logps
    assert torch.allclose(SimPO(2.5, 0.55, length_normalize=False)(x).losses, -logsigmoid(2.5 * sums - 1.375))


def mmpo_by_hand(x: PairInputs, beta: float, margin: float, a: float) -> list[float]:
    """The paper's formulas in plain Python, over the 2B rewards of the batch."""
    q_w = [margin + beta * r for r in x.reference_chosen_logps.tolist()]
    q_l = [beta * r for r in x.reference_rejected_logps.tolist()]
    low, high = min(q_w + q_l), max(q_w + q_l)
    losses = []
    for lp_w, lp_l, w, l in zip(x.policy_chosen_logps, x.policy_rejected_logps, q_w, q_l, strict=True):
        s_w = lp_w.item() + (w - low + 1e-6) / (high - low + 1e-6)
        s_l = lp_l.item() + (l - low + 1e-6) / (high - low + 1e-6)
        losses.append(-math.log(math.exp(s_w) + math.exp(s_l)) + a * math.log(1 + math.exp(s_l - s_w)))
    return losses


def test_mmpo_closed_form():
    x = inputs()
    assert MMPO(0.5)(x).losses.tolist() == pytest.approx(mmpo_by_hand(x, 0.5, 0.9, 1.0))
    assert MMPO(0.5, margin=0.3, auxiliary_weight=0.0)(x).losses.tolist() == pytest.approx(
        mmpo_by_hand(x, 0.5, 0.3, 0.0)
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_mmpo_gradient_is_theorem_3_2(normalize):
    """d(-logsumexp)/d lp_w = -sigma(s_w - s_l), and the mirror image for lp_l."""
    x = inputs()
    output = MMPO(0.5, auxiliary_weight=0.0, normalize_rewards=normalize)(x)
    output.losses.sum().backward()
    gap = output.chosen_scores - output.rejected_scores
    assert torch.allclose(x.policy_chosen_logps.grad, -torch.sigmoid(gap))
    assert torch.allclose(x.policy_rejected_logps.grad, -torch.sigmoid(-gap))


def test_mmpo_at_a_1_is_maximum_likelihood_on_the_chosen_completion():
    """-logsumexp(s_w, s_l) - log sigma(s_w - s_l) = -s_w: beta, margin and the rejected side move no weight."""
    x = inputs()
    output = MMPO(0.5)(x)
    assert torch.allclose(output.losses, -output.chosen_scores)
    output.losses.sum().backward()
    assert torch.allclose(x.policy_chosen_logps.grad, -torch.ones(4).double())
    assert torch.allclose(x.policy_rejected_logps.grad, torch.zeros(4).double(), atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_mmpo_gradient_ignores_a_constant_in_all_rewards(normalize):
    gradients = []
    for shift in (0.0, 7.0):
        x = inputs()
        x = dataclasses.replace(
            x,
            reference_chosen_logps=x.reference_chosen_logps + shift,
            reference_rejected_logps=x.reference_rejected_logps + shift,
        )
        MMPO(0.5, normalize_rewards=normalize, auxiliary_weight=0.3)(x).losses.sum().backward()
        gradients.append((x.policy_chosen_logps.grad.clone(), x.policy_rejected_logps.grad.clone()))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_mmpo_ablations():
    x = inputs()
    n_w, n_l = x.chosen_lengths, x.rejected_lengths
    per_token = dataclasses.replace(
        x,
        policy_chosen_logps=x.policy_chosen_logps / n_w,
        policy_rejected_logps=x.policy_rejected_logps / n_l,
        reference_chosen_logps=x.reference_chosen_logps / n_w,
        reference_rejected_logps=x.reference_rejected_logps / n_l,
    )
    assert torch.allclose(MMPO(0.5, length_normalize=True)(x).losses, MMPO(0.5)(per_token).losses)
    bonus = MMPO(0.5)(x).losses - MMPO(0.5, entropy_bonus=True)(x).losses
    assert torch.allclose(bonus, 0.5 * (x.chosen_entropies + x.rejected_entropies))
    bonus = MMPO(0.5, length_normalize=True)(x).losses - MMPO(0.5, length_normalize=True, entropy_bonus=True)(x).losses
    assert torch.allclose(bonus, 0.5 * (x.chosen_entropies / n_w + x.rejected_entropies / n_l))


def test_needs_follow_the_switches():
    assert MMPO(0.1).needs == {"reference"}
    assert MMPO(0.1, entropy_bonus=True).needs == {"reference", "entropies"}
    assert SimPO(2.0, 0.5).needs == set()
    assert (MMPO(0.1).scope, MMPO(0.1, normalize_rewards=False).scope) == ("micro_batch", "pair")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(0.0),
        lambda: DPO(0.1, label_smoothing=0.5),
        lambda: SimPO(-1.0, 0.5),
        lambda: MMPO(-0.1),
        lambda: MMPO(0.1, auxiliary_weight=-1.0),
    ],
)
def test_values_without_meaning_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
