"""Every sweep file: each of its jobs composes, passes the checks, and is another run."""

import itertools

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from prefopt.config import TrainConfig, build, check, parse, register
from prefopt.objectives.base import Objective
from prefopt.program import SweepFiles
from prefopt.run import Run
from tests.tiny import ROOT, records, run_program

SWEEPS = sorted((ROOT / "sweeps" / "sweep").glob("*.yaml"))


def jobs(name: str) -> list[Run]:
    register()
    Plugins.instance().register(SweepFiles)
    params = OmegaConf.to_container(OmegaConf.load(ROOT / "sweeps/sweep" / f"{name}.yaml").hydra.sweeper.params)
    assert isinstance(params, dict)
    grid = itertools.product(
        *([f"{key}={value}" for value in str(values).split(",")] for key, values in params.items())
    )
    runs = []
    for point in grid:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("train", [f"+sweep={name}", *point]), TrainConfig)
        check(config)
        runs.append(Run(config, build(config.objective, Objective, "objective").name, {}))
    return runs


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.stem)
def test_jobs_compose_and_differ(file):
    names = [run.name for run in jobs(file.stem)]
    assert len(names) >= 2
    assert len(set(names)) == len(names)


def test_the_demo_is_two_objectives_at_two_betas():
    found = {(r.record["objective"], r.record["config"]["objective"]["beta"]) for r in jobs("demo")}
    assert found == {("dpo", 0.05), ("dpo", 0.5), ("mmpo", 0.05), ("mmpo", 0.5)}


def test_a_sweep_file_runs_from_another_folder(overrides, tmp_path):
    """The command line wins over the file, and the file is found wherever the program is called."""
    arguments = ["-m", "+sweep=demo", *overrides("here"), "steps=1", "objective=dpo", "objective.beta=0.1,0.2"]
    process = run_program(*arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = [r["config"]["objective"]["beta"] for r in records(tmp_path / "here")]
    assert sorted(found) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("override", "value"),
    [("optimizer.lr=1e-6", 1e-6), ("optimizer.betas=[0.9,0.95]", [0.9, 0.95]), ("optimizer.eps=1e-8", 1e-8)],
)
def test_numbers_on_the_command_line_are_numbers(override, value):
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("train", [override]), TrainConfig)
    assert getattr(config.optimizer, override.partition("=")[0].removeprefix("optimizer.")) == value
