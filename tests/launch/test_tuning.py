"""The loop of docs/sweeps.md by which a tuner trains: run as it stands there, on the tiny model."""

import re
from types import SimpleNamespace

import pytest

from tests.helpers.tiny import ENVIRONMENT, ROOT, records


@pytest.fixture
def blocks(overrides, tmp_path, monkeypatch):
    """The page's two blocks of Python, the first executed for the tiny model in an empty folder: (names, second)."""
    text = (ROOT / "docs" / "sweeps.md").read_text().partition("## Tuners")[2].partition("\n## ")[0]
    loop, tuner = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names: dict = {}
    exec(loop, names)
    fixed = [word for word in overrides(tmp_path) if not word.startswith(("runs_dir=", "steps="))]
    names["FIXED"][1:] = [*fixed, "steps=2"]
    return names, tuner


@pytest.mark.slow
def test_a_tuner_gets_the_held_out_metric_of_its_point(blocks, tmp_path):
    names, _ = blocks
    trial = SimpleNamespace(number=3, suggest_float=lambda name, low, high, log: 0.25)
    found = names["accuracy"](trial)
    (record,) = records(tmp_path / "runs" / "tuning" / "3")
    assert (record["status"], record["config"]["objective"]["beta"]) == ("finished", 0.25)
    assert found == record["evaluations"][-1]["accuracy"]
    assert record["evaluations"][-1]["step"] == 2


@pytest.mark.slow
def test_optuna_tunes(blocks, tmp_path):
    pytest.importorskip("optuna")
    names, tuner = blocks
    exec(tuner.replace("n_trials=20", "n_trials=3"), names)
    study = names["study"]
    assert len(study.trials) == 3
    for trial in study.trials:
        (record,) = records(tmp_path / "runs" / "tuning" / str(trial.number))
        assert record["config"]["objective"]["beta"] == trial.params["beta"]
        assert trial.value == record["evaluations"][-1]["accuracy"]
