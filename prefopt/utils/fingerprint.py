"""A digest of what a run is, or a cached result is made of: of values, and of the source that decides the result.

A class of prefopt stands for itself by its name, wherever in the package it lives: moving it changes no identity. A
class of the user's own is known by its full path.
"""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any


def fingerprint(values: Any, *code: Any) -> str:
    """SHA-256 (64 hex digits) of `values` and of the source files of `code`: modules, classes or functions.

    `values` is anything that JSON can write, with dataclasses among it; mappings count without their order. Raises
    TypeError for other values, and OSError where a source file cannot be read.
    """
    files = sorted({inspect.getfile(inspect.unwrap(item) if callable(item) else item) for item in code})
    sources = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    text = json.dumps([class_names(values), sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def class_names(node: Any) -> Any:
    """`node` with dataclasses as mappings, and `_target_: prefopt.ROOM.MODULE.Class` as `_target_: Class`."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        node = dataclasses.asdict(node)
    if isinstance(node, dict):
        return {key: _class_name(value) if key == "_target_" else class_names(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [class_names(value) for value in node]
    return node


def _class_name(target: Any) -> Any:
    own = isinstance(target, str) and target.startswith("prefopt.")
    return target.rpartition(".")[2] if own else target
