"""Every objective in conf/objective/, found by glob so that a new one cannot escape; then each one's closed form."""

import dataclasses
import math
import sys
from typing import get_args

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import logsigmoid

from prefopt.config.parse import build
from prefopt.errors import UserError
from prefopt.objectives.__main__ import groups, main, markdown, objectives, rows
from prefopt.objectives.alpha_dpo import AlphaDPO
from prefopt.objectives.alpha_po import AlphaPO
from prefopt.objectives.aot import AOT
from prefopt.objectives.arpo import ARPO
from prefopt.objectives.base import DIFFERENTIABLE, Need, Objective, PairInputs, Pairwise, clamped_exp, concatenate
from prefopt.objectives.bco import BCO
from prefopt.objectives.beta_dpo import BetaDPO
from prefopt.objectives.budget import Budget
from prefopt.objectives.cal_dpo import CalDPO
from prefopt.objectives.cpo import CPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.f_dpo import FDPO
from prefopt.objectives.gpo import FUNCTIONS, GPO
from prefopt.objectives.ipo import IPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.lmpo import LMPO
from prefopt.objectives.madpo import MADPO
from prefopt.objectives.mappo import MaPPO
from prefopt.objectives.margin_matching import MarginMatching
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.orpo import ORPO
from prefopt.objectives.plug_in import PlugIn
from prefopt.objectives.reward import Reward
from prefopt.objectives.robust_dpo import RobustDPO
from prefopt.objectives.rrhf import RRHF
from prefopt.objectives.sft import SFT
from prefopt.objectives.simpo import SimPO
from prefopt.objectives.sppo import SPPO
from prefopt.objectives.symmpo import SymMPO
from prefopt.objectives.tdpo import TDPO
from prefopt.objectives.wpo import WPO
from tests.helpers.tiny import ROOT

CONFIGS = sorted((ROOT / "conf" / "objective").glob("*.yaml"))
DEFAULTS = {name: (objective, node) for name, objective, node in objectives()}
VARIANTS = {
    "dpo-smoothed": DPO(0.3, label_smoothing=0.1),
    "dpo-nll": DPO(0.3, nll_weight=0.1),
    "simpo-sums": SimPO(2.0, 0.5, length_normalize=False),
    "simpo-nll": SimPO(2.0, 0.5, nll_weight=0.1, nll_per="own_token"),
    "cpo-chosen_token": CPO(0.1, nll_weight=1.0, nll_per="chosen_token"),
    "ipo-means": IPO(0.1, length_normalize=True),
    "reward-soft": Reward("soft", 2.2),
    "rrhf-own_token": RRHF(nll_per="own_token"),
    "mmpo-length": MMPO(0.1, length_normalize=True),
    "mmpo-entropy": MMPO(0.1, entropy_bonus=True),
    "mmpo-entropy-length": MMPO(0.1, entropy_bonus=True, length_normalize=True),
    "mmpo-no-auxiliary": MMPO(0.1, auxiliary_weight=0.0),
    "mmpo-step": MMPO(0.1, auxiliary_weight=0.0, normalization="step"),
    "mmpo-raw": MMPO(0.1, normalization="none"),
    "f_dpo-forward": FDPO(0.1, "forward_kl"),
    "f_dpo-alpha": FDPO(0.1, "alpha", 0.5),
    "kto-own": KTO(0.1, reference_point="own"),
    "mappo-simpo": MaPPO(SimPO(2.0, 0.5)),
    "beta_dpo-reward": BetaDPO(0.1, "reward"),
    "mappo-beta_dpo": MaPPO(BetaDPO(0.1)),
    "bco-none": BCO(0.1, shift="none"),
    "wpo-free": WPO(0.1, max_weight=None),
    "tdpo-1": TDPO(0.1, alpha=1.0, stop_gradient=False),
    "aot-smoothed": AOT(0.1, label_smoothing=0.1),
    "alpha_po-negative": AlphaPO(2.0, 0.5, alpha=-0.5),
    "budget-0": Budget(0.1, budget=0.0),
    "sppo-soft": SPPO(0.1, labels="soft"),
    "arpo-dpo": ARPO(DPO(0.1)),
} | {f"gpo-{function}": GPO(0.1, function) for function in FUNCTIONS}
# Those on groups: test_groupwise.py.
OBJECTIVES = {name: o for name, (o, _) in DEFAULTS.items() if "others" not in o.completions} | VARIANTS
every = pytest.mark.parametrize("objective", [pytest.param(o, id=name) for name, o in OBJECTIVES.items()])
pairwise = pytest.mark.parametrize(
    "objective", [pytest.param(o, id=name) for name, o in OBJECTIVES.items() if isinstance(o, Pairwise)]
)


def inputs(objective: Objective | None = None, n: int = 4, scale: float = 10.0, seed: int = 0) -> PairInputs:
    """Random `n` pairs in float64, with what `objective` declares (all of it for None)."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return -scale * torch.rand(n, generator=generator, dtype=torch.float64)

    needs = objective.needs if objective else frozenset(get_args(Need))
    values = {"chosen_lengths": torch.arange(1, n + 1).double(), "rejected_lengths": torch.arange(n, 0, -1).double()}
    values["mean_chosen_length"] = values["chosen_lengths"].mean().expand(n)
    logps = [draw() for _ in range(4)]
    if objective is not None and objective.model_kind == "reward_model":
        values |= {"policy_chosen_rewards": logps[0], "policy_rejected_rewards": logps[1]}
    else:
        values |= {"policy_chosen_logps": logps[0], "policy_rejected_logps": logps[1]}
    if "reference" in needs:
        values |= {"reference_chosen_logps": logps[2], "reference_rejected_logps": logps[3]}
    if "rewards" in needs:
        values |= {"chosen_rewards": -draw() / scale, "rejected_rewards": -draw() / scale}
    if "entropies" in needs:
        values |= {"chosen_entropies": -draw(), "rejected_entropies": -draw()}
    if "prefixes" in needs:  # each a share of the whole
        for model in ("policy", *(["reference"] if "reference" in needs else [])):
            for side in ("chosen", "rejected"):
                values[f"{model}_{side}_prefix_logps"] = -draw() / scale * values[f"{model}_{side}_logps"]
    if "token_weights" in needs:
        for model in ("policy", *(["reference"] if "reference" in needs else [])):
            for side in ("chosen", "rejected"):
                values[f"{model}_{side}_weighted_logps"] = 1.5 * draw()
    if "values" in needs:
        values |= {"policy_chosen_values": -draw() / scale, "policy_rejected_values": draw() / scale}
    if "on_policy" in needs:
        values |= {"chosen_on_policy": -draw() / scale, "rejected_on_policy": draw() / scale}
    if "sequential_kl" in needs:
        values |= {"chosen_kl": -draw(), "rejected_kl": -draw()}
    if "mismatched" in needs:
        values |= {"mismatched_chosen_logratios": -draw(), "mismatched_rejected_logratios": -draw() / 2}
    if "noise" in needs:
        values |= {"noise": -draw() / scale}
    state = objective.initial_state() if objective else {"mean": torch.tensor(0.5), "scale": torch.tensor(2.0)}
    x = PairInputs(**values, state=state)
    for name in set(DIFFERENTIABLE) & set(x.tensors()):
        getattr(x, name).requires_grad_()
    return x


def swapped(x: PairInputs) -> PairInputs:
    """Chosen and rejected exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}

    def mirror(name: str) -> str:
        if name == "mean_chosen_length":  # in `inputs` the same on both sides
            return name
        return "_".join(other.get(part, part) for part in name.split("_"))

    return PairInputs(**{mirror(name): value for name, value in x.tensors().items()}, state=x.state)


def moved(x: PairInputs, **shifts: float) -> PairInputs:
    """`x` with a constant added to the named tensors."""
    return dataclasses.replace(x, **{name: getattr(x, name) + shift for name, shift in shifts.items()})


@every
def test_gradient_is_right_in_float64(objective, monkeypatch):
    """Statistics that an objective detaches are constants to its gradient, so the numerical one must not move them:
    what `detach` gave at the point itself is given again around it."""
    x = inputs(objective, n=5)
    names = [name for name in DIFFERENTIABLE if name in x.tensors()]
    detach, seen = torch.Tensor.detach, []

    def losses(*values):
        replayed = iter(list(seen))

        def frozen(tensor):
            value = next(replayed, None)
            if value is None:
                value = detach(tensor).clone()
                seen.append(value)
            return value

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", frozen)
            return objective(dataclasses.replace(x, **dict(zip(names, values, strict=True)))).losses

    tensors = [getattr(x, name) for name in names]
    losses(*tensors)
    assert torch.autograd.gradcheck(losses, tensors)


@every
@pytest.mark.parametrize("chosen", [1e4, 0.0, -1e4])
@pytest.mark.parametrize("rejected", [1e4, 0.0, -1e4])
def test_finite_at_extreme_scores(objective, chosen, rejected):
    """float32, with |log-ratio| (or |reward|) up to 1e4. A log-probability is never positive, so for a large log-ratio
    the reference is far down."""
    x = inputs(objective, scale=1.0).map(lambda t: t.detach().float())
    for side, shift in (("chosen", chosen), ("rejected", rejected)):
        model = "policy" if shift < 0 else "reference"
        if objective.model_kind == "reward_model":
            x = moved(x, **{f"policy_{side}_rewards": shift})
        else:
            names = [f"{model}_{side}_{kind}" for kind in ("logps", "prefix_logps", "weighted_logps")]
            x = moved(x, **{name: -abs(shift) for name in names if name in x.tensors()})
    leaves = [getattr(x, name).requires_grad_() for name in DIFFERENTIABLE if name in x.tensors()]
    output = objective(x)
    assert output.losses.isfinite().all()
    for gradient in torch.autograd.grad(output.losses.sum(), leaves, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    for value in [*output.diagnostics.values(), *output.state.values()]:
        assert value.isfinite().all()


@every
def test_a_pair_scope_loss_does_not_look_at_other_pairs(objective):
    x, n = inputs(objective), 4
    whole = objective(x).losses
    single = torch.cat([objective(x.map(lambda t, i=i: t[i : i + 1])).losses for i in range(n)])
    assert torch.equal(whole, single) == (objective.scope == "pair")


@every
def test_needs_are_exactly_what_is_read(objective):
    """It works without what it does not declare (`inputs` leaves that out), and not without what it declares."""
    needed = {"reference": "reference_", "rewards": "_rewards", "entropies": "_entropies", "noise": "noise"} | {
        "mismatched": "mismatched_",
        "on_policy": "_on_policy",
        "prefixes": "_prefix_",
        "token_weights": "_weighted_",
        "values": "_values",
        "sequential_kl": "_kl",
    }
    x = inputs(objective)
    assert objective(x).losses.isfinite().all()
    for need in objective.needs:
        kept = ["policy_chosen_logps", "policy_rejected_logps", "policy_chosen_rewards", "policy_rejected_rewards"]
        without = {name: None for name in x.tensors() if needed[need] in name and name not in kept}
        assert without
        with pytest.raises((TypeError, AttributeError)):
            objective(dataclasses.replace(x, **without))


@every
def test_scores_and_diagnostics_carry_no_gradient_and_have_their_shapes(objective):
    output = objective(inputs(objective))
    assert output.losses.shape == (4,)
    for scores in (output.chosen_scores, output.rejected_scores):
        if objective.completions == ("chosen", "rejected"):
            assert scores.shape == (4,)
            assert not scores.requires_grad
        else:
            assert scores is None
    for value in output.diagnostics.values():
        assert value.shape in ((), (4,))
        assert not value.requires_grad
    assert output.state.keys() == objective.initial_state().keys()
    assert all(value.shape == () and not value.requires_grad for value in output.state.values())


@every
def test_step0_loss_is_what_equal_policy_and_reference_give(objective):
    x = inputs(objective)
    if objective.model_kind == "reward_model":
        x = dataclasses.replace(x, policy_rejected_rewards=x.policy_chosen_rewards)
    elif x.has_reference:
        x = dataclasses.replace(
            x, **{name: getattr(x, name.replace("reference", "policy")) for name in x.tensors() if "reference_" in name}
        )
    zeros = {n: torch.zeros(4).double() for n in x.tensors() if n.startswith("mismatched") or n.endswith("_kl")}
    x = dataclasses.replace(x, **zeros)
    losses = objective(x).losses
    if objective.step0_loss is None:
        # Not left out by mistake: losses differ between pairs, or are no constant between steps.
        assert losses.std() > 1e-6
    else:
        assert losses.tolist() == pytest.approx([objective.step0_loss] * 4)
        output = objective(x)
        assert torch.equal(output.chosen_scores, output.rejected_scores)  # all tie, whatever the data


@pairwise
def test_a_swap_exchanges_the_scores(objective):
    x = inputs(objective)
    if isinstance(objective, MMPO):  # its margin is on the chosen side alone
        objective = dataclasses.replace(objective, margin=0.0)
    output, mirrored = objective(x), objective(swapped(x))
    assert torch.equal(output.chosen_scores, mirrored.rejected_scores)
    assert torch.equal(output.rejected_scores, mirrored.chosen_scores)


def test_a_swap_mirrors_logistic_losses():
    """-log sigma(z) + log sigma(-z) = -z, so what a swap changes is known exactly."""
    x = inputs()
    u_w, u_l = x.chosen_logratios, x.rejected_logratios
    for objective, expected in [
        (DPO(0.3), -0.3 * (u_w - u_l)),
        (DPO(0.3, label_smoothing=0.2), -0.3 * (1 - 2 * 0.2) * (u_w - u_l)),
        (RobustDPO(0.3, 0.2), -0.3 * (u_w - u_l) / (1 - 2 * 0.2)),
        (CPO(0.3, nll_weight=0.0), -0.3 * (x.policy_chosen_logps - x.policy_rejected_logps)),
        (IPO(0.3), -2 * (u_w - u_l) / 0.3),  # (d - t)^2 - (-d - t)^2 = -4 d t, t = 1 / (2 beta)
        (MMPO(0.3, margin=0.0, auxiliary_weight=0.0), torch.zeros(4)),  # the marginal likelihood has no sides
    ]:
        difference = objective(x).losses - objective(swapped(x)).losses
        assert torch.allclose(difference, expected.double()), objective


@pairwise
def test_log_ratios_are_all_that_counts_where_there_is_a_reference(objective):
    """A constant added to policy and reference changes nothing, except where the likelihood itself counts."""
    if "reference" not in objective.needs:
        pytest.skip("no reference")
    x = inputs(objective)
    both = moved(x, policy_chosen_logps=-3.0, reference_chosen_logps=-3.0)
    unchanged = torch.allclose(objective(x).losses, objective(both).losses)
    # MMPO is a likelihood, and alpha-DPO compares likelihoods; its reference is in the margin alone.
    assert unchanged == (not isinstance(objective, MMPO | AlphaDPO) and not objective.nll_weight)


# Only the difference of the two sides counts: a constant on both (a prompt's partition function) cancels. Not so in:
SHIFT_SENSITIVE = {
    *("dpo-nll", "simpo", "simpo-nll", "ipo-means", "cpo", "cpo-chosen_token", "f_dpo", "f_dpo-forward"),
    *("f_dpo-alpha", "cal_dpo", "lmpo", "sppo-soft", "apo_zero", "apo_down", "nca", "bco-none", "budget", "budget-0"),
    *("dpop", "dpo_norm", "simper", "alpha_po", "alpha_po-negative", "alpha_dpo", "slic"),
    *("sppo", "orpo", "kto", "kto-own", "rrhf", *(name for name in OBJECTIVES if name.startswith("mmpo"))),
}
SHIFT_INVARIANT = {
    *("dpo", "dpo-smoothed", "beta_dpo", "beta_dpo-reward", "ipo", "madpo", "margin_matching", "robust_dpo", "gpo"),
    *(
        "wpo",
        "ld_dpo",
        "tis_dpo",
        "svpo",
        "tdpo",
        "tdpo-1",
        "simpo-sums",
        "r_dpo",
        "exo",
        "aot",
        "aot-smoothed",
        "aot_unpaired",
        "discopop",
    ),
    *(f"gpo-{function}" for function in FUNCTIONS),
}


@pytest.mark.parametrize("name", [name for name, o in OBJECTIVES.items() if isinstance(o, Pairwise)])
def test_a_constant_on_both_sides_cancels_where_it_should(name):
    objective = OBJECTIVES[name]
    x = inputs(objective)
    both = moved(x, policy_chosen_logps=-3.0, policy_rejected_logps=-3.0)
    unchanged = torch.allclose(objective(x).losses, objective(both).losses)
    assert unchanged if name in SHIFT_INVARIANT else not (unchanged and name in SHIFT_SENSITIVE)


@pairwise
def test_mappo_at_a_gap_of_1_is_its_base_bit_for_bit(objective):
    x = inputs(objective)
    ones = dataclasses.replace(x, chosen_rewards=torch.ones(4).double(), rejected_rewards=torch.zeros(4).double())
    if "rewards" in objective.needs:
        x = ones
    base, wrapped = objective(x), MaPPO(objective)(ones)
    assert torch.equal(base.losses, wrapped.losses)
    leaves = [getattr(x, name) for name in DIFFERENTIABLE if name in x.tensors()]
    both = (torch.autograd.grad(o.losses.sum(), leaves, allow_unused=True) for o in (base, wrapped))
    for a, b in zip(*both, strict=True):
        assert a is b is None or torch.equal(a, b)


@pairwise
def test_the_nll_term_is_what_it_says(objective):
    x = inputs(objective)
    without = dataclasses.replace(objective, nll_weight=0.0)(x).losses
    for per, tokens in (("pair", 1), ("own_token", x.chosen_lengths)):
        losses = dataclasses.replace(objective, nll_weight=0.7, nll_per=per)(x).losses
        assert torch.allclose(losses - without, -0.7 * x.policy_chosen_logps / tokens)
    losses = dataclasses.replace(objective, nll_weight=0.7, nll_per="chosen_token")(x).losses
    mean_over_tokens = -x.policy_chosen_logps.sum() / (1 + 2 + 3 + 4)  # the lengths
    assert torch.allclose((losses - without).mean(), 0.7 * mean_over_tokens)


@pytest.mark.parametrize("name", DEFAULTS)
def test_yaml_opens_with_its_command_and_lists_every_field(name):
    config = ROOT / "conf" / "objective" / f"{name}.yaml"
    objective, node = DEFAULTS[name]
    assert config.read_text().startswith(f"# python -m prefopt.train objective={name}")
    assert set(node) - {"_target_"} == {f.name for f in dataclasses.fields(objective)}
    assert objective.name == (f"{name}_{objective.base.name}" if isinstance(objective, PlugIn) else name)
    assert objective.equation
    assert objective.paper


@pytest.mark.parametrize("name", DEFAULTS)
def test_unknown_fields_are_refused(name):
    node = OmegaConf.merge(DEFAULTS[name][1], {"nonsense": 1})
    with pytest.raises(UserError, match=r"unknown key objective\.nonsense"):
        build(node, Objective, "objective")


def test_an_objective_takes_no_key_of_another():
    node = OmegaConf.merge(DEFAULTS["ipo"][1], {"label_smoothing": 0.1})
    with pytest.raises(UserError, match=r"unknown key objective\.label_smoothing"):
        build(node, Objective, "objective")
    with pytest.raises(UserError, match="alpha must be null unless divergence=alpha"):
        build(OmegaConf.merge(DEFAULTS["f_dpo"][1], {"alpha": 0.3}), Objective, "objective")
    with pytest.raises(UserError, match=r"unknown key objective\.base\.gamma"):
        build(OmegaConf.merge(DEFAULTS["mappo"][1], {"base": {"gamma": 1.0}}), Objective, "objective")


def test_the_listing_names_everything():
    listed = {row[0]: row for row in rows()}
    assert set(listed) == set(DEFAULTS) == {config.stem for config in CONFIGS}
    assert f"any of {len(listed)} objectives" in (ROOT / "README.md").read_text()
    assert listed["mappo"][2:5] == ("reference, rewards", "pair", "base=DPO")
    assert listed["madpo"][4].startswith("beta=0.1, c_max=2, c_min=null")
    assert listed["cpo"][4] == "beta=0.1, nll_weight=0.2, nll_per=pair"
    table = markdown().splitlines()[-len(listed) - 2 :]
    assert table[0].startswith("| objective | loss per pair |")
    assert [row.split("`")[1] for row in table[2:]] == [row[0] for row in rows()]


def test_the_groups_answer_what_they_ask():
    """Each objective is in some group with its phrase, in several where several questions lead to it."""
    members = {group.heading: {listed.name for listed in found} for group, found in groups()}
    assert set.union(*members.values()) == set(DEFAULTS)
    assert members["Without a reference model"] >= {"simpo", "cpo", "orpo", "rrhf", "slic", "simper", "arpo"}
    assert members["With rewards in the rows"] == {"madpo", "mappo", "margin_matching", "svpo"}
    assert members["For noisy labels"] >= {"robust_dpo", "margin_matching"}
    assert members["With weights of tokens in the rows"] == {"tis_dpo"}
    assert members["On all responses to a prompt"] == {"grpo", "rloo"}
    assert members["Online"] == {"mappo", "sppo", "grpo", "rloo"}
    assert members["Not of preferences"] == {"sft", "reward"}
    alone = members["DPO and its relatives"]
    assert {"dpo", "dpop", "apo_zero", "mmpo"} <= alone
    assert all(alone.isdisjoint(others) for heading, others in members.items() if others is not alone)
    shipped = [o for o, _ in DEFAULTS.values() if type(o).__module__.startswith("prefopt.objectives.")]
    assert not [o.name for o in shipped if len(o.summary) > 120]
    assert "* `dpop`: DPO that does not let" in markdown()


def test_one_objective_is_shown_in_full(monkeypatch, capsys):
    def shown(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prefopt.objectives", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        main()
        return capsys.readouterr().out

    text = shown("madpo")
    assert max(map(len, text.splitlines())) <= 80
    assert "        c(h) = c_min" in text or "    c(h) = c_min" in text  # a formula keeps its line
    assert "needs: reference, rewards" in text
    assert "c_max: 2.0 # largest amplification" in text
    assert "1e-06 for all weights, 1e-05 for an adapter" in text
    listed = shown()
    assert max(map(len, listed.splitlines())) <= 80
    assert all(f" {name} " in listed for name in DEFAULTS)
    with pytest.raises(SystemExit) as stop:
        shown("dpopp")
    assert stop.value.code == 2
    assert "did you mean dpop?" in capsys.readouterr().err


def test_exp_until_is_exp_then_its_tangent():
    x = torch.tensor([-5.0, 0.0, 39.9, 40.0, 45.0], dtype=torch.float64, requires_grad=True)
    y = clamped_exp(x)
    y.sum().backward()
    assert torch.allclose(y[:4], x[:4].exp())
    assert y[4].item() == pytest.approx(6 * math.exp(40))
    assert x.grad[4].item() == pytest.approx(math.exp(40))
    assert torch.allclose(x.grad[:3], x[:3].exp())


def test_concatenate_and_map():
    parts = [inputs(seed=seed) for seed in (0, 1)]
    whole = concatenate(parts)
    assert whole.tensors().keys() == parts[0].tensors().keys()
    assert torch.equal(whole.map(lambda t: t[4:]).reference_chosen_logps, parts[1].reference_chosen_logps)


# --- The baselines, by hand -----------------------------------------------------------------------------------------


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def pairs(x: PairInputs) -> list[dict[str, float]]:
    """Each pair's numbers as plain floats."""
    return [{name: value[i].item() for name, value in x.tensors().items()} for i in range(len(x.chosen_lengths))]


def ratios(p: dict[str, float]) -> tuple[float, float]:
    return (
        p["policy_chosen_logps"] - p["reference_chosen_logps"],
        p["policy_rejected_logps"] - p["reference_rejected_logps"],
    )


def means(p: dict[str, float]) -> tuple[float, float]:
    return p["policy_chosen_logps"] / p["chosen_lengths"], p["policy_rejected_logps"] / p["rejected_lengths"]


def by_hand(formula, x: PairInputs) -> list[float]:
    return [formula(p) for p in pairs(x)]


def dpo(p, beta, e=0.0):
    u_w, u_l = ratios(p)
    z = beta * (u_w - u_l)
    return -(1 - e) * math.log(sigmoid(z)) - e * math.log(sigmoid(-z))


def orpo(p, weight):
    odds = [math.exp(m) / (1 - math.exp(m)) for m in means(p)]
    return -means(p)[0] - weight * math.log(sigmoid(math.log(odds[0] / odds[1])))


def cal_dpo(p, beta, k):
    u_w, u_l = ratios(p)
    return -math.log(sigmoid(u_w - u_l)) + k * ((u_w - 0.5 / beta) ** 2 + (u_l + 0.5 / beta) ** 2)


def margin_matching(p, beta, gamma):
    q = sigmoid(gamma * (p["chosen_rewards"] - p["rejected_rewards"]))
    z = beta * (ratios(p)[0] - ratios(p)[1])
    return -q * math.log(sigmoid(z)) - (1 - q) * math.log(sigmoid(-z))


def soft_reward(p, gamma):
    q = 1 / (1 + math.exp(-gamma * (p["chosen_rewards"] - p["rejected_rewards"])))  # the authors' chosen_probs
    z = p["policy_chosen_rewards"] - p["policy_rejected_rewards"]
    return -math.log(sigmoid(z)) * q - math.log(sigmoid(-z)) * (1.0 - q)


def madpo(p, beta, c_max, c_min, decay, tau):
    h = p["chosen_rewards"] - p["rejected_rewards"]
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(decay * (abs(h) - tau)))
    w = sigmoid(c * h) / sigmoid(h) if h > -tau else 1.0
    return w * dpo(p, beta)


FORMULAS = {
    "dpo": (DPO(0.3), lambda p: dpo(p, 0.3)),
    "dpo-smoothed": (DPO(0.3, 0.1), lambda p: dpo(p, 0.3, 0.1)),
    "simpo": (SimPO(2.5, 0.55), lambda p: -math.log(sigmoid(2.5 * (means(p)[0] - means(p)[1]) - 1.375))),
    "simpo-sums": (
        SimPO(2.5, 0.55, length_normalize=False),
        lambda p: -math.log(sigmoid(2.5 * (p["policy_chosen_logps"] - p["policy_rejected_logps"]) - 1.375)),
    ),
    "ipo": (IPO(0.2), lambda p: (ratios(p)[0] - ratios(p)[1] - 2.5) ** 2),
    "ipo-means": (
        IPO(0.2, length_normalize=True),
        lambda p: (ratios(p)[0] / p["chosen_lengths"] - ratios(p)[1] / p["rejected_lengths"] - 2.5) ** 2,
    ),
    "cpo": (
        CPO(0.3),
        lambda p: (
            -math.log(sigmoid(0.3 * (p["policy_chosen_logps"] - p["policy_rejected_logps"])))
            - 0.2 * p["policy_chosen_logps"]
        ),
    ),
    "cpo-means": (
        CPO(0.3, nll_weight=1.0, nll_per="own_token"),
        lambda p: -math.log(sigmoid(0.3 * (p["policy_chosen_logps"] - p["policy_rejected_logps"]))) - means(p)[0],
    ),
    "cpo-authors": (  # eight pairs of 1 to 8 tokens: 4.5 on average
        CPO(0.3, nll_weight=1.0, nll_per="chosen_token"),
        lambda p: (
            -math.log(sigmoid(0.3 * (p["policy_chosen_logps"] - p["policy_rejected_logps"])))
            - p["policy_chosen_logps"] / 4.5
        ),
    ),
    "robust_dpo": (RobustDPO(0.3, 0.2), lambda p: (0.8 * dpo(p, 0.3) - 0.2 * dpo(p, -0.3)) / 0.6),
    "cal_dpo": (CalDPO(0.1), lambda p: cal_dpo(p, 0.1, 1.0)),
    "cal_dpo-half": (CalDPO(0.1, calibration_weight=0.5), lambda p: cal_dpo(p, 0.1, 0.5)),
    "sppo": (SPPO(0.1), lambda p: (ratios(p)[0] - 5) ** 2 + (ratios(p)[1] + 5) ** 2),
    "orpo": (ORPO(0.4), lambda p: orpo(p, 0.4)),
    "rrhf": (RRHF(), lambda p: max(0.0, means(p)[1] - means(p)[0]) - p["policy_chosen_logps"]),
    "rrhf-authors": (
        RRHF(nll_per="own_token"),
        lambda p: max(0.0, means(p)[1] - means(p)[0]) - p["policy_chosen_logps"] / p["chosen_lengths"],
    ),
    "margin_matching": (MarginMatching(0.3, 2.0), lambda p: margin_matching(p, 0.3, 2.0)),
    "madpo": (MADPO(0.3, 4.0, None, 0.7, 0.4), lambda p: madpo(p, 0.3, 4.0, 0.25, 0.7, 0.4)),
    "reward": (Reward(), lambda p: -math.log(sigmoid(p["policy_chosen_rewards"] - p["policy_rejected_rewards"]))),
    "reward-soft": (Reward("soft", 2.2), lambda p: soft_reward(p, 2.2)),
    "sft": (SFT(), lambda p: -p["policy_chosen_logps"]),
    "gpo-hinge": (GPO(0.3), lambda p: max(0.0, 1 - 0.3 * (ratios(p)[0] - ratios(p)[1]))),
    "gpo-squared": (GPO(0.3, "squared"), lambda p: (0.3 * (ratios(p)[0] - ratios(p)[1]) - 1) ** 2),
    "gpo-exponential": (GPO(0.3, "exponential"), lambda p: math.exp(-0.3 * (ratios(p)[0] - ratios(p)[1]))),
    "gpo-truncated_quadratic": (
        GPO(0.3, "truncated_quadratic"),
        lambda p: max(0.0, 1 - 0.3 * (ratios(p)[0] - ratios(p)[1])) ** 2,
    ),
    "gpo-savage": (GPO(0.3, "savage"), lambda p: (1 + math.exp(0.3 * (ratios(p)[0] - ratios(p)[1]))) ** -2),
    "gpo-logistic": (GPO(0.3, "logistic"), lambda p: dpo(p, 0.3)),
    "f_dpo-reverse_kl": (FDPO(0.3, "reverse_kl"), lambda p: dpo(p, 0.3)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_closed_forms(name):
    objective, formula = FORMULAS[name]
    for seed in range(3):
        x = inputs(objective if objective.model_kind == "reward_model" else None, n=8, seed=seed)
        assert objective(x).losses.tolist() == pytest.approx(by_hand(formula, x), rel=1e-9)


def test_kto_by_hand():
    """The reference point is the mean log-ratio of the step's mismatched completions, or by name of the pairs' own,
    where that is positive."""
    x = inputs()
    for shift in (20.0, -20.0):
        moved_x = moved(x, reference_chosen_logps=-shift, reference_rejected_logps=-shift)
        moved_x = moved(moved_x, mismatched_chosen_logratios=shift + 3.0, mismatched_rejected_logratios=shift)
        u = [ratios(p) for p in pairs(moved_x)]
        mismatched = [(p["mismatched_chosen_logratios"], p["mismatched_rejected_logratios"]) for p in pairs(moved_x)]
        for name, of in (("mismatched", mismatched), ("own", u)):
            z = max(0.0, sum(a + b for a, b in of) / 8)
            assert (z > 0) == (shift > 0)
            expected = [
                (1.5 * (1 - sigmoid(0.3 * (u_w - z))) + 0.7 * (1 - sigmoid(0.3 * (z - u_l)))) / 2 for u_w, u_l in u
            ]
            output = KTO(0.3, 1.5, 0.7, name)(moved_x)
            assert output.losses.tolist() == pytest.approx(expected)
            assert output.diagnostics["reference_point"].item() == pytest.approx(z)


def test_lmpo_by_hand():
    x = inputs(n=5)
    margins, logits = [], []
    for p in pairs(x):
        n = (p["chosen_lengths"] + p["rejected_lengths"]) / 2
        a_w, a_l = means(p)
        p_w, p_l = math.exp(a_w * n / p["chosen_lengths"]), math.exp(a_l * n / p["rejected_lengths"])
        margins.append((1 - p_w) * (1 - (p_w - p_l) ** 5) / 2)
        logits.append(2.5 * (a_w - a_l) - 2.5 * 0.55)
    mean = sum(margins) / 5
    scale = math.sqrt(sum((m - mean) ** 2 for m in margins) / 4)
    mean, scale = 0.9 * 0.5 + 0.1 * mean, 0.9 * 2.0 + 0.1 * scale  # the state that `inputs` gives
    expected = [-math.log(sigmoid(z - 0.2 * (m - mean) / scale)) for z, m in zip(logits, margins, strict=True)]
    output = LMPO(2.5, 0.55)(x)
    assert output.losses.tolist() == pytest.approx(expected)
    assert output.state["mean"].item() == pytest.approx(mean)
    assert output.state["scale"].item() == pytest.approx(scale)


@pytest.mark.parametrize(
    ("objective", "f"),
    [
        (FDPO(0.3, "reverse_kl"), lambda t: t * t.log()),
        (FDPO(0.3, "forward_kl"), lambda t: -t.log()),
        (FDPO(0.3, "js"), lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log()),
        (FDPO(0.3, "alpha", 0.4), lambda t: (t**0.6 - 0.6 * t - 0.4) / (0.4 * (0.4 - 1))),
    ],
    ids=lambda value: getattr(value, "divergence", ""),
)
def test_f_dpo_compares_the_derivatives_of_its_divergence(objective, f):
    """beta (f'(t_w) - f'(t_l)), with f' taken from f itself by autograd."""
    x = inputs(scale=2.0)
    derivatives = []
    for u in (x.chosen_logratios, x.rejected_logratios):
        t = u.detach().exp().requires_grad_()
        (derivative,) = torch.autograd.grad(f(t).sum(), t)
        derivatives.append(derivative)
    assert torch.allclose(objective(x).losses, -logsigmoid(0.3 * (derivatives[0] - derivatives[1])))


def test_gpo_squared_is_ipo():
    x = inputs()
    assert torch.allclose(GPO(0.4, "squared")(x).losses, 0.4**2 * IPO(0.2)(x).losses)


def test_f_dpo_alpha_tends_to_its_neighbours():
    """alpha 0 is the reverse KL; alpha 1 is the forward KL."""
    x = inputs(scale=2.0)
    assert torch.allclose(FDPO(0.3, "alpha", 1e-6)(x).losses, DPO(0.3)(x).losses, atol=1e-5)
    assert torch.allclose(
        FDPO(0.3, "alpha", 1 - 1e-6)(x).losses, FDPO(0.3, "forward_kl")(x).losses, rtol=1e-4, atol=1e-5
    )


def test_the_hinge_and_robust_losses_expect_what_they_claim():
    """Under labels flipped at the assumed rate, robust DPO's expectation is the clean DPO loss (its Lemma 3.1)."""
    x, e = inputs(), 0.2
    noisy = (1 - e) * RobustDPO(0.3, e)(x).losses + e * RobustDPO(0.3, e)(swapped(x)).losses
    assert torch.allclose(noisy, DPO(0.3)(x).losses)


# --- beta-DPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin_of", ["log_ratio", "reward"])
def test_beta_dpo_by_hand(margin_of):
    """`log_ratio` is the authors' function, `reward` that of MADPO's baseline. Which pairs are drawn is read from the
    output; its probabilities have a test of their own."""
    x = inputs(n=5)
    objective = BetaDPO(0.3, margin_of)
    u = [ratios(p)[0] - ratios(p)[1] for p in pairs(x)]
    margins = u if margin_of == "log_ratio" else [0.3 * d for d in u]
    mean = sum(margins) / 5
    scale = math.sqrt(sum((m - mean) ** 2 for m in margins) / 4)
    running_mean, running_scale = 0.9 * 0.5 + 0.1 * mean, 0.9 * 2.0 + 0.1 * scale
    output = objective(x)
    kept = output.diagnostics["kept"]
    assert kept.sum() == 4
    if margin_of == "log_ratio":
        mean = sum(m for m, k in zip(margins, kept, strict=True) if k) / 4
    beta = max(1e-3, 0.3 * (1 + 0.6 * (mean - running_mean)))
    expected = [-math.log(sigmoid(beta * d)) * 5 / 4 if k else 0.0 for d, k in zip(u, kept, strict=True)]
    assert output.losses.tolist() == pytest.approx(expected)
    assert output.diagnostics["beta_batch"].item() == pytest.approx(beta)
    assert output.state["mean"].item() == pytest.approx(running_mean)
    assert output.state["scale"].item() == pytest.approx(running_scale)
    # Reported with the base beta, whatever the batch's.
    assert torch.allclose(output.chosen_scores, 0.3 * x.chosen_logratios)


def test_beta_dpos_two_margins_differ_by_alpha_over_beta():
    """From a state that fits each of them, with all pairs kept: alpha on beta * u is beta * alpha on u."""
    x = inputs()
    state = {"mean": torch.tensor(0.2).double(), "scale": torch.tensor(2.0).double()}
    of_ratio = BetaDPO(0.3, "log_ratio", alpha=0.03 * 0.3, keep=1.0)(dataclasses.replace(x, state=state))
    scaled = {name: 0.3 * value for name, value in state.items()}
    of_reward = BetaDPO(0.3, "reward", alpha=0.03, keep=1.0)(dataclasses.replace(x, state=scaled))
    assert torch.allclose(of_ratio.losses, of_reward.losses)
    assert of_ratio.diagnostics["beta_batch"].item() != pytest.approx(0.3, rel=1e-3)


def test_beta_dpo_without_its_two_devices_is_dpo():
    x = inputs()
    assert torch.allclose(BetaDPO(0.3, alpha=0.0, keep=1.0)(x).losses, DPO(0.3)(x).losses)


def test_beta_dpo_stays_positive():
    """The published formula goes negative as soon as alpha (mean M - running mean) < -1."""
    x = moved(inputs(), reference_chosen_logps=500.0)
    output = BetaDPO(0.3)(x)
    assert output.diagnostics["beta_batch"].item() == pytest.approx(1e-3)
    assert output.losses.isfinite().all()


def test_beta_dpo_keeps_pairs_in_proportion_to_their_weight():
    """One of two pairs is drawn: the first with probability w_1 / (w_1 + w_2)."""
    objective = BetaDPO(1.0, keep=0.5, momentum=0.0)  # momentum 0: moments of this very batch
    zeros = torch.zeros(3).double()
    gaps = torch.tensor([0.0, 0.3, 2.0]).double()
    x = PairInputs(
        policy_chosen_logps=gaps,
        policy_rejected_logps=zeros,
        reference_chosen_logps=zeros,
        reference_rejected_logps=zeros,
        state=objective.initial_state(),
    )
    weights = torch.exp(-0.5 * ((gaps - gaps.mean()) / gaps.std()) ** 2)
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(draws, 3, generator=generator).double()
    counts = torch.stack([objective.batch(dataclasses.replace(x, noise=u), gaps)[1] for u in noise]).sum(0)
    assert torch.allclose(counts.double() / draws, weights / weights.sum(), atol=0.03)
    assert counts.sum() == draws


# --- MaPPO and MADPO ------------------------------------------------------------------------------------------------


def test_mappo_closed_forms():
    """The four formulas of arXiv 2507.21183, by hand."""
    x = inputs()
    d = x.chosen_rewards - x.rejected_rewards
    u_w, u_l = x.chosen_logratios, x.rejected_logratios
    lp_w, lp_l = x.policy_chosen_logps, x.policy_rejected_logps
    n_w, n_l = x.chosen_lengths, x.rejected_lengths
    for base, expected in [
        (DPO(0.1), -logsigmoid(0.1 * u_w - d * 0.1 * u_l)),
        (SimPO(2.0, 0.5), -logsigmoid(2.0 * lp_w / n_w - d * 2.0 * lp_l / n_l - 1.0)),
        (IPO(0.1), (u_w - d * u_l - 5) ** 2),
        (CPO(0.1), -logsigmoid(0.1 * lp_w - d * 0.1 * lp_l) - 0.2 * lp_w),
    ]:
        assert torch.allclose(MaPPO(base)(x).losses, expected), base


def test_mappo_gradient_of_the_dpo_case():
    """-beta (1 - sigma(z)) (grad lp_w - delta_r grad lp_l)."""
    x = inputs()
    d = x.chosen_rewards - x.rejected_rewards
    MaPPO(DPO(0.3))(x).losses.sum().backward()
    factor = -0.3 * torch.sigmoid(-(0.3 * x.chosen_logratios - d * 0.3 * x.rejected_logratios))
    assert torch.allclose(x.policy_chosen_logps.grad, factor)
    assert torch.allclose(x.policy_rejected_logps.grad, -d * factor)


def test_mappo_takes_over_what_its_base_declares():
    for base in (DPO(0.1), SimPO(2.0, 0.5), BetaDPO(0.1), MMPO(0.1, entropy_bonus=True)):
        wrapped = MaPPO(base)
        assert wrapped.needs == base.needs | {"rewards"}
        assert (wrapped.scope, wrapped.step0_loss, wrapped.derived) == (base.scope, base.step0_loss, base.derived)
        assert wrapped.initial_state().keys() == base.initial_state().keys()
        assert wrapped.name == f"mappo_{base.name}"
        x = inputs()
        assert torch.equal(wrapped(x).chosen_scores, base(x).chosen_scores)
        assert torch.equal(wrapped(x).rejected_scores, base(x).rejected_scores)


def test_madpo_coefficient_and_weight():
    """c falls with |h| from almost c_max through 1 at tau to c_min. The weight is above 1 for right pairs within tau,
    below 1 beyond, below 1 for wrong pairs within tau, and 1 where the reward model is sure that the label is wrong."""
    objective = MADPO(0.1)
    tau = torch.tensor([objective.tau], dtype=torch.float64)
    assert objective.coefficients(tau).item() == pytest.approx(1, abs=1e-12)
    assert objective.coefficients(-tau).item() == pytest.approx(1, abs=1e-12)
    assert objective.weights(tau).item() == pytest.approx(1, abs=1e-12)
    h = torch.linspace(0, 30, 400).double()
    c = objective.coefficients(h)
    assert torch.equal(c, objective.coefficients(-h))
    assert (c.diff() < 0).all()
    assert c[0] < 2
    assert c[0] > 1.99
    assert c[-1] > 0.5
    assert c[-1] < 0.51
    inside, beyond = (h > 0) & (h < tau), h > tau
    w, wrong = objective.weights(h), objective.weights(-h)
    assert (w[inside] > 1).all()
    assert (w[beyond] < 1).all()
    assert (wrong[inside] < 1).all()
    assert (wrong[h >= tau] == 1).all()
    # Monotone in |h| on the wrong side up to where c turns; on the right side it rises from 1 and falls back to it.
    assert objective.weights(torch.zeros(1).double()).item() == 1


def test_madpos_ablation_is_its_two_halves():
    """Each half has MADPO's weight where c is on its side of 1, and DPO's elsewhere."""
    both, amplifies, damps = (MADPO(0.1, only=only) for only in (None, "amplification", "damping"))
    h = torch.linspace(-30, 30, 400).double()
    inside = h.abs() < both.tau
    assert torch.equal(amplifies.weights(h)[inside], both.weights(h)[inside])
    assert torch.equal(damps.weights(h)[~inside], both.weights(h)[~inside])
    assert (amplifies.weights(h)[~inside] == 1).all()
    assert (damps.weights(h)[inside] == 1).all()
    assert (both.weights(h)[inside] != 1).all()


def test_madpo_at_weight_1_is_dpo_bit_for_bit():
    x = inputs()
    x = dataclasses.replace(x, chosen_rewards=torch.zeros(4).double(), rejected_rewards=torch.full((4,), 8.0).double())
    gradients = []
    for objective in (DPO(0.3), MADPO(0.3)):
        output = objective(x)
        gradients.append((output.losses, *torch.autograd.grad(output.losses.sum(), list(policy(x)))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def policy(x: PairInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return x.policy_chosen_logps, x.policy_rejected_logps


# --- MMPO -----------------------------------------------------------------------------------------------------------


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
    for normalization in ("micro_batch", "step"):  # the same mathematics over other pairs
        objective = MMPO(0.5, normalization=normalization)
        assert objective(x).losses.tolist() == pytest.approx(mmpo_by_hand(x, 0.5, 0.9, 1.0))
    assert MMPO(0.5, margin=0.3, auxiliary_weight=0.0)(x).losses.tolist() == pytest.approx(
        mmpo_by_hand(x, 0.5, 0.3, 0.0)
    )


@pytest.mark.parametrize("normalization", ["micro_batch", "none"])
def test_mmpo_gradient_is_theorem_3_2(normalization):
    """d(-logsumexp)/d lp_w = -sigma(s_w - s_l), and the mirror image for lp_l."""
    x = inputs()
    output = MMPO(0.5, auxiliary_weight=0.0, normalization=normalization)(x)
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


@pytest.mark.parametrize("normalization", ["micro_batch", "none"])
def test_mmpo_gradient_ignores_a_constant_in_all_rewards(normalization):
    gradients = []
    for shift in (0.0, 7.0):
        x = inputs()
        shifted = moved(x, reference_chosen_logps=shift, reference_rejected_logps=shift)
        output = MMPO(0.5, normalization=normalization, auxiliary_weight=0.3)(shifted)
        gradients.append(torch.autograd.grad(output.losses.sum(), list(policy(x))))
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
    assert torch.allclose(bonus, 0.5 * (x.chosen_entropies + x.rejected_entropies) / 2)
    bonus = MMPO(0.5, length_normalize=True)(x).losses - MMPO(0.5, length_normalize=True, entropy_bonus=True)(x).losses
    assert torch.allclose(bonus, 0.5 * (x.chosen_entropies / n_w + x.rejected_entropies / n_l) / 2)


def test_soft_labels_of_a_wide_margin_are_hard_ones():
    x = inputs(Reward("soft", 2.2))
    wide = dataclasses.replace(x, chosen_rewards=x.chosen_rewards + 100)
    assert torch.allclose(Reward("soft", 2.2)(wide).losses, Reward()(x).losses)
    (gradient,) = torch.autograd.grad(Reward("soft", 2.2)(x).losses.sum(), x.policy_chosen_rewards)
    z = x.policy_chosen_rewards - x.policy_rejected_rewards  # the loss is lowest where sigma(z) = p
    assert torch.allclose(gradient, torch.sigmoid(z) - torch.sigmoid(2.2 * (x.chosen_rewards - x.rejected_rewards)))


def test_needs_and_scope_follow_the_switches():
    assert Reward().needs == set()
    assert KTO(0.1).needs == {"reference", "mismatched"}
    assert KTO(0.1, reference_point="own").needs == {"reference"}
    assert Reward("soft", 2.2).needs == {"rewards"}
    assert MMPO(0.1).needs == {"reference"}
    assert MMPO(0.1, entropy_bonus=True).needs == {"reference", "entropies"}
    assert SimPO(2.0, 0.5).needs == set()
    scopes = {n: MMPO(0.1, normalization=n).scope for n in ("micro_batch", "step", "none")}
    assert scopes == {"micro_batch": "micro_batch", "step": "step", "none": "pair"}


def test_derived_quantities():
    assert SimPO(2.5, 0.55).derived == {"gamma": pytest.approx(1.375)}
    assert IPO(0.1).derived == {"target_gap": 5}
    assert MaPPO(SimPO(2.0, 0.5)).derived == {"gamma": 1.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(0.0),
        lambda: DPO(0.1, label_smoothing=0.5),
        lambda: DPO(0.1, nll_weight=-1.0),
        lambda: DPO(0.1, nll_weight=1.0, nll_per="mean"),
        lambda: SimPO(-1.0, 0.5),
        lambda: IPO(0.0),
        lambda: CPO(0.0),
        lambda: MMPO(-0.1),
        lambda: MMPO(0.1, auxiliary_weight=-1.0),
        lambda: MMPO(0.1, normalization="batch"),
        lambda: BetaDPO(0.1, margin_of="beta"),
        lambda: BetaDPO(0.1, keep=0.0),
        lambda: BetaDPO(0.1, momentum=1.0),
        lambda: MADPO(0.1, c_max=1.0),
        lambda: MADPO(0.1, c_min=1.0),
        lambda: MADPO(0.1, tau=0.0),
        lambda: MADPO(0.1, only="hard"),
        lambda: FDPO(0.1, "kl"),
        lambda: FDPO(0.1, "alpha"),
        lambda: FDPO(0.1, "js", 0.5),
        lambda: GPO(0.1, "cubic"),
        lambda: CalDPO(0.1, calibration_weight=-1.0),
        lambda: LMPO(2.0, momentum=1.0),
        lambda: MarginMatching(0.1, 0.0),
        lambda: SPPO(0.0),
        lambda: ORPO(0.0),
        lambda: KTO(0.1, desirable_weight=-1.0),
        lambda: KTO(0.1, reference_point="batch"),
        lambda: RobustDPO(0.1, 0.5),
        lambda: TDPO(0.1, alpha=-0.1),
        lambda: SymMPO(0.0),
        lambda: SymMPO(0.1, anchor_weight=-1.0),
        lambda: SymMPO(0.1, consistency_weight=-1.0),
        lambda: Reward("soft"),
        lambda: Reward("soft", 0.0),
        lambda: Reward("hard", 2.2),
        lambda: Reward("margin"),
    ],
)
def test_values_without_meaning_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
