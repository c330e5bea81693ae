"""What the README and the YAML files tell people to type works."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import build, parse, register
from prefopt.evaluation.config import AlpacaConfig, HarnessConfig
from prefopt.generation.config import SampleConfig
from prefopt.objectives.__main__ import markdown
from prefopt.objectives.base import Objective
from prefopt.prefetch import PrefetchConfig
from prefopt.reporting.config import DataReportConfig, PapersConfig, ReportConfig
from prefopt.rewards.config import ScoreConfig
from prefopt.tracking.status import RunsConfig
from prefopt.training.config import OnlineConfig, TrainConfig, check
from prefopt.training.optim import Schedule
from tests.tiny import ROOT, run_program

README = (ROOT / "README.md").read_text()
YAMLS = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")])
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "harness": HarnessConfig,
    "alpaca": AlpacaConfig,
    "compare": AlpacaConfig,
    "online": OnlineConfig,
    "sample": SampleConfig,
    "score": ScoreConfig,
    "report": ReportConfig,
    "papers": PapersConfig,
    "runs": RunsConfig,
    "prefetch": PrefetchConfig,
    "data_report": DataReportConfig,
}


def commands() -> list[str]:
    texts = [
        README,
        (ROOT / "prefopt/data/README.md").read_text().replace("\\\n", " "),
        *(f.read_text() for f in YAMLS),
    ]
    found = [m.group(1).strip() for text in texts for m in re.finditer(r"python -m (prefopt\.\w+[^`\n#(]*)", text)]
    # This is the objective that the README lets the reader write; the test below writes it.
    # prefopt.objectives takes no overrides.
    return sorted({c for c in found if "=softplus_margin" not in c and not c.startswith("prefopt.objectives")})


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command):
    program, *overrides = shlex.split(command)
    name = program.removeprefix("prefopt.")
    schema = SCHEMAS[name]
    grid = [[f"{key}={value}" for value in values.split(",")] if "[" not in values else [o]
            for o in overrides if o != "-m" and not o.startswith("--")
            for key, _, values in [o.partition("=")]]  # fmt: skip
    register(*SCHEMAS.values())
    for point in itertools.product(*grid):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose(name, list(point)), schema)
        if isinstance(config, TrainConfig):
            check(config)
            build(config.objective, Objective, "objective")
            build(config.schedule, Schedule, "schedule")


def test_there_are_commands_to_test():
    assert len(commands()) >= 15
    assert {c.split()[0] for c in commands()} == {f"prefopt.{name}" for name in SCHEMAS}


def test_an_objective_is_one_file_and_one_yaml(tiny_folder, overrides, tmp_path):
    """The README's own example, written into a copy of the checkout: it trains, and the objective tests find it."""
    blocks = re.findall(r"`((?:prefopt|conf)/objective[^`]*)`:\n\n```\w+\n(.*?)```", README, re.DOTALL)
    assert [path for path, _ in blocks] == [
        "prefopt/objectives/softplus_margin.py",
        "conf/objective/softplus_margin.yaml",
    ]
    copy = tmp_path / "copy"
    for folder in ("prefopt", "hydra_plugins", "conf", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in blocks:
        (copy / path).write_text(text)
    process = run_program(*overrides(tmp_path / "runs"), "objective=softplus_margin", "steps=2", cwd=copy)
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "runs").glob("softplus_margin-*/policy/model.safetensors"))
    arguments = ["-q", "-p", "no:cacheprovider", "tests/test_objectives.py", "-k", "softplus_margin"]
    tests = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=copy, capture_output=True, text=True)
    failing = re.findall(r"^FAILED \S+::(\w+)", tests.stdout, re.MULTILINE)
    assert failing == [], tests.stdout
    assert int(re.search(r"(\d+) passed", tests.stdout.splitlines()[-1]).group(1)) > 20, tests.stdout  # type: ignore[union-attr]


def test_the_list_of_objectives_is_what_the_command_prints():
    """`python -m prefopt.objectives --markdown` makes it. An objective of one's own need not be in the README."""
    process = run_program("--markdown", program="objectives")
    assert process.stdout.strip() == markdown(), process.stderr
    listed = re.findall(r"^\| `\w+` \| .*2\d{3}\.\d{5}.*$", README, re.MULTILINE)
    assert len(listed) >= 18
    assert set(listed) <= set(markdown().splitlines())


def test_make_help_lists_the_targets_of_the_readme():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in text.splitlines()}
    assert {"help", "setup", "demo", "test"} <= listed
    for target in re.findall(r"(?:^|`)make\s([a-z-]+)", README, re.MULTILINE):
        assert target in listed


def test_the_table_in_the_readme_is_the_demos():
    table = (ROOT / "results" / "demo" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 7  # the header, its rule, the initial policy and four runs
    for row in rows:
        without_run = row.rsplit("|", 2)[0]
        assert without_run in README, row
    assert "results/demo/reward_kl.png" in README
