"""Who says which of two answers is better: a language model behind an API, asked by alpaca-eval, or a reward. One
dataclass each, named by a YAML in conf/judge."""

import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from prefopt.data.formats import Message
from prefopt.errors import UserError
from prefopt.rewards.scorers import Request, RewardScorer
from prefopt.utils.console import say
from prefopt.utils.files import atomic_write, with_filename, write_json
from prefopt.utils.locks import locked
from prefopt.utils.redact import redact

ATTEMPTS = 3  # passes over the rows that got no preference
CLIENTS = {"openai": "OpenAI", "anthropic": "Anthropic"}  # the vendors' packages, and what asks in them
CHUNK = 20  # rows that are asked for before the answers are written
CHARACTERS_PER_TOKEN = 4  # of an estimate: English text, any tokenizer


@dataclass(frozen=True)
class Comparison:
    """A question and two answers to it, `index` being its row in the set of questions."""

    index: int
    prompt: list[Message]
    instruction: str
    reference: str
    model: str
    finished: tuple[bool, bool] = (True, True)  # of the reference's answer and the model's: did it end by itself?


@dataclass(frozen=True)
class GeneratorNames:
    """What the two sides are called in annotations."""

    reference: str
    model: str


class Judge(ABC):
    """Compares the answers of duels."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name, which is part of the metric's."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides a preference besides the texts, for records; no secrets."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError for a missing package or key."""

    @abstractmethod
    def annotate(
        self,
        duels: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        max_cost: float,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        """alpaca-eval's annotations of all duels, in their order: `preference` is 1 for the reference, 2 for the model,
        1.5 for neither, or between.

        `folder` keeps what was paid for. Raises UserError where the estimate is above `max_cost` USD, where the judge
        fails, and where a preference is missing.
        """


@dataclass(frozen=True)
class RewardJudge(Judge):
    """Prefers the answer with the higher reward, and neither where they are equal. It is not AlpacaEval's judge, costs
    nothing, and knows what its scorer knows."""

    scorer: RewardScorer

    @property
    def title(self) -> str:
        return f"reward of {self.scorer.label}"

    def describe(self) -> dict[str, Any]:
        return {"name": self.title, "scorer": repr(self.scorer)}

    def check(self) -> None:
        pass  # a scorer says itself what it lacks, when it is made

    def annotate(
        self,
        duels: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        max_cost: float,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        requests = [
            Request({}, side, duel.prompt, answer, finished, f"question {duel.index}")
            for duel in duels
            for side, answer, finished in zip((0, 1), (duel.reference, duel.model), duel.finished, strict=True)
        ]
        rewards = self.scorer.rewards(requests, device, precision)
        return [
            {
                "index": duel.index,
                "instruction": duel.instruction,
                "output_1": duel.reference,
                "output_2": duel.model,
                "generator_1": names.reference,
                "generator_2": names.model,
                "annotator": self.title,
                "preference": 1.5 if ours == theirs else 1.0 + (ours > theirs),
                "reward_1": theirs,
                "reward_2": ours,
            }
            for duel, theirs, ours in zip(duels, rewards[::2], rewards[1::2], strict=True)
        ]


@dataclass(frozen=True)
class LanguageModelJudge(Judge):
    """A judge of alpaca-eval: one of its own by `name`, or one that `annotator` describes as its configuration files
    do, whose prompt_template is a file of alpaca-eval's judges or a path."""

    name: str
    price: list[float]  # USD per million tokens read, and written
    key: str | None = None  # the environment variable that holds it; None: the server asks for none
    base_url: str | None = None  # None: the vendor's
    model: str | None = None  # in place of the annotator's model_name
    annotator: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if len(self.price) != 2 or min(self.price) < 0:
            raise ValueError(f"price must be two numbers, USD per million tokens read and written, is {self.price}")
        # What they are is not shown: it may be a key that was put into the wrong place.
        if self.base_url is not None and not re.fullmatch(r"https?://[^@/?#\s]+(/[^?#\s]*)?", self.base_url):
            raise ValueError(
                "base_url must be http(s)://HOST[:PORT]/PATH without user or password, and without a query"
            )
        if self.key is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key):
            raise ValueError(
                "key must be the name of the environment variable that holds the key, such as OPENAI_API_KEY, and not "
                "the key itself"
            )
        if self.annotator is None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name must be that of one of alpaca-eval's judges, is {self.name}")
        if self.annotator is not None:
            _check_annotator(self.annotator)

    @property
    def title(self) -> str:
        return self.name

    def describe(self) -> dict[str, Any]:
        config, prompt = self._asked
        return {"name": self.name, "base_url": self.base_url, "annotator": config, "prompt": _sha256(prompt)}

    def check(self) -> None:
        config, _ = self._asked
        package = {"openai_completions": "openai", "anthropic_completions": "anthropic"}.get(config["fn_completions"])
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"judge {self.name} needs the package {package}: pip install -e '.[evaluation]'")
        if self.key and not os.environ.get(self.key):
            raise UserError(
                f"judge {self.name} needs a key in the environment variable {self.key}. Set it, or take a judge that "
                "needs none: judge=reward_model, or judge=local judge.base_url=URL"
            )
        if self.base_url and package != "openai":
            raise UserError(f"judge.base_url: judge {self.name} does not speak the OpenAI API")

    def annotate(
        self,
        duels: Sequence[Comparison],
        names: GeneratorNames,
        folder: Path,
        max_cost: float,
        device: str,
        precision: str,
    ) -> list[dict[str, Any]]:
        digest = _sha256(json.dumps(self.describe(), sort_keys=True))[:8]
        place = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.name)}-{digest}"
        annotations = place / "annotations.json"
        with locked(place / "lock", f"preferences of {self.name}"):
            judge = self._write(place)
            for _ in range(ATTEMPTS):
                known = _prune(annotations)
                asked = [d for d in duels if d.reference != d.model and _key(d) not in known]
                max_cost -= self._budget(asked, len(duels), max_cost)
                found = self._ask(duels, names, judge, annotations)
                missing = [row["index"] for row in found if not _is_preference(row["preference"])]
                if not missing:
                    return found
        raise UserError(
            f"incomplete: {self.name} gave no preference for {len(missing)} of {len(duels)} questions, after "
            f"{ATTEMPTS} attempts (rows {', '.join(map(str, missing[:10]))}{', …' * (len(missing) > 10)}), so there is "
            f"no win rate. What it gave is kept in {annotations}, and the same command asks for the rest. A judge "
            "without log-probs of its answer gives no preference at all: judge=local_text reads the letter instead."
        )

    @functools.cached_property
    def _asked(self) -> tuple[dict[str, Any], str]:
        """alpaca-eval's configuration of this judge, and the text of its prompt."""
        spec = importlib.util.find_spec("alpaca_eval")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("a language model as judge needs the package alpaca-eval: pip install -e '.[evaluation]'")
        packaged = Path(spec.submodule_search_locations[0]) / "evaluators_configs"
        config = self.annotator
        if config is None:
            file = packaged / self.name / "configs.yaml"
            if not file.is_file():
                raise UserError(f"judge.name={self.name}: alpaca-eval has no such judge. Its judges: {packaged}")
            config = yaml.safe_load(file.read_text())[self.name]
        config = dict(config)
        if self.model is not None:
            config["completions_kwargs"] = {"model_name": self.model, **config["completions_kwargs"]}
        if letters := config.get("completion_parser_kwargs", {}).get("outputs_to_match"):
            # JSON, in which jobs are frozen, has made texts of these numbers.
            kwargs = {**config["completion_parser_kwargs"], "outputs_to_match": {int(k): v for k, v in letters.items()}}
            config["completion_parser_kwargs"] = kwargs
        template = config.pop("prompt_template")
        prompt = next((f for f in (packaged / template, Path(template).expanduser()) if f.is_file()), None)
        if prompt is None:
            raise UserError(f"judge.annotator.prompt_template={template}: no such file, here or among alpaca-eval's")
        return config, prompt.read_text()

    def _write(self, place: Path) -> Path:
        """The folder that alpaca-eval is pointed to: the judge as it was asked, without a key."""
        config, prompt = self._asked
        folder = place / "judge" / "configuration"
        atomic_write(folder / "prompt.txt", prompt)
        own = {self.name: {"prompt_template": "configuration/prompt.txt", **config}}
        atomic_write(folder / "configs.yaml", yaml.safe_dump(own, sort_keys=False))
        client: dict[str, Any] = {"max_retries": 8}  # of an error of the server, with pauses that grow
        client |= {"base_url": self.base_url} if self.base_url else {}
        client |= {} if self.key else {"api_key": "none"}  # the client insists on one
        atomic_write(folder / "client.yaml", yaml.safe_dump({"default": [client]}))
        return folder

    def _budget(self, duels: Sequence[Comparison], n: int, max_cost: float) -> float:
        """Say what asking for these preferences will cost, and return it. Raises UserError above `max_cost`."""
        config, prompt = self._asked
        how = config.get("completions_kwargs", {})
        written = len(duels) * (how.get("max_tokens") or how.get("max_tokens_to_sample") or 0)
        letters = sum(len(prompt) + len(d.instruction) + len(d.reference) + len(d.model) for d in duels)
        read = math.ceil(letters / CHARACTERS_PER_TOKEN)
        cost = (read * self.price[0] + written * self.price[1]) / 1e6
        say(
            f"{self.name}: {len(duels)} calls for {n} questions (the others are known or equal), about {read:,} tokens "
            f"to read and {written:,} to write, about {cost:.2f} USD"
        )
        if cost > max_cost:
            raise UserError(
                f"the estimate of {cost:.2f} USD is above what is left of max_cost, {max_cost:.2f} USD. Nothing was "
                "asked for."
            )
        return cost

    def _ask(
        self, duels: Sequence[Comparison], names: GeneratorNames, judge: Path, annotations: Path
    ) -> list[dict[str, Any]]:
        """alpaca-eval's own evaluation; a row without preference has None or NaN there."""
        import pandas as pd

        config, _ = self._asked
        how: dict[str, Any] = {"chunksize": CHUNK}
        if config["fn_completions"] == "openai_completions":
            how["client_config_path"] = str(judge / "client.yaml")
            if self.key:  # the client looks for it under this name
                os.environ["OPENAI_API_KEY"] = os.environ[self.key]

        with alpaca_eval() as package:
            from openai import OpenAIError

            class Annotator(package.annotators.PairwiseAnnotator):  # type: ignore[name-defined]
                def save(self, path: str | None = None) -> None:
                    """Whole or not at all: what is in this file was paid for."""
                    aside = annotations.with_suffix(".tmp")
                    with with_filename(annotations):
                        super().save(aside)
                        aside.write_text(redact(aside.read_text()))  # a server may say anything
                        aside.replace(annotations)

                def load_(self, path: str | None = None) -> None:
                    """As numbers that may become 1.5, also where all that is known is 1 or 2."""
                    super().load_(path)
                    known = self.df_annotations  # type: ignore[has-type]
                    self.df_annotations = None if known is None else known.astype({"preference": float})

            def outputs(name: str, answers: list[str]) -> Any:
                rows = zip(duels, answers, strict=True)
                return pd.DataFrame(
                    [{"index": d.index, "instruction": d.instruction, "output": a, "generator": name} for d, a in rows]
                )

            try:
                _, found = package.evaluate(
                    model_outputs=outputs(names.model, [d.model for d in duels]),
                    reference_outputs=outputs(names.reference, [d.reference for d in duels]),
                    annotators_config=str(judge),
                    name=names.model,
                    output_path=None,
                    precomputed_leaderboard=None,
                    is_return_instead_of_print=True,
                    fn_metric=lambda _: {"win_rate": math.nan, "standard_error": math.nan},  # once none is missing
                    sort_by="win_rate",
                    annotation_kwargs=how,
                    Annotator=Annotator,
                    caching_path=str(annotations),
                )
            except OpenAIError as error:
                elsewhere = 300 <= getattr(error, "status_code", 0) < 400
                why = " (a redirect, which is not followed: set judge.base_url to where the server is)" * elsewhere
                raise UserError(
                    f"judge {self.name} failed: {redact(str(error))}{why}. What was judged is kept in {annotations}; "
                    "the same command goes on from there."
                ) from None
        order = {d.instruction: d.index for d in duels}
        return sorted(found, key=lambda row: order[row["instruction"]])


@contextmanager
def alpaca_eval() -> Iterator[Any]:
    """The package, without its messages and warnings: what can go wrong is looked at here. The vendors' clients that it
    makes meanwhile follow no redirect, so that questions and answers go to no other host than the configured one."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import alpaca_eval as package  # sets the level of the root logger

        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.CRITICAL)
        clients = {name: import_module(name) for name in CLIENTS if importlib.util.find_spec(name)}
        own = {name: getattr(module, CLIENTS[name]) for name, module in clients.items()}
        for name, module in clients.items():
            staying = functools.partial(module.DefaultHttpxClient, follow_redirects=False)
            setattr(module, CLIENTS[name], lambda make=own[name], http=staying, **how: make(http_client=http(), **how))
        try:
            yield package
        finally:
            root.setLevel(level)
            for name, module in clients.items():
                setattr(module, CLIENTS[name], own[name])


def _check_annotator(annotator: dict[str, Any]) -> None:
    """Raises ValueError for a description by which alpaca-eval would run code, or reach a host, that only it names."""
    asked = annotator.get("fn_completions")
    if asked not in ("openai_completions", "anthropic_completions"):
        raise ValueError(f"annotator.fn_completions must be openai_completions or anthropic_completions, is {asked!r}")
    foreign = [k for k in annotator.get("completions_kwargs", {}) if k.startswith(("client_", "openai_", "anthropic_"))]
    if foreign:
        raise ValueError(
            f"annotator.completions_kwargs: {', '.join(foreign)} would choose another client, host or key: set "
            "judge.base_url and judge.key"
        )


def _key(duel: Comparison) -> tuple[str, str, str]:
    return duel.instruction, duel.reference, duel.model


def _is_preference(value: Any) -> bool:
    return value is not None and 1 <= value <= 2


def _prune(annotations: Path) -> set[tuple[str, str, str]]:
    """Leave out of the file what has no preference, which alpaca-eval would never ask for again; what is in it."""
    if not annotations.is_file():
        return set()
    rows = json.loads(annotations.read_text())
    kept = [row for row in rows if _is_preference(row["preference"])]
    if not kept:
        annotations.unlink()
    elif len(kept) < len(rows):
        write_json(annotations, kept)
    return {(row["instruction"], row["output_1"], row["output_2"]) for row in kept}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
