"""Messages for a command line that Hydra cannot compose: what is wrong, and the line that would have worked."""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from prefopt.config.parse import unknown_key
from prefopt.utils.files import ROOT

CONF = ROOT / "conf"


def refusal(error: Exception, arguments: Sequence[str]) -> str:
    """The message for `error`, which Hydra raised for `arguments`.

    It replaces Hydra's advice to add an unknown key with a plus, since the schema would refuse that key.
    """
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return _no_such_choice(str(error.missing_cfg_file), arguments)
    if isinstance(error, OverrideParseException):
        for argument in arguments:
            if argument.partition("=")[0] == error.override.partition("=")[0] and (better := _with_quotes(argument)):
                return f"cannot read {argument}: this text needs quotes. Did you mean\n  {shlex.quote(better)}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return _no_such_key(str(cause.full_key), cause.parent_node, arguments)
    if not isinstance(error, HydraException):  # OmegaConf's errors do not name the argument
        return f"{error or type(error).__name__} (in {shlex.join(arguments)})"
    message = str(error).partition("Config search path:")[0].strip()
    return f"{message}: {str(cause).splitlines()[0]}" if isinstance(cause, OmegaConfBaseException) else message


def _no_such_choice(file: str, arguments: Sequence[str]) -> str:
    """The message for a GROUP/CHOICE, `file`, that has no YAML: a path for a group of files, or a misspelt name."""
    for group in ("model", "dataset"):
        if not file.startswith(f"{group}/"):
            continue
        choice = file.removeprefix(f"{group}/").removesuffix(".yaml")
        # Hydra may have dropped a leading slash and the suffix: as it was typed, it stands in the arguments.
        path = next(
            (p for p in _values(group, arguments) if p.lstrip("/").removesuffix(".yaml") == choice.lstrip("/")), choice
        )
        if group == "model" and ("/" in path or Path(path).exists() or path.endswith(".gguf")):
            return f"model={path} is no choice of conf/model, but a path. Did you mean\n  model=hub model.path={path}"
        if group == "dataset" and "/" in path:
            if ready := next((n for n in choices("dataset") if f"\ntrain: {path}\n" in _yaml("dataset", n)), None):
                return f"dataset={path} is read as it lies on the hub by\n  dataset={ready}"
            line = shlex.join(["dataset=jsonl", f"dataset.train={path}"])
            if Path(path).exists():  # of a program that trains on other rows, or whose rows are no data set
                return f"dataset={path} is no choice of conf/dataset, but a path. Did you mean\n  {line}"
            return (
                f"dataset={path} is no choice of conf/dataset, and no file or folder here. If it is on the hub, it is "
                f"read by\n  {line}\nwith dataset.format and dataset.columns for its rows (docs/data.md)."
            )
    group, _, name = file.rpartition("/")
    known = choices(group, [CONF, *config_dirs(arguments)])
    if group == "sweep" or group.startswith("sweep/"):
        group, name = "+sweep", file.removeprefix("sweep/")
        folder = ROOT / "sweeps" / "sweep"
        known = [str(f.relative_to(folder).with_suffix("")) for f in sorted(folder.rglob("*.yaml")) if f.stem[0] != "_"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {group}={near[0]}?" if near else f"The choices are: {', '.join(known) or 'none'}."
    return f"there is no {group}={name}. {hint}"


def _yaml(group: str, name: str) -> str:
    return (CONF / group / f"{name}.yaml").read_text()


def _no_such_key(key: str, parent: Any, arguments: Sequence[str]) -> str:
    """The message for a `key` that the node `parent` of the config does not have."""
    value = next((v for v in _values(key, arguments)), "VALUE")
    if _takes_any_key(parent):
        return f"{key} is not there yet; add it with a plus:\n  {shlex.quote(f'+{key}={value}')}"
    if "." not in key:  # perhaps the last part of a key further down: beta for objective.beta
        full_keys = [full for full in _dotted(parent) if full.rpartition(".")[2] == key]
        if 0 < len(full_keys) <= 3:
            better = " or ".join(shlex.quote(f"{full}={value}") for full in full_keys)
            return f"unknown key {key}. Did you mean {better}?"
    return unknown_key(key, [str(name) for name in parent])


def _takes_any_key(node: Any) -> bool:
    """Whether a node is a mapping from our names to the user's (dataset.columns), or is empty."""
    return not len(node) or (OmegaConf.get_type(node) is dict and node._metadata.element_type is str)


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """All keys below a node, with dots, without Hydra's."""
    for key in node if isinstance(node, DictConfig) else []:
        if (not prefix and key == "hydra") or OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            if key != "hydra":
                yield f"{prefix}{key}"
            continue
        yield f"{prefix}{key}"
        yield from _dotted(node[key], f"{prefix}{key}.")


def _values(key: str, arguments: Sequence[str]) -> Iterator[str]:
    """The values of `key` on the command line: each as typed, and, for a grid, its parts."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.lstrip("+") == key:
            yield value
            yield from value.split(",")


def _with_quotes(override: str) -> str | None:
    """The override with quotes around its value, or around the items of its list. None where that does not help."""
    key, _, value = override.partition("=")
    if value.startswith("[") and value.endswith("]"):
        parts = [part.strip() for part in value[1:-1].split(",")]
        quoted = ",".join(part if re.fullmatch(r"'.*'|\".*\"|[\w.]*", part) else f'"{part}"' for part in parts)
        better = f"{key}=[{quoted}]"
    elif re.match(r"[^\[{'\"]", value):
        better = f'{key}="{value}"'
    else:
        return None
    if '"' in value or better == override:
        return None
    try:
        OverridesParser.create().parse_override(better)
    except (HydraException, ValueError):
        return None
    return better


def choices(group: str, folders: Sequence[Path] = (CONF,)) -> list[str]:
    """The names that `group`=NAME takes, sorted: of the YAML files in `folders`."""
    if group == "objective/base":  # made by parse.register
        names = {file.stem for file in (CONF / "objective").glob("*.yaml") if "\nnll_weight:" in file.read_text()}
        return sorted(names)
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that --config-dir (or -cd) names."""
    folders = []
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):  # --config-dir=FOLDER, or the folder is the next argument
            folders.append(Path(value or "".join(arguments[i + 1 : i + 2])).absolute())
    return folders
