"""Another class by `_target_` on the command line does not get the keys of the group's own class."""

import pytest
from omegaconf import OmegaConf

from prefopt.cli.program import run
from prefopt.training.config import TrainConfig


def composed(*arguments: str, launch=None) -> list:
    """The configs that the program `train` gets."""
    found: list = []

    def points(all_points, *_):
        found.extend(point.cfg for point in all_points)
        return 0

    code = run("train", TrainConfig, found.append, points if launch else None, None, list(arguments))
    assert code == 0
    return [OmegaConf.to_container(cfg.objective) for cfg in found]


IPO = "objective._target_=prefopt.objectives.ipo.IPO"


def test_keys_of_the_groups_class_are_dropped():
    (node,) = composed("objective=dpo", IPO, "objective.beta=0.3")
    assert node == {"_target_": "prefopt.objectives.ipo.IPO", "beta": 0.3, "nll_weight": 0.0, "nll_per": "pair"}


def test_in_a_sweep_each_point_has_the_keys_of_its_class():
    values = ",".join(("prefopt.objectives.dpo.DPO", "prefopt.objectives.ipo.IPO"))
    dpo, ipo = composed("-m", f"objective._target_={values}", launch=True)
    assert dpo.keys() - ipo.keys() == {"label_smoothing"}


@pytest.mark.parametrize("key", ["objective.label_smoothing=0.1", "+objective.mine=1"])
def test_a_key_that_is_given_stays_to_be_refused(key):
    (node,) = composed("objective=dpo", IPO, key)
    assert key.lstrip("+").partition("=")[0].removeprefix("objective.") in node


def test_a_class_that_cannot_be_imported_is_left_to_the_message():
    (node,) = composed("objective=dpo", "objective._target_=nowhere.Class")
    assert "label_smoothing" in node


@pytest.fixture
def sweep(tmp_path):
    """sweep(text) -> the arguments that choose a sweep's file with that text, of the user's own folder."""

    def write(text: str) -> list[str]:
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / "mine.yaml").write_text("# @package _global_\n" + text)
        return ["--config-dir", str(tmp_path), "+sweep=mine"]

    return write


IPO_IN_FILE = "objective:\n  _target_: prefopt.objectives.ipo.IPO\n  beta: 0.3\n"


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_sweeps_file_names_another_class(flags, sweep):
    (node,) = composed(*flags, *sweep(IPO_IN_FILE), launch=bool(flags))
    assert node == {"_target_": "prefopt.objectives.ipo.IPO", "beta": 0.3, "nll_weight": 0.0, "nll_per": "pair"}


def test_a_key_that_the_sweeps_file_gives_stays_to_be_refused(sweep):
    (node,) = composed(*sweep(IPO_IN_FILE + "  label_smoothing: 0.1\n  betta: 1\n"))
    assert (node["label_smoothing"], node["betta"]) == (0.1, 1)


def test_a_class_below_a_node_has_its_own_keys(sweep):
    """Two levels down, as a data set's format."""
    text = "objective:\n  base:\n    _target_: prefopt.objectives.ipo.IPO\n"
    (node,) = composed("objective=mappo", *sweep(text))
    assert node["base"].keys() == {"_target_", "beta", "nll_weight", "nll_per"}
