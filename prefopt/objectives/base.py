"""The contract between the training loop and an objective: `(B,)` tensors in, `(B,)` tensors out.

An objective never sees a model, a batch or a config, so it can be called in float64 from a test. What it needs and
over which pairs it takes statistics is declared on it, so the loop never asks for its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

Need = Literal["reference", "rewards", "entropies", "noise"]
Scope = Literal["pair", "micro_batch", "step"]
Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
# The default of tensors that only some objectives need. Not typed as optional: an objective that declares a need may
# rely on it, and one that does not must not touch it (None would fail at once).
_ABSENT: Any = None
# The tensors of `PairInputs` through which gradient flows into the model.
DIFFERENTIABLE = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "chosen_entropies",
    "rejected_entropies",
    "policy_chosen_rewards",
    "policy_rejected_rewards",
)


@dataclass(frozen=True)
class PairInputs:
    """What an objective may look at, for `B` pairs. Every tensor is `(B,)`, float32 in training, lengths included.

    `*_logps` are sums over the completion's tokens (its terminator included) of log pi(token | what came before), in
    nats; `*_lengths` count those tokens. `*_rewards` are prior rewards from the data. `*_entropies` are the
    surrogates of `prefopt.models.logprobs.Logps.entropies`, whose gradient is that of the sequence entropy.
    `policy_*_rewards` are the outputs of the model in training where that is a reward model. `noise` is uniform in
    [0, 1), a fixed function of seed, step and the pair's place in it; `state` is what the objective carried over from
    the step before: both are there for scope `step` alone. What the objective does not declare may be None.
    """

    policy_chosen_logps: Tensor = _ABSENT
    policy_rejected_logps: Tensor = _ABSENT
    chosen_lengths: Tensor = _ABSENT
    rejected_lengths: Tensor = _ABSENT
    reference_chosen_logps: Tensor = _ABSENT
    reference_rejected_logps: Tensor = _ABSENT
    chosen_rewards: Tensor = _ABSENT
    rejected_rewards: Tensor = _ABSENT
    chosen_entropies: Tensor = _ABSENT
    rejected_entropies: Tensor = _ABSENT
    policy_chosen_rewards: Tensor = _ABSENT
    policy_rejected_rewards: Tensor = _ABSENT
    noise: Tensor = _ABSENT
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def chosen_logratios(self) -> Tensor:
        """u_w = lp_w - rp_w."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """u_l = lp_l - rp_l."""
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def has_reference(self) -> bool:
        return self.reference_chosen_logps is not None

    def tensors(self) -> dict[str, Tensor]:
        """The `(B,)` tensors that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "state"}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairInputs":
        return PairInputs(**{name: function(value) for name, value in self.tensors().items()}, state=self.state)


def concatenate(parts: Sequence[PairInputs]) -> PairInputs:
    """The pairs of all parts, in their order. They must hold the same tensors and the same state."""
    names = parts[0].tensors()
    return PairInputs(**{name: torch.cat([p.tensors()[name] for p in parts]) for name in names}, state=parts[0].state)


@dataclass(frozen=True)
class ObjectiveOutput:
    """`losses` `(B,)` with gradient; the step's loss is their sum over all pairs of the optimizer step, divided by its
    pairs (or by its chosen tokens, where the objective says so).

    `*_scores` `(B,)`, or None where the objective compares nothing: reward accuracy is mean(chosen > rejected), margin
    is mean(chosen - rejected). `diagnostics` are logged under the objective's name: a bool `(B,)` as its share, a
    float `(B,)` as mean and quantiles, a 0-dim tensor as it is. `state` goes into the next step and the checkpoint.
    """

    losses: Tensor
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A frozen dataclass whose fields are its hyperparameters; its YAML names it with `_target_`.

    A subclass sets these class attributes, or makes them properties where a hyperparameter decides:

    * `equation`, `paper`: for people; `python -m prefopt.objectives` prints them;
    * `needs`: which optional fields of `PairInputs` must be filled;
    * `scope`: over which pairs a pair's loss takes statistics (`pair`: none but its own);
    * `micro_batch_size`: with scope `micro_batch`, the pairs that it sees together; None elsewhere: any number;
    * `step0_loss`: the loss per pair that equal policy and reference give whatever the data (log 2 for DPO), None
      where there is no such constant. The run compares it with the loss it sees before its first step;
    * `completions`: the completions that it reads;
    * `model_kind`: what kind of model it trains;
    * `normalize_by`: what the step's loss is divided by;
    * `reward_range`: the prior rewards it accepts (inclusive), None for any.
    """

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    scope: ClassVar[Scope] = "pair"
    micro_batch_size: ClassVar[int | None] = None
    step0_loss: ClassVar[float | None] = None
    completions: ClassVar[tuple[Side, ...]] = SIDES
    model_kind: ClassVar[Literal["policy", "reward_model"]] = "policy"
    normalize_by: ClassVar[Literal["pair", "chosen_token"]] = "pair"
    reward_range: ClassVar[tuple[float, float] | None] = None

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def derived(self) -> dict[str, float]:
        """Quantities that follow from the hyperparameters and that papers quote (SimPO's gamma); said at the start."""
        return {}

    def initial_state(self) -> dict[str, Tensor]:
        """What `PairInputs.state` holds before the first step: 0-dim float32 tensors."""
        return {}

    @abstractmethod
    def __call__(self, inputs: PairInputs) -> ObjectiveOutput: ...


@dataclass(frozen=True, kw_only=True)
class Pairwise(Objective):
    """An objective that compares a chosen with a rejected term.

    A subclass says what the two terms are (`scores`) and what their comparison costs (`losses`). Two things then work
    with each of them: MaPPO, which scales the rejected term, and a weight on the likelihood of the chosen completion,
    loss += nll_weight * -lp_w (`nll_reduction=sum`) or nll_weight * -lp_w / n_w (`token_mean`), which keeps that from
    falling together with the rejected one. Raises ValueError for a negative weight or another reduction.
    """

    loss_at_reference: ClassVar[float | None] = None  # `step0_loss` without the likelihood term, which is no constant

    nll_weight: float = 0.0
    nll_reduction: str = "sum"

    def __post_init__(self) -> None:
        require(self.nll_weight >= 0, f"nll_weight must not be negative, got {self.nll_weight}")
        require(
            self.nll_reduction in ("sum", "token_mean"),
            f"nll_reduction must be sum or token_mean, got {self.nll_reduction!r}",
        )

    @abstractmethod
    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected term, `(B,)` each, with gradient."""

    @abstractmethod
    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        """`(B,)`, with gradient through the two terms. `inputs` is for what else matters: rewards, lengths, state."""

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """See `ObjectiveOutput`; called without gradient."""
        return {}

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """Called without gradient."""
        return {}

    @property
    def step0_loss(self) -> float | None:  # type: ignore[override]
        return None if self.nll_weight else self.loss_at_reference

    def compare(self, inputs: PairInputs, rejected_scale: Tensor | float = 1.0) -> ObjectiveOutput:
        """The objective with its rejected term times `rejected_scale` `(B,)`. Scores are reported unscaled, so that
        accuracy and margin mean the same with every scale."""
        chosen, rejected = self.scores(inputs)
        scaled = rejected_scale * rejected
        losses = self.losses(inputs, chosen, scaled)
        if self.nll_weight:
            tokens = inputs.chosen_lengths if self.nll_reduction == "token_mean" else 1
            losses = losses - self.nll_weight * inputs.policy_chosen_logps / tokens
        terms = chosen.detach(), scaled.detach()
        with torch.no_grad():
            diagnostics, state = self.diagnostics(inputs, *terms), self.next_state(inputs, *terms)
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach(), diagnostics, state)

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        return self.compare(inputs)


@dataclass(frozen=True)
class ImplicitReward(Pairwise):
    """A pairwise objective whose terms are DPO's implicit rewards beta * u, u = log pi - log pi_ref.

    Raises ValueError for beta <= 0.
    """

    needs = frozenset({"reference"})

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return self.beta * inputs.chosen_logratios, self.beta * inputs.rejected_logratios

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected)}


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; for hyperparameters, whose errors become composition errors."""
    if not condition:
        raise ValueError(message)


def saturated(z: Tensor) -> Tensor:
    """`(B,)` bool: where sigma(z) is above 0.99 or below 0.01, so that a logistic loss hardly changes its slope."""
    return z.abs() > 4.6


def clamped_exp(x: Tensor, limit: float = 40.0) -> Tensor:
    """exp(x) up to x = `limit` nats, its tangent beyond: convex, with a gradient everywhere, and finite in float32.

    >>> clamped_exp(torch.tensor([0.0, 1e4])).tolist()
    [1.0, 2.3446726229884173e+21]
    """
    return x.clamp(max=limit).exp() * (1 + relu(x - limit))


def initial_moments() -> dict[str, Tensor]:
    """Mean 0 and scale 1: the public implementations start at scale 0 without correction, which divides zero by zero
    while the policy still is the reference."""
    return {"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)}


def running_moments(state: dict[str, Tensor], values: Tensor, momentum: float = 0.9) -> dict[str, Tensor]:
    """`state` {"mean", "scale"} moved towards mean and standard deviation of `values` `(B,)`, detached.

    A single value has no spread and counts as 0.
    """
    values = values.detach()
    scale = values.std(correction=min(1, len(values) - 1))
    return {
        "mean": momentum * state["mean"] + (1 - momentum) * values.mean(),
        "scale": momentum * state["scale"] + (1 - momentum) * scale,
    }
