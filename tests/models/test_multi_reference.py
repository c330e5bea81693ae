"""Several references as one: closed forms, the authors' code, and runs with two references."""

import math

import pytest
import torch

from prefopt.config.schema import MultiReferenceConfig
from prefopt.models.multi_reference import virtual_logps
from tests.helpers.tiny import records, run_program, save_tiny


def draw(k: int, pairs: int = 20) -> torch.Tensor:
    """(K, 2, B) log-probs."""
    return -30 * torch.rand(k, 2, pairs, generator=torch.Generator().manual_seed(k), dtype=torch.float64) - 1


def node(k: int, **changes) -> MultiReferenceConfig:
    return MultiReferenceConfig(["other"] * (k - 1), **changes)


def authors_code(initial: torch.Tensor, other: torch.Tensor, share: torch.Tensor, eta: float) -> torch.Tensor:
    """thaihungle/MRPO, trainer_mref.py, after its formulas for two references. `share`: the weight of 1 / pi_other,
    which there is the first reference's own by mistake."""
    scale = ((initial + other) / 2).abs()
    etas = eta * scale / scale.sum(0)
    other = torch.min(torch.max(other, initial * (1 + etas)), initial * (1 - etas))
    # (2, B): log p_1 p_2 / (share p_1 + (1 - share) p_2)
    return initial + other - torch.logaddexp(share.log() + initial, (1 - share).log() + other)


def test_two_references_are_what_the_authors_code_makes_of_them():
    logps = draw(2)
    gaps = (logps[:, 0] - logps[:, 1]).abs()
    adaptive = gaps[1] / gaps.sum(0)
    for weights, share in ((None, adaptive), ([0.7, 0.3], torch.full((20,), 0.3))):
        found = virtual_logps(logps, node(2, weights=weights, clip=0.1))
        assert torch.allclose(found, authors_code(*logps, share, 0.1), atol=1e-12)


def test_means_by_hand():
    logps = draw(3, pairs=5)
    weights = [0.5, 0.2, 0.3]
    harmonic = virtual_logps(logps, node(3, weights=weights, clip=None))
    geometric = virtual_logps(logps, node(3, mean="geometric", weights=[1.3, -0.5, 0.2], clip=None))
    for side in range(2):
        for pair in range(5):
            values = logps[:, side, pair].tolist()
            by_hand = -math.log(sum(a * math.exp(-v) for a, v in zip(weights, values, strict=True)))
            assert harmonic[side, pair].item() == pytest.approx(by_hand)
            by_hand = 1.3 * values[0] - 0.5 * values[1] + 0.2 * values[2]
            assert geometric[side, pair].item() == pytest.approx(by_hand)


@pytest.mark.parametrize("mean", ["harmonic", "geometric"])
def test_the_same_reference_several_times_is_that_reference(mean):
    for weights in (None, [0.2, 0.5, 0.3]):
        logps = draw(1).expand(3, 2, 20)
        assert torch.allclose(virtual_logps(logps, node(3, mean=mean, weights=weights)), logps[0])


def test_clipping_keeps_the_others_near_the_first():
    """With all weight on another reference, it is that one, as far as the clip lets it go from the first."""
    logps = draw(2)
    found = virtual_logps(logps, node(2, weights=[0.0, 1.0], clip=0.1))
    assert (found / logps[0] - 1).abs().max() <= 0.1
    assert (found / logps[0] - 1).abs().sum(0).max().item() == pytest.approx(0.1)  # the sides share it
    assert torch.allclose(virtual_logps(logps, node(2, weights=[0.0, 1.0], clip=0.0)), logps[0])
    assert torch.allclose(virtual_logps(logps, node(2, weights=[0.0, 1.0], clip=None)), logps[1])


def test_references_without_a_preference_weigh_the_same():
    logps = torch.tensor([[[-2.0], [-2.0]], [[-3.0], [-3.0]]])
    expected = -math.log((math.exp(2) + math.exp(3)) / 2)
    assert virtual_logps(logps, node(2, clip=None)).flatten().tolist() == pytest.approx([expected] * 2)


def test_extreme_log_probs_stay_finite():
    logps = torch.tensor([[[-1e4], [-1.0]], [[-1.0], [-1e4]]])
    for mean in ("harmonic", "geometric"):
        assert virtual_logps(logps, node(2, mean=mean)).isfinite().all()


def test_a_run_with_two_references(overrides, tmp_path):
    """All weight on the first is a run with that one alone, as far as step 0 shows; adaptive weights are another."""
    other = save_tiny(tmp_path / "other", seed=1)
    found = {}
    for name, change in (("first", ["multi_reference.weights=[1.0,0.0]"]), ("adaptive", [])):
        models = f"multi_reference.models=[{other}]"
        process = run_program(*overrides(tmp_path / name), "steps=1", models, *change)
        assert process.returncode == 0, process.stderr
        (found[name],) = records(tmp_path / name)
    assert found["first"]["evaluations"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["first"]["evaluations"][0]["chosen_logratio"] == pytest.approx(0, abs=1e-5)
    assert found["adaptive"]["evaluations"][0]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert f"the weights of reference {other}" in found["adaptive"]["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reference=resident"], "multi_reference.models are scored once"),
        (["objective=simpo"], "objective simpo reads no reference"),
        (["objective=ld_dpo"], "objective ld_dpo reads the parts of completions"),
        (["objective=tis_dpo"], "objective tis_dpo reads the tokens of completions"),
        (["objective=tdpo"], "objective tdpo reads distributions at each token"),
    ],
)
def test_what_several_references_are_not_for_is_refused(changes, message, overrides, tiny_folder, tmp_path):
    process = run_program(*overrides(tmp_path), f"multi_reference.models=[{tiny_folder / 'model'}]", *changes)
    assert process.returncode == 2
    assert message in " ".join(process.stderr.split())
