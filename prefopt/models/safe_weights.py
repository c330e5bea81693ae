"""The one way to weights: they are safetensors, or nothing is opened.

transformers and peft read a pickle wherever a file says so: in `transformers_weights` of config.json, in an index that
names a .bin, in an adapter beside the model, in settings of an adapter. `use_safetensors=True` covers none of these.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from prefopt.config.schema import ADAPTER_CONFIG
from prefopt.errors import UserError

INDEX = "model.safetensors.index.json"
FILE = re.compile(r"[^/\\]+\.safetensors")  # of the model's own folder
INDEX_FILE = re.compile(r"[^/\\]+\.safetensors\.index\.json")
ADAPTER = "adapter_model.safetensors"


def load_pretrained(auto: Any, path: str, revision: str | None = None, **settings: Any) -> Any:
    """`auto.from_pretrained(path, ...)`, of weights that are safetensors, or of the GGUF file in `settings`.

    Raises UserError where a file of the model names others, before any weights are opened, and where code that reads
    the model comes to a pickle all the same."""
    check_weights(path, revision)
    with no_pickles(path):
        return auto.from_pretrained(path, revision=revision, use_safetensors=True, **settings)


def check_weights(path: str, revision: str | None = None) -> None:
    """Raise UserError where the configuration or the index of the model in folder `path`, or of that name on the hub,
    names weights that are not safetensors files beside it, or where there is an adapter. Reads no weights."""
    refuse_adapter(path, revision)
    indices = {INDEX}
    for name in named_weights(_json(path, revision, "config.json")):
        if isinstance(name, str) and INDEX_FILE.fullmatch(name):
            indices.add(name)
        elif not (isinstance(name, str) and FILE.fullmatch(name)):
            refuse(path, "transformers_weights in config.json", name)
    for index in sorted(indices):
        values = _json(path, revision, index)
        shards = values.get("weight_map", {}) if isinstance(values, dict) else values
        for name in shards.values() if isinstance(shards, dict) else [shards]:
            if not (isinstance(name, str) and FILE.fullmatch(name)):
                refuse(path, index, name)


def refuse_adapter(path: str, revision: str | None = None, key: str = "model.path") -> None:
    """Raise UserError for a model, a folder or a name on the hub, that holds an adapter: transformers would put it into
    the model as it is. `key`: the user's, for the message. (The folder of an adapter alone is no `path` of a
    ModelConfig.)"""
    if _text(path, revision, ADAPTER_CONFIG) is None:
        return
    if _text(path, revision, "config.json") is not None or any(Path(path).glob("*.gguf")):
        raise UserError(
            f"{key}={path} holds an adapter beside a model. Move adapter_config.json and its weights into a folder of "
            "their own; for both together, give that as model.adapter."
        )
    told = _json(path, revision, ADAPTER_CONFIG)
    base = (isinstance(told, dict) and told.get("base_model_name_or_path")) or "BASE"
    raise UserError(
        f"{key}={path} is an adapter of {base}, not a model. Download it into a folder, and give the folder; or give "
        f"model.adapter=FOLDER model.path={base}."
    )


def check_adapter(path: str) -> None:
    """Raise UserError for a folder whose adapter has no safetensors."""
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"model.adapter={path} is no adapter: it holds no {ADAPTER_CONFIG}.")
    if not (folder / ADAPTER).is_file():
        raise UserError(
            f"model.adapter={path} holds no {ADAPTER}; adapter_model.bin would be a pickle, which could run any code "
            "and is not read. Save the adapter again with peft 0.7 or later."
        )


@contextlib.contextmanager
def no_pickles(path: str) -> Iterator[None]:
    """Inside, torch.load raises UserError: whatever code of transformers or peft reads the model in `path`, and
    whatever its files tell that code, no pickle is opened."""

    def refuse_pickle(file: Any, *args: Any, **settings: Any) -> Any:
        raise UserError(f"{path}: {file} is a pickle, which could run any code and is not read.")

    original = torch.load
    torch.load = refuse_pickle  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def named_weights(values: Any) -> Iterator[Any]:
    """Every value of the key `transformers_weights` in a configuration, also in the configurations inside of it."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "transformers_weights" and value is not None:
                yield value
            yield from named_weights(value)
    elif isinstance(values, list):
        for value in values:
            yield from named_weights(value)


def refuse(path: str, source: str, name: Any) -> None:
    raise UserError(
        f"{path}: {source} names {json.dumps(name)}, which is no safetensors file of its folder. Other weights are "
        "pickles, which could run any code and are not read. If you trust it, convert it with the program that wrote "
        "it."
    )


def _json(path: str, revision: str | None, name: str) -> Any:
    """The content of a JSON file of the model; {} where it has none or one that cannot be parsed: then nothing loads
    it."""
    try:
        return json.loads(_text(path, revision, name) or "{}")
    except ValueError:
        return {}


def _text(path: str, revision: str | None, name: str) -> str | None:
    try:
        file = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # neither a folder nor a name on the hub: loading it says so
        return None
    return None if file is None else Path(file).read_text(errors="replace")
