"""The contract between the training loop and an objective: `(B,)` tensors in, `(B,)` tensors out.

To write an objective, subclass one of these, in this order of preference:

* `ImplicitReward`: it compares beta * (log pi - log pi_ref) of two completions. Write `losses`. Example: dpo.py.
* `Pairwise`: it compares some term of two completions. Write `scores` and `losses`. Example: simpo.py.
* `Groupwise`: it reads all n scored responses to a prompt. Write `losses`. In groupwise.py. Example: rloo.py.
* `Objective`: anything else. Write `__call__`. Example: sft.py.

An objective never sees a model, a batch or a config, so a test can call it in float64. It declares what it needs and
over which pairs it takes statistics, so the loop never asks for its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from prefopt.errors import UserError
from prefopt.objectives import SIDES

if TYPE_CHECKING:
    from prefopt.objectives.groupwise import GroupInputs

Need = Literal[
    "reference", "rewards", "entropies", "on_policy", "prefixes", "sequential_kl", "noise", "mismatched", "initial",
    "tokens", "token_weights", "values",
]  # fmt: skip
Scope = Literal["pair", "micro_batch", "step"]
Purpose = Literal["noisy_labels", "online"]
# The default of tensors that only some objectives need. It is None, but not typed as optional: an objective that
# declares a need can rely on the tensor, and one that reads a tensor without declaring it fails at once.
_ABSENT: Any = None
# The tensors of `PairInputs` through which gradient flows into the model.
DIFFERENTIABLE = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "policy_chosen_prefix_logps",
    "policy_rejected_prefix_logps",
    "policy_chosen_weighted_logps",
    "policy_rejected_weighted_logps",
    "policy_chosen_values",
    "policy_rejected_values",
    "chosen_entropies",
    "rejected_entropies",
    "chosen_kl",
    "rejected_kl",
    "policy_chosen_rewards",
    "policy_rejected_rewards",
)


@dataclass(frozen=True)
class PairInputs:
    """What an objective reads, for `B` pairs. Every tensor is `(B,)`, float32 in training, lengths included.

    Always filled, for the completions that the objective declares:
    * `policy_*_logps`: sums over the completion's tokens (its terminator included) of log pi(token | tokens before), in
      nats. With `model_kind` `reward_model`, `policy_*_rewards` instead: the outputs of the model in training.
    * `*_lengths`: the number of those tokens.
    * `weights`: what `apply_objective` multiplies the losses by, from the rows; no objective reads it.
    * `mean_chosen_length`: the mean of `chosen_lengths` over all pairs that are averaged, those of the whole optimizer
      step, and so the same number in every place. With it a term of a pair can be one of the step's mean over tokens.

    Filled if `needs` names them, else perhaps None:
    * `reference_*_logps` (`reference`): as `policy_*_logps`, of the reference model.
    * `*_rewards` (`rewards`): prior rewards from the data.
    * `*_entropies` (`entropies`): the surrogates of `prefopt.models.logprobs.Logps.entropies`, whose gradient is
      that of the sequence entropy.
    * `*_on_policy` (`on_policy`): mean over the completion's tokens of log pi(token) - log sum_v pi(v)^2, in nats: how
      much it looks like a sample of the policy. It carries no gradient.
    * `policy_*_prefix_logps`, and with `reference` also `reference_*_prefix_logps` (`prefixes`): as the log-probs, but
      over the completion's first m tokens, where m is the length of the pair's shorter completion.
    * `policy_*_weighted_logps`, and with `reference` also `reference_*_weighted_logps` (`token_weights`): as the
      log-probs, but each token's times its weight, from the rows.
    * `policy_*_values` (`values`): the outputs of a value head beside the policy at the completion's last token, in
      (-1, 1). The head is made, and trained, where an objective needs it.
    * `*_kl` (`sequential_kl`): sum over the completion's tokens of KL(pi_ref || pi) between the distributions of the
      token, in nats. The reference must be a model that scores every batch, and no cache.
    * `mismatched_*_logratios` (`mismatched`): log pi - log pi_ref of this pair's prompt with the completions of another
      pair of the step. They carry no gradient, and cost a forward pass of both models.

    Filled for an objective that reads groups (`completions`):
    * `group`: all responses. The pair is then the best and the worst of them.

    Filled with scope `step` alone:
    * `noise` (`noise`): uniform in [0, 1), a fixed function of seed, step and the pair's place in the step.
    * `state`: what the objective returned as `ObjectiveOutput.state` in the step before.
    """

    policy_chosen_logps: Tensor = _ABSENT
    policy_rejected_logps: Tensor = _ABSENT
    chosen_lengths: Tensor = _ABSENT
    rejected_lengths: Tensor = _ABSENT
    mean_chosen_length: Tensor = _ABSENT
    reference_chosen_logps: Tensor = _ABSENT
    reference_rejected_logps: Tensor = _ABSENT
    policy_chosen_prefix_logps: Tensor = _ABSENT
    policy_rejected_prefix_logps: Tensor = _ABSENT
    reference_chosen_prefix_logps: Tensor = _ABSENT
    reference_rejected_prefix_logps: Tensor = _ABSENT
    policy_chosen_weighted_logps: Tensor = _ABSENT
    policy_rejected_weighted_logps: Tensor = _ABSENT
    policy_chosen_values: Tensor = _ABSENT
    policy_rejected_values: Tensor = _ABSENT
    reference_chosen_weighted_logps: Tensor = _ABSENT
    reference_rejected_weighted_logps: Tensor = _ABSENT
    chosen_rewards: Tensor = _ABSENT
    rejected_rewards: Tensor = _ABSENT
    chosen_entropies: Tensor = _ABSENT
    rejected_entropies: Tensor = _ABSENT
    chosen_on_policy: Tensor = _ABSENT
    rejected_on_policy: Tensor = _ABSENT
    chosen_kl: Tensor = _ABSENT
    rejected_kl: Tensor = _ABSENT
    mismatched_chosen_logratios: Tensor = _ABSENT
    mismatched_rejected_logratios: Tensor = _ABSENT
    policy_chosen_rewards: Tensor = _ABSENT
    policy_rejected_rewards: Tensor = _ABSENT
    weights: Tensor = _ABSENT
    noise: Tensor = _ABSENT
    group: "GroupInputs" = _ABSENT
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
        """The `(B,)` tensors that are filled, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("group", "state")}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairInputs":
        """The inputs with `function` applied to every tensor but the state, which stays as it is."""
        values: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return PairInputs(**values, group=self.group and self.group.map(function), state=self.state)


def apply_objective(objective: "Objective", inputs: PairInputs) -> "ObjectiveOutput":
    """`objective(inputs)`, held against the contract, with its losses times the pairs' weights, if there are any.

    Raises UserError unless losses and scores are `(B,)` floats on the inputs' device, and losses carry gradient where
    the inputs do. A mean over the pairs, say, would train: with another weight for every micro-batch, and one pair in
    each metric.
    """
    output = objective(inputs)
    expected = inputs.chosen_lengths
    for name in ("losses", "chosen_scores", "rejected_scores"):
        value = getattr(output, name)
        if value is None and name != "losses":
            continue
        if not isinstance(value, Tensor):
            what = f"a {type(value).__name__}"
        elif value.shape != expected.shape:
            what = f"of shape {tuple(value.shape)}"
        elif not value.is_floating_point():
            what = f"of {value.dtype}"
        elif value.device != expected.device:
            what = f"on {value.device}"
        else:
            continue
        raise UserError(
            f"objective {objective.name}: its {name} are {what}. They must be floating point, of shape "
            f"{tuple(expected.shape)}, one for each pair, on {expected.device}. Return the loss of each pair, not "
            "their mean or sum: the step takes that."
        )
    differentiable = any(value.requires_grad for value in inputs.tensors().values())
    if torch.is_grad_enabled() and differentiable and not output.losses.requires_grad:
        raise UserError(
            f"objective {objective.name}: no gradient flows through its losses. They must depend on the policy's "
            "log-probs (or rewards) without detach() or item()."
        )
    return output if inputs.weights is None else replace(output, losses=inputs.weights * output.losses)


def concatenate(parts: Sequence[PairInputs]) -> PairInputs:
    """The pairs of all parts, in their order, without groups. All parts must hold the same tensors and the same
    state."""
    names = parts[0].tensors()
    values: dict[str, Any] = {name: torch.cat([p.tensors()[name] for p in parts]) for name in names}
    return PairInputs(**values, state=parts[0].state)


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns for `B` pairs.

    * `losses`: `(B,)`, with gradient. The step's loss is their sum over all pairs of the optimizer step, divided as
      `Objective.normalize_by` declares.
    * `chosen_scores`, `rejected_scores`: `(B,)`, detached, or None if the objective compares nothing. Reward
      accuracy is mean(chosen > rejected), and margin is mean(chosen - rejected).
    * `diagnostics`: further values for the log, by name. A bool `(B,)` is logged as its share, a float `(B,)` as mean
      and quantiles, a 0-dim tensor as it is.
    * `state`: 0-dim tensors that become `PairInputs.state` of the next step. They are saved with the checkpoint.
    """

    losses: Tensor
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A frozen dataclass whose fields are its hyperparameters. Its YAML in conf/objective/ names it with `_target_`.

    A subclass sets those of the following class attributes that differ from the default. It makes one a property if a
    hyperparameter decides its value.

    * `equation`: the loss of one pair, as `python -m prefopt.objectives` prints it.
    * `paper`: the paper's arXiv number and, where it has one, the number of the equation.
    * `summary`: what it is for, in a phrase of the same list.
    * `made_for`: what a user asks for that `needs` does not show: `noisy_labels`, or `online`, samples of the policy.
    * `needs`: which optional tensors of `PairInputs` must be filled.
    * `scope`: the pairs on which the loss of one pair may depend: itself (`pair`), all pairs of its micro-batch
      (`micro_batch`), or all pairs of the optimizer step (`step`).
    * `micro_batch_size`: with scope `micro_batch`, the number of pairs in a micro-batch; otherwise None, for any
    number.
    * `linked`: whether it compares two pairs with exchanged completions (`prefopt.data.linked`). They are then 2k and
      2k + 1 of every micro-batch; the scope is `micro_batch`, and its size even.
    * `step0_loss`: the loss per pair when policy and reference are equal, whatever the data (log 2 for DPO), or None if
      that is no constant. The run compares it with the loss before its first step.
    * `completions`: the completions that the objective reads: of each pair both (`SIDES`), the chosen one, or all
      responses of a group (`GROUP`). An objective that reads groups has the scope `pair`.
    * `model_kind`: the kind of model that it trains.
    * `normalize_by`: what the sum of the losses is divided by: the step's pairs, or its chosen tokens.
    * `reward_range`: the lowest and highest prior reward that the objective accepts, or None for any.
    * `learning_rates`: the peak learning rate where `optimizer.lr` is null: for all weights, and for an adapter.
    """

    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    made_for: ClassVar[frozenset[Purpose]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    scope: ClassVar[Scope] = "pair"
    micro_batch_size: ClassVar[int | None] = None
    linked: ClassVar[bool] = False
    step0_loss: ClassVar[float | None] = None
    completions: ClassVar[tuple[str, ...]] = SIDES
    model_kind: ClassVar[Literal["policy", "reward_model"]] = "policy"
    normalize_by: ClassVar[Literal["pair", "chosen_token"]] = "pair"
    reward_range: ClassVar[tuple[float, float] | None] = None
    learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    @property
    def name(self) -> str:
        """The name of the objective's file without .py."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def derived(self) -> dict[str, float]:
        """Quantities computed from the hyperparameters that papers quote (SimPO's gamma). The run prints them."""
        return {}

    def initial_state(self) -> dict[str, Tensor]:
        """`PairInputs.state` of the first step: 0-dim float32 tensors."""
        return {}

    @abstractmethod
    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        """The losses of `inputs`' pairs. Called once for each micro-batch, or with scope `step` once for the step."""


@dataclass(frozen=True, kw_only=True)
class Pairwise(Objective):
    """An objective that compares a term of the chosen completion with the same term of the rejected one.

    A subclass defines the two terms (`scores`) and the loss of their comparison (`losses`). Two features then work with
    all of these objectives:

    * MaPPO, which scales the rejected term (`compare`).
    * A negative log-likelihood of the chosen completion, times `nll_weight`, is added to the loss. It keeps lp_w from
      falling together with lp_l. `nll_per` says what it is a mean over, in the step's loss:

      - `pair`: the pairs, of -lp_w.
      - `own_token`: the pairs, of -lp_w / n_w, so that every pair counts the same.
      - `chosen_token`: all chosen tokens of the optimizer step, whatever the micro-batches, so that every token counts
        the same: sum(-lp_w) / sum(n_w).

    Raises ValueError for a negative `nll_weight` or another `nll_per`.
    """

    # `step0_loss` where nll_weight is 0. With the likelihood term the loss depends on the data.
    loss_at_reference: ClassVar[float | None] = None

    nll_weight: float = 0.0
    nll_per: str = "pair"

    def __post_init__(self) -> None:
        require(self.nll_weight >= 0, f"nll_weight must not be negative, got {self.nll_weight}")
        require(
            self.nll_per in ("pair", "own_token", "chosen_token"),
            f"nll_per must be pair, own_token or chosen_token, got {self.nll_per!r}",
        )

    @abstractmethod
    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected term, `(B,)` each, with gradient."""

    @abstractmethod
    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The losses, `(B,)`, with gradient through the two terms. Rewards, lengths and state are in `inputs`. MaPPO
        passes a scaled `rejected`, so the terms must not be computed again from `inputs`."""

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """`ObjectiveOutput.diagnostics`. Called without gradient."""
        return {}

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """`ObjectiveOutput.state`. Called without gradient."""
        return {}

    @property
    def step0_loss(self) -> float | None:  # type: ignore[override]
        return None if self.nll_weight else self.loss_at_reference

    def compare(self, inputs: PairInputs, rejected_scale: Tensor | float = 1.0) -> ObjectiveOutput:
        """The objective with its rejected term multiplied by `rejected_scale` `(B,)`. Scores are reported unscaled, so
        that accuracy and margin have the same meaning for every scale."""
        chosen, rejected = self.scores(inputs)
        scaled = rejected_scale * rejected
        losses = self.losses(inputs, chosen, scaled)
        if self.nll_weight:
            losses = losses + self.nll_weight * self._nll(inputs)

        terms = chosen.detach(), scaled.detach()
        with torch.no_grad():
            diagnostics, state = self.diagnostics(inputs, *terms), self.next_state(inputs, *terms)
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach(), diagnostics, state)

    def _nll(self, inputs: PairInputs) -> Tensor:
        """The likelihood term of each pair, `(B,)`, whose mean over the step's pairs is what `nll_per` says."""
        if self.nll_per == "pair":
            return -inputs.policy_chosen_logps
        # The mean over B pairs of lp / mean(n) is sum(lp) / (B mean(n)), and B mean(n) is the number of tokens.
        tokens = inputs.chosen_lengths if self.nll_per == "own_token" else inputs.mean_chosen_length
        return -inputs.policy_chosen_logps / tokens

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
    """Raise ValueError(message) unless `condition`. For `__post_init__`: the program adds the hyperparameter's key."""
    if not condition:
        raise ValueError(message)


def saturated(z: Tensor) -> Tensor:
    """`(B,)` bool: where sigma(z) is above 0.99 or below 0.01, so the slope of a logistic loss is almost constant."""
    return z.abs() > 4.6  # log(0.99 / 0.01) = 4.595


def clamped_exp(x: Tensor, limit: float = 40.0) -> Tensor:
    """exp(x) up to x = `limit` nats, and its tangent beyond: convex, finite in float32, with a gradient everywhere.

    >>> clamped_exp(torch.tensor([0.0, 1e4])).tolist()
    [1.0, 2.3446726229884173e+21]
    """
    return x.clamp(max=limit).exp() * (1 + relu(x - limit))


def initial_moments() -> dict[str, Tensor]:
    """The state of `running_moments` before the first step: mean 0 and scale 1. (Public implementations start at scale
    0, which divides zero by zero as long as the policy equals the reference.)"""
    return {"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)}


def running_moments(state: dict[str, Tensor], values: Tensor, momentum: float = 0.9) -> dict[str, Tensor]:
    """Exponential moving averages of the mean and the standard deviation of `values` `(B,)`: the next `state`, with the
    keys "mean" and "scale", detached. The standard deviation of a single value counts as 0."""
    values = values.detach()
    scale = values.std(correction=min(1, len(values) - 1))
    return {
        "mean": momentum * state["mean"] + (1 - momentum) * values.mean(),
        "scale": momentum * state["scale"] + (1 - momentum) * scale,
    }
