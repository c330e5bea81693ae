"""The relatives beyond the papers' own baselines: closed forms in plain Python, their limits, and where they kink.

What every objective must do (gradients, extreme values, scope) is tested in test_objectives.py, agreement with TRL in
test_trl.py.
"""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefopt.data.build_items import win_rates
from prefopt.data.formats import ScoredResponses
from prefopt.data.items import Pair
from prefopt.objectives.alpha_dpo import AlphaDPO
from prefopt.objectives.alpha_po import AlphaPO
from prefopt.objectives.aot import AOT
from prefopt.objectives.aot_unpaired import AOTUnpaired
from prefopt.objectives.apo_down import APODown
from prefopt.objectives.apo_zero import APOZero
from prefopt.objectives.arpo import ARPO
from prefopt.objectives.base import PairInputs
from prefopt.objectives.bco import BCO
from prefopt.objectives.budget import Budget
from prefopt.objectives.cpo import CPO
from prefopt.objectives.discopop import DiscoPOP
from prefopt.objectives.dpo import DPO
from prefopt.objectives.dpo_norm import DPONorm
from prefopt.objectives.dpop import DPOP
from prefopt.objectives.exo import EXO
from prefopt.objectives.gpo import GPO
from prefopt.objectives.ld_dpo import LDDPO
from prefopt.objectives.mappo import MaPPO
from prefopt.objectives.nca import NCA
from prefopt.objectives.r_dpo import RDPO
from prefopt.objectives.simper import SimPER
from prefopt.objectives.simpo import SimPO
from prefopt.objectives.slic import SLiC
from prefopt.objectives.sppo import SPPO
from prefopt.objectives.svpo import SVPO
from prefopt.objectives.symmpo import SymMPO
from prefopt.objectives.tdpo import TDPO
from prefopt.objectives.tis_dpo import TISDPO
from tests.objectives.test_objectives import by_hand, dpo, inputs, means, moved, pairs, ratios, sigmoid, swapped


def exo(p, beta, e):
    u_w, u_l = ratios(p)
    q = sigmoid(beta * (u_w - u_l))
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def nca(p, beta):
    w, l = (sigmoid(beta * u) for u in ratios(p))
    return -math.log(w) - math.log(1 - w) / 2 - math.log(1 - l) / 2


def dpop(p, beta, penalty):
    u_w, u_l = ratios(p)
    return -math.log(sigmoid(beta * (u_w - u_l - penalty * max(0.0, -u_w))))


def discopop(p, beta, tau):
    u_w, u_l = ratios(p)
    z = beta * (u_w - u_l)
    m = sigmoid(z / tau)
    return (1 - m) * -math.log(sigmoid(z)) + m * math.exp(-z)


def alpha_po(p, beta, gamma, alpha):
    w, l = ((1 - math.exp(m) ** -alpha) / alpha for m in means(p))
    return -math.log(sigmoid(beta * (w - l) - gamma))


def arpo(p):
    """The authors' code: CPO with a factor on the rejected log-probability."""
    a_w, a_l = means(p)
    factor = min(0.9 * math.exp(0.4 * abs(a_w - a_l)) - 1, 1.0)
    z = 0.3 * (p["policy_chosen_logps"] - factor * p["policy_rejected_logps"])
    return math.log1p(math.exp(-z)) - 0.2 * p["policy_chosen_logps"]


def sppo_soft(p, beta):
    """Twice the authors' loss, which halves the sum."""
    u_w, u_l = ratios(p)
    target_w, target_l = (1 / beta * (p[f"{side}_rewards"] - 0.5) for side in ("chosen", "rejected"))
    return (u_w - target_w) ** 2 + (u_l - target_l) ** 2


def ld_dpo(p, beta, alpha):
    def u(side):
        whole, prefix = (
            p[f"policy_{side}_{kind}"] - p[f"reference_{side}_{kind}"] for kind in ("logps", "prefix_logps")
        )
        return prefix + alpha * (whole - prefix)

    return -math.log(sigmoid(beta * (u("chosen") - u("rejected"))))


def tis_dpo(p, beta):
    u_w, u_l = (
        p[f"policy_{side}_weighted_logps"] - p[f"reference_{side}_weighted_logps"] for side in ("chosen", "rejected")
    )
    return -math.log(sigmoid(beta * (u_w - u_l)))


def tdpo(p, beta, alpha):
    u_w, u_l = ratios(p)
    return -math.log(sigmoid(beta * (u_w - u_l - alpha * (p["rejected_kl"] - p["chosen_kl"]))))


def svpo(p, beta, weight, margin):
    v_w, v_l = p["policy_chosen_values"], p["policy_rejected_values"]
    of_values = (v_w - p["chosen_rewards"]) ** 2 + (v_l - p["rejected_rewards"]) ** 2 + max(0.0, margin - (v_w - v_l))
    return dpo(p, beta) + weight * of_values


FORMULAS = {
    "apo_zero": (APOZero(0.3), lambda p: 1 - sigmoid(0.3 * ratios(p)[0]) + sigmoid(0.3 * ratios(p)[1])),
    "apo_down": (
        APODown(0.3),
        lambda p: sigmoid(0.3 * ratios(p)[0]) + 1 - sigmoid(0.3 * (ratios(p)[0] - ratios(p)[1])),
    ),
    "nca": (NCA(0.3), lambda p: nca(p, 0.3)),
    "exo": (EXO(0.3, label_smoothing=0.01), lambda p: exo(p, 0.3, 0.01)),
    "bco-none": (
        BCO(0.3, shift="none"),
        lambda p: -math.log(sigmoid(0.3 * ratios(p)[0])) - math.log(sigmoid(-0.3 * ratios(p)[1])),
    ),
    "discopop": (DiscoPOP(0.05, tau=0.3), lambda p: discopop(p, 0.05, 0.3)),
    "dpo_norm": (
        DPONorm(5.0),
        lambda p: (
            -math.log(
                sigmoid(5 * (ratios(p)[0] / p["chosen_lengths"] - ratios(p)[1] / p["rejected_lengths"])),
            )
        ),
    ),
    "ld_dpo": (LDDPO(0.3, alpha=0.3), lambda p: ld_dpo(p, 0.3, 0.3)),
    "tis_dpo": (TISDPO(0.3), lambda p: tis_dpo(p, 0.3)),
    "svpo": (SVPO(0.3, value_weight=0.7, margin=1.2), lambda p: svpo(p, 0.3, 0.7, 1.2)),
    "tdpo-1": (TDPO(0.3, alpha=1.0, stop_gradient=False), lambda p: tdpo(p, 0.3, 1.0)),
    "tdpo-2": (TDPO(0.3), lambda p: tdpo(p, 0.3, 0.5)),
    "dpop": (DPOP(0.05, penalty=3.0), lambda p: dpop(p, 0.05, 3.0)),
    "r_dpo": (
        RDPO(0.3, alpha=0.2),
        lambda p: (
            -math.log(
                sigmoid(0.3 * (ratios(p)[0] - ratios(p)[1]) + 0.2 * (p["chosen_lengths"] - p["rejected_lengths"]))
            )
        ),
    ),
    "simper": (SimPER(), lambda p: -math.exp(means(p)[0]) + math.exp(means(p)[1])),
    "alpha_po": (AlphaPO(2.5, 0.55, alpha=0.25), lambda p: alpha_po(p, 2.5, 1.375, 0.25)),
    "alpha_po-negative": (AlphaPO(2.5, 0.55, alpha=-0.5), lambda p: alpha_po(p, 2.5, 1.375, -0.5)),
    "slic": (
        SLiC(2.0),
        lambda p: max(0.0, 2 - p["policy_chosen_logps"] + p["policy_rejected_logps"]) - 0.1 * p["policy_chosen_logps"],
    ),
    "budget": (Budget(0.3, budget=2.0, penalty=0.7), lambda p: dpo(p, 0.3) + 0.7 * max(0.0, -ratios(p)[0] - 2)),
    "arpo": (ARPO(CPO(0.3)), arpo),
    "sppo-soft": (SPPO(0.1, labels="soft"), lambda p: sppo_soft(p, 0.1)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_closed_forms(name):
    objective, formula = FORMULAS[name]
    for seed in range(3):
        x = inputs(n=8, seed=seed)
        assert objective(x).losses.tolist() == pytest.approx(by_hand(formula, x), rel=1e-9)


LIMITS = {
    "dpop without penalty is DPO": (DPOP(0.3, penalty=0.0), DPO(0.3), 0.0),
    "r_dpo without alpha is DPO": (RDPO(0.3, alpha=0.0), DPO(0.3), 0.0),
    "budget without penalty is DPO": (Budget(0.3, penalty=0.0), DPO(0.3), 0.0),
    "budget with a large one is DPO": (Budget(0.3, budget=1e3), DPO(0.3), 0.0),
    "ld_dpo at alpha 1 is DPO": (LDDPO(0.3, alpha=1.0), DPO(0.3), 0.0),
    "svpo without its values is DPO": (SVPO(0.3, value_weight=0.0), DPO(0.3), 0.0),
    "tdpo without alpha is DPO": (TDPO(0.3, alpha=0.0), DPO(0.3), 0.0),
    "alpha_po tends to SimPO": (AlphaPO(2.5, 0.5, alpha=1e-7), SimPO(2.5, 0.5), 1e-4),
    "alpha_dpo without alpha is SimPO": (AlphaDPO(2.5, 0.5, alpha=0.0), SimPO(2.5, 0.5), 0.0),
    "arpo at a factor of 1 is its base": (ARPO(DPO(0.3), strength=2.0, slope=1e-9), DPO(0.3), 1e-6),
    "arpo over another base": (ARPO(SimPO(2.0, 0.5), strength=2.0, slope=1e-9), SimPO(2.0, 0.5), 1e-6),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    limit, other, tolerance = LIMITS[name]
    x = inputs(n=8)
    assert torch.allclose(limit(x).losses, other(x).losses, rtol=1e-12, atol=max(tolerance, 1e-12))


def test_tdpos_two_forms_differ_in_the_gradient_through_the_chosen_kl():
    x = inputs(n=5)
    for stop_gradient in (False, True):
        losses = TDPO(0.3, alpha=0.7, stop_gradient=stop_gradient)(x).losses.sum()
        names = (x.policy_rejected_logps, x.rejected_kl, x.chosen_kl)
        by_logps, by_rejected, by_chosen = torch.autograd.grad(losses, names, allow_unused=True)
        assert torch.allclose(by_rejected, 0.7 * by_logps)
        assert by_chosen is None if stop_gradient else torch.allclose(by_chosen, -by_rejected)


def test_dpo_norm_of_equal_lengths_is_dpo():
    x = inputs()
    equal = dataclasses.replace(x, chosen_lengths=torch.full((4,), 5.0), rejected_lengths=torch.full((4,), 5.0))
    assert torch.allclose(DPONorm(1.5)(equal).losses, DPO(0.3)(x).losses)


def test_exo_is_the_reverse_kl_to_the_labels_and_lowest_there():
    """0 where q = 1 - e. With DPO it shares nothing but this place."""
    x = inputs(n=1)
    e = 0.1
    gap = math.log((1 - e) / e) / 0.3
    at = dataclasses.replace(
        x, policy_rejected_logps=(x.chosen_logratios - gap + x.reference_rejected_logps).detach().requires_grad_()
    )
    losses = EXO(0.3, label_smoothing=e)(at).losses
    assert losses.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), at.policy_rejected_logps)
    assert gradient.item() == pytest.approx(0, abs=1e-12)
    assert (EXO(0.3, label_smoothing=e)(inputs(n=50)).losses > 0).all()


def test_nca_in_the_chosen_reward_is_lowest_at_log_2_where_dpo_has_no_bound():
    x = inputs(n=1)
    at = dataclasses.replace(
        x, policy_chosen_logps=(x.reference_chosen_logps + math.log(2) / 0.3).detach().requires_grad_()
    )
    (gradient,) = torch.autograd.grad(NCA(0.3)(at).losses.sum(), at.policy_chosen_logps)
    assert gradient.item() == pytest.approx(0, abs=1e-12)


def symmpo_as_published(u: dict[str, float], beta: float, lam: float) -> float:
    """The authors' loss of two prompts, with y_2 for y_l: `u[a + b]` is that of completion a to prompt b."""
    z_1, z_2 = u["11"] - u["21"], u["22"] - u["12"]
    loss = -math.log(sigmoid(beta * (u["11"] - u["21"])))
    loss -= lam * (math.log(sigmoid(beta * z_1)) + math.log(sigmoid(beta * z_2)))
    loss -= math.log(sigmoid(beta * u["11"])) + math.log(sigmoid(beta * u["22"]))
    return loss + 1e-4 * (z_1 - z_2) ** 2


@pytest.mark.parametrize("lam", [0.5, 0.2])
def test_symmpo_is_the_mean_of_the_published_loss_over_both_orders(lam):
    """Loss and gradient, of the two linked pairs together; another lambda up to a factor on the whole."""
    factor = 0.5 + lam
    objective = SymMPO(0.1, anchor_weight=1 / factor, consistency_weight=1e-4 / factor)
    x = inputs(objective, n=4, scale=20.0)
    losses = objective(x).losses.view(2, 2).sum(1)
    rows = pairs(x)
    for k in range(2):
        (w_1, l_1), (w_2, l_2) = map(ratios, rows[2 * k : 2 * k + 2])
        orders = {"11": w_1, "21": l_1, "22": w_2, "12": l_2}, {"11": w_2, "21": l_2, "22": w_1, "12": l_1}
        mean = sum(symmpo_as_published(u, 0.1, lam) for u in orders) / 2
        assert factor * losses[k].item() == pytest.approx(mean, rel=1e-12)

    (gradient,) = torch.autograd.grad(losses.sum(), x.policy_chosen_logps)
    u_w, u_l = x.chosen_logratios.detach(), x.rejected_logratios.detach()
    z = u_w - u_l
    gaps = z - z.view(2, 2).flip(1).flatten()
    c = objective.consistency_weight
    expected = -0.1 * torch.sigmoid(-0.1 * z) - 0.1 * objective.anchor_weight * torch.sigmoid(-0.1 * u_w) + 2 * c * gaps
    assert torch.allclose(gradient, expected, rtol=1e-12)


def test_symmpo_alone_is_dpo_with_an_anchor():
    """Without its third term, which a pair without a partner has not either."""
    x = inputs(n=5)
    parts = SymMPO(0.3, anchor_weight=0.0, consistency_weight=0.0)(x).losses
    assert torch.allclose(parts, DPO(0.3)(x).losses, rtol=1e-12)
    with_third = SymMPO(0.3, anchor_weight=0.0, consistency_weight=1.0)(x).losses
    assert with_third[4] == parts[4]
    assert (with_third[:4] > parts[:4]).all()
    assert SymMPO(0.3, anchor_weight=0.5).step0_loss == pytest.approx(1.5 * math.log(2))


def test_bco_bounds_dpo_from_above():
    """The paper's claim, for every shift: -log sigma(a - d) - log sigma(d - b) >= -log sigma(a - b)."""
    x = inputs(n=50)
    for mean in (-3.0, 0.0, 3.0):
        state = {"mean": torch.tensor(mean).double(), "steps": torch.tensor(9.0).double()}
        assert (BCO(0.3)(dataclasses.replace(x, state=state)).losses > DPO(0.3)(x).losses).all()


def test_bcos_shift_is_the_mean_over_the_steps_so_far():
    """As the running moments of earlier versions of TRL: an average of the steps' means, this one included."""
    objective = BCO(0.3)
    state, step_means = objective.initial_state(), []
    for seed, n in ((0, 4), (1, 7), (2, 5)):
        x = dataclasses.replace(inputs(n=n, seed=seed), state=state)
        rewards = [[0.3 * u for u in ratios(p)] for p in pairs(x)]
        step_means.append(sum(sum(r) for r in rewards) / (2 * n))
        shift = sum(step_means) / len(step_means)
        output = objective(x)
        expected = [-math.log(sigmoid(w - shift)) - math.log(sigmoid(shift - l)) for w, l in rewards]
        assert output.losses.tolist() == pytest.approx(expected)
        state = output.state
        assert state["mean"].item() == pytest.approx(shift)
    assert state["steps"].item() == 3
    assert BCO(0.3, shift="none").initial_state() == {}


def test_aot_by_hand():
    """The lists sorted in plain Python; the losses in the sorted order, which is not the pairs'."""
    x = inputs(n=7)
    policy = sorted(p["policy_chosen_logps"] - p["policy_rejected_logps"] for p in pairs(x))
    reference = sorted(p["reference_chosen_logps"] - p["reference_rejected_logps"] for p in pairs(x))
    chosen, rejected = sorted(ratios(p)[0] for p in pairs(x)), sorted(ratios(p)[1] for p in pairs(x))
    for objective, (upper, lower) in ((AOT(0.3), (policy, reference)), (AOTUnpaired(0.3), (chosen, rejected))):
        expected = [-math.log(sigmoid(0.3 * (a - b))) for a, b in zip(upper, lower, strict=True)]
        assert sorted(objective(x).losses.tolist()) == pytest.approx(sorted(expected))


def test_aot_of_one_pair_is_dpo_and_ties_have_a_finite_gradient():
    single = inputs(n=1)
    for objective in (AOT(0.3), AOTUnpaired(0.3)):
        assert torch.allclose(objective(single).losses, DPO(0.3)(single).losses)
        zeros = [torch.zeros(5, requires_grad=True) for _ in range(4)]
        names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
        x = PairInputs(**dict(zip(names, zeros, strict=True)))
        gradients = torch.autograd.grad(objective(x).losses.sum(), zeros[:2])
        assert torch.allclose(gradients[0], torch.full((5,), -0.15))
        assert torch.allclose(gradients[1], torch.full((5,), 0.15))


def test_aot_unpaired_does_not_see_who_belongs_to_whom():
    x = inputs(n=6)
    other = dataclasses.replace(
        x,
        policy_rejected_logps=x.policy_rejected_logps.roll(2),
        reference_rejected_logps=x.reference_rejected_logps.roll(2),
    )
    assert torch.allclose(AOTUnpaired(0.3)(x).losses, AOTUnpaired(0.3)(other).losses)
    assert not torch.allclose(AOT(0.3)(x).losses, AOT(0.3)(other).losses)


def test_dpop_holds_the_chosen_completion_where_dpo_gives_it_up():
    """Chosen and rejected both fall by 2 nats: DPO's gradient is the same on both, DPOP's pulls the chosen up."""
    x = moved(inputs(DPO(0.3)), policy_chosen_logps=0.0)
    x = dataclasses.replace(
        x,
        policy_chosen_logps=(x.reference_chosen_logps - 2).requires_grad_(),
        policy_rejected_logps=(x.reference_rejected_logps - 2).requires_grad_(),
    )
    chosen, rejected = torch.autograd.grad(
        DPOP(0.3, penalty=50.0)(x).losses.sum(), [x.policy_chosen_logps, x.policy_rejected_logps]
    )
    assert torch.allclose(chosen, -51 * rejected)
    # Above the reference the penalty is idle.
    above = moved(x, policy_chosen_logps=3.0)
    assert torch.allclose(DPOP(0.3)(above).losses, DPO(0.3)(above).losses)


def test_r_dpo_pushes_less_where_the_chosen_completion_is_longer():
    x = inputs(n=6)  # lengths 1 to 6 against 6 to 1
    (gradient,) = torch.autograd.grad(RDPO(0.3, alpha=0.5)(x).losses.sum(), x.policy_chosen_logps)
    (plain,) = torch.autograd.grad(DPO(0.3)(x).losses.sum(), x.policy_chosen_logps)
    longer = x.chosen_lengths > x.rejected_lengths
    assert (gradient.abs() < plain.abs()).tolist() == longer.tolist()


def test_discopop_joins_two_losses():
    """For a wrong pair the logistic loss, for a right one the exponential one, each up to what tau lets through."""
    x = inputs(n=8)
    z = (0.3 * (x.chosen_logratios - x.rejected_logratios)).detach()
    losses = DiscoPOP(0.3, tau=1e-4)(x).losses
    assert torch.allclose(losses, torch.where(z < 0, -logsigmoid(z), torch.exp(-z)))
    assert torch.allclose(losses[z > 0], GPO(0.3, "exponential")(x).losses[z > 0])


@pytest.mark.parametrize(("tau", "towards"), [(0.05, "rejected"), (0.2, "chosen")])
def test_at_the_reference_discopop_prefers_a_side_by_its_tau(tau, towards):
    """Its slope in z is (1 - log 2) / (4 tau) - 3 / 4 there."""
    x = inputs(n=3)
    logps = x.reference_chosen_logps.detach().clone().requires_grad_()
    at_reference = dataclasses.replace(x, policy_chosen_logps=logps, policy_rejected_logps=x.reference_rejected_logps)
    (slope,) = torch.autograd.grad(DiscoPOP(0.05, tau=tau)(at_reference).losses.sum(), logps)
    expected = torch.full((3,), 0.05 * ((1 - math.log(2)) / (4 * tau) - 0.75), dtype=torch.float64)
    assert torch.allclose(slope, expected)
    assert (slope[0] > 0) == (towards == "rejected")


def test_alpha_dpo_by_hand():
    """The authors' update_and_sync_ref_mean_std and loss, from the state that `inputs` gives."""
    x = inputs(n=5)
    gains, gaps = [], []
    for p in pairs(x):
        u_w, u_l = ratios(p)
        gains.append(u_w / p["chosen_lengths"] - u_l / p["rejected_lengths"])
        gaps.append(means(p)[0] - means(p)[1])
    mean = sum(gains) / 5
    scale = math.sqrt(sum((g - mean) ** 2 for g in gains) / 4)
    mean, scale = 0.9 * 0.5 + 0.1 * mean, 0.9 * 2.0 + 0.1 * scale
    expected = [
        -math.log(sigmoid(2.5 * (gap - ((gain - mean) / scale * 0.2 + 0.6))))
        for gap, gain in zip(gaps, gains, strict=True)
    ]
    output = AlphaDPO(2.5, 0.6)(x)
    assert output.losses.tolist() == pytest.approx(expected)
    assert output.state["mean"].item() == pytest.approx(mean)
    assert output.state["scale"].item() == pytest.approx(scale)


def test_arpo_takes_over_what_its_base_declares():
    for base in (DPO(0.1), SimPO(2.0, 0.5), BCO(0.1), SPPO(0.1, labels="soft")):
        wrapped = ARPO(base)
        assert (wrapped.needs, wrapped.scope, wrapped.step0_loss) == (base.needs, base.scope, base.step0_loss)
        assert (wrapped.reward_range, wrapped.learning_rates) == (base.reward_range, base.learning_rates)
        assert wrapped.name == f"arpo_{base.name}"
        x = inputs(wrapped)
        assert torch.equal(wrapped(x).chosen_scores, base(x).chosen_scores)
        assert torch.equal(wrapped(x).rejected_scores, base(x).rejected_scores)
        assert not wrapped(x).diagnostics["rejection"].requires_grad


def test_arpos_factor_rises_from_below_0_to_1():
    """Equal completions: 0.9 - 1. From |d| = log(2 / 0.9) / 0.4, about 2 nats a token, on: 1."""
    ones = torch.ones(4).double()
    x = dataclasses.replace(
        inputs(),
        policy_chosen_logps=-torch.tensor([1.0, 1.0, 3.1, 900.0]).double(),
        policy_rejected_logps=-torch.tensor([1.0, 2.0, 1.0, 1.0]).double(),
        chosen_lengths=ones,
        rejected_lengths=ones,
    )
    expected = [-0.1, 0.9 * math.exp(0.4) - 1, 1.0, 1.0]
    assert ARPO(DPO(0.1)).scale(x).tolist() == pytest.approx(expected)


def test_mappo_wraps_the_new_ones_too():
    x = inputs()
    d = x.chosen_rewards - x.rejected_rewards
    expected = torch.sigmoid(-0.3 * x.chosen_logratios) + torch.sigmoid(d * 0.3 * x.rejected_logratios)
    assert torch.allclose(MaPPO(APOZero(0.3))(x).losses, expected)
    expected = -logsigmoid(0.3 * x.chosen_logratios) - logsigmoid(-d * 0.3 * x.rejected_logratios)
    assert torch.allclose(MaPPO(BCO(0.3, shift="none"))(x).losses, expected)


def test_soft_sppo_at_certain_labels_is_hard_sppo():
    x = inputs()
    certain = dataclasses.replace(x, chosen_rewards=torch.ones(4).double(), rejected_rewards=torch.zeros(4).double())
    assert torch.allclose(SPPO(0.1, labels="soft")(certain).losses, SPPO(0.1)(x).losses)
    assert SPPO(0.1, labels="soft").needs == {"reference", "rewards"}
    assert SPPO(0.1, labels="soft").reward_range == (0.0, 1.0)
    assert SPPO(0.1).needs == {"reference"}
    assert SPPO(0.1).reward_range is None
    assert (MaPPO(SPPO(0.1)).reward_range, MaPPO(SPPO(0.1)).learning_rates) == ((0.0, 1.0), (5e-7, 1e-5))


def test_win_rates_are_those_of_the_authors_script():
    """Rows of the matrix of probabilities, summed and divided by n; the diagonal is 1/2."""
    scores = [0.3, -1.2, 2.0, 0.3]
    matrix = [[1 / (1 + math.exp(b - a)) for b in scores] for a in scores]
    expected = [sum(row) / 4 for row in matrix]
    assert win_rates(scores) == pytest.approx(expected)
    assert sum(win_rates(scores)) == pytest.approx(2)
    row = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "rewards": scores}
    pair = ScoredResponses(win_rates=True)(row)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("c", "b")
    assert (pair.chosen_reward, pair.rejected_reward) == pytest.approx((expected[2], expected[1]))
    every = ScoredResponses(pairing="all", min_gap=1.0, win_rates=True)(row)  # of the scores, not of the rates
    assert {(p.chosen, p.rejected) for p in every} == {("a", "b"), ("d", "b"), ("c", "a"), ("c", "b"), ("c", "d")}


def test_a_swap_of_the_sides_is_known_exactly():
    x = inputs()
    z = 0.3 * (x.chosen_logratios - x.rejected_logratios)
    n = x.chosen_lengths - x.rejected_lengths
    for objective, expected in [
        (RDPO(0.3, alpha=0.2), -(z + 0.2 * n)),
        (EXO(0.3, label_smoothing=0.1), -(2 * torch.sigmoid(z) - 1) * math.log(0.9 / 0.1)),
        (SimPER(), 2 * SimPER()(x).losses),
        (BCO(0.3, shift="none"), -0.3 * (x.chosen_logratios + -x.rejected_logratios)),
    ]:
        difference = objective(x).losses - objective(swapped(x)).losses
        assert torch.allclose(difference, expected.double()), objective


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPOP(0.1, penalty=-1.0),
        lambda: DPOP(0.0),
        lambda: RDPO(0.1, alpha=-0.1),
        lambda: LDDPO(0.1, alpha=1.5),
        lambda: SVPO(0.1, value_weight=-1.0),
        lambda: SVPO(0.1, margin=-0.1),
        lambda: EXO(0.1, label_smoothing=0.0),
        lambda: EXO(0.1, label_smoothing=0.5),
        lambda: BCO(0.1, shift="mean"),
        lambda: AOT(0.1, label_smoothing=0.5),
        lambda: DiscoPOP(0.1, tau=0.0),
        lambda: AlphaPO(2.0, 0.5, alpha=0.0),
        lambda: AlphaDPO(2.0, 0.5, alpha=-1.0),
        lambda: AlphaDPO(2.0, 0.5, momentum=1.0),
        lambda: SLiC(0.0),
        lambda: Budget(0.1, budget=-1.0),
        lambda: Budget(0.1, penalty=-1.0),
        lambda: ARPO(DPO(0.1), strength=0.0),
        lambda: ARPO(DPO(0.1), slope=0.0),
        lambda: SPPO(0.1, labels="maybe"),
    ],
)
def test_values_without_meaning_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
