"""`${best:FOLDER,KEY,MEASURE}` in a configuration."""

import json

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from prefopt.errors import UserError
from prefopt.tracking.best import register_best
from tests.launch.test_estimate import config as composed

DPO = {"_target_": "prefopt.objectives.dpo.DPO", "beta": 0.1}
IPO = {"_target_": "prefopt.objectives.ipo.IPO", "beta": 0.1}
MAPPO = {"_target_": "prefopt.objectives.mappo.MaPPO"}


@pytest.fixture
def folder(tmp_path):
    def run(name, objective, lr, status="finished", **end):
        if "oracle_reward" in end:
            end |= {"oracle_reward_se": 0.1, "kl": 1.0, "kl_se": 0.1, "samples": 8}
        end |= {"step": 8, "accuracy_se": 0.1, "tie_rate": 0.0, "n": 8}
        record = {"status": status, "config": {"objective": objective, "optimizer": {"lr": lr}}, "evaluations": [end]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))

    run("a", DPO, 1e-4, accuracy=0.7, oracle_reward=0.5)
    run("b", DPO | {"beta": 0.5}, 3e-4, accuracy=0.6, oracle_reward=0.9)
    run("b2", DPO, 1e-4, accuracy=0.9, oracle_reward=0.95)
    run("b3", DPO, 3e-4, accuracy=0.5, oracle_reward=0.9)
    run("c", MAPPO | {"base": DPO}, 1e-3, accuracy=0.6, oracle_reward=0.99)
    run("d", MAPPO | {"base": IPO}, 3e-3, accuracy=0.6)
    run("e", IPO, 5e-3, status="failed", accuracy=0.6)
    return tmp_path


def resolved(text, objective):
    register_best()
    return OmegaConf.create({"objective": objective, "optimizer": {"lr": text}}).optimizer.lr


@pytest.mark.parametrize(
    ("measure", "objective", "lr"),
    [
        ("", DPO, 3e-4),  # by the mean reward, whatever the betas, and not by the one highest
        (",accuracy", DPO, 1e-4),
        ("", MAPPO | {"base": DPO}, 1e-3),
        ("", MAPPO | {"base": IPO}, 3e-3),  # without a reward the accuracy
    ],
)
def test_of_the_same_method_the_value_with_the_highest_mean(folder, measure, objective, lr):
    assert resolved(f"${{best:{folder},optimizer.lr{measure}}}", objective) == lr


@pytest.mark.parametrize(
    ("text", "objective", "why"),
    [
        ("optimizer.lr", {"_target_": "prefopt.objectives.orpo.ORPO"}, "has no run with objective ORPO"),
        ("optimizer.lr", IPO, "have not finished: e"),
        ("optimizer.eps", DPO, "a has no optimizer.eps"),
        ("optimizer.lr,grammatical", DPO, "a has no grammatical"),
    ],
)
def test_what_is_refused(folder, text, objective, why):
    with pytest.raises(InterpolationResolutionError, match=why):
        resolved(f"${{best:{folder},{text}}}", objective)


def test_a_damaged_record_is_no_reason_to_choose_another_run(folder):
    (folder / "b" / "record.json").write_text("{")
    with pytest.raises(InterpolationResolutionError, match="cannot be read: b"):
        resolved(f"${{best:{folder},optimizer.lr}}", DPO)


def test_a_command_line_takes_it_and_a_folder_with_an_interpolation_in_quotes(folder):
    register_best()
    words = [f"dataset.name={folder.name}", f'optimizer.lr="${{best:{folder.parent}/${{dataset.name}},optimizer.lr}}"']
    assert composed("objective=dpo", *words).optimizer.lr == 3e-4
    with pytest.raises(UserError, match=r"^the best optimizer.lr in .*: it has no run with objective ORPO"):
        composed("objective=orpo", f"optimizer.lr=${{best:{folder},optimizer.lr}}")
