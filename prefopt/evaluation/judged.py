"""What MT-Bench and Arena-Hard share as jobs: whose answers are judged, and how results are made."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from prefopt.config.schema import SamplingConfig
from prefopt.data.items import Message
from prefopt.data.readers import READABLE, SUFFIXES
from prefopt.data.sources import digest, read_rows, write_rows
from prefopt.errors import UserError
from prefopt.evaluation.answers import OutputsFile, check_source
from prefopt.evaluation.config import JudgedConfig
from prefopt.evaluation.cost import Budget, Estimate
from prefopt.evaluation.result_folder import has_rows, make_once
from prefopt.evaluation.text_judge import ReplyFormat, TextJudge, Verdict
from prefopt.generation.responses import GENERATION_PACKAGES
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import version
from prefopt.utils.files import atomic_write, resolve_path, safe_name
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import format_sealed_line

Subject = Checkpoint | OutputsFile  # whose answers are judged
NAME_FIELDS = ("model_id", "model")  # of an answer: FastChat's, Arena-Hard's


def subjects(config: JudgedConfig) -> Sequence[Subject]:
    """A run's policies, the answers of a file, or a model. Raises UserError where there is none."""
    if config.run is not None:
        return exported_policies(config.run, config.checkpoints)
    if config.answers is not None:
        if not config.answers.endswith(SUFFIXES) or not resolve_path(config.answers).is_file():
            raise UserError(f"answers={config.answers} is no file of a model's answers ({READABLE})")
        rows = (row for _, row in read_rows(config.answers, None))
        names = {next((str(row[field]) for field in NAME_FIELDS if row.get(field)), "") for row in rows}
        if len(names) > 1:
            told = ", ".join(sorted(name or "one without a name" for name in names))
            raise UserError(f"answers={config.answers} are of several models ({told}): judge each.")
        return [OutputsFile(names.pop() or Path(config.answers).name.partition(".")[0], config.answers)]
    return [Checkpoint(config.model.name, config.model)]


@dataclass(frozen=True)
class TextJudgedResult(ABC):
    """A `JudgedResult` of a judge that answers in text. `job`: the name of the benchmark's program."""

    config: JudgedConfig
    judge: TextJudge
    subject: Subject

    job: ClassVar[str]

    @property
    @abstractmethod
    def form(self) -> ReplyFormat[Any]:
        """What the judge is to write."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the figures beside the model."""

    @abstractmethod
    def prompts(self) -> Sequence[list[Message]]:
        """What the judge is asked."""

    @abstractmethod
    def drawn_rows(self) -> list[dict[str, Any]]:
        """The answers that were drawn here, as rows of the benchmark's own."""

    @abstractmethod
    def judged(self, verdicts: Sequence[Verdict[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The judgments, as rows of the benchmark's own, and what the record holds beside what is said here. Its
        `figures` have the number of the rows, `judgments`."""

    def check(self) -> None:
        if self.subject.model is not None:
            check_source(self.subject.model, "model" if self.config.run is None else f"policy of {self.config.run}")

    @property
    def model_name(self) -> str:
        """The model's name in rows and records."""
        return f"{Path(self.config.run).name}-{self.subject.name}" if self.config.run else self.subject.name

    @property
    def folder(self) -> Path:
        """The folder that holds a folder for each result."""
        if self.config.output is not None:
            return Path(self.config.output)
        assert self.config.run is not None  # judged_problems wants a run or an output
        return Path(self.config.run) / self.job

    @cached_property
    def place(self) -> Path:
        """The result's folder."""
        # The model's files, too, which another training may have written anew.
        of_model: Any = digest(self.subject.path)
        if self.subject.model is not None:
            model = self.subject.model
            of_model = [local_files(model), self.subject.path, model.revision, model.tokenizer]
        key = fingerprint([self.settings(), of_model])[:8]
        return self.folder / safe_name(f"{self.subject.name}-{self.judge.title}-{key}")

    def is_complete(self) -> bool:
        return has_rows("judgments.jsonl", "judgments")(self.place)

    def estimate(self) -> Estimate:
        return self.judge.estimate(self.prompts(), self.form.tokens, self.folder / "replies")

    def make(self, budget: Budget, extra: dict[str, str]) -> Path:
        """The result's folder, with record.json, judgments.jsonl, and, of answers that were drawn here,
        model_answer.jsonl."""

        def make_record(place: Path) -> dict[str, Any]:
            if self.subject.model is not None:
                write_rows(place / "model_answer.jsonl", self.drawn_rows())
            verdicts = self.judge.judge(self.prompts(), self.form, self.folder / "replies", budget)
            rows, facts = self.judged(verdicts)
            atomic_write(place / "judgments.jsonl", "".join(map(format_sealed_line, rows)))
            told = {"checkpoint": self.subject.name, "step": self.subject.step, "path": self.subject.path}
            return {**told, "judge": self.judge.describe(), **facts, "settings": self.settings()}

        what = f"the judgments of {self.subject.path}"
        return make_once(self.place, what, lambda _: self.is_complete(), make_record, extra)


def settings_of(config: JudgedConfig, judge: TextJudge, draws: bool) -> dict[str, Any]:
    """What decides the figures beside the benchmark and the models: the judge, and, with `draws`, how answers are
    drawn."""
    if not draws:
        return {"judge": judge.describe()}
    keys = ("max_new_tokens", "batch_size", "backend", "seed", "precision", "device")
    versions = {package: version(package) for package in GENERATION_PACKAGES}
    return {"judge": judge.describe(), **{key: getattr(config, key) for key in keys}, "versions": versions}


def sampling_of(config: JudgedConfig, temperature: float) -> SamplingConfig:
    """How answers are drawn at this temperature."""
    return SamplingConfig(temperature, 1.0, config.max_new_tokens, config.batch_size)


def counted(verdicts: Sequence[Verdict[Any]]) -> dict[str, int]:
    """Figures of these verdicts: their number, how many are missing, and how many needed a request to finish."""
    return {
        "judgments": len(verdicts),
        "missing": sum(verdict.value is None for verdict in verdicts),
        "asked_again": sum(len(verdict.replies) > 1 for verdict in verdicts),
    }
