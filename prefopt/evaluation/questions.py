"""The questions of AlpacaEval, and one's own: read, and checked against the published files."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from omegaconf import OmegaConf

from prefopt.config.parse import parse
from prefopt.config.schema import DatasetConfig
from prefopt.data.dataset import has_heldout, load_split, prompt_of
from prefopt.data.fields import as_prompt
from prefopt.data.items import Message, Pair
from prefopt.data.sources import SUFFIXES, digest, read_rows
from prefopt.errors import UserError

log = logging.getLogger(__name__)

REPOSITORY = "tatsu-lab/alpaca_eval"  # a data set on the hub
QUESTIONS = "alpaca_eval_gpt4_baseline.json"  # the 805 questions, with the answers of AlpacaEval 2's baseline
GAMED = "df_gamed.csv"  # the data that regularize the GLM of the length-controlled win rate
SHA256 = {
    QUESTIONS: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    GAMED: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
}
NUM_QUESTIONS = 805  # questions of AlpacaEval


@dataclass(frozen=True)
class Question:
    """A question as messages for a policy, and as the one text that judges read. `dataset`: where AlpacaEval has it
    from."""

    prompt: list[Message]
    instruction: str
    dataset: str | None = None


@dataclass(frozen=True)
class Questions:
    """Different questions in the order of their rows. `is_alpaca_eval`: they are AlpacaEval's 805, so that a
    length-controlled win rate can be computed."""

    items: list[Question]
    is_alpaca_eval: bool


def hub_file(name: str) -> Path:
    """The path of an AlpacaEval file in the hub's cache, downloaded if need be. Raises UserError where it cannot be
    downloaded, or where its digest is not the one in SHA256."""
    try:
        file = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except Exception as error:  # the hub's clients raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"AlpacaEval's {name} is not here: {reason}\nFetch it on a machine with network: python -m "
            "prefopt.prefetch alpaca=true (or take questions of your own: instructions=FILE, for a win rate without "
            "length control)"
        ) from None
    if digest(str(file)) != SHA256[name]:
        raise UserError(
            f"{file} is not the {name} that published figures rest on: its SHA-256 is {digest(str(file))}, and not "
            f"{SHA256[name]}. Remove it, and fetch it again: python -m prefopt.prefetch alpaca=true"
        )
    return file


def heldout_questions(dataset: dict[str, Any], limit: int | None) -> tuple[Questions, list[str]]:
    """The held-out prompts of a run's data (its record's `dataset`), the first `limit` of them, and the chosen
    completion of each; of several pairs with one prompt that of the first. Raises UserError where there are none."""
    config = parse(OmegaConf.create(dataset), DatasetConfig, "dataset.")
    if not has_heldout(config):
        raise UserError(f"data set {config.name} has no held-out rows: name the questions by instructions=FILE")
    found: dict[str, tuple[Question, str]] = {}
    for item in load_split(config, "heldout").read():
        if limit is not None and len(found) == limit:
            break
        prompt = prompt_of(item)
        chosen = item.chosen if isinstance(item, Pair) else item.messages[len(prompt)]["content"]
        found.setdefault(question_text(prompt), (Question(prompt, question_text(prompt)), chosen))
    questions, completions = zip(*found.values(), strict=True)
    return Questions(list(questions), is_alpaca_eval=False), list(completions)


def question_text(prompt: list[Message]) -> str:
    """The messages of a prompt as the one text that judges read."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def read_questions(path: str | None, split: str | None) -> Questions:
    """The questions of a file, or AlpacaEval's where `path` is None. A repeated question is left out. Raises UserError
    for a row without a question."""
    file = path or str(hub_file(QUESTIONS))
    questions: dict[str, Question] = {}
    repeated = 0
    for where, row in read_rows(file, split):
        try:
            prompt = as_prompt(row["instruction"] if "instruction" in row else row["prompt"])
        except KeyError:
            fields = ", ".join(row) or "none"
            raise UserError(f"{where} has neither a field 'instruction' nor 'prompt' (its fields: {fields}).") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None
        text = question_text(prompt)
        if text in questions:
            repeated += 1
        dataset = row.get("dataset")
        questions[text] = Question(prompt, text, dataset if isinstance(dataset, str) else None)

    if repeated:
        log.info(f"{file}: {repeated} rows ask what another row asks, and are left out")
    is_alpaca_eval = file.endswith(SUFFIXES) and digest(file) == SHA256[QUESTIONS]
    return Questions(list(questions.values()), is_alpaca_eval)
