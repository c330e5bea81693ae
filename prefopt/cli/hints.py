"""What is said of a command line that cannot be composed: what is wrong, and the line that would have worked."""

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
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")


def refusal(error: Exception, arguments: Sequence[str]) -> str:
    """What keeps Hydra from composing `arguments`, and what to write instead; not Hydra's own advice, to add a key with
    a plus, which the schema would refuse."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return _no_such_choice(str(error.missing_cfg_file), arguments)
    if isinstance(error, OverrideParseException):
        for argument in arguments:
            if argument.partition("=")[0] == error.override.partition("=")[0] and (better := _with_quotes(argument)):
                return f"cannot read {argument}: this text needs quotes. Did you mean\n  {shlex.quote(better)}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return _no_such_key(str(cause.full_key), cause.parent_node, arguments)
    if not isinstance(error, HydraException):  # it does not say what it is about
        return f"{error or type(error).__name__} (in {shlex.join(arguments)})"
    message = str(error).partition("Config search path:")[0].strip()
    return f"{message}: {str(cause).splitlines()[0]}" if isinstance(cause, OmegaConfBaseException) else message


def _no_such_choice(file: str, arguments: Sequence[str]) -> str:
    """`file` is GROUP/CHOICE, as Hydra looks for it."""
    for group in ("model", "dataset"):
        if not file.startswith(f"{group}/"):
            continue
        given = file.removeprefix(f"{group}/").removesuffix(".yaml")
        path = next(
            (p for p in _values(group, arguments) if p.lstrip("/").removesuffix(".yaml") == given.lstrip("/")), given
        )
        if group == "model" and ("/" in path or Path(path).exists() or path.endswith(".gguf")):
            return f"model={path} is no choice of conf/model, but a path. Did you mean\n  model=hub model.path={path}"
        if group == "dataset" and ("/" in path or path.endswith(DATA_SUFFIXES)):
            line = shlex.join(["dataset=jsonl", f"dataset.train={path}"])
            return f"dataset={path} is no choice of conf/dataset, but a path. Did you mean\n  {line}"
    group, _, name = file.rpartition("/")
    known = choices(group, [CONF, *config_dirs(arguments)])
    if group == "sweep" or group.startswith("sweep/"):
        group, name = "+sweep", file.removeprefix("sweep/")
        folder = ROOT / "sweeps" / "sweep"
        known = [str(f.relative_to(folder).with_suffix("")) for f in sorted(folder.rglob("*.yaml")) if f.stem[0] != "_"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {group}={near[0]}?" if near else f"The choices are: {', '.join(known) or 'none'}."
    return f"there is no {group}={name}. {hint}"


def _no_such_key(key: str, parent: Any, arguments: Sequence[str]) -> str:
    value = next((v for v in _values(key, arguments)), "VALUE")
    if _takes_any_key(parent):
        return f"{key} is not there yet; add it with a plus:\n  {shlex.quote(f'+{key}={value}')}"
    known = [str(each) for each in parent]
    if "." not in key:
        last = [full for full in _dotted(parent) if full.rpartition(".")[2] == key]
        if 0 < len(last) <= 3:
            return f"unknown key {key}. Did you mean {' or '.join(shlex.quote(f'{full}={value}') for full in last)}?"
    return unknown_key(key, known)


def _takes_any_key(node: Any) -> bool:
    """Of a field that is a mapping from our names to the user's (dataset.columns), or an empty one."""
    return not len(node) or (OmegaConf.get_type(node) is dict and node._metadata.element_type is str)


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node if isinstance(node, DictConfig) else []:
        if (not prefix and key == "hydra") or OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            if key != "hydra":
                yield f"{prefix}{key}"
            continue
        yield f"{prefix}{key}"
        yield from _dotted(node[key], f"{prefix}{key}.")


def _values(key: str, arguments: Sequence[str]) -> Iterator[str]:
    """What the command line gives to `key`; of a grid, each."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.lstrip("+") == key:
            yield value
            yield from value.split(",")


def _with_quotes(override: str) -> str | None:
    """The override with quotes around the texts in its list, or around its value, where Hydra can read that."""
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
    """The names that GROUP=NAME takes, from the YAML files in `folders`."""
    if group == "objective/base":  # made by config.register
        names = {file.stem for file in (CONF / "objective").glob("*.yaml") if "\nnll_weight:" in file.read_text()}
        return sorted(names)
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that --config-dir (or -cd) names."""
    found = []
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(Path(value or "".join(arguments[i + 1 : i + 2])).absolute())
    return found
