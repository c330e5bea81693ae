"""Momentum between stages: accelerated preference optimization (He et al. 2024, arXiv 2410.06293).

With the policies p_t of the stages, stage t + 1 has the reference p_t (p_t / p_{t-1})^m, which is not normalized: the
constant of a prompt cancels in a pair. Its log-probs are (1 + m) lp_t - m lp_{t-1}, a geometric mean of two references.
Nothing can be sampled from that, so the stage draws its responses, and is trained, from the weights extrapolated alike.

The formula was not read in the paper, nor was m = 0.3, nor from which weights a stage is trained there. Read was the
framework: a proximal point method with Nesterov's momentum, by an extrapolation after each update of the policy.
"""

import logging
from pathlib import Path

import torch

from prefopt.config.schema import ModelConfig
from prefopt.models import load
from prefopt.training.checkpoint import export

log = logging.getLogger(__name__)


@torch.no_grad()
def write_extrapolated(latest: ModelConfig, before: ModelConfig, momentum: float, target: Path) -> None:
    """Write theta + momentum (theta - theta_before) into the folder `target`, with the tokenizer of `latest`, whose
    weights are theta. Raises UserError for a model that cannot be loaded, and OSError where it cannot be written."""
    model, earlier = load.load_model(latest, "cpu"), dict(load.load_model(before, "cpu").named_parameters())
    for name, weight in model.named_parameters():
        weight.add_(weight - earlier[name], alpha=momentum)
    export(model, load.load_tokenizer(latest), target)
    log.info(f"{target}: the last policy, moved on by {momentum:g} of what its stage has changed")
