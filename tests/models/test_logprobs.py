"""Log-probs against hand-made examples, enumeration and plain formulas."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig

import prefopt.models.chunked_logprobs
from prefopt.data.collate import Group, padded
from prefopt.models.chunked_logprobs import Distributions, LogitTransform, TiledLogps
from prefopt.models.logprobs import completion_logps
from tests.helpers.tiny import ROOT, SMALL, tiny_model


class LookupModel:
    """A language model whose next-token logits depend on the current token only: logits = table[token]."""

    def __init__(self, table: torch.Tensor):
        self.table = table
        self.head = nn.Identity()
        self.config = PreTrainedConfig()

    def base_model(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def get_output_embeddings(self):
        return self.head


class PrefixModel(LookupModel):
    """Logits depend on the whole prefix, through a table over (previous token, current token)."""

    def base_model(self, input_ids, **_):
        previous = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], 1)
        return SimpleNamespace(last_hidden_state=self.table[previous, input_ids])


def test_five_tokens_by_hand():
    """Prompt [3, 1], completion [4, 0, 2] (2 the terminator): three transitions count, 1->4, 4->0 and 0->2."""
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    log = table.log_softmax(-1)
    result = completion_logps(LookupModel(table), padded([Group([3, 1], [[4, 0, 2]]), Group([3], [[2]])]))  # type: ignore[arg-type]
    assert result.sums[0].item() == pytest.approx((log[1, 4] + log[4, 0] + log[0, 2]).item())
    assert result.sums[1].item() == pytest.approx(log[3, 2].item())
    assert result.lengths.tolist() == [3, 1]


def test_a_prefix_is_as_long_as_the_pairs_shorter_completion():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    log = table.log_softmax(-1)
    groups = [Group([3, 1], [[4, 0, 2], [2]]), Group([1], [[2], [0, 2]]), Group([1], [[0, 2], [4, 2]])]
    result = completion_logps(LookupModel(table), padded(groups), prefixes=True)  # type: ignore[arg-type]
    first = [log[1, 4], log[1, 2], log[1, 0] + log[0, 2], log[1, 2], log[1, 0], log[1, 4] + log[4, 2]]
    assert result.prefixes.tolist() == pytest.approx([value.item() for value in first])
    assert completion_logps(LookupModel(table), padded(groups)).prefixes is None  # type: ignore[arg-type]


def test_padding_and_neighbours_change_nothing():
    model = tiny_model(50).double()
    rows = [Group([1, 2, 3], [[4, 5, 2]]), Group([7], [[8, 9, 10, 11, 2]]), Group([1, 2, 3, 4, 5, 6], [[2]])]
    together = completion_logps(model, padded(rows))
    alone = torch.cat([completion_logps(model, padded([row])).sums for row in rows])
    assert torch.allclose(together.sums.double(), alone.double(), atol=1e-5)


def test_equals_the_models_own_logits():
    model = tiny_model(50)
    prompt, completion = [1, 2, 3], [4, 5, 6, 2]
    ids = torch.tensor([prompt + completion])
    log = model(ids).logits.double().log_softmax(-1)
    expected = sum(log[0, i - 1, ids[0, i]].item() for i in range(3, 7))
    assert completion_logps(model, padded([Group(prompt, [completion])])).sums.item() == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("tiled", [True, False])
def test_sequential_kl_by_hand(tiled, monkeypatch):
    """Sums of KL(reference || model) at three places and at one; of the model from itself it is 0, bit for bit."""
    monkeypatch.setattr(prefopt.models.chunked_logprobs, "TILE", 7)
    batch = padded([Group([3, 1], [[4, 0, 2]]), Group([3], [[2]])])
    model, other = tiny_model(50), tiny_model(50, seed=1)
    with torch.no_grad():
        reference, own = (completion_logps(m, batch).distributions for m in (other, model))
    found = completion_logps(model, batch, tiled=tiled, reference=reference).sequential_kl
    for row, ids, places in ((0, [3, 1, 4, 0, 2], [1, 2, 3]), (1, [3, 2], [0])):
        q, p = (m.double()(torch.tensor([ids])).logits[0, places].log_softmax(-1) for m in (other, model))
        assert found[row].item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-4)
    assert completion_logps(model.float(), batch, tiled=tiled, reference=own).sequential_kl.tolist() == [0.0, 0.0]
    assert completion_logps(model, batch).sequential_kl is None


def test_bfloat16_logits_are_summed_in_float32():
    table = 20 * torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    low = LookupModel(table.bfloat16())
    exact = table.bfloat16().double().log_softmax(-1)
    expected = sum(exact[a, b].item() for a, b in itertools.pairwise([3, *tokens]))
    result = completion_logps(low, padded([Group([3], [tokens])]))  # type: ignore[arg-type]
    assert result.sums.dtype == torch.float32
    assert result.sums.item() == pytest.approx(expected, rel=1e-5)


def test_entropy_surrogate_has_the_gradient_of_the_sequence_entropy():
    """Enumerate all sequences of length 3 over 3 tokens: the expected gradient of the surrogate, over sequences drawn
    from the policy, is the gradient of the policy's exact sequence entropy."""
    vocabulary, length = 3, 3
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    sequences = list(itertools.product(range(vocabulary), repeat=length))
    batch = padded([Group([1], [list(s)]) for s in sequences])
    result = completion_logps(PrefixModel(table), batch, entropies=True)  # type: ignore[arg-type]
    probabilities = result.sums.double().exp()
    assert probabilities.sum().item() == pytest.approx(1)
    exact = -(probabilities * probabilities.log()).sum()
    (expected,) = torch.autograd.grad(exact, table, retain_graph=True)
    (estimated,) = torch.autograd.grad((probabilities.detach() * result.entropies.double()).sum(), table)
    assert torch.allclose(expected, estimated, atol=1e-5)
    assert expected.abs().max() > 0.05


def test_entropy_of_a_uniform_policy():
    result = completion_logps(LookupModel(torch.zeros(8, 8)), padded([Group([1], [[2, 3]])]), entropies=True)  # type: ignore[arg-type]
    # H_1 + H_2 + H_2 * log pi(y_1), with every H = log 8 and log pi = -log 8
    assert result.entropies.item() == pytest.approx(2 * math.log(8) - math.log(8) ** 2, rel=1e-6)


CHANGED_LOGITS = {
    "soft-capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "scaled": CohereConfig(**SMALL, head_dim=8, logit_scale=0.3),
    "divided": GraniteConfig(**SMALL, head_dim=8, logits_scaling=4.0),
}


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in CHANGED_LOGITS.items()])
def test_soft_capped_and_scaled_logits_are_the_models_own(config, tiled, monkeypatch):
    monkeypatch.setattr(prefopt.models.chunked_logprobs, "TILE", 7)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    prompt, completion = [1, 2, 3], [4, 5, 6, 2]
    parameters = list(model.parameters())

    def with_gradients(sums, entropies):
        return sums, entropies, torch.autograd.grad(sums + 0.1 * entropies, parameters)

    log = model(torch.tensor([prompt + completion])).logits[0, 2:-1].float().log_softmax(-1)
    chosen, entropies = log[range(4), completion], -(log.exp() * log).sum(-1)
    surrogate = (entropies + entropies.detach() * (chosen.cumsum(0) - chosen)).sum()
    expected = with_gradients(chosen.sum(), surrogate)
    result = completion_logps(model, padded([Group(prompt, [completion])]), entropies=True, tiled=tiled)
    found = with_gradients(result.sums[0], result.entropies[0])
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found[1].item() == pytest.approx(expected[1].item(), rel=1e-4)
    for a, b in zip(found[2], expected[2], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_log_softmax_is_called_in_one_place():
    offenders = [
        file.name
        for file in (ROOT / "prefopt").rglob("*.py")
        if "log_softmax(" in file.read_text() and file.name != "logprobs.py"
    ]
    assert offenders == []


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize("tile", [1, 7, 50, 4096])
def test_tiled_equals_dense_in_values_and_gradients(monkeypatch, tie, tile, kept):
    """Log-probs, entropies, the KL from a reference, and the gradients of every weight and of a tied one; tiles that
    divide the vocabulary and tiles that do not."""
    monkeypatch.setattr(prefopt.models.chunked_logprobs, "TILE", tile)
    monkeypatch.setattr(prefopt.models.chunked_logprobs, "KEPT", kept)
    rows = [Group([3, 4], [[5, 6, 49]]), Group([7], [[0]]), Group([1, 2, 3], [[49, 0, 48, 7]])]
    other = tiny_model(50, seed=1).double()
    with torch.no_grad():
        other.lm_head.weight.mul_(50)  # so that another token leads
        reference = completion_logps(other, padded(rows)).distributions
    results = []
    for tiled in (True, False):
        model = tiny_model(50, tie_word_embeddings=tie).double()
        result = completion_logps(model, padded(rows), entropies=True, tiled=tiled, reference=reference)
        weights = torch.tensor([1.0, -2.0, 0.5])
        ((result.sums + 0.3 * result.entropies + 0.7 * result.sequential_kl) * weights).sum().backward()
        values = [result.sums, result.entropies, result.sequential_kl]
        results.append([*values, *(p.grad for p in model.parameters())])
    assert results[0][2].min() > 0.1
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def test_tiled_gradient_in_float64():
    """Finite differences of log-probs, entropies and KL by hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    labels = torch.tensor([0, 8, 3])
    tensors = draw(3, 4), draw(9, 4), draw(9)
    reference = Distributions(draw(3, 4).detach(), torch.nn.Linear(4, 9).double(), LogitTransform())
    # The sums are float32 by design, so the steps must be large and the tolerance is theirs.
    assert torch.autograd.gradcheck(
        lambda *t: TiledLogps.apply(*t, labels, True, LogitTransform(), False, reference)[:3],
        tensors,
        eps=1e-2,
        atol=2e-3,
        rtol=1e-2,
    )


def test_tiled_at_extreme_logits_and_in_bfloat16():
    head = torch.nn.Linear(2, 3 * 4096 + 5, bias=True)
    with torch.no_grad():
        head.weight.mul_(0)
        head.bias.copy_(torch.linspace(-1e4, 1e4, len(head.bias)))
        reversed_head = copy.deepcopy(head)
        reversed_head.bias.copy_(head.bias.flip(0))
    logps, entropies, kl, squares = prefopt.models.chunked_logprobs.chunked_logps(
        torch.ones(2, 2), head, torch.tensor([0, len(head.bias) - 1]), with_squares=True,
        reference=Distributions(torch.ones(2, 2), reversed_head, LogitTransform()),
    )  # fmt: skip
    exact = head.bias.double().log_softmax(-1)
    assert logps.tolist() == pytest.approx([exact[0].item(), exact[-1].item()], rel=1e-6)
    assert entropies.tolist() == pytest.approx([-(exact.exp() * exact).sum().item()] * 2, rel=1e-4)
    assert squares.tolist() == pytest.approx([(2 * exact).logsumexp(-1).item()] * 2, rel=1e-5)
    assert kl.tolist() == pytest.approx([(exact.flip(0).exp() * (exact.flip(0) - exact)).sum().item()] * 2, rel=1e-5)
    head, hidden = torch.nn.Linear(64, 9000), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4095, 4096, 8999, 77])
    with torch.autocast("cpu", torch.bfloat16):
        low, *_ = prefopt.models.chunked_logprobs.chunked_logps(hidden, head, labels)
        dense = head(hidden).float().log_softmax(-1)[range(5), labels]
    assert low.dtype == torch.float32
    assert torch.allclose(low, dense, atol=1e-5)


def test_a_head_with_something_on_it_is_computed_whole():
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model(50, tie_word_embeddings=False)
    plain = completion_logps(model, padded([Group([3], [[4, 5]])])).sums
    model.lm_head.__class__ = Louder
    louder = completion_logps(model, padded([Group([3], [[4, 5]])])).sums
    logits = 2 * torch.nn.Linear.forward(model.lm_head, model.model(torch.tensor([[3, 4]])).last_hidden_state)
    assert louder.item() == pytest.approx(logits.log_softmax(-1)[0, [0, 1], [4, 5]].sum().item(), rel=1e-5)
    assert louder != plain
