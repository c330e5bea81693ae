"""What an objective on groups reads, and the class to derive it from."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefopt.objectives import GROUP
from prefopt.objectives.base import Need, Objective, ObjectiveOutput, PairInputs

_ABSENT: Any = None  # as in base.py: the default of tensors that only some objectives need


@dataclass(frozen=True)
class GroupInputs:
    """All scored responses to each of `B` prompts, of which there are up to `n`: `(B, n)` tensors, float32 in training,
    from the highest reward to the lowest but for the first two columns. These are the group's pair: 0 is the best
    response, 1 the worst. Where a group has fewer, `mask` is False and every other tensor is 0.

    Always filled:
    * `mask`: bool. `lengths`, `rewards` and `policy_logps`: as in `PairInputs`.
    * `mean_tokens`: 0-dim, the mean over all groups that are averaged of the tokens of all their responses.

    Filled if `needs` names them:
    * `reference_logps` (`reference`): of the reference model.
    * `initial_logps` (`initial`): of the policy that the run began with. Of a stage of prefopt.online it is the one
      that has drawn the responses.
    * `policy_tokens`, `reference_tokens`, `initial_tokens` (`tokens`): `(B, n, T)`, the log-probs of the tokens whose
      sums these are; 0 behind a response's end. `token_mask`: bool, where a token is.
    """

    mask: Tensor
    lengths: Tensor
    rewards: Tensor
    policy_logps: Tensor
    mean_tokens: Tensor
    reference_logps: Tensor = _ABSENT
    initial_logps: Tensor = _ABSENT
    policy_tokens: Tensor = _ABSENT
    reference_tokens: Tensor = _ABSENT
    initial_tokens: Tensor = _ABSENT

    @property
    def sizes(self) -> Tensor:
        """(B,): how many responses each group has."""
        return self.mask.sum(1).to(self.rewards.dtype)

    @property
    def token_mask(self) -> Tensor:
        """(B, n, T), bool."""
        places = torch.arange(self.policy_tokens.shape[-1], device=self.lengths.device)
        return places < self.lengths[..., None]

    def mean(self, values: Tensor) -> Tensor:
        """(B,): the mean over each group's responses of `values` `(B, n)`."""
        return values.masked_fill(~self.mask, 0.0).sum(1) / self.sizes

    def map(self, function: Callable[[Tensor], Tensor]) -> "GroupInputs":
        """The inputs with `function` applied to every tensor."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Groupwise(Objective):
    """An objective on all scored responses to a prompt. A subclass defines `losses`.

    Scores, of which accuracy compares those of the best and the worst response, are u = log pi - log pi_ref, or log pi
    without a reference.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    completions = GROUP

    @abstractmethod
    def losses(self, group: GroupInputs) -> Tensor:
        """The losses, `(B,)`, with gradient."""

    def diagnostics(self, group: GroupInputs) -> dict[str, Tensor]:
        """`ObjectiveOutput.diagnostics`. Called without gradient."""
        return {}

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        losses, group = self.losses(inputs.group), inputs.group.map(Tensor.detach)
        scores = group.policy_logps if group.reference_logps is None else group.policy_logps - group.reference_logps
        with torch.no_grad():
            return ObjectiveOutput(losses, scores[:, 0], scores[:, 1], self.diagnostics(group))
