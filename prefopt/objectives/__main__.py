"""Print every objective of conf/objective/: equation, needs, scope, hyperparameters with their defaults, paper.

python -m prefopt.objectives
python -m prefopt.objectives --markdown        # docs/objectives.md's list
"""

import argparse
import re
from collections.abc import Iterator

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from prefopt.config.parse import build, register
from prefopt.objectives.base import Objective
from prefopt.utils.console import plain_console
from prefopt.utils.files import ROOT

COLUMNS = ("objective", "loss per pair", "needs", "scope", "defaults", "paper")
NOTATION = (
    "lp: log-probability of a completion under the policy, rp: under the reference, u = lp − rp, n: tokens, r: prior "
    "reward, w: chosen, l: rejected, σ: logistic"
)


def objectives() -> Iterator[tuple[str, Objective, DictConfig]]:
    """(name, object, composed YAML) for every file in conf/objective/, with all defaults filled in."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for file in sorted((ROOT / "conf" / "objective").glob("*.yaml")):
            composed = compose("objectives", [f"objective={file.stem}"]).objective
            node = OmegaConf.create(OmegaConf.to_container(composed))
            assert isinstance(node, DictConfig)
            yield file.stem, build(node, Objective, "objective"), node


def rows() -> list[tuple[str, ...]]:
    """One row for every objective, with the texts of COLUMNS."""
    table: list[tuple[str, ...]] = []
    for name, objective, node in objectives():
        values = OmegaConf.to_container(node)
        assert isinstance(values, dict)
        defaults = ", ".join(f"{key!s}={_text(value)}" for key, value in values.items() if key != "_target_")
        # The loop makes noise and mismatched completions, no user provides them.
        needs = ", ".join(sorted(objective.needs - {"noise", "mismatched"})) or "–"
        equation = objective.equation
        if values.get("nll_weight") == 0:  # every pairwise objective has this term; it is listed where it is used
            defaults = defaults.replace(", nll_weight=0, nll_per=pair", "")
        table.append((name, equation, needs, objective.scope, defaults or "–", objective.paper))
    return table


def _text(value: object) -> str:
    if isinstance(value, dict):  # the base of a wrapper
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower()


def markdown() -> str:
    """A Markdown table with links to arXiv."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- | --- | --- |"]
    for name, equation, needs, scope, defaults, paper in rows():
        link = re.sub(r"\d{4}\.\d{5}", lambda m: f"[{m.group()}](https://arxiv.org/abs/{m.group()})", paper, count=1)
        cells = (f"`{name}`", equation.replace("|", "or"), needs, scope, defaults, link)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prefopt.objectives", description="List the objectives.")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    if parser.parse_args().markdown:
        print(markdown())
        return
    # Three columns, so that it can be read in a terminal of 80 characters.
    table = Table("objective", "loss per pair, hyperparameters", "needs; scope; paper", show_lines=True)
    for name, equation, needs, scope, defaults, paper in rows():
        table.add_row(name, f"{equation}\n{defaults}", f"{needs}; {scope}\n{paper}")
    console = plain_console()
    console.print(table)
    console.print(NOTATION, highlight=False)
    console.print(
        "Each pairwise objective also has nll_weight (0 unless listed) and nll_per (pair, own_token or chosen_token): "
        "an added -log-likelihood of the chosen completion.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
