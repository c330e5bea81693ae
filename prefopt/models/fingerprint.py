"""What "the model" of a result is: its weights, its configuration, and its tokenizer with the chat template.

`model_files` tells that from the files, before anything is loaded: it is recorded when a run starts, and compared when
the run is skipped or resumed; records of evaluations are named by it. `loaded_model` tells it from a model in memory,
and is part of the key of every cache of what a model has computed, together with the tokens that it has read.
"""

import importlib.metadata
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from prefopt.config.schema import ADAPTER_CONFIG, ModelConfig
from prefopt.data.sources import cached_commit, digest
from prefopt.utils.files import resolve_path
from prefopt.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("*.safetensors",)
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
)
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
CHANGES_NO_NUMBER = ("_name_or_path", "transformers_version")  # in config.json


def model_files(config: ModelConfig) -> dict[str, str]:
    """Digests of the files of a model, by what they hold: "weights", "config", "adapter", "tokenizer and template".

    Files in the hub's cache are known by the names that the hub gave their contents, and are not read. What is not on
    this machine is left out.
    """
    place = files_of(config.path, config.revision)
    other = files_of(str(config.tokenizer), None) if config.tokenizer else place
    if place.is_file():  # a GGUF file
        parts: dict[str, Any] = {"weights": [file_digest(place)], "config": None}
    else:
        parts = {"weights": digests(place, WEIGHTS), "config": read_configs(place)}
    parts["adapter"] = digests(Path(config.adapter), ADAPTER_FILES) if config.adapter else None
    parts["tokenizer and template"] = digests(other, TOKENIZER)
    if config.chat_template and (template := resolve_path(config.chat_template)).is_file():
        parts["tokenizer and template"].append(file_digest(template))
    return {part: fingerprint(content) for part, content in parts.items() if content}


def local_files(config: ModelConfig) -> dict[str, str]:
    """`model_files` of a model in a folder or GGUF file; of a name on the hub, those of its adapter alone. For the name
    of a record, which must be the same before and after the first download."""
    is_local = resolve_path(config.path).exists()
    return {part: value for part, value in model_files(config).items() if is_local or part == "adapter"}


def files_of(path: str, revision: str | None) -> Path:
    """The folder of a model or tokenizer, or its GGUF file. It need not exist: of a name on the hub it is the folder
    that the hub's cache has, or would have, for this revision."""
    local = resolve_path(path)
    if local.exists():
        return local
    commit = cached_commit(path, "model", revision) or "unknown"
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="model") / "snapshots" / commit


def digests(folder: Path, patterns: Iterable[str]) -> list[tuple[str, str]]:
    """(name, digest) of the files in a folder that have one of these names."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return [(file.relative_to(folder).as_posix(), file_digest(file)) for file in sorted(files)]


def file_digest(file: Path) -> str:
    """A digest of the content. It is kept for this process, as long as the file has the same size and time."""
    target = file.resolve()
    return target.name if target.parent.name == "blobs" else digest(str(target))


def read_configs(folder: Path) -> list[Any]:
    """What a model's config.json says, as far as it can change a number, and the stop tokens in its generation_config.
    Empty where there is none."""
    found: list[Any] = []
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):  # loading it says what is wrong
            values = {}
        if name == "generation_config.json":  # nothing else in it has an effect (models/generation_config.py)
            found.append(values.get("eos_token_id"))
        else:
            found.append({key: value for key, value in values.items() if key not in CHANGES_NO_NUMBER})
    return found


def loaded_model(model: "PreTrainedModel", weights: str | None = None) -> list[Any]:
    """Everything but its tokens that decides what a model in memory computes: its weights, its resolved configuration,
    the code that comes with it, device and versions. `weights`: their digest, where it is known."""
    from prefopt.models.load import resolved_config, weights_digest

    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    return [weights or weights_digest(model), resolved_config(model), own_code(model), model.device.type, versions]


def own_code(model: "PreTrainedModel") -> list[tuple[str, str]]:
    """(name, digest) of the Python files that came with a model; none where its code is transformers' own."""
    if not type(model).__module__.startswith("transformers_modules"):
        return []
    return digests(Path(inspect.getfile(type(model))).parent, ("*.py",))
