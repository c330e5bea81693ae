"""What MT-Bench and Arena-Hard share as jobs: whose answers are judged, and the folder of a result."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.schema import SamplingConfig
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.answers import OutputsFile
from prefopt.evaluation.config import JudgedConfig
from prefopt.evaluation.text_judge import TextJudge, Verdict
from prefopt.generation.responses import GENERATION_PACKAGES
from prefopt.models.fingerprint import local_files
from prefopt.tracking.policies import Checkpoint, exported_policies
from prefopt.tracking.provenance import provenance, version
from prefopt.tracking.record import find_result, write_result
from prefopt.utils.files import atomic_write, safe_name
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.locks import locked
from prefopt.utils.store import format_sealed_line, read_sealed_lines

log = logging.getLogger(__name__)

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
    """The folder of a result below `folder`, with record.json and judgments.jsonl. Nothing is computed where the record
    exists. Other processes wait while one makes it.

    `make(folder of the result)` returns the judgments, and what the record holds beside what is said here; `figures`
    has their number, `judgments`. `extra` goes into the record.
    """
    # Their files, too, which another training may have written anew.
    of_model: Any = digest(subject.path)
    if subject.model is not None:
        of_model = [local_files(subject.model), subject.path, subject.model.revision, subject.model.tokenizer]
    key = fingerprint([settings, of_model])[:8]
    place = folder / safe_name(f"{subject.name}-{judge.title}-{key}")
    with locked(place.with_name(f"{place.name}.lock"), f"the judgments of {subject.path}"):
        if is_complete(place, "judgments.jsonl", "judgments"):
            return place
        start = time.monotonic()
        rows, facts = make(place)
        # In this order: where the record exists, the result is complete.
        atomic_write(place / "judgments.jsonl", "".join(map(format_sealed_line, rows)))
        record = {
            "checkpoint": subject.name,
            "step": subject.step,
            "path": subject.path,
            "judge": judge.describe(),
            **facts,
            "settings": settings,
            "seconds": time.monotonic() - start,
        }
        write_result(place / "record.json", record | provenance() | extra)
    return place


def is_complete(folder: Path, name: str, key: str) -> bool:
    """Whether the result in this folder has been made: a record, and in the file `name` as many rows as its figure
    `key` says. A damaged one has not, which the log says."""
    record = find_result(folder / "record.json")
    if record is None:
        return False
    rows, whole = read_sealed_lines(folder / name)
    if not whole or len(rows) != record["figures"][key]:
        log.warning(f"  {folder / name} is damaged. It is made anew.")
        return False
    return True


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
