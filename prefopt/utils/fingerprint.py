"""A digest of all that decides a result, values and source code: the identity of a run, the key of a cache.

A class of prefopt enters by its name without its module, so that moving it changes no identity. A class of the user's
enters by its full path.
"""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any


def fingerprint(values: Any, *code: Any) -> str:
    """SHA-256 (64 hex digits) of `values` and of the source files of `code`: modules, classes or functions.

    `values` is anything that JSON can write, and dataclasses. The order of a mapping does not count. Raises TypeError
    for other values, and OSError where a source file cannot be read.
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
    is_ours = isinstance(target, str) and target.startswith("prefopt.")
    return target.rpartition(".")[2] if is_ours else target
