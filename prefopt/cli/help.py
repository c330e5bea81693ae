"""`--help`: what a program does, examples, and the groups and keys that apply to it with their comments from conf/.

Nothing here imports torch, so that help comes at once.
"""

import ast
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.cli.hints import choices, config_dirs, refusal
from prefopt.cli.hydra_guard import check_overrides
from prefopt.config.parse import register
from prefopt.errors import UserError
from prefopt.utils.files import PACKAGE, ROOT

CONF = ROOT / "conf"
GROUP_WIDTH = 15  # columns that a group's name takes, before its choices
KEY_WIDTH = 34  # columns that keys and defaults take, before their comments


def wants_help(arguments: Sequence[str]) -> bool:
    return "--help" in arguments or "-h" in arguments


def show(program: str, arguments: Sequence[str]) -> int:
    """Print `program_help`; the exit code, which is 2 for overrides that cannot be composed."""
    try:
        print(program_help(program, arguments), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:  # of the overrides beside --help
        print(f"error: {refusal(error, arguments)}", file=sys.stderr)
        return 2
    return 0


def overview(programs: Sequence[str]) -> str:
    """The text that `prefopt` alone prints: the programs with the first paragraph of their docstrings, and examples."""
    lines = ["prefopt PROGRAM [KEY=VALUE ...]", "", "Programs:"]
    for name in programs:
        summary = " ".join(_docstring(name).split("\n\n")[0].split())
        lines += _two_columns(name, summary, GROUP_WIDTH)
    lines += [
        "",
        "Examples:",
        "  prefopt train objective=dpo objective.beta=0.1",
        "  prefopt train -m objective=dpo,mmpo objective.beta=0.05,0.5",
        "",
        "prefopt PROGRAM --help lists the keys of a program.",
    ]
    return "\n".join(lines) + "\n"


def program_help(program: str, arguments: Sequence[str]) -> str:
    """The help of a program, with the values and keys that the overrides among `arguments` lead to.

    `objective=mmpo --help` shows the keys of MMPO. Raises what Hydra raises for overrides that cannot be composed, and
    UserError for those of Hydra's own section.
    """
    register()
    for file in CONF.glob("*.yaml"):
        # The YAMLs name their schemas, whose programs are not imported here, since that takes seconds. One that is
        # registered already may be of another program: conf/compare.yaml has keys that alpaca's schema has not.
        ConfigStore.instance().store(name=f"{file.stem}_schema", node={})
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    check_overrides(overrides)
    folders = [CONF, *config_dirs(arguments)]
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]"] if folders[1:] else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, [*search, *overrides], return_hydra_config=True)

    chosen = dict(cfg.hydra.runtime.choices)
    written = list(_written(program, "", folders, chosen))
    if chosen["hydra/sweeper"] != "prefopt":  # the program runs its points itself, without a launcher
        written = [key for key in written if key.group != "launcher"]
    groups = list(dict.fromkeys(key.group for key in written if key.group))
    groups += [group for group in _groups(program, folders) if group not in groups and chosen[group] is None]

    width = min(shutil.get_terminal_size().columns, 120)
    what, examples = _parts(program)
    lines = [textwrap.fill(paragraph, width) if paragraph else "" for paragraph in what]
    lines += ["", "Examples:"]
    for example in examples[:2]:
        lines += _command(example, width)

    if groups:
        lines += ["", "Groups (GROUP=CHOICE):"]
        for group in groups:
            options = choices(group, folders)
            default = f" (now: {chosen[group]})" if chosen.get(group) else ""
            lines += _two_columns(group, ", ".join(options) + default, GROUP_WIDTH, width)
    if sweeps := _sweeps(program):
        lines += _two_columns("+sweep", f"with -m: {', '.join(sweeps)}", GROUP_WIDTH, width)

    lines += ["", "Keys (KEY=VALUE), what they are now, and what they mean; ??? has to be given:"]
    keys = {key.name: key for key in written}  # of several files that write a key, the last one says what it means
    lines += _keys([key for key in keys.values() if not key.group], cfg, width)
    for group in groups:
        of_group = [key for key in keys.values() if key.group == group]
        if of_group:
            lines += ["", f"Keys of {group}={chosen[group]}:", *_keys(of_group, cfg, width)]
    return "\n".join(lines) + "\n"


@dataclass
class _Key:
    """A key as a YAML file writes it; `group` is that of its file."""

    name: str
    group: str
    comment: str
    empty: bool  # a mapping without keys


def _written(
    config: str, package: str, folders: Sequence[Path], chosen: dict[str, Any], group: str = ""
) -> Iterator[_Key]:
    """The keys of conf/`config`.yaml and of the files in its defaults list, in the order in which they are composed.

    `package` is the key below which its keys stand; `folders` are conf/ and the user's --config-dir; `chosen` is what
    Hydra has composed, {group: choice}; `group` is the group of the file.
    """
    path = f"{config}.yaml".replace("objective/base/", "objective/")  # as parse.register makes that group
    file = next((f for folder in folders if (f := folder / path).is_file()), None)
    if file is None:  # a schema
        return
    text = file.read_text()
    node: Any = yaml.safe_load(text) or {}
    place = config.rpartition("/")[0]
    for entry in node.get("defaults", []):
        if isinstance(entry, str):
            if entry != "_self_":
                name, _, below = entry.partition("@")
                yield from _written(f"{place}/{name}".lstrip("/"), _join(package, below), folders, chosen, group)
            continue
        ((name, choice),) = entry.items()
        name, _, below = str(name).partition("@")
        if name.startswith("override ") or "hydra/" in name:
            continue
        inner = f"{place}/{name}".lstrip("/")
        choice = chosen.get(inner, choice)
        if choice:
            yield from _written(f"{inner}/{choice}", below or inner.replace("/", "."), folders, chosen, inner)
    yield from _leaves(yaml.compose(text), package, text.splitlines(), group)


def _leaves(node: Any, prefix: str, lines: list[str], group: str) -> Iterator[_Key]:
    """The keys of a parsed YAML file, whose text is `lines`: the parser drops the comments, but knows the places."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = _join(prefix, str(key.value))
        if not prefix and key.value in ("defaults", "hydra"):
            continue
        if key.value in ("defaults", "_target_"):
            continue
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _leaves(value, name, lines, group)
            continue
        after = lines[value.end_mark.line][value.end_mark.column :] if value.end_mark.line < len(lines) else ""
        comment = after.strip().removeprefix("#").strip() if "#" in after else ""
        yield _Key(name, group, comment, isinstance(value, yaml.MappingNode) and not value.value)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _keys(keys: Sequence[_Key], cfg: DictConfig, width: int) -> list[str]:
    """The lines of `keys` with their values in `cfg`."""
    root: Any = OmegaConf.to_container(cfg, resolve=False)
    lines = []
    for key in keys:
        value: Any = root
        for part in key.name.split("."):
            value = value.get(part, "???") if isinstance(value, dict) else "???"
        text = "{}" if key.empty else _text(value)
        lines += _two_columns(f"{key.name}={text}", key.comment, KEY_WIDTH, width)
    return lines


def _text(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(item)}' for key, item in value.items())}}}"
    if _is_number(value):  # before the next line, to which 1 is True
        return str(value)
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _two_columns(left: str, right: str, column: int, width: int | None = None) -> list[str]:
    """`left` indented by two blanks, and `right` beside it from `column` on, or below it where there is no room."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = textwrap.wrap(left, width - 2, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    if not right:
        return lines
    wrapped = textwrap.wrap(right, max(width - column, 20), break_on_hyphens=False, break_long_words=False)
    if len(lines) == 1 and len(lines[0]) < column - 1:
        first = f"{lines[0]:<{column}}{wrapped[0]}"
        return [first, *(" " * column + line for line in wrapped[1:])]
    return [*lines, *(" " * column + line for line in wrapped)]


def _command(text: str, width: int) -> list[str]:
    """A command in lines of at most `width`, with the backslashes that a shell needs."""
    lines, line = [], "  "
    for word in re.findall(r"(?:'[^']*'|\S)+", text):
        if len(line) > 4 and len(line) + len(word) + 2 > width:
            lines.append(f"{line}\\")
            line = "      "
        line += f"{word} "
    return [*lines, line.rstrip()]


def _docstring(program: str) -> str:
    file = PACKAGE / f"{program}.py"
    if not file.is_file():
        file = PACKAGE / program / "__main__.py"
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def _parts(program: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a program's docstring, with "" between them; the commands in it and at the head of its YAML."""
    paragraphs, examples = [], []
    for paragraph in _docstring(program).split("\n\n"):
        if paragraph.startswith("    "):
            joined = re.sub(r"\\\n\s*", "", textwrap.dedent(paragraph))
            examples += joined.splitlines()
        else:
            paragraphs += [" ".join(paragraph.split()), ""]
    head = (CONF / f"{program}.yaml").read_text().splitlines()
    examples += [line.removeprefix("# ") for line in head if line.startswith("# python -m ")]
    plain = [re.split(r"\s{2,}(?=[#(])", example)[0].strip() for example in examples]
    return paragraphs[:-1], list(dict.fromkeys(plain))


def _groups(program: str, folders: Sequence[Path]) -> list[str]:
    """The groups in the defaults list of a program, also those without a choice."""
    node: Any = yaml.safe_load((CONF / f"{program}.yaml").read_text())
    groups = []
    for entry in node["defaults"]:
        if isinstance(entry, dict):
            groups += [name for name in map(str, entry) if "hydra/" not in name and not name.startswith("override ")]
        elif (CONF / f"{entry}.yaml").is_file():
            groups += _groups(str(entry), folders)
    return groups


def _sweeps(program: str) -> list[str]:
    """The sweeps in sweeps/sweep that are made for this program: their files have its command as an example."""
    folder = ROOT / "sweeps" / "sweep"
    sweeps = []
    for file in sorted(folder.rglob("*.yaml")):
        name = str(file.relative_to(folder).with_suffix(""))
        if f"prefopt.{program} -m +sweep={name}" in file.read_text():
            sweeps.append(name)
    return sweeps
