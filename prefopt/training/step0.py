"""The check that a run begins where it must: policy and reference are the same model, and the loss is known."""

from collections.abc import Sequence

import torch

from prefopt.errors import UserError
from prefopt.models.reference import rounding
from prefopt.objectives import SIDES
from prefopt.objectives.base import PairInputs
from prefopt.training.state import TrainState

# Policy and reference are the same function of the same weights before the first update. What is left is rounding.
STEP0_TOLERANCE = 1e-3


@torch.no_grad()
def check_step0(train_state: TrainState, inputs: Sequence[PairInputs], loss: float, where: str) -> str:
    """Check that policy and reference agree before any update: every log-ratio is 0, and the loss is known.

    The run calls it twice. In the first evaluation nothing has been trained yet; in the first training step the policy
    is in the state in which it is trained, with the layers' own dropout, say, if that is active although it must not
    be. A new adapter changes nothing: one of its two matrices is 0.

    A reference scored in other micro-batches than the policy may differ by rounding, in bfloat16 or on hardware whose
    products depend on the batch. Returns what agreed, in words. Raises UserError for larger differences.
    """
    if train_state.config.reference_model or train_state.config.multi_reference.models:
        return ""  # another model than the policy
    agreed, exact = [], True
    read = [side for side in train_state.objective.completions if side in SIDES]
    sides = [(part, side) for part in inputs for side in read if part.has_reference]
    if sides:
        logratios = torch.cat([getattr(part, f"{side}_logratios") for part, side in sides]).abs()
        lengths = torch.cat([getattr(part, f"{side}_lengths") for part, side in sides])
        largest = logratios.max().item()
        exact = largest <= STEP0_TOLERANCE
        # Written as `not all(<=)`, which NaN fails.
        if not exact and not (logratios <= rounding(train_state.config.precision, lengths)).all():
            raise UserError(
                f"{where} the policy differs from the reference: largest |log-ratio| {largest:.3g} nats over its "
                "pairs. They must be the same model, scored in the same way; this is a bug or a model whose forward "
                "pass is random."
            )
        agreed.append(f"policy = reference {'' if exact else 'up to rounding '}(largest |log-ratio| {largest:.2g})")
    expected = train_state.objective.step0_loss
    if expected is not None:  # the same for every pair, times its weight
        expected *= torch.cat([part.weights for part in inputs]).mean().item()
    if expected is not None and exact:
        if not abs(loss - expected) <= STEP0_TOLERANCE * max(1.0, abs(expected)):
            raise UserError(f"{where} the loss is {loss:.6f}; it must be {expected:.6f} there")
        agreed.append(f"loss {loss:.6f} = {expected:.6f}")
    return ", ".join(agreed)
