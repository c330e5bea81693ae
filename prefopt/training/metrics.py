"""Metrics as sums and counts, so that no mean depends on how pairs were split into micro-batches."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs

QUANTILES = (0.1, 0.5, 0.9)


class Means:
    """Running means of named values. They stay on their device until `compute`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float | Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """`(B,)` each."""
        for name, value in values.items():
            self.add_ratio(name, value.sum(dtype=torch.float64), value.numel())

    def add_ratio(self, name: str, numerator: Tensor, denominator: float | Tensor) -> None:
        """The mean is the sum of numerators over the sum of denominators."""
        self.sums[name] = self.sums.get(name, 0) + numerator.detach().double()
        self.counts[name] = self.counts.get(name, 0) + denominator

    def compute(self) -> dict[str, float]:
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        return dict(zip(self.sums, means.tolist(), strict=True))


def step_metrics(
    objective: Objective, scored: Sequence[tuple[PairInputs, ObjectiveOutput]], **others: Tensor
) -> dict[str, Any]:
    """Loss, pair metrics, `n` pairs, the objective's diagnostics under its name, over all parts of a step, and `others`
    (0-dim). All of it leaves the device together: a transfer for each would stop a GPU as often."""
    means = Means()
    for name, value in others.items():
        means.add_ratio(name, value, 1)
    for inputs, output in scored:
        pairs = output.losses.numel()
        per = inputs.chosen_lengths.sum() if objective.normalize_by == "chosen_token" else pairs
        means.add_ratio("loss", output.losses.sum(dtype=torch.float64), per)
        means.add(pair_metrics(inputs, output))
    for name in scored[0][1].diagnostics:
        parts = [output.diagnostics[name].detach() for _, output in scored]
        for key, value in _summary(name, parts).items():
            means.add_ratio(f"{objective.name}/{key}", value, 1)
    return {**means.compute(), "n": sum(output.losses.numel() for _, output in scored)}


def _summary(name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """As `ObjectiveOutput` says: a share, a mean with quantiles, or a statistic of the step. 0-dim each."""
    if parts[0].ndim == 0:
        return {name: torch.stack(list(parts)).double().mean()}
    values = torch.cat(list(parts))
    mean = {name: values.double().mean()}
    if values.dtype == torch.bool:
        return mean
    return mean | {f"{name}_p{round(100 * q)}": values.double().quantile(q) for q in QUANTILES}


def pair_metrics(inputs: PairInputs, output: ObjectiveOutput) -> dict[str, Tensor]:
    """Per pair, `(B,)` each, where there is something to compute them from. Log-probs and log-ratios in nats,
    `_per_token` divided by the completion's length.

    A tie counts neither as right nor is it hidden: `tie_rate` stands beside `accuracy`.
    """
    metrics = {}
    if output.chosen_scores is not None and output.rejected_scores is not None:
        metrics["accuracy"] = (output.chosen_scores > output.rejected_scores).float()
        metrics["tie_rate"] = (output.chosen_scores == output.rejected_scores).float()
        metrics["margin"] = output.chosen_scores - output.rejected_scores
    for side in ("chosen", "rejected"):
        lengths = getattr(inputs, f"{side}_lengths")
        if lengths is None:
            continue
        metrics[f"{side}_length"] = lengths
        logps = getattr(inputs, f"policy_{side}_logps")
        if logps is None:
            continue
        metrics[f"{side}_logps"] = logps
        metrics[f"{side}_logps_per_token"] = logps / lengths
        if inputs.has_reference:
            logratios = getattr(inputs, f"{side}_logratios")
            metrics[f"{side}_logratio"] = logratios
            metrics[f"{side}_logratio_per_token"] = logratios / lengths
    return metrics


def reliability(margins: Tensor, bins: int = 5) -> dict[str, Any]:
    """Does a reward model mean its probabilities? `margins`: (B,) r_w - r_l, the log-odds it gives the chosen side.

    It prefers one side with confidence sigma(|margin|), and is right where that is the chosen one. `reliability`: per
    bin of confidence between 0.5 and 1 that is not empty its mean, the share that is right, and n; a tie is half right.
    `calibration_error`: the mean distance of the two, weighted by n (expected calibration error; Guo et al. 2017, arXiv
    1706.04599, Eq. 3).
    """
    confidence = margins.double().abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    places = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = []
    for i in range(bins):
        inside = places == i
        if n := int(inside.sum()):
            rows.append(
                {
                    "low": 0.5 + 0.5 * i / bins,
                    "high": 0.5 + 0.5 * (i + 1) / bins,
                    "confidence": confidence[inside].mean().item(),
                    "accuracy": right[inside].mean().item(),
                    "n": n,
                }
            )
    error = sum(r["n"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / len(margins)
    return {"calibration_error": error, "reliability": rows}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
