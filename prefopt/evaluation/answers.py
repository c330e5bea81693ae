"""The two sides of a comparison: a model's answers to all questions, sampled here or read from a file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.items import Message
from prefopt.data.sources import SUFFIXES, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.config import AlpacaConfig, JudgedConfig
from prefopt.evaluation.initial import initial_model
from prefopt.evaluation.questions import Question
from prefopt.generation.responses import GenerationRequest, LoadedSampler, generate_resumable
from prefopt.tracking.policies import exported_policies
from prefopt.utils.files import cache_dir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions, in their order."""

    name: str
    texts: list[str]
    finished: list[bool]  # False where the token limit cut the answer off
    weights: str | None  # the digest of the model's weights; None: the answers come from a file

    @property
    def unfinished(self) -> int | None:
        """How many the token limit cut off; None where a file does not tell."""
        return None if self.weights is None else self.finished.count(False)


def format_unfinished(n: int | None) -> str:
    return "not known" if n is None else str(n)


def answer_questions(model: ModelConfig, name: str, questions: Sequence[Question], config: AlpacaConfig) -> Answers:
    """Sample one answer per question. Answers of the same weights and settings come from the user's cache."""
    log.info(f"{name}: answers to {len(questions)} questions")
    drawn, weights = draw(config, model, [question.prompt for question in questions], config.sampling)
    return Answers(name, [text for text, _ in drawn], [finished for _, finished in drawn], weights)


def draw(
    config: AlpacaConfig | JudgedConfig,
    model: ModelConfig,
    prompts: Sequence[list[Message]],
    sampling: SamplingConfig,
    sampler: LoadedSampler | None = None,
) -> tuple[list[tuple[str, bool]], str]:
    """A model's answers, each with whether it ended before the token limit, and the digest of its weights. Answers of
    the same weights and settings come from the user's cache."""
    folder = cache_dir() / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    request = GenerationRequest(
        model=model,
        prompts=prompts,
        sampling=sampling,
        samples_per_prompt=1,
        seed=config.seed,
        backend=config.backend,
        server=config.server,
        server_log=server_log(config),
        device=config.device,
        precision=config.precision,
    )
    rows, weights = generate_resumable(request, folder, sampler=sampler)
    return [(row["responses"][0], row["finished"][0]) for row in rows], weights


def server_log(config: AlpacaConfig | JudgedConfig) -> Path:
    """Where a job keeps what its server writes: in the folder of the results, or the run's."""
    return Path(config.output or str(config.run)) / "server.log"  # the checks want one of the two


def baseline_of(baseline: str, run: str | None) -> tuple[str, ModelConfig | None]:
    """The baseline's name, and its model; None: its answers are in a file. `run`: the run that `initial` is of. Raises
    UserError where there is no such baseline."""
    if baseline.endswith(SUFFIXES):
        return Path(baseline).name.partition(".")[0], None
    if baseline == "initial":
        if run is None:
            raise UserError(
                "baseline=initial is the model that a run began from. Name another: a run's folder, a model, or a FILE "
                "of answers"
            )
        model = initial_model(run)
        return f"{model.name}-initial", model
    if (Path(baseline) / "record.json").is_file():
        (policy,) = exported_policies(baseline, "final")
        return Path(baseline).name, policy.model
    return Path(baseline).name, ModelConfig(baseline, baseline, None)


def check_source(model: ModelConfig, key: str) -> None:
    """Raise UserError for a model that cannot be found, or has no tokenizer with a chat template. Reads no weights.
    `key`: what the user calls it."""
    from prefopt.models.load import check_model, load_tokenizer

    check_model(model, key)
    load_tokenizer(model)


@dataclass(frozen=True)
class OutputsFile:
    """A model of which there are its answers alone, in a file. It stands where a `Checkpoint` does."""

    name: str
    path: str
    model: None = None
    step: None = None


def read_outputs_file(path: str) -> OutputsFile:
    """The file of alpaca-eval's `model_outputs`, named by its `generator` where all rows have the same one. Raises
    UserError where it is no file of rows."""
    if not path.endswith(SUFFIXES) or not Path(path).is_file():
        raise UserError(f"model_outputs={path} is no file of rows with instruction and output ({', '.join(SUFFIXES)})")
    generators = {str(row.get("generator") or "") for _, row in read_rows(path, None)}
    own = generators.pop() if len(generators) == 1 else ""
    return OutputsFile(own or Path(path).name.partition(".")[0], path)


def load_answers(path: str, name: str, questions: Sequence[Question]) -> Answers:
    """The answers in a file. Raises UserError for a question without an answer."""
    answers = {}
    for where, row in read_rows(path, None):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise UserError(f"{where} needs the texts `instruction` and `output` (its fields: {', '.join(row)}).")
        answers[row["instruction"]] = row["output"]
    if lacking := [i for i, question in enumerate(questions) if question.instruction not in answers]:
        raise UserError(
            f"{path} has no answer to {len(lacking)} of {len(questions)} questions (rows {str(lacking[:10])[1:-1]}), "
            "and must answer them all."
        )
    return Answers(name, [answers[q.instruction] for q in questions], [True] * len(questions), None)


def as_outputs(questions: Sequence[Question], answers: Answers, generator: str) -> list[dict[str, str]]:
    """The rows of alpaca-eval's `model_outputs` and `reference_outputs`."""
    return [
        ({"dataset": question.dataset} if question.dataset else {})
        | {"instruction": question.instruction, "output": text, "generator": generator}
        for question, text in zip(questions, answers.texts, strict=True)
    ]
