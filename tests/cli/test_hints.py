"""Messages for command lines that Hydra cannot read: paths with blanks and other characters."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from prefopt.cli.hints import refusal

SPECIAL = ["/my data (1)/x.jsonl", "/a {b}/x", "/a=b c/x", '/a "b" c/x', "/it's a/x"]
SPLIT = ["/my data/x.jsonl", "/my data (1)/x.jsonl", "/a {b}/x", "/mnt/my own data"]


def message(arguments: list[str]) -> str:
    with pytest.raises(HydraException) as error:
        OverridesParser.create().parse_overrides(arguments)
    return refusal(error.value, arguments)


def suggested(text: str) -> str:
    """The value of the argument that a message ends with, as the shell and Hydra read it."""
    (argument,) = shlex.split(text.rpartition("\n")[2])
    return str(OverridesParser.create().parse_override(argument).value())


@pytest.mark.parametrize("path", SPECIAL)
def test_a_path_that_needs_quotes_gets_them(path):
    text = message(["seed=1", f"dataset.train={path}", "steps=3"])
    assert "this text needs quotes" in text
    assert suggested(text) == path


@pytest.mark.parametrize("path", SPLIT)
def test_a_path_that_the_shell_has_split_is_put_together(path):
    first, *words = path.split(" ")
    text = message(["seed=1", f"dataset.train={first}", *words, "steps=3"])
    assert "both need quotes" in text
    assert suggested(text) == path


@pytest.mark.parametrize("arguments", [["seed"], ["seed", "steps=3"]])
def test_a_word_with_nothing_before_it_gets_hydras_message(arguments):
    assert "Error parsing override 'seed'" in message(arguments)
