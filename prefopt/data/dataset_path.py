"""`dataset=PATH` on a command line: look at the rows, say what they are, and go on with what reads them."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from prefopt.cli.hints import choices, config_dirs
from prefopt.errors import UserError
from prefopt.utils.files import ROOT, resolve_path

log = logging.getLogger("prefopt.dataset")


def replace_path(arguments: Sequence[str], program: str) -> list[str]:
    """The arguments with `dataset=PATH` replaced by the choices and keys that read the rows there. Says which they are.

    After -m, PATH may be several, with commas between them, if one layout reads them all. What the user gives for a key
    stays. Without `dataset=PATH`, all arguments stay.

    Raises UserError for a file that cannot be read, and where its layout is not certain.
    """
    places = [i for i, argument in enumerate(arguments) if argument.startswith("dataset=")]
    if len(places) != 1:
        return list(arguments)
    value = unquoted(arguments[places[0]].removeprefix("dataset="))
    known = choices("dataset", [ROOT / "conf", *config_dirs(arguments)])
    is_multirun = "-m" in arguments or "--multirun" in arguments
    paths = [unquoted(v) for v in value.split(",")] if is_multirun and not exists(value) else [value]
    if not any(is_path(path, known) for path in paths):
        return list(arguments)
    if strays := [path for path in paths if not is_path(path, known)]:
        raise UserError(f"dataset={value}: {strays[0]} is no file or folder. A sweep is over names, or over files.")

    from prefopt.data.layouts import find_layout  # reads files: most commands need none of it
    from prefopt.data.overrides import quoted  # reads files: most commands need none of it

    others = [argument for i, argument in enumerate(arguments) if i != places[0]]
    given = {key.lstrip("+~"): val for key, _, val in (argument.partition("=") for argument in others)}
    command = shlex.join(["python", "-m", f"prefopt.{program}", *others])
    if "dataset.format._target_" in given:
        return put(arguments, places[0], ["dataset=jsonl", f"dataset.train={','.join(map(quoted, paths))}"])
    prefix = "dataset.columns."
    columns = {key.removeprefix(prefix): unquoted(val) for key, val in given.items() if key.startswith(prefix)}
    found = {}
    for path in paths:
        split = None if resolve_path(path).is_file() else unquoted(given.get("dataset.train_split", "train"))
        found[path] = find_layout(path, split, columns, command)
    layouts = {path: it.layout for path, it in found.items()}
    if any(layout != layouts[paths[0]] for layout in layouts.values()):
        lines = [f"  {command} {shlex.join(layout.overrides(path))}" for path, layout in layouts.items()]
        raise UserError("one sweep reads one layout, and these files have several:\n" + "\n".join(lines))

    overrides = layouts[paths[0]].overrides(paths[0])
    if len(paths) > 1:  # their names name the runs
        keys = [o for o in overrides if not o.startswith(("dataset.train=", "dataset.name="))]
        overrides = [keys[0], f"dataset.train={','.join(map(quoted, paths))}", *keys[1:]]
    overrides = [o for o in overrides if o.partition("=")[0].lstrip("+") not in given]
    replaced = put(arguments, places[0], overrides)
    layout = layouts[paths[0]]
    log.info(f"{value} holds rows of {layout.format.__name__}: {layout.rows}")
    log.info(f"the whole command: {shlex.join(['python', '-m', f'prefopt.{program}', *replaced])}")
    for path, it in found.items():
        if it.unread:
            log.info(f"  not read of {path}: {', '.join(it.unread)}")
        if it.rewards and not any("_reward" in ours for ours in columns):
            log.info(f"  its scores are read as rewards by {shlex.join(it.rewards)}")
    if layout.is_chats:
        log.info("  these are chats, not pairs: train on them by objective=sft")
    return replaced


def put(arguments: Sequence[str], place: int, overrides: Sequence[str]) -> list[str]:
    """The arguments with `overrides` for the one at `place`."""
    return [*arguments[:place], *overrides, *arguments[place + 1 :]]


def is_path(value: str, known: Sequence[str]) -> bool:
    """Whether a value of `dataset` is a file or a folder, or would be one; a choice of conf/dataset is none."""
    from prefopt.data.sources import SUFFIXES

    if not value or value in known:
        return False
    return value.endswith(SUFFIXES) or value.startswith("package://") or exists(value)


def exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, a user who is not known, a null byte
        return False


def unquoted(value: str) -> str:
    """The value without the quotes of Hydra's grammar."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value
