"""Metrics as sums and counts, so that no mean depends on how pairs were split into micro-batches."""

import math
import sys

import torch
from torch import Tensor

from prefopt.objectives.base import ObjectiveOutput, PairInputs


class Means:
    """Running means of named `(B,)` tensors. Values stay on their device until `compute`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            total = value.detach().double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def compute(self) -> dict[str, float]:
        means = torch.stack(list(self.sums.values())) / torch.tensor(
            list(self.counts.values()), device=next(iter(self.sums.values())).device
        )
        return dict(zip(self.sums, means.tolist(), strict=True))


def pair_metrics(inputs: PairInputs, output: ObjectiveOutput) -> dict[str, Tensor]:
    """Per pair, `(B,)` each. Log-probs and log-ratios in nats, `_per_token` divided by the completion's length.

    A tie counts neither as right nor is it hidden: `tie_rate` stands beside `accuracy`.
    """
    metrics = {
        "loss": output.losses,
        "accuracy": (output.chosen_scores > output.rejected_scores).float(),
        "tie_rate": (output.chosen_scores == output.rejected_scores).float(),
        "margin": output.chosen_scores - output.rejected_scores,
        "chosen_logps": inputs.policy_chosen_logps,
        "rejected_logps": inputs.policy_rejected_logps,
        "chosen_logps_per_token": inputs.policy_chosen_logps / inputs.chosen_lengths,
        "rejected_logps_per_token": inputs.policy_rejected_logps / inputs.rejected_lengths,
        "chosen_length": inputs.chosen_lengths,
        "rejected_length": inputs.rejected_lengths,
    }
    if inputs.reference_chosen_logps is not None:
        metrics["chosen_logratio"] = inputs.policy_chosen_logps - inputs.reference_chosen_logps
        metrics["rejected_logratio"] = inputs.policy_rejected_logps - inputs.reference_rejected_logps
    return metrics


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (from the sample standard deviation; nan for fewer than two values)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
