"""The model card of a policy: its README.md, with the front matter that the Hugging Face hub reads."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from prefopt.tracking.record import heldout_accuracy
from prefopt.training.export import portable_name
from prefopt.utils.files import resolve_path
from prefopt.utils.plain import markdown_text

# (key of an evaluation, its name in words, key of the standard error, key of n)
METRICS = (
    ("loss", "loss", None, "n"),
    ("accuracy", "accuracy: the chosen completion has the higher score", "accuracy_se", "n"),
    ("margin", "margin of the scores", None, "n"),
    ("kl", "KL to the reference (nats)", "kl_se", "samples"),
    ("oracle_reward", "reward of samples, by the oracle of the data set", "oracle_reward_se", "samples"),
    ("sample_length", "length of samples (tokens)", None, "samples"),
)


def model_card(record: dict[str, Any], is_adapter: bool, evaluations: list[dict[str, Any]]) -> str:
    """The card's text, from the run's record and its evaluations. Paths of this machine are left out where a name does,
    and shortened elsewhere. `is_adapter`: the policy is an adapter alone."""
    config = record["config"]
    base, revision = portable_name(config["model"]["path"], config["model"]["revision"])
    license_ = base_license(config["model"]["path"])
    objective = config["objective"]["_target_"].rpartition(".")[2]
    data = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        license=license_,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation" if record["objective"] != "reward" else "text-classification",
        tags=["prefopt", "preference-optimization", record["objective"]],
    )
    git = record.get("git") or {}
    commit = f"{git['commit']}{' with changes that are not committed' if git['dirty'] else ''}" if git else "unknown"
    facts = {
        "base model": f"{base}" + (f" at revision {revision}" if revision else ""),
        "data": f"{config['dataset']['name']}: {record['data']['train']['items']} training items",
        "objective": ", ".join([objective, *_settings(config["objective"])]),
        "weights": "all" if not config["peft"]["target_modules"] else f"LoRA of rank {config['peft']['r']}",
        "optimizer": ", ".join(_settings(config["optimizer"])),
        "schedule": ", ".join([config["schedule"]["_target_"].rpartition(".")[2], *_settings(config["schedule"])]),
        "steps": f"{config['steps']} of {config['batch_size']} pairs",
        "seed": config["seed"],
        "code": f"prefopt, commit {commit}",
        "command": record["command"],
    }
    terms = (
        f"The base model's card says `{markdown_text(license_)}`."
        if license_
        else "The folder of the base model names no license. What the base model is under holds for this one too."
    )
    lines = [
        f"# {markdown_text(record['name'])}",
        "",
        f"{markdown_text(base)}, trained on preferences.",
        "",
        *(_about_adapter(base) if is_adapter else ()),
        *_table(("what", "value"), [(key, str(value)) for key, value in facts.items()]),
        "",
        "## Evaluation",
        "",
        *_evaluation(evaluations),
        "",
        "## License",
        "",
        terms,
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2, sort_keys=True),
        "```",
    ]
    text = "\n".join(lines).replace(str(Path.home()), "~")
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _about_adapter(base: str) -> list[str]:
    text = "This is an adapter. With peft installed, `from_pretrained` of transformers loads it on its base."
    if not is_hub_name(base):
        text += (
            " The base was a folder or a file on the machine of the run; adapter_config.json names its place there "
            "(`base_model_name_or_path`). Elsewhere, write the place that it has."
        )
    return [text, ""]


def is_hub_name(name: str) -> bool:
    """Whether `name` can be OWNER/MODEL on the hub; a folder's name without its place is not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def base_license(path: str) -> str | None:
    """The license in the front matter of the README.md beside the base model; None where there is none."""
    folder = resolve_path(path)
    file = (folder if folder.is_dir() else folder.parent) / "README.md"
    try:
        license_ = ModelCard.load(file).data.license if file.is_file() else None
    except Exception:  # a README that is no card
        return None
    return license_ if isinstance(license_, str) else None


def _settings(node: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in node.items() if key != "_target_"]


def _evaluation(evaluations: list[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return ["No held-out data."]
    first, last = evaluations[0], evaluations[-1]
    rows = [
        (name, _figure(first, key, error), _figure(last, key, error), str(last[n]))
        for key, name, error, n in METRICS
        if last.get(key) is not None
    ]
    header = ("on held-out prompts", f"step {first['step']}", f"step {last['step']}", "n")
    return [*_table(header, rows), "", "± is one standard error over the n pairs or samples."]


def _figure(row: dict[str, Any], key: str, error: str | None) -> str:
    if row.get(key) is None or (key == "accuracy" and heldout_accuracy(row) is None):
        return "–"
    return f"{row[key]:.3f}" + (f" ± {row[error]:.3f}" if error and row.get(error) is not None else "")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [["---"] * len(header), *([markdown_text(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in [list(header), *cells]]
