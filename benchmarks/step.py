"""Measure one variant of a training step: prefopt's, TRL's, or the floor.

    python -m benchmarks.step SPEC RESULT

`benchmarks.steps` starts it once per measurement, so that the peak memory of a process belongs to one variant. SPEC is
`Spec` as JSON, RESULT the JSON file to write. Every variant reads the same file of token ids, sees the same pairs in
every step, and computes with float32 weights in the precision that `precision=auto` means on this machine. Nothing here
has run on a GPU yet.
"""

import hashlib
import importlib.util
import itertools
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from prefopt.config.parse import parse, register
from prefopt.data.tokenize import TokenizedPair
from prefopt.training.config import TrainConfig, check, resolve
from prefopt.utils.files import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# SmolLM2's vocabulary: the special tokens come first, and token 2 ends a turn.
SPECIAL_TOKENS, VOCABULARY, EOS = 17, 49152, 2
# TRL's and the floor's pairs per forward and backward pass, and the most tokens that TRL may keep of a sequence.
MICRO_BATCH_PAIRS, MAX_LENGTH = 2, 2048
BETA, LEARNING_RATE = 0.1, 1e-6


@dataclass(frozen=True)
class Profile:
    """Shortest and longest prompt and completion in tokens, and the pairs per optimizer step."""

    prompt: tuple[int, int]
    completion: tuple[int, int]
    pairs: int


PROFILES = {"chat": Profile((80, 200), (80, 200), 8), "long_prompts": Profile((600, 900), (100, 250), 4)}


@dataclass
class Spec:
    """The task of one process."""

    variant: str  # a key of MEASUREMENTS
    folder: str  # for everything that the process writes
    data: str = ""  # a file of `write_pairs`
    batch_size: int = 1  # pairs per optimizer step
    steps: int = 1
    warmup: int = 1  # the first steps, which are not counted
    device: str = "auto"
    overrides: list[str] = field(default_factory=list)  # Hydra's, after those of `overrides(spec)`
    trl: dict[str, Any] = field(default_factory=dict)  # arguments of TRL's DPOConfig
    started: float = 0.0  # time.time() when the process was started
    save: bool = False  # TRL: write the policy at the end, as a run of prefopt does
    trace: str = ""  # prefopt: the file for a trace of the last step


def make_pairs(profile: Profile, n: int, seed: int = 0) -> list[TokenizedPair]:
    """`n` pairs of random tokens that are not special, with uniform lengths within the profile's. A completion ends
    with eos, which is part of its length. The same arguments give the same pairs on every machine."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(draw.randint(low, high))]

    low, high = profile.completion
    return [
        TokenizedPair(
            str(i), tokens(*profile.prompt), [*tokens(low - 1, high - 1), EOS], [*tokens(low - 1, high - 1), EOS]
        )
        for i in range(n)
    ]


def write_pairs(file: Path, pairs: Sequence[TokenizedPair]) -> None:
    """Write a data set whose texts are token ids in decimal."""

    def text(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    rows = [
        {"id": p.id, "prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in pairs
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_pairs(file: Path) -> list[TokenizedPair]:
    """Read a file of `write_pairs`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [TokenizedPair(row["id"], ids(row["prompt"]), ids(row["chosen"]), ids(row["rejected"])) for row in rows]


def ids(text: str) -> list[int]:
    return [int(token) for token in text.split()]


def in_order(pairs: Sequence[TokenizedPair], seed: int, steps: int, batch_size: int) -> list[list[TokenizedPair]]:
    """The pairs of each optimizer step, in the order of prefopt's loop."""
    from prefopt.data.sampler import step_indices

    return [[pairs[i] for i in step_indices(len(pairs), seed, step, batch_size)] for step in range(steps)]


def digest(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> str:
    """A digest of the (prompt, chosen, rejected) ids of a step. It depends on their order."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def digests(steps: Sequence[Sequence[TokenizedPair]]) -> list[str]:
    return [digest([(p.prompt, p.chosen, p.rejected) for p in pairs]) for pairs in steps]


def overrides(spec: Spec) -> list[str]:
    """The arguments of a training run with prefopt's defaults on the bench's data. The learning rate is constant,
    because TRL's schedules differ from prefopt's."""
    return [
        "dataset=jsonl",
        f"dataset.train={spec.data}",
        "dataset.name=bench",
        "dataset.heldout_share=0",
        "logger=quiet",
        f"runs_dir={spec.folder}/runs",
        f"device={spec.device}",
        f"objective.beta={BETA}",
        f"optimizer.lr={LEARNING_RATE}",
        "schedule.warmup=0",
        "schedule.final=1",
        f"steps={spec.steps}",
        f"batch_size={spec.batch_size}",
        f"eval_every={spec.steps}",
        f"save_every={spec.steps}",
        f"max_prompt_tokens={MAX_LENGTH}",
        "sampling.prompts=0",
        *spec.overrides,
    ]


def compose(spec: Spec) -> Any:
    from hydra import compose, initialize_config_dir

    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides(spec))


def resolved(spec: Spec) -> TrainConfig:
    """The config of that run, with the device and the precision of this machine."""
    config = parse(compose(spec), TrainConfig)
    check(config)
    resolve(config)
    return config


def texts_are_ids(tokenizer: Any, items: Sequence[Any], prompt_limit: int, limit: int, *_: Any) -> Any:
    """A replacement of `prefopt.data.tokenize.tokenize` that reads the ids of `write_pairs`. Everything else stays
    real: the cache of tokenized data, its files, and the caches that are keyed by them."""
    from prefopt.data.tokenize import Tokenized

    pairs = [TokenizedPair(i.id, ids(i.prompt[0]["content"]), ids(i.chosen), ids(i.rejected)) for i in items]
    assert not any(set(p.prompt) & set(tokenizer.all_special_ids) for p in pairs), "a special token inside"
    assert all(len(p.prompt) <= prompt_limit and max(len(p.chosen), len(p.rejected)) <= limit for p in pairs), "cut"
    assert all(side[-1] == tokenizer.eos_token_id for p in pairs for side in (p.chosen, p.rejected)), "no terminator"
    return Tokenized(pairs, Counter(), Counter())


@contextmanager
def token_ids() -> Iterator[None]:
    """Inside, prefopt takes texts for token ids."""
    with mock.patch("prefopt.data.cache.tokenize", texts_are_ids):
        yield


def measure_prefopt(spec: Spec) -> dict[str, Any]:
    """A real training run, from its config to its loop, without evaluations and export. A step lasts from the end of
    the step before to its own end, so that work between steps counts. TRL's steps are timed the same way."""
    ends: list[float] = []  # the start of the first step, then the end of each
    losses: list[float] = []
    seen: list[str] = []  # digests of the pairs

    def watched(step: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def call(train_state: Any, *args: Any) -> dict[str, Any]:
            if not ends:
                ends.append(time.perf_counter())
            with profiled(spec.trace if len(ends) == spec.steps else ""):
                metrics = step(train_state, *args)
            ends.append(time.perf_counter())
            losses.append(metrics["loss"])
            pairs = in_order(train_state.train_pairs, train_state.config.seed, len(losses), spec.batch_size)[-1]
            for side in ("chosen", "rejected"):
                tokens = sum(len(getattr(p, side)) for p in pairs)
                # The loop reports mean lengths: they show that it took the pairs that are expected here.
                assert round(metrics[f"{side}_length"] * metrics["n"]) == tokens, "other pairs than expected"
            seen.append(digest([(p.prompt, p.chosen, p.rejected) for p in pairs]))
            return metrics

        return call

    import prefopt.training.loop
    from prefopt.training.setup import prepare_run, run

    step = watched(prefopt.training.loop.train_step)
    with (
        token_ids(),
        mock.patch("prefopt.training.loop.train_step", step),
        mock.patch("prefopt.training.loop.evaluate", return_value={}),
        mock.patch("prefopt.training.checkpoint.export"),
        mock.patch("prefopt.training.export.PolicyExporter.check"),
        stopwatch() as events,
    ):
        run(prepare_run(resolved(spec)))
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "seconds": seconds[spec.warmup :],
        "losses": losses,
        "digests": seen[spec.warmup :],
        "reference_seconds": sum(e["seconds"] for e in events if e["stage"] == "reference"),
    }


@contextmanager
def profiled(trace: str) -> Iterator[None]:
    """Write a trace of the block to the file `trace`, for ui.perfetto.dev or chrome://tracing; nothing for ""."""
    if not trace:
        yield
        return
    from torch.profiler import profile

    with profile() as profiler:
        yield
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(trace)


# The stages of a run, and the functions that are timed for each. None of them calls another, so no time counts twice.
STAGES = {
    "tokenizer": ["prefopt.models.load:load_tokenizer"],
    "data": ["prefopt.data.cache:prepare_dataset"],
    "model": ["prefopt.models.load:load_model"],
    "digest": ["prefopt.models.load:weights_digest"],
    "probe": ["prefopt.models.layout_check:known_layout"],
    "reference": ["prefopt.models.reference:cached"],
    "evaluation": ["prefopt.training.loop:evaluate"],
    "step": ["prefopt.training.loop:train_step"],
    "export": ["prefopt.training.checkpoint:export"],
}


@contextmanager
def stopwatch(stages: dict[str, list[str]] = STAGES) -> Iterator[list[dict[str, Any]]]:
    """Collect {"stage", "began", "seconds"} of every call to a function of `stages`; `began` is time.time()."""
    events: list[dict[str, Any]] = []

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                events.append({"stage": stage, "began": began, "seconds": time.time() - began})

        return call

    with ExitStack() as patches:
        for stage, places in stages.items():
            for place in places:
                module, name = place.split(":")
                function = getattr(importlib.import_module(module), name)
                patches.enter_context(mock.patch(f"{module}.{name}", timed(stage, function)))
        yield events


def run_program(spec: Spec) -> dict[str, Any]:
    """`python -m prefopt.train` with a stopwatch. The first of the `events` is the time from the start of the process
    to here. The jobs of a sweep are further processes: the stopwatch does not see them, and `token_ids` does not reach
    them, but they read the tokens from the cache."""
    import prefopt.train

    # Hydra's argparse wants options before positional arguments.
    arguments = ["prefopt.train", *sorted(overrides(spec), key=lambda argument: not argument.startswith("-"))]
    with token_ids(), stopwatch() as events, mock.patch.object(sys, "argv", arguments):
        imported = time.time()
        code: Any = None
        try:
            prefopt.train.main()
        except SystemExit as end:
            code = end.code
    assert not code, f"prefopt.train ended with exit code {code}"
    imports = {"stage": "imports", "began": spec.started, "seconds": imported - spec.started}
    return {"events": [imports, *events]}


def sample_tokens(spec: Spec) -> dict[str, Any]:
    """Tokens per second of `prefopt.generation.sampler.sample` at two batch sizes, counting the returned tokens."""
    from prefopt.config.schema import SamplingConfig
    from prefopt.generation.sampler import sample
    from prefopt.models.load import load_model, load_tokenizer
    from prefopt.models.logprobs import autocast
    from prefopt.utils.memory import keep_freed_memory

    config = resolved(spec)
    if config.device == "cpu":
        keep_freed_memory()
    model, tokenizer = load_model(config.model, config.device), load_tokenizer(config.model)
    prompts = [[{"role": "user", "content": f"Tell me a long story about the number {n}."}] for n in range(64)]
    by_size = {}
    for size in (16, 64):
        with autocast(model.device, config.precision):
            sample(model, tokenizer, prompts[:size], SamplingConfig(1.0, 1.0, 4, size), 0)  # warm-up
            began = time.perf_counter()
            drawn = sample(model, tokenizer, prompts[:size], SamplingConfig(1.0, 1.0, 64, size), 0)
            seconds = time.perf_counter() - began
        tokens = sum(len(s.tokens) for samples in drawn for s in samples)
        by_size[str(size)] = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"sampling": by_size}


def patch_fused_head() -> None:
    """Make TRL's fused head compute completion positions only on a CPU too, as it does on GPUs.

    TRL decides that by asking `_use_triton`, whether the device runs Triton. This answers yes. TRL's kernels ask a
    function of another name, so they stay in plain torch.
    """
    import trl.trainer.utils

    assert hasattr(trl.trainer.utils, "_use_triton"), "this patch is for TRL 1.16"
    trl.trainer.utils._use_triton = lambda device: True


def trl_trainer(
    model: "PreTrainedModel", tokenizer: Any, steps: Sequence[Sequence[TokenizedPair]], settings: dict[str, Any]
) -> Any:
    """TRL's DPOTrainer on exactly these pairs in this order.

    TRL takes no token ids, so the method that tokenizes is replaced. `.seen` holds the batches on which the loss was
    computed, `.losses` their losses, `.times` the start of training and the end of every optimizer step,
    `.reference_seconds` the time of the precomputation of the reference.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            self.seen: list[dict[str, torch.Tensor]] = []
            self.losses: list[torch.Tensor] = []
            self.times: list[float] = []
            self.reference_seconds = 0.0
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            began = time.perf_counter()
            logps = super()._precompute_ref_logps(*args)
            self.reference_seconds += time.perf_counter() - began
            return logps

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.seen.append(inputs)
            self.losses.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.note()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.note()

        def note(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            trainer.times.append(time.perf_counter())

    pairs = [pair for step in steps for pair in step]
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert longest <= MAX_LENGTH, "TRL would cut"
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    trainer = Trainer(
        model=model,
        args=DPOConfig(**trl_arguments(len(steps), len(steps[0])) | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    return trainer


def trl_arguments(steps: int, batch_size: int) -> dict[str, Any]:
    """The arguments of DPOConfig for the training that prefopt does, without logging and saving."""
    return {
        "beta": BETA,
        "max_length": MAX_LENGTH,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": MICRO_BATCH_PAIRS,
        "gradient_accumulation_steps": batch_size // MICRO_BATCH_PAIRS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def shortened(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs with the last quarter of each text, for TRL's warm-up steps: full ones take a third of the bench's
    time. Shorter ones do as well, because TRL keeps no memory from step to step that they would fail to allocate."""

    def quarter(tokens: list[int]) -> list[int]:
        return tokens[-(len(tokens) // 4 or 1) :]

    return [TokenizedPair(p.id, quarter(p.prompt), quarter(p.chosen), quarter(p.rejected)) for p in pairs]


def batch_pairs(batch: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    """The (prompt, chosen, rejected) ids of a batch of TRL's collator, whose rows are first all chosen, then all
    rejected."""
    sides = []
    for row, real, completion in zip(
        *(batch[k].tolist() for k in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        end, start = sum(real), sum(real) - sum(completion)
        sides.append((row[:start], row[start:end]))
    half = len(sides) // 2
    both = list(zip(sides[:half], sides[half:], strict=True))
    assert all(chosen[0] == rejected[0] for chosen, rejected in both)
    return [(chosen[0], chosen[1], rejected[1]) for chosen, rejected in both]


def measure_trl(spec: Spec) -> dict[str, Any]:
    """TRL's DPOTrainer: as it comes (trl_default), with its reference precomputed (trl_precomputed), and with a head
    that computes completion positions only as well (trl_patched)."""
    from prefopt.models.load import load_model, load_tokenizer

    config = resolved(spec)
    cuda = config.device.startswith("cuda")
    settings = {"output_dir": f"{spec.folder}/trl", "use_cpu": not cuda, "bf16": config.precision == "bfloat16"}
    if spec.variant == "trl_patched":
        patch_fused_head()
    if spec.variant != "trl_default":
        settings["precompute_ref_log_probs"] = True
    model = load_model(config.model, config.device)
    if cuda:  # TRL gets the fastest kernels that are installed
        model.set_attn_implementation("flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa")
        settings["use_liger_kernel"] = importlib.util.find_spec("liger_kernel") is not None
    steps = in_order(read_pairs(Path(spec.data)), config.seed, spec.steps, spec.batch_size)
    steps = [shortened(pairs) for pairs in steps[: spec.warmup]] + steps[spec.warmup :]
    trainer = trl_trainer(model, load_tokenizer(config.model), steps, settings | spec.trl)
    trainer.train()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if spec.save:
        trainer.save_model()
    seen = [pair for batch in trainer.seen for pair in batch_pairs(batch)]
    size, n = spec.batch_size, spec.batch_size // MICRO_BATCH_PAIRS
    losses = [loss.item() for loss in trainer.losses]
    seconds = [after - before for before, after in itertools.pairwise(trainer.times)]
    return {
        "seconds": seconds[spec.warmup :],
        "losses": [sum(losses[i : i + n]) / n for i in range(0, len(losses), n)],
        "digests": [digest(seen[i : i + size]) for i in range(0, len(seen), size)][spec.warmup :],
        "reference_seconds": trainer.reference_seconds,
    }


def rectangles(pairs: Sequence[TokenizedPair], passes: int) -> list[tuple[int, int, int]]:
    """(rows, columns, predicted positions) of each of `passes` micro-batches without padding.

    Together they have as many tokens as the prompts, chosen and rejected completions of a step, spread evenly. They may
    have up to `rows` - 1 tokens fewer, because the rows of a rectangle are equally long. Together they predict as many
    positions as the completions have tokens.
    """
    rows = len(pairs) // passes
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) // rows
    predicted = sum(len(p.chosen) + len(p.rejected) for p in pairs)

    def share(total: int, part: int) -> int:
        return total * (part + 1) // passes - total * part // passes

    return [(rows, share(tokens, i), share(predicted, i)) for i in range(passes)]


def measure_floor(spec: Spec) -> dict[str, Any]:
    """A bare forward and backward pass over as many tokens as a step has with each prompt once, in rectangles.

    The model and the autocast are prefopt's. Attention is that of transformers, the loss is cross-entropy on ordinary
    logits, and there is no optimizer and no reference. The loss is over as many positions as there are completion
    tokens; under `all_tokens`, over all positions. Freed memory is kept as prefopt keeps it.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from prefopt.models.load import load_model
    from prefopt.models.logprobs import autocast
    from prefopt.utils.memory import keep_freed_memory

    config = resolved(spec)
    if config.device == "cpu":
        keep_freed_memory()
    model: Any = load_model(config.model, config.device)
    generator = torch.Generator().manual_seed(0)
    passes = spec.batch_size // MICRO_BATCH_PAIRS

    def forward_and_backward(shapes: list[tuple[int, int, int]], all_tokens: bool) -> tuple[float, float]:
        """(seconds, loss) of one step."""
        batches = [torch.randint(SPECIAL_TOKENS, VOCABULARY, shape[:2], generator=generator) for shape in shapes]
        began, total = time.perf_counter(), 0.0
        for (rows, columns, predicted), cpu_batch in zip(shapes, batches, strict=True):
            batch = cpu_batch.to(config.device)
            n = rows * columns if all_tokens else predicted
            with autocast(model.device, config.precision):
                hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1)
                logits = model.get_output_embeddings()(hidden[:n])
            labels = batch.flatten().roll(-1)[:n]
            loss = cross_entropy(logits.float(), labels, reduction="sum") / n / passes
            loss.backward()
            total += loss.item()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        model.zero_grad()
        return seconds, total

    by_loss: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # (seconds, loss) of each step
    tokens = []
    for pairs in in_order(read_pairs(Path(spec.data)), config.seed, spec.steps, spec.batch_size):
        shapes = rectangles(pairs, passes)
        tokens.append(sum(rows * columns for rows, columns, _ in shapes))
        for all_tokens, results in by_loss.items():
            results.append(forward_and_backward(shapes, all_tokens))

    def result(all_tokens: bool) -> dict[str, Any]:
        seconds, losses = zip(*by_loss[all_tokens], strict=True)
        return {"seconds": seconds[spec.warmup :], "losses": losses}

    return result(False) | {"all_tokens": result(True), "tokens": tokens[spec.warmup :]}


MEASUREMENTS: dict[str, Callable[[Spec], dict[str, Any]]] = {
    "prefopt": measure_prefopt,
    "trl_default": measure_trl,
    "trl_precomputed": measure_trl,
    "trl_patched": measure_trl,
    "floor": measure_floor,
    "program": run_program,
    "sampling": sample_tokens,
}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    result = MEASUREMENTS[spec.variant](spec)

    import torch

    from prefopt.training.metrics import peak_memory_gib

    device = torch.device("cuda" if torch.cuda.is_available() and spec.device != "cpu" else "cpu")
    used = resource.getrusage(resource.RUSAGE_SELF)
    result |= {
        "peak_memory_gib": peak_memory_gib(device),
        "threads": torch.get_num_threads(),
        # Time in the kernel shows a step that returns memory to the system and allocates it again.
        "user_seconds": used.ru_utime,
        "system_seconds": used.ru_stime,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
