"""Each sentence of SECURITY.md and of the reliability page, and the tests that try to break what it says."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.forks import At, run
from tests.helpers.tiny import ROOT

# By page: {the beginning of a sentence: the names of its tests}; none for one that promises nothing.
PROMISES = yaml.safe_load(Path(__file__).with_name("promises.yaml").read_text())


def sentences(page: Path) -> list[str]:
    """The sentences of a page, without headings and tables."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[*|] ?)", page.read_text()):
        text = " ".join(block.split())
        if not text.startswith(("#", "|", "```")):
            found += [s for s in re.split(r"(?<=[.:?])\s+(?=[A-Z`*])", text.removeprefix("* ")) if s]
    return found


def names_of_tests() -> set[str]:
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PROMISES)
def test_every_sentence_has_its_tests(page):
    found, expected = sentences(ROOT / page), list(PROMISES[page])
    assert [s for s in found if not s.startswith(tuple(expected))] == [], "sentences without an entry here"
    assert [b for b in expected if not any(s.startswith(b) for s in found)] == [], "entries without a sentence"


def test_the_tests_that_are_named_exist():
    there = names_of_tests()
    named = {name for promises in PROMISES.values() for tests in promises.values() for name in tests}
    assert named - there == set()


class Unplugged:
    """Kills the process where it asks for an address or connects to one."""

    def arm(self) -> None:
        At("socket:getaddrinfo").arm()
        At("socket:socket.connect").arm()


def test_nothing_is_asked_of_anybody(overrides, tmp_path):
    env = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    arguments = [*overrides(tmp_path / "runs"), "steps=2"]
    code, said = run(tmp_path / "log", *arguments, env=env, at=Unplugged())
    assert code == 0, said
    # wandb asks its own process on this machine: the plug is really out.
    code, said = run(tmp_path / "log", *arguments, "logger=wandb", "seed=1", env=env, at=Unplugged())
    assert code == -9, said
