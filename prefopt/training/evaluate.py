"""Held-out pairs and samples of the policy, and the check that nothing is wrong before the first step."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import prefopt.generation.sampler
import prefopt.models.logprobs
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.errors import UserError
from prefopt.generation.sampler import Sample, sample
from prefopt.models.load import resolved_config
from prefopt.models.logprobs import autocast
from prefopt.models.reference import ROUNDING
from prefopt.objectives.base import SIDES, PairInputs
from prefopt.training.guards import explain_oom
from prefopt.training.metrics import reliability, step_metrics
from prefopt.training.state import TrainState
from prefopt.training.step import forward_pairs, step_inputs
from prefopt.utils.console import progress, say
from prefopt.utils.distributed import on_main_process
from prefopt.utils.files import atomic_write, cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.stats import mean_and_error

# Policy and reference are the same function of the same weights before the first step; what is left is rounding.
STEP0_TOLERANCE = 1e-3


def evaluate_on_main(job: TrainState, step: int) -> dict[str, Any]:
    """`evaluate` by the first process, while the others wait."""
    return on_main_process(partial(evaluate, job, step)) or {}


def evaluate(job: TrainState, step: int) -> dict[str, Any]:
    """Held-out pairs and, with an oracle, samples to the held-out prompts; says the main figures."""
    metrics: dict[str, Any] = {}
    if job.heldout_pairs:
        metrics |= evaluate_pairs(job, step, job.heldout_pairs)
    elif step == 0:  # for its check alone
        first = step_indices(len(job.train_pairs), job.config.seed, 0, job.config.batch_size)
        evaluate_pairs(job, 0, [job.train_pairs[i] for i in first])
    if job.oracle:
        metrics |= initial_sample_metrics(job) if step == 0 else sample_metrics(job, step)
    parts = []
    if "accuracy" in metrics:
        parts.append(f"held-out accuracy {metrics['accuracy']:.3f} (ties {metrics['tie_rate']:.2f}, n {metrics['n']})")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "calibration_error" in metrics:
        parts.append(f"calibration error {metrics['calibration_error']:.3f}")
    if "oracle_reward" in metrics:
        parts.append(f"oracle reward {metrics['oracle_reward']:.3f} ± {metrics['oracle_reward_se']:.3f}")
        parts.append(f"KL {metrics['kl']:.2f} ± {metrics['kl_se']:.2f}")
        parts.append(f"length {metrics['sample_length']:.1f}")
    say(f"  step {step}/{job.config.total_steps}: {', '.join(parts) or 'nothing to evaluate'}")
    for row in metrics.get("reliability", []) if step == job.config.total_steps else []:
        found = f"{row['confidence']:.3f} on average, right {row['accuracy']:.3f} (n {row['n']})"
        say(f"    confidence {row['low']:.1f} to {row['high']:.1f}: {found}")
    fall, limit = -metrics.get("chosen_logratio_per_token", 0.0), job.config.squeeze_alarm
    if limit is not None and fall > limit:
        say(
            f"  squeezing: the held-out chosen completions have lost {fall:.2f} nats per token since the start, more "
            f"than squeeze_alarm={limit:g} (the rejected ones {-metrics.get('rejected_logratio_per_token', 0):.2f}). "
            "Lower optimizer.lr, or hold the chosen ones up with objective.nll_weight."
        )
    return metrics


@torch.no_grad()
def evaluate_pairs(job: TrainState, step: int, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """The pair metrics over `pairs`, the same in every call. At step 0 also the check that policy and reference agree.

    An objective whose scope is the step sees all pairs at once, with its state as it stands.
    """
    micro_batches = job.micro_batches(pairs)
    known = job.reference is not None and job.objective.completions == SIDES
    show = job.config.logger.progress
    with explain_oom(job, f"evaluation after step {step}", micro_batches):
        parts = [forward_pairs(job, part, reference=known) for part in progress(micro_batches, "held-out pairs", show)]
    if job.objective.scope == "step":
        parts = [step_inputs(job, 0, parts)]
    scored = [(inputs, job.objective(inputs)) for inputs in parts]
    metrics = step_metrics(job.objective, scored)
    if job.objective.model_kind == "reward_model":
        margins = [output.chosen_scores - output.rejected_scores for _, output in scored]  # type: ignore[operator]
        metrics |= reliability(torch.cat(margins))
    if step == 0:
        check_step0(job, [inputs for inputs, _ in scored], metrics["loss"])
    return metrics


def check_step0(job: TrainState, scored: Sequence[PairInputs], loss: float) -> None:
    """Before the first step policy and reference are the same: every log-ratio is 0 and the loss is known.

    Where the reference was scored in other batches than the policy, in bfloat16, on hardware whose products depend on
    the batch, log-ratios may be as large as that rounding. Raises UserError beyond; says so if all is well.
    """
    if job.config.reference_model:
        return  # they need not be the same
    found, exact = [], True
    sides = [(x, side) for x in scored for side in job.objective.completions if x.has_reference]
    if sides:
        logratios = torch.cat([getattr(x, f"{side}_logratios") for x, side in sides]).abs()
        lengths = torch.cat([getattr(x, f"{side}_lengths") for x, side in sides])
        largest = logratios.max().item()
        exact = largest <= STEP0_TOLERANCE
        if not exact and not (logratios <= ROUNDING[job.config.precision] * lengths).all():
            raise UserError(
                f"before the first step the policy differs from the reference: largest |log-ratio| {largest:.3g} "
                "nats over its pairs. They must be the same model, scored in the same way; this is a bug or a "
                "model whose forward pass is random."
            )
        found.append(f"policy = reference {'' if exact else 'up to rounding '}(largest |log-ratio| {largest:.2g})")
    expected = job.objective.step0_loss
    if expected is not None and exact:
        if not abs(loss - expected) <= STEP0_TOLERANCE * max(1.0, abs(expected)):
            raise UserError(f"before the first step the loss is {loss:.6f}; it must be {expected:.6f} there")
        found.append(f"loss {loss:.6f} = {expected:.6f}")
    if found:
        say(f"  step 0: {', '.join(found)}")


def initial_sample_metrics(job: TrainState) -> dict[str, Any]:
    """`sample_metrics` of the initial policy, which all the runs of a sweep share: drawn once, then read from the
    user's cache under everything that decides them."""
    config = job.config
    if config.reference_model:
        return sample_metrics(job, 0)  # the KL is to another model
    decides = [
        job.run.record["initial_weights"],
        resolved_config(job.engine.policy),
        job.run.record["versions"],
        [encode_prompt(job.tokenizer, prompt) for prompt in job.prompts],
        repr(job.oracle),
        config.sampling,
        [config.seed, config.precision, config.device, torch.get_num_threads()],
    ]
    key = fingerprint(decides, prefopt.generation.sampler, prefopt.models.logprobs, type(job.oracle))
    cached = cache_dir() / "initial_samples" / key[:16]
    samples_file = samples_path(job, 0)
    if not (cached / "metrics.json").is_file():
        metrics = sample_metrics(job, 0)
        atomic_write(cached / "samples.jsonl", samples_file.read_text())
        atomic_write(cached / "metrics.json", json.dumps(metrics))
    atomic_write(samples_file, (cached / "samples.jsonl").read_text())
    return json.loads((cached / "metrics.json").read_text())


@torch.no_grad()
def sample_metrics(job: TrainState, step: int) -> dict[str, Any]:
    """Draw one response to each held-out prompt and score it; write the texts to samples/.

    `kl` estimates KL(policy || reference) in nats per response: the mean log-ratio over the policy's own samples,
    unbiased at temperature 1.
    """
    assert job.oracle is not None
    show = job.config.logger.progress
    with autocast(job.engine.device, job.config.precision):
        drawn = sample(job.engine.policy, job.tokenizer, job.prompts, job.config.sampling, job.config.seed, 1, show)
    samples = [responses[0] for responses in drawn]
    logratios = sample_logratios(job, samples)
    rewards = [job.oracle(prompt, s.text) for prompt, s in zip(job.prompts, samples, strict=True)]
    lines = [
        {"prompt": prompt, "response": s.text, "finished": s.finished, "reward": reward, "logratio": logratio}
        for prompt, s, reward, logratio in zip(job.prompts, samples, rewards, logratios, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write(samples_path(job, step), text)
    reward, reward_se = mean_and_error(rewards)
    kl, kl_se = mean_and_error(logratios)
    return {
        "oracle_reward": reward,
        "oracle_reward_se": reward_se,
        "kl": kl,
        "kl_se": kl_se,
        "sample_length": sum(len(s.tokens) for s in samples) / len(samples),
        "sample_finished": sum(s.finished for s in samples) / len(samples),
        "samples": len(samples),
    }


def samples_path(job: TrainState, step: int) -> Path:
    """Its folder is there afterwards. Raises FileNotFoundError where the run's own is gone, with its file system."""
    folder = job.run.folder / "samples"
    folder.mkdir(exist_ok=True)
    return folder / f"step_{step:07d}.jsonl"


def sample_logratios(job: TrainState, samples: Sequence[Sample]) -> list[float]:
    """log pi - log pi_ref of each sample, nats."""
    assert job.reference is not None
    # As pairs without a rejected side, which the layouts know how to cut into micro-batches.
    pairs = [TokenizedPair(str(i), s.prompt_tokens, s.tokens, []) for i, s in enumerate(samples)]
    parts = job.layout.micro_batches(pairs, job.config.micro_batch_tokens, None, ("chosen",))

    def scored(model: PreTrainedModel, what: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part in progress(parts, f"KL of samples: {what}", job.config.logger.progress):
            found = job.score(model, job.layout.collate(part, ("chosen",)).to(job.engine.device)).sums
            sums |= dict(zip((p.id for p in part), found.tolist(), strict=True))
        return sums

    policy = scored(job.engine.policy, "policy")
    with job.reference.model() as model:
        reference = scored(model, "reference")
    return [policy[p.id] - reference[p.id] for p in pairs]
