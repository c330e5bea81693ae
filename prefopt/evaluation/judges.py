"""Judges, which prefer one of two answers: a language model behind an API, asked through alpaca-eval, or a reward.

Each is a dataclass that a YAML of conf/judge names by `_target_`.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data.items import Message
from prefopt.errors import UserError
from prefopt.evaluation.annotations import is_preference, known_preferences, prune_annotations
from prefopt.evaluation.clients import VENDOR_URLS, Calls, alpaca_eval, failure_reason, judge_client
from prefopt.evaluation.cost import Budget, Estimate, LimitError
from prefopt.evaluation.judge_configuration import PACKAGES, check_annotator, read_configuration, write_configuration
from prefopt.rewards.scorers import Request, RewardScorer
from prefopt.utils.files import safe_name
from prefopt.utils.locks import locked
from prefopt.utils.redact import redact

log = logging.getLogger(__name__)

ATTEMPTS = 3  # passes over the rows that got no preference
CHUNK = 20  # questions that are asked before the answers are written to disk
# The variables of the environment by which the vendors' clients, or alpaca-eval, would ask another host or add headers.
ADDRESSES = {
    "openai": ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH"),
    "anthropic": ("ANTHROPIC_BASE_URL",),
}
HEADERS = {"openai": "OPENAI_CUSTOM_HEADERS", "anthropic": "ANTHROPIC_CUSTOM_HEADERS"}


@dataclass(frozen=True)
class Comparison:
    """A question and two answers to it. `index` is the question's row among all questions."""

    index: int
    prompt: list[Message]
    instruction: str
    reference: str
    model: str
    finished: tuple[bool, bool] = (True, True)  # (reference, model): False where the token limit cut the answer off


@dataclass(frozen=True)
class GeneratorNames:
    """The names of the two sides in annotations."""

    reference: str
    model: str


class Judge(ABC):
    """Prefers one of the two answers of a comparison."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The judge's name. It is part of the names of metrics and folders."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything besides the texts that decides a preference, for records. It holds no secrets."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError for a missing package or key."""

    @abstractmethod
    def annotate(
        self,
        comparisons: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        budget: Budget,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        """One annotation per comparison, in their order, with the fields of alpaca-eval's annotations.

        `preference` is 1 for the reference, 2 for the model, 1.5 for a tie; a judge that gives probabilities may give
        any number from 1 to 2. Preferences that cost money are kept in `folder`, and paid of `budget`.

        Raises UserError where the estimated cost is above what is left of it, where the judge fails, and where a
        preference is missing after all attempts.
        """

    @abstractmethod
    def estimate(self, comparisons: Sequence[Comparison], folder: Path) -> Estimate:
        """The calls that `annotate` will make, but for those that have to be repeated."""


@dataclass(frozen=True)
class RewardJudge(Judge):
    """Prefers the answer with the higher reward; equal rewards are a tie. It costs nothing, but its win rate is not
    comparable with those of AlpacaEval's judges."""

    scorer: RewardScorer

    @property
    def title(self) -> str:
        return f"reward of {self.scorer.label}"

    def describe(self) -> dict[str, Any]:
        return {"name": self.title, "scorer": repr(self.scorer), "files": self.scorer.model_files()}

    def check(self) -> None:
        pass  # the scorer has checked its packages when it was built

    def estimate(self, comparisons: Sequence[Comparison], folder: Path) -> Estimate:
        return Estimate((0.0, 0.0), {})

    def annotate(
        self,
        comparisons: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        budget: Budget,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        requests = [
            Request({}, side, comparison.prompt, answer, finished, f"question {comparison.index}")
            for comparison in comparisons
            for side, answer, finished in zip(
                (0, 1), (comparison.reference, comparison.model), comparison.finished, strict=True
            )
        ]
        rewards = self.scorer.rewards(requests, device, precision)

        # The requests alternate: the reference's answer, then the model's.
        return [
            {
                "index": comparison.index,
                "instruction": comparison.instruction,
                "output_1": comparison.reference,
                "output_2": comparison.model,
                "generator_1": names.reference,
                "generator_2": names.model,
                "annotator": self.title,
                "preference": _preference(theirs, ours),
                "reward_1": theirs,
                "reward_2": ours,
            }
            for comparison, theirs, ours in zip(comparisons, rewards[::2], rewards[1::2], strict=True)
        ]


def _preference(reference_reward: float, model_reward: float) -> float:
    """1 for the reference, 2 for the model, 1.5 for a tie."""
    if model_reward == reference_reward:
        return 1.5
    return 2.0 if model_reward > reference_reward else 1.0


@dataclass(frozen=True)
class LanguageModelJudge(Judge):
    """A judge that alpaca-eval asks: one of alpaca-eval's judges by `name`, or the one that `annotator` describes.

    `annotator` has the form of alpaca-eval's configuration files. Its prompt_template is a path, or a file among
    alpaca-eval's judges.
    """

    name: str
    price: list[float]  # USD per million tokens: [read, written]
    key: str | None = None  # the name of the environment variable with the API key; None: the server wants no key
    base_url: str | None = None  # None: the vendor's server
    model: str | None = None  # replaces the annotator's model_name
    annotator: dict[str, Any] | None = None
    timeout: float = 60  # seconds of one attempt at a call, until its answer is there

    def __post_init__(self) -> None:
        if len(self.price) != 2 or min(self.price) < 0:
            raise ValueError(f"price must be two numbers, USD per million tokens read and written, is {self.price}")
        # The messages do not show the value: it may be a key in the wrong field.
        if self.base_url is not None and not re.fullmatch(r"https?://[^@/?#\s]+(/[^?#\s]*)?", self.base_url):
            raise ValueError(
                "base_url must be http(s)://HOST[:PORT]/PATH without user or password, and without a query"
            )
        if not 0 < self.timeout <= 3600:
            raise ValueError(f"timeout must be above 0 and at most 3600 seconds, is {self.timeout}")
        if self.key is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key):
            raise ValueError(
                "key must be the name of the environment variable that holds the key, such as OPENAI_API_KEY, and not "
                "the key itself"
            )
        if self.annotator is None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name must be that of one of alpaca-eval's judges, is {self.name}")
        if self.annotator is not None:
            check_annotator(self.annotator)

    @property
    def title(self) -> str:
        return self.name

    def describe(self) -> dict[str, Any]:
        config, prompt = self._configuration
        return {"name": self.name, "base_url": self.address, "annotator": config, "prompt": _sha256(prompt)}

    @property
    def model_name(self) -> str:
        """The model that the server is asked for."""
        config, _ = self._configuration
        return str(config["completions_kwargs"]["model_name"])

    @property
    def vendor(self) -> str:
        """The package of the vendor whose API the judge speaks: openai or anthropic."""
        config, _ = self._configuration
        return PACKAGES[config["fn_completions"]]

    @property
    def address(self) -> str:
        """Where the judge's server is: `base_url`, or the vendor's."""
        return self.base_url or VENDOR_URLS[self.vendor]

    @property
    def secret(self) -> str:
        """The key, or a text that is none: the clients refuse to be made without one."""
        return os.environ[self.key] if self.key else "none"

    def check(self) -> None:
        config, _ = self._configuration
        package = PACKAGES.get(config["fn_completions"])
        if package is None:
            raise UserError(
                f"judge.name={self.name}: this judge of alpaca-eval runs {config['fn_completions']}, and only judges "
                f"with {' or '.join(PACKAGES)} are asked here"
            )
        if importlib.util.find_spec(package) is None:
            raise UserError(f"judge {self.name} needs the package {package}: pip install -e '.[evaluation]'")
        if self.key and not os.environ.get(self.key):
            raise UserError(
                f"judge {self.model_name} needs a key in the environment variable {self.key}. Set it, or take a judge "
                "that needs none, such as judge=local judge.base_url=URL"
            )
        self._check_environment()

    def _check_environment(self) -> None:
        """Raise UserError where the environment says where this judge's calls go, or what is sent with them."""
        addresses = [name for name in ADDRESSES[self.vendor] if os.environ.get(name)]
        if addresses and self.base_url is None:
            raise UserError(
                f"the environment's {' and '.join(addresses)} would send what judge {self.name} is asked, and the key, "
                f"to another host than {self.address}. Unset it, or write the address into the command, so that it is "
                "recorded: judge.base_url=URL"
            )
        if os.environ.get(HEADERS[self.vendor]):
            raise UserError(
                f"the environment's {HEADERS[self.vendor]} would change the calls to judge {self.name}, and no record "
                "would tell. Unset it."
            )

    def annotate(
        self,
        comparisons: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        budget: Budget,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        judge_folder = self._folder(folder)
        annotations = judge_folder / "annotations.json"

        # The lock keeps a second job with the same judge from paying for the same questions.
        with locked(judge_folder / "lock", f"preferences of {self.name}"):
            configuration = judge_folder / "judge" / "configuration"
            write_configuration(self.name, *self._configuration, configuration)
            calls = Calls(budget, self.price)
            for _ in range(ATTEMPTS):
                prune_annotations(annotations)
                estimate = self.estimate(comparisons, folder)
                what = f"{self.name}: {len(estimate.calls)} calls for {len(comparisons)} questions"
                budget.announce(f"{what} (the others are known or equal)", estimate)
                rows = self._ask(comparisons, names, configuration, annotations, calls)
                given = {row["index"]: row for row in rows if is_preference(row["preference"])}
                missing = [c.index for c in comparisons if c.index not in given]
                if not missing:
                    return rows
                if len(missing) <= len(calls.refused):
                    break  # these are not asked again

        listed = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise UserError(
            f"incomplete: {self.name} gave no preference for {len(missing)} of {len(comparisons)} questions, after "
            f"{ATTEMPTS} attempts (rows {listed}), so there is no win rate.{what_failed(calls)}\n"
            f"What it gave is kept in {annotations}, and the same command asks for the rest. A judge without log-probs "
            "of its answer gives no preference at all: judge=local_text reads the letter instead."
        )

    @functools.cached_property
    def _configuration(self) -> tuple[dict[str, Any], str]:
        return read_configuration(self.name, self.annotator, self.model)

    def _folder(self, folder: Path) -> Path:
        """Where in `folder` this judge's preferences are kept."""
        digest = _sha256(json.dumps(self.describe(), sort_keys=True))[:8]
        return folder / f"{safe_name(self.name)}-{digest}"

    def estimate(self, comparisons: Sequence[Comparison], folder: Path) -> Estimate:
        config, prompt = self._configuration
        kwargs = config.get("completions_kwargs", {})
        written = kwargs.get("max_tokens") or kwargs.get("max_tokens_to_sample") or 0
        annotations = self._folder(folder) / "annotations.json"
        known = known_preferences(annotations)
        return Estimate(
            self.price,
            {
                (annotations, _key(c)): (len(prompt) + len(c.instruction) + len(c.reference) + len(c.model), written)
                for c in comparisons
                # alpaca-eval does not ask about equal answers: it calls them a tie.
                if c.reference != c.model and _key(c) not in known
            },
        )

    def _ask(
        self,
        comparisons: Sequence[Comparison],
        names: GeneratorNames,
        configuration: Path,
        annotations: Path,
        calls: Calls,
    ) -> list[dict[str, Any]]:
        """Ask alpaca-eval once for all annotations that are not in the file yet. The rows of all comparisons, in their
        order; `preference` is None or NaN where the judge gave none. Raises UserError where the judge's server fails.
        """
        settings: dict[str, Any] = {"chunksize": CHUNK}
        config, _ = self._configuration
        if config["fn_completions"] == "openai_completions":
            settings["client_config_path"] = str(configuration / "client.yaml")
        model = [_output(c, c.model, names.model) for c in comparisons]
        reference = [_output(c, c.reference, names.reference) for c in comparisons]

        with alpaca_eval(), judge_client(self.vendor, self.address, self.secret, self.timeout, calls):
            from prefopt.evaluation.annotator import annotate

            rows = annotate(model, reference, configuration, annotations, settings)
        check_server(self.name, calls, annotations)
        order = {c.instruction: c.index for c in comparisons}
        return sorted(rows, key=lambda row: order[row["instruction"]])


def check_server(name: str, calls: Calls, kept: Path) -> None:
    """Raise UserError where nothing more is asked of the judge `name`. What it has said is in the file `kept`."""
    if (error := calls.failure) is None:
        return
    if isinstance(error, LimitError):
        raise UserError(f"{error} What was judged is kept in {kept}; with a higher max_cost the command goes on there.")
    why = ""
    if 300 <= getattr(error, "status_code", 0) < 400:
        why = " (a redirect, which is not followed: set judge.base_url to where the server is)"
    raise UserError(
        f"judge {name} failed: {redact(failure_reason(error))}{why}. What was judged is kept in {kept}; the same "
        "command goes on from there."
    )


def what_failed(calls: Calls) -> str:
    """Sentences on the calls that gave nothing, for messages; "" where there were none. Each begins with a blank."""
    why = ""
    if calls.refused:
        said = redact(next(iter(calls.refused.values())))[:300]
        why += f" Its server refused {len(calls.refused)} of them; to the first it said: {said}"
    if calls.last_error:
        why += f" The last call that failed: {redact(failure_reason(calls.last_error))[:300]}"
    return why


def _output(comparison: Comparison, answer: str, generator: str) -> dict[str, Any]:
    """One side's answer as alpaca-eval reads it."""
    return {
        "index": comparison.index,
        "instruction": comparison.instruction,
        "output": answer,
        "generator": generator,
    }


def _key(comparison: Comparison) -> tuple[str, str, str]:
    return comparison.instruction, comparison.reference, comparison.model


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
