"""The points of a sweep: what each is called, and that none is run twice or dropped without a word."""

import pytest

from prefopt.data.fields import finite
from tests.cli.test_hydra_guard import call
from tests.helpers.tiny import run_program


def test_a_range_has_the_numbers_of_a_list(monkeypatch):
    grid = ["objective.beta=range(0.1,0.5,0.1)", "seed=range(1,3)"]
    code, points = call(("train", "-m"), *grid, monkeypatch=monkeypatch)
    assert code in (0, None)
    assert [p.cfg.objective.beta for p in points][::2] == [0.1, 0.2, 0.3, 0.4]
    assert points[-1].overrides[:2] == ["objective.beta=0.4", "seed=2"]


@pytest.mark.parametrize("flags", [["--dry-run"]])
def test_a_repeated_point_is_counted_once_and_said(flags, overrides, tmp_path):
    process = run_program("-m", *flags, *overrides(tmp_path / "runs"), "seed=1,2,1", "optimizer.lr=0.1,0.10")
    assert process.returncode == 0, process.stderr
    assert "2 jobs of prefopt.train" in process.stdout
    assert "4 points compute what others do" in process.stderr


def test_an_unknown_key_of_an_optional_node_is_refused(overrides, tmp_path):
    process = run_program(*overrides(tmp_path / "runs"), "logger=wandb", "+logger.wandb.anything=1")
    assert process.returncode == 2
    assert "unknown key logger.wandb.anything" in process.stderr


@pytest.mark.parametrize("value", [3.5e38, -1e39, 1e308, 10**400])
def test_a_reward_beyond_float32_is_refused(value):
    with pytest.raises(ValueError, match="reward must be a finite number"):
        finite(value, "reward")
    assert finite(3.4e38, "reward") == 3.4e38
