"""Metrics as sums and counts, so that no mean depends on how pairs were split into micro-batches."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs
from prefopt.tracking.metrics import GAPS

QUANTILES = (0.1, 0.5, 0.9)
OF_GAPS = ("accuracy", "margin", "chosen_logratio", "rejected_logratio")


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
    """The metrics over all parts of a step: loss, pair metrics, `n` pairs, and the objective's diagnostics under its
    name. `others` (0-dim) are added as they are.

    All values leave the device in one transfer: each transfer would make the host wait for the GPU.
    """
    means = Means()
    for name, value in others.items():
        means.add_ratio(name, value, 1)
    for inputs, output in scored:
        pairs = output.losses.numel()
        denominator = inputs.chosen_lengths.sum() if objective.normalize_by == "chosen_token" else pairs
        means.add_ratio("loss", output.losses.sum(dtype=torch.float64), denominator)
        means.add(pair_metrics(inputs, output))
    for name in scored[0][1].diagnostics:
        parts = [output.diagnostics[name].detach() for _, output in scored]
        for key, value in _summary(name, parts).items():
            means.add_ratio(f"{objective.name}/{key}", value, 1)
    return {**means.compute(), "n": sum(output.losses.numel() for _, output in scored)}


def _summary(name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """0-dim values of a diagnostic: of booleans their share, of numbers mean and quantiles, of a statistic its mean."""
    if parts[0].ndim == 0:  # a statistic of the whole step
        return {name: torch.stack(list(parts)).double().mean()}
    values = torch.cat(list(parts))
    mean = {name: values.double().mean()}
    if values.dtype == torch.bool:
        return mean
    return mean | {f"{name}_p{round(100 * q)}": values.double().quantile(q) for q in QUANTILES}


def pair_metrics(inputs: PairInputs, output: ObjectiveOutput) -> dict[str, Tensor]:
    """The metrics of each pair, `(B,)`, as far as scores, log-probs and reference are there to compute them.

    Log-probs and log-ratios are in nats; `_per_token` is divided by the completion's length. A tie is not right, and
    counts in `tie_rate`.
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


def by_reward_gap(values: dict[str, Tensor], gaps: Tensor) -> dict[str, float]:
    """Means of the metrics of `OF_GAPS` over thirds of the pairs, `small_gap_accuracy` for instance.

    Args:
        values: `(B,)` each, by the names of `pair_metrics`.
        gaps: `(B,)` |r_w - r_l| of the prior rewards. Near ties are in the first third.
    """
    thirds = gaps.sort(stable=True).indices.tensor_split(len(GAPS))
    names = [name for name in OF_GAPS if name in values]
    return {
        f"{gap}_{name}": values[name][third].double().mean().item()
        for gap, third in zip(GAPS, thirds, strict=True)
        for name in names
        if len(third)
    }


def calibration(margins: Tensor, bins: int = 5) -> dict[str, Any]:
    """Whether a reward model is right as often as its probabilities say.

    It prefers one side with confidence sigma(|margin|), and is right where that is the chosen side. A tie is half
    right.

    Args:
        margins: `(B,)` r_w - r_l, the log-odds of the chosen side.
        bins: of equal width, over confidences from 0.5 to 1.

    Returns:
        `reliability`: for each bin that is not empty its bounds, mean confidence, share that is right, and n.
        `calibration_error`: the mean of |confidence - accuracy|, weighted by n (expected calibration error; Guo et al.
        2017, arXiv 1706.04599, Eq. 3).
    """
    confidence = margins.double().abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # confidence 1 belongs to the last bin
    rows = []
    for i in range(bins):
        inside = bin_of == i
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
