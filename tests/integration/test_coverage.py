"""docs/coverage.md says of everything that the papers name whether it works, and the code agrees."""

import re
from typing import NamedTuple

import pytest
import yaml

from prefopt.__main__ import PROGRAMS
from tests.helpers.tiny import ROOT


class Row(NamedTuple):
    what: str
    named_by: str
    state: str
    where: str


def read_table() -> list[Row]:
    lines = [line for line in (ROOT / "docs" / "coverage.md").read_text().splitlines() if line.startswith("|")]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines[2:]]


TABLE = read_table()
OBJECTIVES = sorted(file.stem for file in (ROOT / "conf" / "objective").glob("*.yaml"))


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def paths(text: str, *roots: str) -> list[str]:
    return [name for name in in_code(text) if name.startswith(roots)]


def state(wanted: str) -> list[Row]:
    return [row for row in TABLE if row.state == wanted]


def ids(row: Row) -> str:
    return row.what


def test_every_row_has_a_state():
    assert len(TABLE) >= 70
    assert len({row.what for row in TABLE}) == len(TABLE)
    assert {row.state for row in TABLE} == {"works", "configured, never run", "left out"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_works(objective):
    (row,) = (row for row in TABLE if objective in in_code(row.what))
    assert row.state == "works"


@pytest.mark.parametrize("row", state("works"), ids=ids)
def test_what_works_names_a_test_and_a_run(row):
    test, run = re.fullmatch(r"test (.+); run (.+)", row.where).groups()
    assert paths(test, "tests/")
    assert paths(run, "results/", "tests/", "docs/") or "the same file" in run
    for path in paths(row.where, "results/", "tests/", "docs/"):
        assert (ROOT / path).is_file(), path
    for name in in_code(row.what):
        if name.startswith("prefopt "):
            assert name.removeprefix("prefopt ") in PROGRAMS
        elif name in OBJECTIVES:
            check_objective(name, in_code(row.where))


def check_objective(name: str, where: list[str]) -> None:
    """The files that a row names really are about its objective."""
    if "tests/objectives/test_trl.py" in where:  # which reads the page
        assert re.search(rf"^\| `objective={name}[ `]", (ROOT / "docs" / "trl.md").read_text(), re.MULTILINE)
    if "tests/objectives/test_family.py" in where:
        assert re.search(rf"^from prefopt\.objectives\.{name} ", (ROOT / where[-2]).read_text(), re.MULTILINE)
    if "results/objectives/table.md" in where:
        assert re.search(rf"^\| {name} \|", (ROOT / "results" / "objectives" / "table.md").read_text(), re.MULTILINE)
    if "tests/integration/test_slow.py" in where:  # which trains all objectives of pairs that the sweep leaves out
        sweep = yaml.safe_load((ROOT / "sweeps" / "sweep" / "objectives.yaml").read_text())
        assert name not in sweep["hydra"]["sweeper"]["params"]["objective"].split(",")


@pytest.mark.parametrize("row", state("configured, never run"), ids=ids)
def test_what_is_configured_names_its_settings(row):
    found = paths(row.where, "conf/", "sweeps/", "scripts/")
    assert found
    for path in found:
        assert (ROOT / path).exists(), path
    assert not paths(row.where, "results/")


@pytest.mark.parametrize("row", state("left out"), ids=ids)
def test_what_is_left_out_has_a_reason_and_no_code(row):
    assert len(row.where.split()) >= 5
    for name in in_code(row.what):
        assert name not in OBJECTIVES
        assert name.removeprefix("prefopt ") not in PROGRAMS
