"""alpaca-eval's configuration of a language model as judge: found, checked, and written for alpaca-eval."""

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.utils.files import atomic_write

PACKAGES = {"openai_completions": "openai", "anthropic_completions": "anthropic"}  # by alpaca-eval's fn_completions


def read_configuration(name: str, annotator: dict[str, Any] | None, model: str | None) -> tuple[dict[str, Any], str]:
    """The configuration of a judge, without its prompt_template, and the text of that template.

    Args:
        name: one of alpaca-eval's judges, unless `annotator` describes another.
        annotator: what a file of alpaca-eval's judges holds below the judge's name.
        model: replaces the configuration's model_name.

    Raises UserError where there is no such judge or template.
    """
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("a language model as judge needs the package alpaca-eval: pip install -e '.[evaluation]'")
    packaged = Path(spec.submodule_search_locations[0]) / "evaluators_configs"

    config = annotator
    if config is None:
        file = packaged / name / "configs.yaml"
        if not file.is_file():
            raise UserError(f"judge.name={name}: alpaca-eval has no such judge. Its judges: {packaged}")
        config = yaml.safe_load(file.read_text())[name]
    config = dict(config)
    if model is not None:
        config["completions_kwargs"] = {**config["completions_kwargs"], "model_name": model}
    if letters := config.get("completion_parser_kwargs", {}).get("outputs_to_match"):
        # The keys are numbers. A job is frozen as JSON, which turns them into texts.
        kwargs = {**config["completion_parser_kwargs"], "outputs_to_match": {int(k): v for k, v in letters.items()}}
        config["completion_parser_kwargs"] = kwargs

    template = config.pop("prompt_template")
    prompt = next((f for f in (packaged / template, Path(template).expanduser()) if f.is_file()), None)
    if prompt is None:
        raise UserError(f"judge.annotator.prompt_template={template}: no such file, here or among alpaca-eval's")
    return config, prompt.read_text()


def write_configuration(name: str, config: dict[str, Any], prompt: str, folder: Path) -> None:
    """Write a judge's configuration for alpaca-eval into `folder`, without a key."""
    atomic_write(folder / "prompt.txt", prompt)
    annotators = {name: {"prompt_template": f"{folder.name}/prompt.txt", **config}}
    atomic_write(folder / "configs.yaml", yaml.safe_dump(annotators, sort_keys=False))

    # alpaca-eval wants a file that describes its clients. The one that it gets is made by `judge_client`.
    atomic_write(folder / "client.yaml", yaml.safe_dump({"default": [{}]}))


def check_annotator(annotator: dict[str, Any]) -> None:
    """Raise ValueError where alpaca-eval would run code, or reach a host, that this description chooses."""
    completions = annotator.get("fn_completions")
    if completions not in list(PACKAGES):  # a list, because what a YAML holds here may not be hashable
        raise ValueError(f"annotator.fn_completions must be {' or '.join(PACKAGES)}, is {completions!r}")
    foreign = [k for k in annotator.get("completions_kwargs", {}) if k.startswith(("client_", "openai_", "anthropic_"))]
    if foreign:
        raise ValueError(
            f"annotator.completions_kwargs: {', '.join(foreign)} would choose another client, host or key: set "
            "judge.base_url and judge.key"
        )
