"""Write the parts of the documentation that come from the code: configuration.md, and the table of objectives.md.

    python docs/generate.py        # `make docs` runs it before mkdocs

configuration.md lists every key of conf/**/*.yaml with its default and its comment, and the policies of a data set. The
YAML files are read as text with marks, because a YAML loader drops comments.
"""

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from prefopt.config.schema import PoliciesConfig
from prefopt.objectives.__main__ import markdown

DOCS = Path(__file__).parent
CONF = DOCS.parent / "conf"
INCLUDED = {"common", "_self_"}  # entries of `defaults` that give no key which a user sets
INTRODUCTION = """\
# Configuration

This page is made from `conf/` by `make docs`: each key, its default, and the comment beside it. `???` is a value that
you have to give. A group is set by its name (`objective=simpo`), a key by its path (`objective.beta=2.0`), and a key
that a file does not list yet by a plus (`+dataset.columns.prompt=question`). Unknown keys are refused.

"""


class Key(NamedTuple):
    """A key of a YAML file: its dotted path, its default, and its comment, as they are written in the file."""

    path: str
    default: str
    comment: str


class Config(NamedTuple):
    """The content of a YAML file: the comment lines at its head, its `defaults`, and its keys."""

    name: str
    header: list[str]
    defaults: list[str]
    keys: list[Key]


def read(file: Path) -> Config:
    text = file.read_text()
    lines = text.splitlines()
    root = yaml.compose(text)
    header = [line[2:] for line in lines[: root.start_mark.line] if line.startswith("# ") and "@package" not in line]
    defaults = []
    for key, value in root.value:
        if key.value == "defaults":
            defaults = [_source(item, lines) for item in value.value]
    return Config(file.stem, header, defaults, list(_keys(root, lines)))


def _source(node: yaml.Node, lines: list[str]) -> str:
    """An entry of `defaults`: `jsonl`, or `group=choice`."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    ((key, value),) = node.value  # type: ignore[misc]
    return f"{key.value}={value.value}"


def _keys(node: yaml.MappingNode, lines: list[str], prefix: str = "") -> Iterator[Key]:
    """The leaves of a mapping. A mapping in block style is no leaf; it is listed only where it has a comment."""
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if path in ("defaults", "hydra"):
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            if comment := _comment(lines, key.end_mark):
                yield Key(path, "", comment)
            yield from _keys(value, lines, f"{path}.")
            continue
        start, end = value.start_mark, value.end_mark
        yield Key(path, lines[start.line][start.column : end.column], _comment(lines, end))


def _comment(lines: list[str], mark: yaml.Mark) -> str:
    """The comment behind `mark` on its line, or ""."""
    return lines[mark.line][mark.column :].partition("# ")[2].strip()


def table(keys: list[Key], heads: tuple[str, ...] = ("key", "default", "what it is")) -> str:
    """A Markdown table of keys."""
    rows = [(_code(key.path), _code(key.default), _text(key.comment)) for key in keys]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ("---",) * len(heads), *rows])


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def _text(comment: str) -> str:
    return re.sub(r"([\\*_<|])", r"\\\1", comment)


def program(config: Config) -> str:
    """The section of a file directly in conf/: that of a program, or one that several programs include."""
    commands = [line for line in config.header if line.startswith("python -m")]
    notes = [line for line in config.header if line not in commands]
    groups = [f"`{d.removeprefix('override ')}`" for d in config.defaults if "=" in d and "hydra/" not in d]
    includes = [f"`conf/{d}.yaml`" for d in config.defaults if "=" not in d and "schema" not in d and d not in INCLUDED]
    is_program = any(f"prefopt.{config.name} " in line for line in commands)
    parts = [f"## prefopt {config.name}" if is_program else f"## conf/{config.name}.yaml"]
    if notes:
        parts.append(_text("\n".join(notes)))
    if is_program:
        parts.append("\n".join(["```", *commands, "```"]))
    if includes:
        parts.append(f"Includes the keys of {', '.join(includes)}.")
    if groups:
        parts.append(f"Groups: {', '.join(groups)}.")
    if config.keys:
        parts.append(table(config.keys))
    return "\n\n".join(parts)


def group(name: str, configs: list[Config]) -> str:
    """The section of a folder of conf/: the keys that several of its choices share, then the keys of every choice."""
    counts = Counter(key for config in configs for key in config.keys if key.comment)
    shared = [key for key, n in counts.items() if n > 1]
    parts = [f"## {name}=…"]
    if shared:
        rows = [
            f"{table(shared[i : i + 1]).splitlines()[2]} {_choices(key, configs)} |" for i, key in enumerate(shared)
        ]
        heads = ("key", "default", "what it is", "in")
        parts.append("\n".join([f"| {' | '.join(heads)} |", "| --- | --- | --- | --- |", *rows]))
    for config in configs:
        commands = [line for line in config.header if line.startswith(("python -m", "torchrun"))]
        notes = [line for line in config.header if line not in commands]
        parts.append(f"### {name}={config.name}")
        parts.append("\n".join(["```", *commands, "```"]))
        if notes:
            parts.append(_text("\n".join(notes)))
        if based := [d for d in config.defaults if d not in INCLUDED]:
            parts.append(f"Built from {', '.join(f'`{d}`' for d in based)}.")
        if keys := [key for key in config.keys if key not in shared]:
            parts.append(table(keys))
    return "\n\n".join(parts)


def _choices(key: Key, configs: list[Config]) -> str:
    """The choices that have this key, as a short list: "all but" where most have it."""
    having = [f"`{config.name}`" for config in configs if key in config.keys]
    lacking = [f"`{config.name}`" for config in configs if key not in config.keys]
    if len(lacking) < len(having):
        return f"all but {', '.join(lacking)}" if lacking else "all"
    return ", ".join(having)


def policies() -> str:
    """The section of the policies for defective rows, from the fields of PoliciesConfig and their comments."""
    comments = dict(re.findall(r"^    (\w+): str = .*?# (.*)$", inspect.getsource(PoliciesConfig), re.MULTILINE))
    fields = dataclasses.fields(PoliciesConfig)
    keys = [Key(f"dataset.policies.{f.name}", str(f.default), comments.get(f.name, "")) for f in fields]
    return f"## dataset.policies\n\n{inspect.getdoc(PoliciesConfig)}\n\n{table(keys)}"


def configuration() -> str:
    """The text of configuration.md. The training programs come first."""
    files = sorted(CONF.glob("*.yaml"), key=lambda file: (not file.stem.startswith("train"), file.stem))
    programs = [program(read(file)) for file in files if file.stem not in INCLUDED]
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir())
    groups = [group(folder.name, [read(file) for file in sorted(folder.glob("*.yaml"))]) for folder in folders]
    return INTRODUCTION + "\n\n".join([*programs, *groups, policies()]) + "\n"


def objectives(page: str) -> str:
    """`page` with the current table of `python -m prefopt.objectives --markdown` between its two marks."""
    return re.sub(r"(?<=<!-- table -->\n\n).*?(?=\n\n<!-- end -->)", lambda _: markdown(), page, flags=re.DOTALL)


def main() -> None:
    (DOCS / "configuration.md").write_text(configuration())
    page = DOCS / "objectives.md"
    page.write_text(objectives(page.read_text()))


if __name__ == "__main__":
    main()
