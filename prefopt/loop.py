"""The training loop, from top to bottom: evaluate, step, log, save. It knows no objective by name."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import UserError, stop
from prefopt.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from prefopt.config import TrainConfig
from prefopt.data.formats import Message
from prefopt.data.layout import LAYOUTS, Batch, Layout, padded
from prefopt.data.sampler import step_indices
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.engine import Engine
from prefopt.generate import Sample, sample
from prefopt.loggers import Loggers, read_metrics
from prefopt.logps import Logps, completion_logps, completion_rewards
from prefopt.metrics import mean_and_error, peak_memory_gib, step_metrics
from prefopt.objectives.base import DIFFERENTIABLE, Objective, ObjectiveOutput, PairInputs, concatenate
from prefopt.optim import Schedule
from prefopt.paths import cache_dir, write_whole
from prefopt.posthoc.oracle import Oracle
from prefopt.progress import Bar, say, track
from prefopt.run import Run

# Policy and reference are the same function of the same weights before the first step; what is left is rounding.
STEP0_TOLERANCE = 1e-3


@dataclass
class Job:
    """Everything one run needs. `reference` is the initial policy, frozen, or None where a reward model is trained;
    `prompts` are the held-out ones; `state` is the objective's."""

    config: TrainConfig
    run: Run
    objective: Objective
    schedule: Schedule
    engine: Engine
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    train_pairs: Sequence[TokenizedPair]
    heldout_pairs: Sequence[TokenizedPair]
    prompts: list[list[Message]]
    oracle: Oracle | None
    layout: Layout = LAYOUTS["padded"]
    heldout_reference: list[Logps] = field(default_factory=list)  # filled by the first evaluation
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.objective.initial_state()

    @property
    def tiled(self) -> bool:
        return self.config.logits == "tiled"


def train(job: Job) -> list[dict[str, Any]]:
    """Run from the last checkpoint, or from the start, to the end. Returns the rows of all evaluations.

    The order of pairs and the learning rate are functions of the step and there is no dropout, so weights, moments,
    the objective's state and the step are all there is: a run that goes on is bit for bit the run that was never
    interrupted.
    """
    config, run, engine = job.config, job.run, job.engine
    start = 0
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint:
        tensors, meta = load_checkpoint(checkpoint)
        engine.load_state(tensors)
        job.state = tensors["objective"]
        start = meta["step"]
        say(f"  going on from step {start} of {config.steps} ({checkpoint})")
    logger = Loggers(run, config.logger, start)
    try:
        if start == 0:
            logger.log("heldout", 0, evaluate(job, 0))
        with Bar("training", config.steps, config.logger.progress, done=start) as bar:
            for step in range(start, config.steps):
                metrics = train_step(job, step)
                done = step + 1
                logger.log("train", done, metrics)
                if done % config.eval_every == 0 or done == config.steps:
                    logger.log("heldout", done, evaluate(job, done))
                leave = done < config.steps and stop.requested()
                if (done % config.save_every == 0 and done < config.steps) or leave:
                    save_checkpoint(run.checkpoints, done, engine.state() | {"objective": job.state}, {})
                if leave:
                    raise stop.Interrupted(f"saved after step {done} of {config.steps}")
                bar.advance("  ".join(f"{k} {metrics[k]:.4g}" for k in ("loss", "accuracy") if k in metrics))
    finally:
        logger.close()
    return [row for row in read_metrics(run) if row["split"] == "heldout"]


def train_step(job: Job, step: int) -> dict[str, Any]:
    """One optimizer step over `batch_size` pairs, in micro-batches. Returns the step's metrics.

    Raises UserError, without touching the weights, if loss or gradient is not finite.
    """
    config, engine = job.config, job.engine
    began = time.monotonic()
    indices = step_indices(len(job.train_pairs), config.seed, step, config.batch_size)
    pairs = [job.train_pairs[i] for i in indices]
    scored = accumulate_gradients(job, step, pairs)
    gradient_norm = engine.clip_gradients()
    metrics: dict[str, Any] = {**step_metrics(job.objective, scored), "gradient_norm": gradient_norm.item()}
    bad = [name for name in ("loss", "gradient_norm") if not torch.tensor(metrics[name]).isfinite()]
    if bad:
        raise UserError(
            f"step {step + 1}: {' and '.join(bad)} not finite; the step was refused and the weights are unchanged. Its "
            f"pairs: {', '.join(p.id for p in pairs)}. Look at these pairs, or lower optimizer.lr="
            f"{config.optimizer.lr}; the same command goes on from the last checkpoint."
        )
    lr = config.optimizer.lr * job.schedule(step, config.steps)
    engine.step(lr)
    job.state = scored[-1][1].state
    seconds = time.monotonic() - began
    sides = job.objective.sides
    tokens = sum(len(p.prompt) + len(getattr(p, side)) for p in pairs for side in sides)
    return metrics | {
        "lr": lr,
        "pairs_per_second": len(pairs) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(engine.device),
    }


def accumulate_gradients(
    job: Job, step: int, pairs: Sequence[TokenizedPair]
) -> list[tuple[PairInputs, ObjectiveOutput]]:
    """Add up the gradient of the step's loss, the mean over `pairs` (or over their chosen tokens, where the objective
    says so), micro-batch by micro-batch. It does not depend on the micro-batches unless the objective's scope is one.

    An objective over the whole step cannot be differentiated in parts. Its gradient has two factors, though: by the
    `(B,)` log-probs, which is cheap once they are all known, and of the log-probs by the weights. So a first pass
    collects the log-probs without graph, the objective is differentiated on them, and a second pass backpropagates
    sum(gradient * log-prob) micro-batch by micro-batch. The second pass must repeat the first, so there is no dropout.
    """
    objective, engine = job.objective, job.engine
    denominator = sum(p.learnt for p in pairs) if objective.per == "chosen_token" else len(pairs)
    micro_batches = chunks(pairs, job.config.micro_batch_size)
    scored = []
    if objective.scope != "step" or len(micro_batches) == 1:
        for micro_batch in micro_batches:
            inputs = pair_inputs(job, micro_batch)
            if objective.scope == "step":
                inputs = whole_step(job, step, [inputs])
            output = objective(inputs)
            engine.backward(output.losses.sum() / denominator)
            scored.append((inputs, output))
        return scored
    with torch.no_grad():
        inputs = whole_step(job, step, [pair_inputs(job, micro_batch) for micro_batch in micro_batches])
    leaves = {name: getattr(inputs, name).requires_grad_() for name in inputs.tensors() if name in DIFFERENTIABLE}
    output = objective(inputs)
    total = output.losses.sum() / denominator
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    start = 0
    for micro_batch in micro_batches:
        tensors = policy_tensors(job, job.layout(micro_batch).to(engine.device))
        part = slice(start, start + len(micro_batch))
        engine.backward(torch.stack([(gradients[name][part] * tensors[name]).sum() for name in gradients]).sum())
        start += len(micro_batch)
    return [(inputs, output)]


def whole_step(job: Job, step: int, parts: Sequence[PairInputs]) -> PairInputs:
    """All pairs of a step, with what only objectives of that scope may read: the state, and noise drawn for it."""
    inputs = concatenate(parts)
    n = len(inputs.chosen_lengths)
    generator = torch.Generator().manual_seed(job.config.seed * 1_000_003 + step)
    noise = torch.rand(n, generator=generator).to(inputs.chosen_lengths.device)
    return replace(inputs, noise=noise, state=job.state)


def pair_inputs(job: Job, pairs: Sequence[TokenizedPair], reference: Logps | None = None) -> PairInputs:
    """Score B pairs with the policy, and with the reference where the objective needs it and `reference`, the
    log-probs of the same batch, is not given."""
    needs = job.objective.needs
    batch = job.layout(pairs).to(job.engine.device)
    inputs = policy_tensors(job, batch)
    if reference is None and "reference" in needs:
        assert job.reference is not None
        with torch.no_grad(), job.engine.autocast():
            reference = completion_logps(job.reference, batch, tiled=job.tiled)
    if reference is not None:
        inputs |= by_side(job, "reference_{}_logps", reference.sums)
    inputs |= by_side(job, "{}_lengths", batch.lengths)
    if "rewards" in needs:
        for side in job.objective.sides:
            rewards = [getattr(p, f"{side}_reward") for p in pairs]
            inputs[f"{side}_rewards"] = torch.tensor(rewards, dtype=torch.float32, device=batch.input_ids.device)
    return PairInputs(**inputs)


def policy_tensors(job: Job, batch: Batch) -> dict[str, Any]:
    """What the model in training gives, by the names of `PairInputs`: the tensors that carry gradient."""
    with job.engine.autocast():
        if job.objective.trains == "reward_model":
            return by_side(job, "policy_{}_rewards", completion_rewards(job.engine.policy, batch))
        entropies = "entropies" in job.objective.needs
        logps = completion_logps(job.engine.policy, batch, entropies, job.tiled)
    tensors = by_side(job, "policy_{}_logps", logps.sums)
    return tensors if logps.entropies is None else tensors | by_side(job, "{}_entropies", logps.entropies)


def by_side(job: Job, name: str, values: Tensor) -> dict[str, Any]:
    """Split `(C,)` values of a batch's completions into `(B,)` ones: first all chosen, then all rejected."""
    sides = job.objective.sides
    return {name.format(side): part for side, part in zip(sides, values.chunk(len(sides)), strict=True)}


def evaluate(job: Job, step: int) -> dict[str, Any]:
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
    if "oracle_reward" in metrics:
        parts.append(f"oracle reward {metrics['oracle_reward']:.3f} ± {metrics['oracle_reward_se']:.3f}")
        parts.append(f"KL {metrics['kl']:.2f} ± {metrics['kl_se']:.2f}")
        parts.append(f"length {metrics['sample_length']:.1f}")
    say(f"  step {step}/{job.config.steps}: {', '.join(parts) or 'nothing to evaluate'}")
    fall, limit = -metrics.get("chosen_logratio_per_token", 0.0), job.config.squeeze_alarm
    if limit is not None and fall > limit:
        say(
            f"  squeezing: the held-out chosen completions have lost {fall:.2f} nats per token since the start, more "
            f"than squeeze_alarm={limit:g} (the rejected ones {-metrics.get('rejected_logratio_per_token', 0):.2f}). "
            "Lower optimizer.lr, or hold the chosen ones up with objective.nll_weight."
        )
    return metrics


@torch.no_grad()
def evaluate_pairs(job: Job, step: int, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """The pair metrics over `pairs`, the same in every call. At step 0 also the check that policy and reference agree.

    The reference scores the very same micro-batches, once: its log-probs are kept for later evaluations. An objective
    whose scope is the step sees all pairs at once, with its state as it stands.
    """
    micro_batches = chunks(pairs, job.config.micro_batch_size)
    show = job.config.logger.progress
    if job.reference and not job.heldout_reference:
        for part in track(micro_batches, "reference", show):
            with job.engine.autocast():
                batch = job.layout(part).to(job.engine.device)
                job.heldout_reference.append(completion_logps(job.reference, batch, tiled=job.tiled))
    references: Sequence[Logps | None] = job.heldout_reference or [None] * len(micro_batches)
    both = list(zip(micro_batches, references, strict=True))
    parts = [pair_inputs(job, part, reference) for part, reference in track(both, "held-out pairs", show)]
    if job.objective.scope == "step":
        parts = [whole_step(job, 0, parts)]
    scored = [(inputs, job.objective(inputs)) for inputs in parts]
    metrics = step_metrics(job.objective, scored)
    if step == 0:
        check_step0(job.objective, [inputs for inputs, _ in scored], metrics["loss"])
    return metrics


def check_step0(objective: Objective, scored: Sequence[PairInputs], loss: float) -> None:
    """Before the first step policy and reference are the same: every log-ratio is 0 and the loss is known.

    Raises UserError if not; says so if they are.
    """
    found = []
    logratios = [getattr(x, f"{side}_logratios") for x in scored for side in objective.sides if x.has_reference]
    if logratios:
        largest = torch.cat(logratios).abs().max().item()
        if not largest <= STEP0_TOLERANCE:
            raise UserError(
                f"before the first step the policy differs from the reference: largest |log-ratio| {largest:.3g} "
                "nats over its pairs. They must be the same model, scored in the same way; this is a bug or a "
                "model whose forward pass is random."
            )
        found.append(f"policy = reference (largest |log-ratio| {largest:.2g})")
    expected = objective.step0_loss
    if expected is not None:
        if not abs(loss - expected) <= STEP0_TOLERANCE * max(1.0, abs(expected)):
            raise UserError(f"before the first step the loss is {loss:.6f}; it must be {expected:.6f} there")
        found.append(f"loss {loss:.6f} = {expected:.6f}")
    if found:
        say(f"  step 0: {', '.join(found)}")


def initial_sample_metrics(job: Job) -> dict[str, Any]:
    """`sample_metrics` of the initial policy, which all the runs of a sweep share: drawn once, then read from the
    user's cache under everything that decides them."""
    config = job.config
    key = [
        job.run.record["initial_weights"],
        job.run.record["versions"],
        [encode_prompt(job.tokenizer, prompt) for prompt in job.prompts],
        repr(job.oracle),
        asdict(config.sampling),
        [config.seed, config.precision, config.device],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cached = cache_dir() / "initial_samples" / digest
    samples_file = job.run.folder / "samples" / "step_0000000.jsonl"
    if not (cached / "metrics.json").is_file():
        metrics = sample_metrics(job, 0)
        write_whole(cached / "samples.jsonl", samples_file.read_text())
        write_whole(cached / "metrics.json", json.dumps(metrics))
    write_whole(samples_file, (cached / "samples.jsonl").read_text())
    return json.loads((cached / "metrics.json").read_text())


@torch.no_grad()
def sample_metrics(job: Job, step: int) -> dict[str, Any]:
    """Draw one response to each held-out prompt and score it; write the texts to samples/.

    `kl` estimates KL(policy || reference) in nats per response: the mean log-ratio over the policy's own samples,
    unbiased at temperature 1.
    """
    assert job.oracle is not None
    show = job.config.logger.progress
    with job.engine.autocast():
        drawn = sample(job.engine.policy, job.tokenizer, job.prompts, job.config.sampling, job.config.seed, 1, show)
        samples = [responses[0] for responses in drawn]
        # By length, so that little is computed on padding.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_tokens) + len(samples[i].tokens))
        logratios = [0.0] * len(samples)
        for part in track(chunks(order, 2 * job.config.micro_batch_size), "KL of samples", show):
            for i, logratio in zip(part, _logratios(job, [samples[i] for i in part]), strict=True):
                logratios[i] = logratio
    rewards = [job.oracle(prompt, s.text) for prompt, s in zip(job.prompts, samples, strict=True)]
    lines = [
        {"prompt": prompt, "response": s.text, "finished": s.finished, "reward": reward, "logratio": logratio}
        for prompt, s, reward, logratio in zip(job.prompts, samples, rewards, logratios, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(job.run.folder / "samples" / f"step_{step:07d}.jsonl", text)
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


def _logratios(job: Job, samples: Sequence[Sample]) -> list[float]:
    batch = padded([(s.prompt_tokens, s.tokens) for s in samples]).to(job.engine.device)
    assert job.reference is not None
    policy, reference = (completion_logps(m, batch, tiled=job.tiled).sums for m in (job.engine.policy, job.reference))
    return (policy - reference).tolist()


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
