"""From a composed node to a typed object, with every unknown key, missing value or wrong type named."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, TypeVar, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from prefopt.errors import UserError
from prefopt.utils.files import ROOT
from prefopt.utils.redact import find_secret

T = TypeVar("T")

NO_KEYS = (
    "Configs and commands go into records and logs; a key stays in the environment, and a config names its variable "
    "(judge.key=OPENAI_API_KEY)."
)


def register(*schemas: type) -> None:
    """Register the schemas with Hydra (TrainConfig as train_schema), and the groups and resolvers that YAMLs use. One
    that extends another stands for that too, so that its YAML can build on the other's."""
    store = ConfigStore.instance()
    for schema in schemas:
        for base in filter(dataclasses.is_dataclass, schema.__mro__):
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", base.__name__.removesuffix("Config")).lower()
            store.store(name=f"{name}_schema", node=schema)
    # A wrapper (MaPPO) chooses its base among the pairwise objectives, which are those with a likelihood term:
    # objective/base=NAME is conf/objective/NAME.yaml.
    for file in sorted((ROOT / "conf" / "objective").glob("*.yaml")):
        node = OmegaConf.load(file)
        if "nll_weight" in node:
            store.store(group="objective/base", name=file.stem, node=node, package="objective.base")
    OmegaConf.register_new_resolver("basename", lambda path: PurePath(path or "").name, replace=True)


def parse(node: DictConfig, schema: type[T], prefix: str = "") -> T:
    """Resolve `node` into an instance of the dataclass `schema`. `prefix` leads the keys in messages.

    Raises UserError that names all unknown keys, or all keys without a value, or all numbers that are not finite, or
    the first key of a wrong type, or everything that the dataclasses refuse with ValueError (whose lines begin with
    the field's name).
    """
    try:
        if unknown := _unknown_keys(node, schema, prefix):
            raise UserError("\n".join(unknown))
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(
                f"no value for {', '.join(prefix + key for key in missing)}. Give it on the command line: "
                f"{prefix}{missing[0]}=VALUE"
            )
        OmegaConf.resolve(merged)
        for key, value in _texts(OmegaConf.to_container(merged), prefix):
            if secret := find_secret(value):
                raise UserError(f"{key} holds {secret}. {NO_KEYS}")
        if problems := _not_finite(OmegaConf.to_container(merged), prefix):
            raise UserError("\n".join(problems))
        try:
            return OmegaConf.to_object(merged)  # type: ignore[return-value]  # to_object returns the structured type
        except ValueError:  # of the first node that is refused; there may be others
            raise UserError("\n".join(_refusals(merged, prefix))) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{prefix}{_describe(error)}") from None
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def build(node: Any, base: type[T], where: str) -> T:
    """Build the object that `node` describes: a mapping with `_target_` and the fields of that dataclass.

    A field whose type is an abstract class (MaPPO's base) is built in the same way from the mapping below it.

    Args:
        base: the class that the target must be derived from.
        where: the node's key, which leads every message.

    Raises UserError for a target that is not a dataclass derived from `base`, for unknown, missing or mistyped fields,
    and for values that the class refuses.
    """
    if not OmegaConf.is_dict(node) and not isinstance(node, dict):
        raise UserError(f"{where} must be a mapping with `_target_`, is {node!r}.")
    values = dict(node)
    target = values.pop("_target_", None)
    if not isinstance(target, str):
        raise UserError(f"{where} needs a `_target_` that names a Python class, such as package.module.Class.")
    try:
        cls = get_class(target)
    except Exception as error:  # whatever importing somebody's module raises
        raise UserError(f"{where}._target_: cannot import {target!r}: {error}") from None
    if not (dataclasses.is_dataclass(cls) and issubclass(cls, base)):
        raise UserError(f"{where}._target_: {target} must be a dataclass derived from {base.__name__}.")
    types, fields = get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]  # just checked
    parts = [f.name for f in fields if inspect.isabstract(types[f.name])]
    for name in parts:
        if name not in values:
            raise UserError(f"no value for {where}.{name}; it needs a mapping with `_target_`.")
    built = {name: build(values.pop(name), types[name], f"{where}.{name}") for name in parts}
    if not built:
        return parse(OmegaConf.create(values), cls, f"{where}.")
    # The other fields are parsed as a dataclass without the built ones: OmegaConf knows no abstract classes.
    plain = dataclasses.make_dataclass(
        cls.__name__, [(f.name, types[f.name], f) for f in fields if f.name not in parts]
    )
    rest = dataclasses.asdict(parse(OmegaConf.create(values), plain, f"{where}."))
    try:
        return cls(**rest, **built)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from None


def drop_left_over(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Where an override names another class (objective._target_=mine.Mine), take the keys out of its node in `cfg` that
    the choice of the group has left there, and the class has no fields for. A key that an override names stays."""
    named = [text.lstrip("+").partition("=")[0] for text in overrides]
    for key in named:
        place, _, last = key.rpartition(".")
        node: Any = OmegaConf.select(cfg, place) if place and last == "_target_" else None
        if OmegaConf.is_dict(node):
            with open_dict(node):
                for name in keys_without_field(node):
                    if not any(f"{other}.".startswith(f"{place}.{name}.") for other in named):
                        del node[name]


def drop_left_over_of_files(cfg: Any, groups: dict[str, Any]) -> None:
    """The same where a sweep's file names the other class. `groups`: the content of the file of each group's choice.
    What such a file says, and its class has no field for, goes; what the sweep's file says otherwise stays."""
    for group, own in groups.items():
        _drop_below(OmegaConf.select(cfg, group.replace("/", ".")), own)


def _drop_below(node: Any, own: Any) -> None:
    """`own` is what the node's own file has there."""
    if not OmegaConf.is_dict(node) or not isinstance(own, dict):
        return
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    if "_target_" in own and own["_target_"] != values.get("_target_"):
        with open_dict(node):
            for name in keys_without_field(node):
                if name in own and own[name] == values[name]:
                    del node[name]
    for name in own.keys() & set(node):
        if isinstance(own[name], dict):
            _drop_below(node[name], own[name])


def keys_without_field(node: Any) -> set[str]:
    """The keys of a node that its class has no fields for. Empty for a class that cannot be imported: `build` says
    what is wrong with it."""
    try:
        return set(node) - {f.name for f in dataclasses.fields(get_class(node["_target_"]))} - {"_target_"}
    except Exception:  # whatever importing somebody's module raises
        return set()


def file_name_problems(names: dict[str, str]) -> list[str]:
    """What becomes part of a file's name must be no path and no piece of shell.

    Args:
        names: the name by its dotted key, such as model.name.
    """
    return [
        f"{key} becomes part of file names: letters, digits, blanks and . _ - + = @ , alone, and "
        f"not a dot or a blank first, is {name!r}"
        for key, name in names.items()
        if name and not re.fullmatch(r"[\w+=@,-][\w+=@,. -]*", name)
    ]


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of all texts below a node; `where` leads the keys."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{where}{key}" if isinstance(value, str) else f"{where}{key}.")
    elif isinstance(node, str):
        yield where, node


def unknown_key(name: str, known: list[str]) -> str:
    """The message for a dotted key whose last part is none of `known`."""
    prefix, dot, key = name.rpartition(".")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean {prefix}{dot}{near[0]}?" if near else f"The keys here are: {', '.join(known) or 'none'}."
    return f"unknown key {name}. {hint}"


def _unknown_keys(node: Any, schema: type, prefix: str) -> list[str]:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    problems = []
    for key in node:
        name = f"{prefix}{key}"
        if key not in fields:
            problems.append(unknown_key(name, list(fields)))
            continue
        # Of `Node | None`, the node.
        below = [kind for kind in (fields[key], *get_args(fields[key])) if dataclasses.is_dataclass(kind)]
        if below and OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key):
            child = node[key]
            if OmegaConf.is_dict(child):
                problems += _unknown_keys(child, below[0], f"{name}.")  # type: ignore[arg-type]
    return problems


def _not_finite(value: Any, key: str) -> list[str]:
    """A line for each number below `value` that is NaN or infinite. `key` ends in a dot.

    They are refused here, so that no rule has to consider them: NaN is neither above nor below any bound.
    """
    if isinstance(value, dict):
        return [problem for k, v in value.items() for problem in _not_finite(v, f"{key}{k}.")]
    if isinstance(value, list):
        return [problem for i, v in enumerate(value) for problem in _not_finite(v, f"{key[:-1]}[{i}].")]
    bad = isinstance(value, float) and not math.isfinite(value)
    return [f"{key[:-1]} must be a finite number, is {value}"] if bad else []


def _refusals(node: Any, prefix: str) -> list[str]:
    """What the dataclass of `node` refuses, and those of the nodes below it; `prefix` leads the keys."""
    schema: Any = OmegaConf.get_type(node)
    problems: list[str] = []
    accepted = {}
    for key, value in node.items():
        is_node = OmegaConf.is_dict(value) and dataclasses.is_dataclass(OmegaConf.get_type(value))
        refused = _refusals(value, f"{prefix}{key}.") if is_node else []
        problems += refused
        if not refused:
            accepted[key] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    try:
        if problems:  # the node by itself, with the defaults of those below it that were refused
            schema(**accepted)
        else:
            OmegaConf.to_object(node)
    except ValueError as error:
        problems = [f"{prefix}{line}" for line in str(error).splitlines()] + problems
    return problems


def _describe(error: OmegaConfBaseException) -> str:
    """The first line of an OmegaConf error, led by the key."""
    if isinstance(error, InterpolationToMissingValueError):
        missing = str(error.msg).partition("Missing mandatory value: ")[2].split()[0]
        return f"no value for {missing}. Give it on the command line: {missing}=VALUE"
    key = error.full_key or ""
    if isinstance(error, InterpolationKeyError):
        return f"{key}: {str(error.msg).splitlines()[0]}. Give it in full: {key}=VALUE"
    message = (error.msg or str(error)).splitlines()[0].removeprefix("UserError raised while resolving interpolation: ")
    return f"{key}: {message}" if key and key not in message else message
