"""List the objectives of conf/objective/ by what one asks for, or show one of them in full.

python -m prefopt.objectives
python -m prefopt.objectives dpop
python -m prefopt.objectives --markdown        # docs/objectives.md's lists and table
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.padding import Padding
from rich.table import Table

from prefopt.config.parse import build, register
from prefopt.objectives.base import Objective
from prefopt.utils.console import PlainConsole
from prefopt.utils.files import ROOT

COLUMNS = ("objective", "loss per pair", "needs", "scope", "defaults", "paper")
NOTATION = (
    "lp: log-probability of a completion under the policy, rp: under the reference, u = lp − rp, n: tokens, r: prior "
    "reward, w: chosen, l: rejected, σ: logistic"
)
YAMLS = ROOT / "conf" / "objective"


class Listed(NamedTuple):
    """An objective of conf/objective/ with its composed YAML, all defaults filled in."""

    name: str
    objective: Objective
    node: DictConfig


class Group(NamedTuple):
    """A question that brings somebody here, what to know about it, and which objectives are the answer."""

    heading: str
    text: str
    has: Callable[[Objective], bool]


def _compares(objective: Objective) -> bool:
    return objective.model_kind == "policy" and "rejected" in objective.completions


SPECIAL = (
    Group(
        "Without a reference model",
        "No second model is scored, and nothing but the learning rate holds the policy near its start.",
        lambda o: _compares(o) and "reference" not in o.needs,
    ),
    Group(
        "With rewards in the rows",
        "They read how much better the chosen completion is. `prefopt score` writes rewards beside rows without. "
        "With labels=soft also sppo and reward.",
        lambda o: "rewards" in o.needs and "others" not in o.completions,
    ),
    Group(
        "With weights of tokens in the rows",
        "They read a number for each token of a completion, which `prefopt token_weights` writes.",
        lambda o: "token_weights" in o.needs,
    ),
    Group(
        "On all responses to a prompt",
        "They read groups: rows of scored responses, with dataset.format.pairing=group.",
        lambda o: "others" in o.completions,
    ),
    Group(
        "For noisy labels",
        "Made for preferences of which some are wrong. With label_smoothing (cDPO) also dpo.",
        lambda o: "noisy_labels" in o.made_for,
    ),
    Group(
        "Online",
        "Made for the policy's own samples. `prefopt online` takes every objective that trains a policy.",
        lambda o: "online" in o.made_for,
    ),
)
GROUPS = (
    Group(
        "DPO and its relatives",
        "Pairs and a reference model are all that they need.",
        lambda o: _compares(o) and not any(group.has(o) for group in SPECIAL),
    ),
    *SPECIAL,
    Group("Not of preferences", "The stages before.", lambda o: not _compares(o)),
)


@cache
def objectives() -> tuple[Listed, ...]:
    """Every file in conf/objective/."""
    return tuple(_compose(file.stem for file in sorted(YAMLS.glob("*.yaml"))))


def _compose(names: Iterator[str] | list[str]) -> Iterator[Listed]:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in names:
            composed = compose("objectives", [f"objective={name}"]).objective
            node = OmegaConf.create(OmegaConf.to_container(composed))
            assert isinstance(node, DictConfig)
            yield Listed(name, build(node, Objective, "objective"), node)


def groups() -> list[tuple[Group, list[Listed]]]:
    """GROUPS with their objectives. One may be in several."""
    return [(group, [listed for listed in objectives() if group.has(listed.objective)]) for group in GROUPS]


def rows() -> list[tuple[str, ...]]:
    """One row for every objective, with the texts of COLUMNS."""
    return [
        (name, objective.equation, _needs(objective), objective.scope, _defaults(node), objective.paper)
        for name, objective, node in objectives()
    ]


def _needs(objective: Objective) -> str:
    # The loop makes the others, no user provides them.
    made = {"noise", "mismatched", "on_policy", "prefixes", "sequential_kl", "initial", "tokens", "values"}
    return ", ".join(sorted(objective.needs - made)) or "–"


def _defaults(node: DictConfig) -> str:
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    defaults = ", ".join(f"{key!s}={_text(value)}" for key, value in values.items() if key != "_target_")
    if values.get("nll_weight") == 0:  # every pairwise objective has this term; it is listed where it is used
        defaults = re.sub("(, )?nll_weight=0, nll_per=pair", "", defaults)
    return defaults or "–"


def _text(value: object) -> str:
    if isinstance(value, dict):  # the base of a plug-in
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower()


def markdown() -> str:
    """The groups as lists, then a Markdown table with links to arXiv."""
    lines = []
    for group, found in groups():
        lines += [f"**{group.heading}.** {group.text}", ""]
        lines += [f"* `{name}`: {_summary(objective)}" for name, objective, _ in found] + [""]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- | --- | --- |"]
    for name, equation, needs, scope, defaults, paper in rows():
        link = re.sub(r"\d{4}\.\d{5}", lambda m: f"[{m.group()}](https://arxiv.org/abs/{m.group()})", paper, count=1)
        cells = (f"`{name}`", equation.replace("|", "or"), needs, scope, defaults, link)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(objective: Objective) -> str:
    return objective.summary or objective.equation


def print_groups(console: PlainConsole) -> None:
    """The groups, as wide as the terminal."""
    for group, found in groups():
        console.print(group.heading, style="bold")
        console.print(group.text, highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, objective, _ in found:
            table.add_row(name, _summary(objective))
        console.print(Padding(table, (0, 0, 1, 2)))
    console.print("One in full: prefopt objectives NAME. Training with it: prefopt train objective=NAME.")


def print_one(console: PlainConsole, listed: Listed) -> None:
    """What an objective's class says of itself, and its YAML, whose comments say what its keys mean."""
    name, objective, _ = listed
    # A paragraph or an item of a list becomes one line, which the console folds; a formula on lines of its own stays.
    described = re.sub(r"(?<=\S)\n {0,2}(?=[^\s*])", " ", inspect.getdoc(type(objective)) or "")
    lines = [f"{name}: {_summary(objective)}", "", described, ""]
    lines += [f"loss per pair: {objective.equation}", f"paper: {objective.paper}", f"needs: {_needs(objective)}"]
    lines += [f"scope of its statistics: {objective.scope}"]
    lines += ["optimizer.lr=null: {:g} for all weights, {:g} for an adapter".format(*objective.learning_rates)]
    lines += ["", f"conf/objective/{name}.yaml:", (YAMLS / f"{name}.yaml").read_text().rstrip(), "", NOTATION]
    for line in lines:
        console.print(line, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prefopt.objectives", description="List the objectives, or show one in full."
    )
    parser.add_argument("name", nargs="?", help="this one alone, with its settings")
    parser.add_argument("--markdown", action="store_true", help="all, as Markdown")
    arguments = parser.parse_args()
    console = PlainConsole(file=sys.stdout)
    if arguments.markdown:
        print(markdown())
    elif arguments.name is None:
        print_groups(console)
    else:
        names = [file.stem for file in sorted(YAMLS.glob("*.yaml"))]
        if arguments.name not in names:
            near = difflib.get_close_matches(arguments.name, names, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            parser.error(f"no objective {arguments.name!r}{meant}; prefopt objectives lists them")
        print_one(console, next(_compose([arguments.name])))


if __name__ == "__main__":
    main()
