"""Attacks through Hydra's own section: by overrides, flags, sweep files and folders of configs. What each would do if
it worked is to create a file."""

import pickle
import sys
from pathlib import Path

import pytest
import yaml

from prefopt.cli.program import run
from prefopt.tracking.status import RunsConfig
from prefopt.training.config import TrainConfig
from tests.helpers.tiny import ROOT

# A program that runs its sweeps in its own process, by Hydra's sweeper; and one that launches jobs, by ours.
PROGRAMS = {"runs": RunsConfig, "train": TrainConfig}
USES = [("runs",), ("runs", "-m"), ("train", "-m"), ("train", "-m", "--dry-run"), ("runs", "--cfg", "all")]
HANDLER = {"_target_": "logging.FileHandler", "filename": "MARK"}


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that no attack may create. A package `evil` creates it when it is imported."""
    mark = tmp_path / "mark"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield mark
    sys.modules.pop("evil", None)
    assert not mark.exists()
    assert not (tmp_path / "made").exists()


def call(use: tuple[str, ...], *arguments: str, monkeypatch) -> tuple[int, list]:
    """(exit code, what was composed and would have run) of a program with a job that does nothing."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # programs wrap both
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    program, *flags = use
    ran: list = []
    launch = (lambda points, *_: ran.extend(points)) if program == "train" else None
    try:
        code = run(program, PROGRAMS[program], ran.append, launch, None, [*flags, *arguments])  # type: ignore[arg-type]
    except SystemExit as error:
        code = int(error.code or 0)
    return code, ran


def config_dir(folder: Path, mark: Path, files: dict[str, object]) -> list[str]:
    """The flag for a folder of configs with these files; MARK in them is the file that no attack may create."""
    for name, content in files.items():
        file = folder / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        header = "# @package _global_\n" if name.startswith("sweep/") else ""
        file.write_text(header + text.replace("MARK", str(mark)))
    return ["--config-dir", str(folder / "conf")]


def logging_section(**handler: object) -> dict:
    return {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": handler}}


SECTIONS = {
    "a callback": {"callbacks": {"x": HANDLER}},
    "a log file of the job": {"job_logging": logging_section(**{"class": "logging.FileHandler", "filename": "MARK"})},
    "a log file of Hydra": {"hydra_logging": logging_section(**{"class": "logging.FileHandler", "filename": "MARK"})},
    "a factory of handlers": {"job_logging": logging_section(**{"()": "logging.FileHandler", "filename": "MARK"})},
    "a name to import": {"job_logging": logging_section(**{"class": "logging.StreamHandler", "stream": "ext://evil.x"})},
    "a filter to import": {"job_logging": {"version": 1, "filters": {"x": {"()": "evil.Filter"}}}},
    "a package of configs": {"searchpath": ["pkg://evil"]},
    "a launcher": {"launcher": HANDLER},
    "a sweeper": {"sweeper": HANDLER},
    "a sweeper's part": {"sweeper": {"params": HANDLER}},
    "a sweeper's reference": {"sweeper": {"params": {"seed": "${hydra.env}"}}, "env": HANDLER},
    "variables": {"job": {"env_set": {"LD_PRELOAD": "MARK"}}},
    "a folder of the job": {"run": {"dir": "made"}, "job": {"chdir": True}},
    "a folder of Hydra's files": {"output_subdir": "made"},
    "an override": {"overrides": {"hydra": ["hydra.run.dir=made"]}},
    "an override of the job": {"overrides": {"task": ["name=x"]}},
}  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=" ".join)
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_sweep_file_sets_nothing_that_hydra_calls(section, use, mark, tmp_path, monkeypatch, capsys):
    folder = config_dir(tmp_path, mark, {"sweep/evil": {"hydra": section}})
    code, ran = call(use, *folder, "+sweep=evil", monkeypatch=monkeypatch)
    assert (code, ran) == (2, [])
    said = capsys.readouterr()
    # Of launchers and search paths Hydra itself knows better.
    named = "is not taken: Hydra runs code that its own section names"
    assert named in said.err or {"launcher", "sweeper", "searchpath"} & set(section), said
    assert not said.out


@pytest.mark.parametrize("use", USES, ids=" ".join)
@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x={_target_:logging.FileHandler,filename:MARK}",
        "++hydra.callbacks={x:{_target_:logging.FileHandler,filename:MARK}}",
        "hydra={callbacks:{x:{_target_:logging.FileHandler,filename:MARK}}}",
        "hydra.job_logging={version:1,handlers:{x:{class:logging.FileHandler,filename:MARK}},root:{handlers:[x]}}",
        "hydra.searchpath=[pkg://evil]",
        " hydra.searchpath=[pkg://evil]",
        "+hydra.job.env_set.LD_PRELOAD=x",
        "hydra.run.dir=made",
        "hydra.output_subdir=made",
        "hydra/job_logging=default",
        "hydra/callbacks=x",
        "~hydra.job_logging",
        "+hydra.sweeper.params._target_=evil.x",
        "hydra.sweeper._target_=evil.x",
    ],
)
def test_an_override_sets_nothing_that_hydra_calls(override, use, mark, monkeypatch, capsys):
    code, ran = call(use, override.replace("MARK", str(mark)), monkeypatch=monkeypatch)
    assert (code, ran) == (2, [])
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("use", USES, ids=" ".join)
@pytest.mark.parametrize(
    ("files", "arguments"),
    [
        ({"hydra/launcher/e": HANDLER, "sweep/e": {"defaults": [{"override /hydra/launcher": "e"}]}}, ["+sweep=e"]),
        ({"sweep/evil": {"defaults": [{"override /hydra/job_logging": "default"}]}}, ["+sweep=evil"]),
        ({"any/evil": {"x": HANDLER}}, ["+any@hydra.callbacks=evil"]),
        ({"any/evil": "# @package hydra.callbacks\nx: {_target_: logging.FileHandler, filename: MARK}"}, ["+any=evil"]),
        ({"mine": {"hydra": {"searchpath": ["pkg://evil"]}}}, ["--config-name", "mine"]),
        ({"mine": {"defaults": ["runs", "_self_"], "hydra": {"callbacks": {"x": HANDLER}}}}, ["-cn", "mine"]),
    ],
    ids=["launcher", "logging", "package", "header", "search path", "primary"],
)  # fmt: skip
def test_a_folder_of_configs_sets_nothing_that_hydra_calls(files, arguments, use, mark, tmp_path, monkeypatch):
    folder = config_dir(tmp_path, mark, files)
    assert call(use, *folder, *arguments, monkeypatch=monkeypatch) == (2, [])


@pytest.mark.parametrize("use", USES, ids=" ".join)
def test_a_sweeper_of_a_folder_is_not_called(use, mark, tmp_path, monkeypatch):
    files = {
        "hydra/sweeper/evil": HANDLER,
        "sweep/evil": {
            "defaults": [{"override /hydra/sweeper": "evil"}],
            "hydra": {"sweeper": {"params": {"seed": 1}}},
        },
    }
    code, _ = call(use, *config_dir(tmp_path, mark, files), "+sweep=evil", monkeypatch=monkeypatch)
    # conf/train.yaml chooses its sweeper first: there the file's choice is without effect.
    assert code == (2 if use[0] == "runs" else 0)


@pytest.mark.parametrize("use", [*USES, ("runs", "--help"), ("runs", "--hydra-help"), ("train", "--info=all")])
@pytest.mark.parametrize(
    "arguments",
    [["--experimental-rerun", "pickle"], ["--experimental-rer=pickle"], ["--config-path", "pkg://evil"],
     ["--config-p=pkg://evil"], ["-cp", "pkg://evil"], ["hydra.searchpath=[pkg://evil]"]],
    ids=" ".join,
)  # fmt: skip
def test_no_flag_runs_code(arguments, use, mark, tmp_path, monkeypatch, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (mark,)

    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    assert call(use, *arguments, monkeypatch=monkeypatch) == (2, [])
    assert "is not taken" in capsys.readouterr().err


def test_a_group_of_hydras_is_refused_with_what_to_do(monkeypatch, capsys):
    for group, advice in (("hydra/launcher=basic", "launcher=NAME"), ("+hydra/sweeper=optuna", "after -m")):
        assert call(("train", "-m"), group, monkeypatch=monkeypatch) == (2, [])
        assert advice in capsys.readouterr().err


def test_what_people_set_of_hydras_section_works(tmp_path, monkeypatch, capsys):
    files = {"sweep/mine": {"hydra": {"sweeper": {"params": {"seed": "1,2", "steps": 3}}, "mode": "MULTIRUN"}}}
    folder = config_dir(tmp_path, tmp_path, files)
    code, points = call(("train", "-m"), *folder, "+sweep=mine", "hydra.verbose=true", monkeypatch=monkeypatch)
    assert code in (0, None)
    assert [(point.cfg.seed, point.cfg.steps) for point in points] == [(1, 3), (2, 3)]
    code, ran = call(("runs", "-m"), "name=a,b", f"hydra.sweep.dir={tmp_path / 'x'}", monkeypatch=monkeypatch)
    assert (code, [cfg.name for cfg in ran]) == (0, ["a", "b"])
    (tmp_path / "conf" / "mine.yaml").write_text("defaults: [runs, _self_]\nname: mine\n")
    code, ran = call(("runs",), *folder, "-cn", "mine", monkeypatch=monkeypatch)
    assert (code, [cfg.name for cfg in ran]) == (0, ["mine"])


def test_flags_stand_between_overrides(monkeypatch):
    code, points = call(("train",), "seed=1", "-m", "steps=3,4", "--dry-run", "epochs=null", monkeypatch=monkeypatch)
    assert code in (0, None)
    assert [(point.cfg.seed, point.cfg.steps) for point in points] == [(1, 3), (1, 4)]


@pytest.mark.parametrize("sweep", sorted((ROOT / "sweeps" / "sweep").rglob("[!_]*.yaml"))[:3], ids=lambda f: f.stem)
def test_our_own_sweeps_pass(sweep, monkeypatch):
    name = sweep.relative_to(ROOT / "sweeps" / "sweep").with_suffix("")
    code, points = call(("train", "-m"), f"+sweep={name}", monkeypatch=monkeypatch)
    assert code in (0, None)
    assert points
