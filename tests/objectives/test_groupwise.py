"""Every objective of conf/objective/ that reads groups; then each one's closed form."""

import dataclasses

import pytest
import torch

from prefopt.objectives.__main__ import objectives
from prefopt.objectives.arpo import ARPO
from prefopt.objectives.base import Objective, PairInputs
from prefopt.objectives.dpo import DPO
from prefopt.objectives.groupwise import GroupInputs, Groupwise
from prefopt.objectives.grpo import GRPO
from prefopt.objectives.mappo import MaPPO
from prefopt.objectives.mmpo import MMPO
from prefopt.objectives.rloo import RLOO
from prefopt.objectives.rrhf import RRHF

OBJECTIVES = {name: objective for name, objective, _ in objectives() if isinstance(objective, Groupwise)} | {
    "rloo-free": RLOO(beta=0.0),
    "grpo-token": GRPO(per="token", scale="none"),
}
every = pytest.mark.parametrize("objective", [pytest.param(o, id=name) for name, o in OBJECTIVES.items()])


def group(objective: Objective, sizes: tuple[int, ...] = (4, 2, 3), seed: int = 0, scale: float = 1.0) -> GroupInputs:
    """Random groups of these sizes in float64, with what `objective` declares, and 0 where there is no response."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    lengths = torch.randint(1, 5, mask.shape, generator=generator) * mask
    is_token = torch.arange(4) < lengths[..., None]

    def tokens() -> torch.Tensor:
        return -scale * torch.rand(is_token.shape, generator=generator, dtype=torch.float64) * is_token

    rewards = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    rewards = torch.stack([rewards.max(1).values, rewards.min(1).values, *rewards.T[2:]], 1) * mask
    values = {"mask": mask, "lengths": lengths.double(), "rewards": rewards, "mean_tokens": torch.tensor(7.0).double()}
    for name in ("policy", *(name for name in ("reference", "initial") if name in objective.needs)):
        of_tokens = tokens()
        values[f"{name}_logps"] = of_tokens.sum(-1)
        if "tokens" in objective.needs:
            values[f"{name}_tokens"] = of_tokens
    return GroupInputs(**values)


def part(x: GroupInputs, i: int, size: int) -> GroupInputs:
    """Group `i` alone, without empty places."""
    return x.map(lambda t: t if t.dim() == 0 else t[i : i + 1, :size])


@every
def test_gradient_is_right_in_float64(objective):
    x = group(objective)
    name = "policy_tokens" if "tokens" in objective.needs else "policy_logps"
    leaf = getattr(x, name).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: objective.losses(dataclasses.replace(x, **{name: value})), [leaf])


@every
def test_a_group_does_not_look_at_others_nor_at_empty_places(objective):
    x, sizes = group(objective), (4, 2, 3)
    single = torch.cat([objective.losses(part(x, i, size)) for i, size in enumerate(sizes)])
    torch.testing.assert_close(objective.losses(x), single, rtol=1e-12, atol=1e-12)
    for name, value in objective.diagnostics(x).items():
        assert value.shape == (3,), name
        of_parts = torch.cat([objective.diagnostics(part(x, i, size))[name] for i, size in enumerate(sizes)])
        torch.testing.assert_close(value, of_parts, rtol=1e-12, atol=1e-12)


@every
def test_the_order_of_the_responses_is_of_no_account(objective):
    x, order = group(objective, (4, 4)), [2, 0, 3, 1]
    mixed = x.map(lambda t: t if t.dim() == 0 else t[:, order])
    torch.testing.assert_close(objective.losses(mixed), objective.losses(x), rtol=1e-12, atol=1e-12)


@every
def test_needs_are_exactly_what_is_read(objective):
    x = group(objective)
    assert objective.losses(x).isfinite().all()
    fields = {f.name for f in dataclasses.fields(GroupInputs)}
    for need in objective.needs:
        names = [name for name in fields if name.startswith(need) or name.endswith(need)]
        with pytest.raises((TypeError, AttributeError)):
            objective.losses(dataclasses.replace(x, **dict.fromkeys(names)))


@every
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_finite_at_extreme_ratios(objective, shift):
    x = group(objective).map(lambda t: t.float() if t.is_floating_point() else t)
    models = [name for name in ("policy", "reference", "initial") if getattr(x, f"{name}_logps") is not None]
    for model in models:
        name = f"{model}_tokens" if "tokens" in objective.needs else f"{model}_logps"
        moved = dataclasses.replace(x, **{name: getattr(x, name) + shift})
        key = name.replace(model, "policy")
        leaf = getattr(moved, key).requires_grad_()
        losses = objective.losses(moved)
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert gradient.isfinite().all()


@every
def test_step0_loss_is_what_equal_models_give(objective):
    x = group(objective)
    same = {
        f"{name}_{kind}": getattr(x, f"policy_{kind}")
        for name in ("reference", "initial")
        for kind in ("logps", "tokens")
        if getattr(x, f"{name}_{kind}") is not None
    }
    losses = objective.losses(dataclasses.replace(x, **same))
    if objective.step0_loss is None:
        assert losses.std() > 1e-6
    else:
        assert losses.tolist() == pytest.approx([objective.step0_loss] * 3, abs=1e-12)


@every
def test_the_scores_are_those_of_the_best_and_the_worst(objective):
    x = group(objective)
    output = objective(PairInputs(chosen_lengths=x.lengths[:, 0], group=x))
    u = x.policy_logps - x.reference_logps if "reference" in objective.needs else x.policy_logps
    assert torch.equal(output.chosen_scores, u[:, 0])
    assert torch.equal(output.rejected_scores, u[:, 1])
    assert not any(value.requires_grad for value in output.diagnostics.values())


def test_two_samples_of_rloo_are_a_weighted_pair():
    """With n = 2 the advantages are +-(r_w - r_l), so at rho = 1 the loss pulls the two apart by their gap."""
    x = group(RLOO(beta=0.0), (2, 2))
    leaf = x.policy_logps.requires_grad_()
    losses = RLOO(beta=0.0).losses(dataclasses.replace(x, initial_logps=leaf.detach()))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    gap = x.rewards[:, 0] - x.rewards[:, 1]
    torch.testing.assert_close(gradient, torch.stack([-gap, gap], 1) / 2)


def test_the_kl_of_rloo_is_taken_off_the_reward():
    x, beta = group(RLOO()), 0.3
    penalized = x.rewards - beta * (x.initial_logps - x.reference_logps)
    expected = RLOO(beta=0.0).losses(dataclasses.replace(x, rewards=penalized))
    torch.testing.assert_close(RLOO(beta=beta).losses(x), expected)


def test_a_clipped_response_gets_no_gradient():
    for objective, kind in ((RLOO(beta=0.0), "logps"), (GRPO(beta=0.0), "tokens")):
        x = group(objective, (2, 2))
        initial = getattr(x, f"initial_{kind}")
        leaf = (initial + 1.0).requires_grad_()  # rho = e
        losses = objective.losses(dataclasses.replace(x, **{f"policy_{kind}": leaf}))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert (gradient[:, 0] == 0).all()  # the better one is likelier already
        assert (gradient[:, 1] != 0).any()


def test_grpo_per_token_is_the_mean_over_all_tokens_of_a_step():
    objective = GRPO(beta=0.0, per="token")
    x = group(objective)
    x = dataclasses.replace(x, mean_tokens=x.lengths.sum() / 3)
    ratios = (x.policy_tokens - x.initial_tokens).exp()
    a = objective.advantages(x)[..., None]
    tokens = -torch.minimum(ratios * a, ratios.clamp(0.8, 1.2) * a)
    torch.testing.assert_close(objective.losses(x).mean(), tokens[x.token_mask].mean())


def test_a_group_without_a_preference_teaches_nothing():
    for objective in (RLOO(beta=0.0), GRPO(beta=0.0)):
        x = group(objective)
        x = dataclasses.replace(x, rewards=0.7 * x.mask.double())
        assert objective.losses(x).abs().max() < 1e-9


def pair_of(x: GroupInputs) -> PairInputs:
    """The pair inputs of the best and the worst response."""
    sides = {"chosen": 0, "rejected": 1}
    values = {f"policy_{side}_logps": x.policy_logps[:, i] for side, i in sides.items()}
    values |= {f"{side}_lengths": x.lengths[:, i] for side, i in sides.items()}
    if x.reference_logps is not None:
        values |= {f"reference_{side}_logps": x.reference_logps[:, i] for side, i in sides.items()}
    return PairInputs(**values, group=x)


def test_rrhf_ranks_all_candidates_and_fine_tunes_on_the_best():
    objective = RRHF(candidates="group")
    x = group(objective)
    x = dataclasses.replace(x, rewards=torch.tensor([[3.0, 0.0, 1.0, 1.0], [2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
    expected = []
    for b, size in enumerate((4, 2, 3)):
        scores, rewards = x.policy_logps[b] / x.lengths[b], x.rewards[b]
        ranked = sum(
            max(0.0, float(scores[j] - scores[i])) for i in range(size) for j in range(size) if rewards[i] > rewards[j]
        )
        expected.append(ranked - float(x.policy_logps[b, 0]))
    assert objective(pair_of(x)).losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_two_candidates_are_a_pair(length_normalize):
    settings = {"length_normalize": length_normalize, "auxiliary_weight": 0.0, "micro_batch_size": 1}
    both = {
        RRHF(): RRHF(candidates="group"),
        MMPO(0.3, normalization="none", **settings): MMPO(0.3, normalization="none", candidates="group", **settings),
        MMPO(0.3, **settings): MMPO(0.3, normalization="group", candidates="group", **settings),
    }
    x = group(DPO(0.1), (2,))  # the reference, and one group: published MMPO normalizes over its micro-batch
    for of_pairs, of_groups in both.items():
        a, b = of_pairs(pair_of(x)), of_groups(pair_of(x))
        torch.testing.assert_close(a.losses, b.losses)
        assert torch.equal(a.chosen_scores, b.chosen_scores)
        assert torch.equal(a.rejected_scores, b.rejected_scores)


def test_the_marginal_likelihood_weighs_gradients_by_its_posterior():
    """Theorem 3.2 for n samples: d(-logsumexp s)/d lp_i = -softmax(s)_i, without gradient through q."""
    objective = MMPO(0.3, normalization="none", auxiliary_weight=0.0, candidates="group")
    x = group(DPO(0.1))
    leaf = x.policy_logps.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(pair_of(x)).losses.sum(), leaf)
    s = leaf + 0.3 * x.reference_logps + 0.9 * (torch.arange(4) == 0)
    expected = -s.masked_fill(~x.mask, -torch.inf).softmax(1)
    torch.testing.assert_close(gradient, expected.detach())


def test_what_does_not_go_together_is_refused():
    for wrong in ({"normalization": "micro_batch", "auxiliary_weight": 0.0}, {"normalization": "group"}):
        with pytest.raises(ValueError, match="candidates=group goes with"):
            MMPO(0.3, candidates="group", **wrong)
    with pytest.raises(ValueError, match="normalization=group needs candidates=group"):
        MMPO(0.3, normalization="group")
    for plug_in in (MaPPO, ARPO):
        with pytest.raises(ValueError, match="base must compare two completions; rrhf reads a group"):
            plug_in(RRHF(candidates="group"))
