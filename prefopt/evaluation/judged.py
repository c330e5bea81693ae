"""What MT-Bench and Arena-Hard share as jobs: whose answers are judged, and the folder of a result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.schema import SamplingConfig
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.answers import OutputsFile
from prefopt.evaluation.config import JudgedConfig
from prefopt.evaluation.result_folder import has_rows, make_once
from prefopt.evaluation.text_judge import TextJudge, Verdict
from prefopt.generation.responses import GENERATION_PACKAGES
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import version
from prefopt.utils.files import atomic_write, safe_name
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import format_sealed_line

Subject = Checkpoint | OutputsFile  # whose answers are judged


def subjects(config: JudgedConfig, name_field: str) -> Sequence[Subject]:
    """A run's policies, the answers of a file, or a model. The file is named by the field `name_field` of its rows.
    Raises UserError where there is none."""
    if config.run is not None:
        return exported_policies(config.run, config.checkpoints)
    if config.answers is not None:
        names = {str(row.get(name_field)) for _, row in read_rows(config.answers, None)}
        if len(names) > 1:
            raise UserError(f"answers={config.answers} are of several models ({', '.join(sorted(names))}): judge each.")
        return [OutputsFile(names.pop(), config.answers)]
    return [Checkpoint(config.model.name, config.model)]


def results_folder(config: JudgedConfig, job: str) -> Path:
    """The folder that holds a folder for each result of `job`, mtbench or arena."""
    if config.output is not None:
        return Path(config.output)
    assert config.run is not None  # judged_problems wants a run or an output
    return Path(config.run) / job


def settings_of(config: JudgedConfig, judge: TextJudge, draws: bool) -> dict[str, Any]:
    """What decides the figures beside the benchmark and the models: the judge, and, with `draws`, how answers are
    drawn."""
    if not draws:
        return {"judge": judge.describe()}
    keys = ("max_new_tokens", "batch_size", "backend", "seed", "precision", "device")
    versions = {package: version(package) for package in GENERATION_PACKAGES}
    return {"judge": judge.describe(), **{key: getattr(config, key) for key in keys}, "versions": versions}


def result(
    folder: Path,
    subject: Subject,
    judge: TextJudge,
    settings: dict[str, Any],
    make: Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]],
    extra: dict[str, str],
) -> Path:
    """The folder of a result below `folder`, with record.json and judgments.jsonl (`make_once`).

    `make(folder of the result)` returns the judgments, and what the record holds beside what is said here; `figures`
    has their number, `judgments`. `extra` goes into the record.
    """
    # Their files, too, which another training may have written anew.
    of_model: Any = digest(subject.path)
    if subject.model is not None:
        of_model = [local_files(subject.model), subject.path, subject.model.revision, subject.model.tokenizer]
    key = fingerprint([settings, of_model])[:8]
    place = folder / safe_name(f"{subject.name}-{judge.title}-{key}")

    def make_record(place: Path) -> dict[str, Any]:
        rows, facts = make(place)
        atomic_write(place / "judgments.jsonl", "".join(map(format_sealed_line, rows)))
        told = {"checkpoint": subject.name, "step": subject.step, "path": subject.path, "judge": judge.describe()}
        return {**told, **facts, "settings": settings}

    complete = has_rows("judgments.jsonl", "judgments")
    return make_once(place, f"the judgments of {subject.path}", complete, make_record, extra)


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
