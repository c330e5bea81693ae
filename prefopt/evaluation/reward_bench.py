"""RewardBench and other preferences, ranked by reward models and by the implicit rewards of policies."""

import functools
import importlib.metadata
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig
from prefopt.data.sources import digest, write_rows
from prefopt.errors import UserError
from prefopt.evaluation.config import RewardBenchConfig, check_reward_bench
from prefopt.evaluation.initial import initial_model
from prefopt.evaluation.result_folder import has_record, make_once
from prefopt.evaluation.reward_bench_figures import format_results, summarize
from prefopt.evaluation.reward_bench_rows import Item, check_rows, read_items
from prefopt.models.fingerprint import local_files
from prefopt.rewards.reward_model import LogLikelihood, ModelScorer, RewardModel
from prefopt.rewards.scorers import Request, RewardScorer
from prefopt.tracking.policies import Checkpoint, exported_policies, runs_of
from prefopt.tracking.record import read_result, record_of
from prefopt.utils.console import console
from prefopt.utils.files import check_folder
from prefopt.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers")  # their versions are part of a record


@dataclass(frozen=True)
class Subject:
    """What gives the rewards: a reward model (`scorer`), or a policy by its implicit reward under an `objective`, which
    compares it with `reference` if it needs one. `folder` is for its records."""

    checkpoint: Checkpoint
    folder: Path
    label: str
    scorer: ModelScorer
    objective: "Objective | None" = None
    reference: ModelConfig | None = None

    @property
    def models(self) -> list[ModelConfig]:
        return [self.scorer.model, *([self.reference] if self.reference else [])]

    def describe(self) -> dict[str, Any]:
        """What the reward is, for the record."""
        if self.objective is None:
            return {"kind": "head"}
        kind = f"score of {self.objective.name}" if scores_of(self.objective) else "log pi - log pi_ref"
        return {"kind": kind, "reference": self.reference.place if self.reference else None}


def scores_of(objective: "Objective") -> Any:
    """The pairwise objective whose `scores` are the implicit reward: those of one response depend on no other. None for
    another objective: log pi - log pi_ref is then the reward."""
    from prefopt.objectives.base import Pairwise
    from prefopt.objectives.plug_in import PlugIn

    base = objective.base if isinstance(objective, PlugIn) else objective
    of_pairs = {"prefixes", "sequential_kl", "token_weights"}
    alone = isinstance(base, Pairwise) and base.scope == "pair" and not base.needs & of_pairs
    return base if alone else None


def subjects(config: RewardBenchConfig) -> list[Subject]:
    """What is evaluated. Raises UserError where it does not exist, or cannot give rewards."""
    if config.run is None:
        scorer = build(config.scorer, RewardScorer, "scorer")
        if not isinstance(scorer, ModelScorer):
            raise UserError(
                f"scorer: {type(scorer).__name__} is no model. Give scorer=reward_model, hub_reward_model or "
                "custom_reward_model."
            )
        assert config.output  # check_reward_bench wants one
        return [Subject(Checkpoint(scorer.label, scorer.model), Path(config.output), scorer.label, scorer)]

    runs = runs_of(config.run)
    found = []
    for run in runs:
        for checkpoint in exported_policies(run, config.checkpoints):
            label = f"{Path(run).name}/{checkpoint.name}" if len(runs) > 1 else checkpoint.name
            folder = Path(config.output or Path(run) / "reward_bench")
            found.append(_subject_of_run(run, checkpoint, folder, label))
    return found


def _subject_of_run(run: str, checkpoint: Checkpoint, folder: Path, label: str) -> Subject:
    from prefopt.objectives.base import Objective

    config = record_of(run)["config"]
    objective = build(config["objective"], Objective, f"the objective of {run}")
    if objective.model_kind == "reward_model":
        if checkpoint.model.adapter:
            raise UserError(
                f"{checkpoint.path} is an adapter, and a reward model is read whole: evaluate the final one of a run "
                "with merge_adapter=true (checkpoints=final)."
            )
        return Subject(checkpoint, folder, label, RewardModel(checkpoint.path, "terminator"))

    base, reference = scores_of(objective), None
    if base is None or "reference" in base.needs:
        other = config.get("reference_model")
        reference = ModelConfig(other, other) if other else initial_model(run)
    return Subject(checkpoint, folder, label, LogLikelihood(checkpoint.model), objective, reference)


def rewards_of(
    subject: Subject, requests: Sequence[Request], config: RewardBenchConfig
) -> tuple[list[float], list[bool], int]:
    """The reward of each request, whether its text lost its beginning, and the tokens that a text has at most."""
    from prefopt.models.load import check_model

    limits = [config.max_length, subject.scorer.max_tokens()]
    limits += [check_model(subject.reference)] if subject.reference else []
    max_length = min(limit for limit in limits if limit)
    texts, cut = subject.scorer.encode(requests, max_length)
    values = subject.scorer.compute(texts, config.device, config.precision)
    if subject.objective is None:
        return values, cut, max_length

    import torch

    from prefopt.objectives.base import PairInputs

    logps, lengths = torch.tensor(values), torch.tensor([float(len(text.chosen)) for text in texts])
    # Each response stands on both sides: the score of one does not depend on the other.
    inputs = PairInputs(logps, logps, lengths, lengths)
    if subject.reference:
        # The ids are the policy's: the reference's own tokenizer is not asked.
        theirs = torch.tensor(LogLikelihood(subject.reference).compute(texts, config.device, config.precision))
        inputs = replace(inputs, reference_chosen_logps=theirs, reference_rejected_logps=theirs)
    base = scores_of(subject.objective)
    rewards = base.scores(inputs)[0] if base else inputs.chosen_logratios
    return rewards.tolist(), cut, max_length


def settings_of(config: RewardBenchConfig) -> dict[str, Any]:
    """Everything besides the models that decides the figures."""
    return {
        "rows": digest(config.rows, config.split or "train"),
        **{key: getattr(config, key) for key in ("split", "max_length", "precision", "device")},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def result_folder(subject: Subject, config: RewardBenchConfig) -> Path:
    """The folder of a result: named by checkpoint, rows, and a digest of settings, reward and the models' files."""
    models: list[Any] = [local_files(model) for model in subject.models]
    if config.output is not None:  # several models of one name may have their results in this folder
        models += [[model.place, model.revision] for model in subject.models]
    key = fingerprint([settings_of(config), subject.describe()["kind"], models])[:8]
    name = Path(subject.checkpoint.name).name
    return subject.folder / f"{name}-{rows_name(config.rows)}-{key}"


def rows_name(path: str) -> str:
    """`llmbar` of data/llmbar.jsonl.gz, `reward-bench` of allenai/reward-bench."""
    return Path(path).name.partition(".")[0]


def evaluate(subject: Subject, items: Sequence[Item], config: RewardBenchConfig, folder: Path) -> dict[str, Any]:
    """Give every response its reward, write rewards.jsonl, a line per row, into `folder`, and return the record."""
    log.info(f"{subject.label}: {len(items)} rows of {config.rows}")
    requests = [request for item in items for request in item.requests]
    values, cut, max_length = rewards_of(subject, requests, config)
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{request.where}: the reward of response {request.key} is {value}, and can rank nothing.")
    iterator = iter(values)
    rewards = [[next(iterator) for _ in item.requests] for item in items]
    rows = [
        {"id": item.id, "subset": item.subset, "correct": item.num_correct, "rewards": given}
        for item, given in zip(items, rewards, strict=True)
    ]
    write_rows(folder / "rewards.jsonl", rows)
    checkpoint = subject.checkpoint
    return {
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "path": checkpoint.path,
        "reward": subject.describe(),
        "rows": config.rows,
        "figures": summarize(items, rewards),
        "texts": {"n": len(values), "cut_from_the_left": sum(cut), "max_length": max_length},
        "settings": settings_of(config),
    }


def run_pending(config: RewardBenchConfig, **extra: str) -> None:
    """Evaluate every checkpoint that has no record yet, and print the table of all. `extra` goes into the records.
    Raises UserError for what is missing, before a model is loaded."""
    check_reward_bench(config)
    resolve_hardware(config)
    found = check_subjects(config)
    items = read_items(config.rows, config.split)

    folders = []
    for subject in found:
        make = functools.partial(evaluate, subject, items, config)
        what = f"the rewards of {subject.checkpoint.path}"
        folders.append(make_once(result_folder(subject, config), what, has_record, make, extra))

    rows = [(s.label, read_result(folder / "record.json")) for s, folder in zip(found, folders, strict=True)]
    console().print(format_results(rows))
    for label, record in rows:
        texts = record["texts"]
        if texts["cut_from_the_left"]:
            print(
                f"{label}: {texts['cut_from_the_left']} of {texts['n']} texts were cut from the left to "
                f"{texts['max_length']} tokens"
            )
    for folder in folders:
        print(folder)


def check_subjects(config: RewardBenchConfig) -> list[Subject]:
    """`subjects`, whose models can be found. Raises UserError for what is missing, before a model is loaded."""
    from prefopt.models.load import check_model

    if config.output is not None:
        check_folder("output", config.output)
    check_rows(config.rows, config.split)
    found = subjects(config)
    for subject in found:
        subject.scorer.max_tokens()
        if subject.reference:
            check_model(subject.reference, "reference_model")
    return found
