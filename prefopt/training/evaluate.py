"""Held-out pairs and samples of the policy, and the check that nothing is wrong before the first step."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import prefopt.generation.sampler
import prefopt.models.logprobs
from prefopt.data.cache import tokenizer_digest
from prefopt.data.collate import groups_of
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.errors import UserError
from prefopt.generation.sampler import Sample, sample
from prefopt.models.fingerprint import loaded_model
from prefopt.models.generation_config import stop_tokens
from prefopt.models.logprobs import autocast
from prefopt.objectives.base import apply_objective
from prefopt.rewards.scorers import Request, RewardScorer, rewards_shared
from prefopt.tracking.metrics import item_file
from prefopt.tracking.record import heldout_accuracy
from prefopt.training.forward import count_step, forward_pairs
from prefopt.training.guards import explain_oom
from prefopt.training.metrics import by_reward_gap, calibration, pair_metrics, step_metrics
from prefopt.training.state import TrainState
from prefopt.training.step import step_inputs
from prefopt.training.step0 import check_step0
from prefopt.utils.console import progress
from prefopt.utils.distributed import broadcast, is_main_process, map_shared
from prefopt.utils.files import atomic_write, cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.memory import is_out_of_memory, memory_for
from prefopt.utils.stats import mean_and_error, share_error
from prefopt.utils.store import opened

log = logging.getLogger(__name__)


def evaluate(train_state: TrainState, step: int) -> dict[str, Any]:
    """Evaluate after `step` steps: the held-out pairs, and samples to held-out prompts.

    A collective: the processes share the work, and the main one writes the files. Says the main figures, and returns
    all metrics. Raises UserError as `check_step0` does.
    """
    config = train_state.config
    metrics: dict[str, Any] = {}
    with train_state.engine.unsharded():
        if train_state.heldout_pairs:
            metrics |= evaluate_pairs(train_state, step, train_state.heldout_pairs)
        if train_state.prompts:
            metrics |= sample_metrics(train_state, step)

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
        accuracy = heldout_accuracy(metrics)
        text = f"{accuracy[0]:.3f} ± {accuracy[1]:.3f}" if accuracy else "–"
        parts.append(f"held-out accuracy {text} (ties {metrics['tie_rate']:.2f}, n {metrics['n']})")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "calibration_error" in metrics:
        parts.append(f"calibration error {metrics['calibration_error']:.3f}")
    if "oracle_reward" in metrics:
        parts.append(f"oracle reward {metrics['oracle_reward']:.3f} ± {metrics['oracle_reward_se']:.3f}")
    if "kl" in metrics:
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
    """The metrics of `pairs`, the accuracy with its standard error. At step 0 also the check that policy and reference
    agree.

    An objective whose scope is the step gets all pairs at once, with its present state.
    """
    objective = train_state.objective
    micro_batches = train_state.micro_batches(pairs)
    total = count_step(micro_batches)
    # Log-ratios are metrics also of objectives that do not read the reference.
    has_reference = train_state.reference is not None and "rejected" in objective.completions
    show = train_state.config.logger.progress
    with explain_oom(train_state, f"evaluation after step {step}", micro_batches):
        inputs = map_shared(
            lambda micro_batch: forward_pairs(train_state, micro_batch, total, reference=has_reference),
            micro_batches,
            lambda micro_batch: micro_batch.batch.tokens,
            lambda share: progress(share, "held-out pairs", show),
        )
    inputs = [part.map(lambda values: values.to(train_state.engine.device)) for part in inputs]
    if objective.scope == "step":
        inputs = [step_inputs(train_state, 0, inputs)]  # the noise of step 0 at every step, so that figures compare
    scored = [(part, apply_objective(objective, part)) for part in inputs]
    in_order = [pair for micro_batch in micro_batches for pair in micro_batch.pairs]
    parts = [pair_metrics(*part) for part in scored]
    values = {key: torch.cat([part[key].float() for part in parts]).cpu() for key in parts[0]}
    if pairs is train_state.heldout_pairs:
        write_pairs(train_state, step, [pair.id for pair in in_order], values)

    metrics = step_metrics(objective, scored)
    rewards = [(pair.chosen_reward, pair.rejected_reward) for pair in in_order]
    gaps = [abs(w - l) for w, l in rewards if w is not None and l is not None]
    if len(gaps) == len(rewards):
        metrics |= by_reward_gap(values, torch.tensor(gaps, dtype=torch.float64))
    if "accuracy" in metrics:
        metrics["accuracy_se"] = share_error(metrics["accuracy"], metrics["n"])
    if objective.model_kind == "reward_model":
        margins = [output.chosen_scores - output.rejected_scores for _, output in scored]  # type: ignore[operator]
        metrics |= calibration(torch.cat(margins))
    if step == 0:
        agreed = check_step0(train_state, inputs, metrics["loss"], "before the first step")
        if agreed:
            log.info(f"  step 0: {agreed}")
        if agreed and objective.step0_loss is not None and objective.model_kind == "policy":
            # All scores are equal there, whatever the data. What parts them in bfloat16 is rounding, and no accuracy.
            metrics |= {"accuracy": 0.0, "accuracy_se": 0.0, "tie_rate": 1.0}
    return metrics


def write_pairs(train_state: TrainState, step: int, ids: Sequence[str], values: dict[str, torch.Tensor]) -> None:
    """Write what is known of each held-out pair after `step` steps into heldout/, for paired differences of two runs: a
    line with its id, the objective's margin, and the log-probs of both sides, in nats."""
    keys = [key for key in ("margin", "chosen_logps", "rejected_logps") if key in values]
    columns = [values[key].tolist() for key in keys]
    rows = [{"id": id_} | dict(zip(keys, of_pair, strict=True)) for id_, *of_pair in zip(ids, *columns, strict=True)]
    write_items(train_state, "heldout", step, rows)


def sample_metrics(train_state: TrainState, step: int) -> dict[str, Any]:
    """Draw one response to each of the run's prompts, let the oracle reward them, if there is one, and write them to
    samples/.

    `kl` estimates KL(policy || reference) in nats per response: the mean log-ratio over the policy's own samples,
    unbiased at temperature 1.
    """
    rows = initial_samples(train_state) if step == 0 else draw_samples(train_state, step)
    if train_state.oracle:
        figures = oracle_figures(train_state, train_state.oracle, step, rows)
        rows = [row | {name: values[i] for name, values in figures.items()} for i, row in enumerate(rows)]
    else:
        figures = {}
    write_items(train_state, "samples", step, rows)

    metrics: dict[str, Any] = {}
    further = {f"sample_{name}": name for name in figures if name != "reward"}
    for name, key in {"oracle_reward": "reward", "kl": "logratio", **further}.items():
        if key in rows[0]:
            metrics[name], metrics[f"{name}_se"] = mean_and_error([row[key] for row in rows])
    return metrics | {
        "sample_length": sum(row["length"] for row in rows) / len(rows),
        "sample_finished": sum(row["finished"] for row in rows) / len(rows),
        "samples": len(rows),
    }


def initial_samples(train_state: TrainState) -> list[dict[str, Any]]:
    """`draw_samples` of the initial policy, which all runs of a sweep share: drawn once, then read from the user's
    cache. The key holds everything that decides them; rewards are not kept."""
    config = train_state.config
    if config.reference_model:
        return draw_samples(train_state, 0)  # the log-ratios are to another model
    policy, tokenizer = train_state.engine.policy, train_state.tokenizer
    decisive = [
        *loaded_model(policy, train_state.run.record["initial_weights"]),
        stop_tokens(tokenizer, policy.config, policy.generation_config),
        tokenizer_digest(tokenizer),
        train_state.run.record["versions"],
        [encode_prompt(tokenizer, prompt) for prompt in train_state.prompts],
        dataclasses.replace(config.sampling, prompts=None),  # the prompts themselves stand above
        [config.seed, config.precision, config.device, torch.get_num_threads()],
    ]
    key = fingerprint(decisive, draw_samples, prefopt.generation.sampler, prefopt.models.logprobs)

    if not is_main_process():
        while (rows := broadcast(None)) is None:
            draw_samples(train_state, 0)
        return rows

    def draw(folder: Path) -> None:
        broadcast(None)  # so that the other processes draw too
        (folder / "samples.jsonl").write_text(_as_lines(draw_samples(train_state, 0)))

    cached = opened(cache_dir() / "initial_samples" / key[:16], "samples of the initial policy", draw)
    return broadcast([json.loads(line) for line in (cached / "samples.jsonl").read_text().split("\n")[:-1]])


@torch.no_grad()
def draw_samples(train_state: TrainState, step: int) -> list[dict[str, Any]]:
    """One response to each prompt: its text, whether it ended, its length in tokens, and its log-ratio in nats.

    Raises UserError for a model that cannot generate.
    """
    policy, sampling = train_state.engine.policy, train_state.config.sampling
    half, none = f"sampling.batch_size={max(1, sampling.batch_size // 2)}", "sampling.prompts=0, which draws no samples"
    with memory_for(f"sampling after step {step}", half, "lower sampling.max_new_tokens", none):
        try:
            with autocast(train_state.engine.device, train_state.config.precision):
                show = train_state.config.logger.progress
                prompts, seed = train_state.prompts, train_state.config.seed
                drawn = sample(policy, train_state.tokenizer, prompts, sampling, seed, 1, show, True)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the {policy.config.model_type} cannot generate ({why}). With sampling.prompts=0 it is trained and "
                "evaluated without samples."
            ) from error
    samples = [responses[0] for responses in drawn]
    with memory_for(f"computing the KL after step {step}", none):
        logratios = sample_logratios(train_state, samples)
    return [
        {"prompt": prompt, "response": s.text, "finished": s.finished, "length": len(s.tokens), "logratio": logratio}
        for prompt, s, logratio in zip(train_state.prompts, samples, logratios, strict=True)
    ]


def oracle_figures(
    train_state: TrainState, oracle: RewardScorer, step: int, rows: Sequence[dict[str, Any]]
) -> dict[str, list[float]]:
    """By name, the figures that the oracle gives the responses in `rows`, of which "reward" is one. A reward model is
    in memory meanwhile, beside the policy."""
    requests = [
        Request(row, i, row["prompt"], row["response"], row["finished"], f"sample {i + 1} after step {step}")
        for i, row in enumerate(rows)
    ]
    config = train_state.config
    with memory_for(f"scoring the samples after step {step}", "dataset.oracle=null, which gives no rewards"):
        show, device = config.logger.progress, str(train_state.engine.device)
        rewards = rewards_shared(oracle, requests, device, config.precision, show)
    return {"reward": rewards, **oracle.further_figures(requests)}


def _as_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_items(train_state: TrainState, kind: str, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write what the evaluation after `step` steps knows of each item: `kind` of `PER_ITEM`.

    Raises FileNotFoundError where the run's folder is gone, as when its file system is.
    """
    if not is_main_process():
        return
    file = item_file(train_state.run.folder, kind, step)
    file.parent.mkdir(exist_ok=True)  # without parents, for that error
    atomic_write(file, _as_lines(rows))


def sample_logratios(train_state: TrainState, samples: Sequence[Sample]) -> list[float]:
    """log pi - log pi_ref of each sample, in nats."""
    assert train_state.reference is not None
    # The layouts cut pairs into micro-batches, so each sample becomes a pair without a rejected side.
    pairs = [TokenizedPair(str(i), s.prompt_tokens, s.tokens, []) for i, s in enumerate(samples)]
    layout, show = train_state.layout, train_state.config.logger.progress
    parts = layout.micro_batches(pairs, train_state.config.micro_batch_tokens, None, ("chosen",))

    def score(model: PreTrainedModel, what: str) -> dict[str, float]:
        def sums(part: list[TokenizedPair]) -> list[tuple[str, float]]:
            batch = layout.collate(part, ("chosen",)).to(train_state.engine.device)
            return list(zip((p.id for p in part), train_state.score(model, batch).sums.tolist(), strict=True))

        found = map_shared(
            sums,
            parts,
            lambda part: layout.tokens(groups_of(part, ("chosen",))),
            lambda share: progress(share, f"KL of samples: {what}", show),
        )
        return dict(logps for part in found for logps in part)

    policy = score(train_state.engine.policy, "policy")
    with train_state.reference.model() as model:
        reference = score(model, "reference")
    return [policy[p.id] - reference[p.id] for p in pairs]
