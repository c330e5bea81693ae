"""Held-out pairs and samples of the policy, and the check that nothing is wrong before the first step."""

import json
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import prefopt.generation.sampler
import prefopt.models.logprobs
from prefopt.data.cache import tokenizer_digest
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.generation.sampler import Sample, sample
from prefopt.models.fingerprint import loaded_model
from prefopt.models.generation_config import stop_tokens
from prefopt.models.logprobs import autocast
from prefopt.objectives import SIDES
from prefopt.objectives.base import apply_objective
from prefopt.training.guards import explain_oom
from prefopt.training.metrics import calibration, step_metrics
from prefopt.training.state import TrainState
from prefopt.training.step import count_step, forward_pairs, step_inputs
from prefopt.training.step0 import check_step0
from prefopt.utils.console import progress
from prefopt.utils.distributed import on_main_process
from prefopt.utils.files import atomic_write, cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.memory import memory_for
from prefopt.utils.stats import mean_and_error
from prefopt.utils.store import opened

log = logging.getLogger(__name__)


def evaluate_on_main(train_state: TrainState, step: int) -> dict[str, Any]:
    """`evaluate` in the main process, while the others wait. Returns {} in the others."""
    return on_main_process(partial(evaluate, train_state, step)) or {}


def evaluate(train_state: TrainState, step: int) -> dict[str, Any]:
    """Evaluate after `step` steps: the held-out pairs and, with an oracle, samples to the held-out prompts.

    Says the main figures, and returns all metrics. Raises UserError as `check_step0` does.
    """
    config = train_state.config
    metrics: dict[str, Any] = {}
    if train_state.heldout_pairs:
        metrics |= evaluate_pairs(train_state, step, train_state.heldout_pairs)
    if train_state.oracle:
        metrics |= initial_sample_metrics(train_state) if step == 0 else sample_metrics(train_state, step)

    log.info(f"  step {step}/{config.total_steps}: {format_evaluation(metrics)}")
    if step == config.total_steps:
        for row in metrics.get("reliability", []):
            log.info(f"    {format_reliability(row)}")
    warn_of_squeezing(metrics, config.squeeze_alarm)
    return metrics


def format_evaluation(metrics: dict[str, Any]) -> str:
    """The main figures of an evaluation in one line."""
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
    return ", ".join(parts) or "nothing to evaluate"


def format_reliability(row: dict[str, Any]) -> str:
    """One bin of `metrics.calibration`."""
    accuracy = f"{row['confidence']:.3f} on average, right {row['accuracy']:.3f} (n {row['n']})"
    return f"confidence {row['low']:.1f} to {row['high']:.1f}: {accuracy}"


def warn_of_squeezing(metrics: dict[str, Any], limit: float | None) -> None:
    """Say so where the held-out chosen completions have lost more than `limit` nats per token. None: never."""
    loss_per_token = -metrics.get("chosen_logratio_per_token", 0.0)
    if limit is not None and loss_per_token > limit:
        log.info(
            f"  squeezing: the held-out chosen completions have lost {loss_per_token:.2f} nats per token since the "
            f"start, more than squeeze_alarm={limit:g} (the rejected ones "
            f"{-metrics.get('rejected_logratio_per_token', 0):.2f}). "
            "Lower optimizer.lr, or hold the chosen ones up with objective.nll_weight."
        )


@torch.no_grad()
def evaluate_pairs(train_state: TrainState, step: int, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """The metrics of `pairs`. At step 0 also the check that policy and reference agree.

    An objective whose scope is the step gets all pairs at once, with its present state.
    """
    objective = train_state.objective
    micro_batches = train_state.micro_batches(pairs)
    total = count_step(micro_batches)
    # Log-ratios are metrics also of objectives that do not read the reference.
    has_reference = train_state.reference is not None and objective.completions == SIDES
    show = train_state.config.logger.progress
    with explain_oom(train_state, f"evaluation after step {step}", micro_batches):
        inputs = [
            forward_pairs(train_state, micro_batch, total, reference=has_reference)
            for micro_batch in progress(micro_batches, "held-out pairs", show)
        ]
    if objective.scope == "step":
        inputs = [step_inputs(train_state, 0, inputs)]  # the noise of step 0 at every step, so that figures compare
    scored = [(part, apply_objective(objective, part)) for part in inputs]

    metrics = step_metrics(objective, scored)
    if objective.model_kind == "reward_model":
        margins = [output.chosen_scores - output.rejected_scores for _, output in scored]  # type: ignore[operator]
        metrics |= calibration(torch.cat(margins))
    if step == 0:
        agreed = check_step0(train_state, inputs, metrics["loss"], "before the first step")
        if agreed:
            log.info(f"  step 0: {agreed}")
    return metrics


def initial_sample_metrics(train_state: TrainState) -> dict[str, Any]:
    """`sample_metrics` of the initial policy, which all runs of a sweep share: computed once, then read from the user's
    cache. The key holds everything that decides the samples."""
    config = train_state.config
    if config.reference_model:
        return sample_metrics(train_state, 0)  # the KL is to another model
    policy, tokenizer = train_state.engine.policy, train_state.tokenizer
    decisive = [
        *loaded_model(policy, train_state.run.record["initial_weights"]),
        stop_tokens(tokenizer, policy.config, policy.generation_config),
        tokenizer_digest(tokenizer),
        train_state.run.record["versions"],
        [encode_prompt(tokenizer, prompt) for prompt in train_state.prompts],
        repr(train_state.oracle),
        config.sampling,
        [config.seed, config.precision, config.device, torch.get_num_threads()],
    ]
    key = fingerprint(decisive, prefopt.generation.sampler, prefopt.models.logprobs, type(train_state.oracle))
    samples_file = samples_path(train_state, 0)

    def draw(folder: Path) -> None:
        metrics = sample_metrics(train_state, 0)
        shutil.copyfile(samples_file, folder / "samples.jsonl")
        (folder / "metrics.json").write_text(json.dumps(metrics))

    cached = opened(cache_dir() / "initial_samples" / key[:16], "samples of the initial policy", draw)
    atomic_write(samples_file, (cached / "samples.jsonl").read_bytes())
    metrics: dict[str, Any] = json.loads((cached / "metrics.json").read_text())
    return metrics


@torch.no_grad()
def sample_metrics(train_state: TrainState, step: int) -> dict[str, Any]:
    """Draw one response to each held-out prompt and score it; write the texts to samples/.

    `kl` estimates KL(policy || reference) in nats per response: the mean log-ratio over the policy's own samples,
    unbiased at temperature 1.
    """
    assert train_state.oracle is not None
    show = train_state.config.logger.progress
    half = f"sampling.batch_size={max(1, train_state.config.sampling.batch_size // 2)}"
    fewer = "lower sampling.max_new_tokens"
    with (
        memory_for(f"sampling after step {step}", half, fewer),
        autocast(train_state.engine.device, train_state.config.precision),
    ):
        drawn = sample(
            train_state.engine.policy,
            train_state.tokenizer,
            train_state.prompts,
            train_state.config.sampling,
            train_state.config.seed,
            1,
            show,
        )
    samples = [responses[0] for responses in drawn]
    logratios = sample_logratios(train_state, samples)
    rewards = [train_state.oracle(prompt, s.text) for prompt, s in zip(train_state.prompts, samples, strict=True)]
    lines = [
        {"prompt": prompt, "response": s.text, "finished": s.finished, "reward": reward, "logratio": logratio}
        for prompt, s, reward, logratio in zip(train_state.prompts, samples, rewards, logratios, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic_write(samples_path(train_state, step), text)
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


def samples_path(train_state: TrainState, step: int) -> Path:
    """The file of the samples drawn after `step` steps. Makes its folder.

    Raises FileNotFoundError where the run's folder is gone, as when its file system is.
    """
    folder = train_state.run.folder / "samples"
    folder.mkdir(exist_ok=True)  # without parents, for that error
    return folder / f"step_{step:07d}.jsonl"


def sample_logratios(train_state: TrainState, samples: Sequence[Sample]) -> list[float]:
    """log pi - log pi_ref of each sample, in nats."""
    assert train_state.reference is not None
    # The layouts cut pairs into micro-batches, so each sample becomes a pair without a rejected side.
    pairs = [TokenizedPair(str(i), s.prompt_tokens, s.tokens, []) for i, s in enumerate(samples)]
    parts = train_state.layout.micro_batches(pairs, train_state.config.micro_batch_tokens, None, ("chosen",))

    def score(model: PreTrainedModel, what: str) -> dict[str, float]:
        logps: dict[str, float] = {}
        for part in progress(parts, f"KL of samples: {what}", train_state.config.logger.progress):
            batch = train_state.layout.collate(part, ("chosen",)).to(train_state.engine.device)
            sums = train_state.score(model, batch).sums
            logps |= dict(zip((p.id for p in part), sums.tolist(), strict=True))
        return logps

    policy = score(train_state.engine.policy, "policy")
    with train_state.reference.model() as model:
        reference = score(model, "reference")
    return [policy[p.id] - reference[p.id] for p in pairs]
