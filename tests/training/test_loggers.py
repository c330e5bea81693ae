"""wandb as a logger: without key, without network, after a kill, and beside its environment variables."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import LoggerConfig, WandbConfig
from prefopt.errors import UserError
from prefopt.tracking.run import Run
from prefopt.training import loggers
from prefopt.training.config import TrainConfig
from prefopt.training.loggers import Loggers, check_logger
from tests.helpers.tiny import ROOT, run_program

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path, monkeypatch):
    """No key, and a server that is not there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def online() -> LoggerConfig:
    return LoggerConfig(progress=False, wandb=WandbConfig(project="prefopt", mode="online"))


def test_online_without_a_key_is_refused_first(overrides, tmp_path):
    process = run_program(
        *overrides(tmp_path / "runs"), "logger=wandb", "logger.wandb.mode=online", env=dict(os.environ)
    )
    assert process.returncode == 2, process.stderr
    assert "logger.wandb.mode=online needs wandb's key" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_a_key_of_the_wrong_form_is_refused_without_it(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abc")
    with pytest.raises(UserError, match=r"needs wandb's key: .*must have 40\+ characters") as error:
        check_logger(online())
    assert "0123456789abc" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_PROJECT", "other"), ("WANDB_MODE", "disabled"), ("WANDB_DIR", "/elsewhere"), ("WANDB_RUN_ID", "x")],
)
def test_what_the_environment_says_otherwise_is_refused(name, value, monkeypatch):
    config = LoggerConfig(progress=False, wandb=WandbConfig(project="prefopt", mode="offline"))
    check_logger(config)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment says {name}={value}"):
        check_logger(config)
    check_logger(LoggerConfig(progress=False))  # nobody asked for wandb


class Recorder:
    """wandb's run, as far as the loggers use it."""

    def __init__(self, folder: Path, mode: str, step: int = 0):
        self.dir, self.offline, self.step, self.rows = str(folder / "files"), mode == "offline", step, []

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self):
        pass


@pytest.fixture
def run(overrides, tmp_path) -> Run:
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("train", [*overrides(tmp_path), "logger=wandb"]), TrainConfig)
    made = Run(asdict(config), "dpo", {})
    made.folder.mkdir(exist_ok=True)
    return made


def test_without_network_the_rows_are_kept_offline_and_a_line_says_how_to_upload_them(run, monkeypatch, capsys):
    asked = []

    def init(mode, **settings):
        asked.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no such host")
        return Recorder(run.folder / "wandb" / "offline-run-1", mode)

    monkeypatch.setattr(wandb, "init", init)
    logger = Loggers(run, online(), None)
    logger.log("train", 1, {"loss": 0.5})
    assert logger.wandb.rows == [(1, {"train/loss": 0.5})]
    logger.close()
    said = capsys.readouterr().err
    assert asked == ["online", "offline"]
    assert "wandb cannot be reached, so its rows are kept offline in the run's folder: no such host" in said
    assert f"wandb sync {run.folder}/wandb/offline-run-1" in said


def test_the_real_wandb_without_network_goes_on_offline(run, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "INIT_SECONDS", 2)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    wandb.teardown()  # what an earlier test has started knows another server
    check_logger(online())
    logger = Loggers(run, online(), None)
    logger.log("train", 1, {"loss": 0.5})
    logger.close()
    wandb.teardown()
    (folder,) = (run.folder / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    said = capsys.readouterr().err
    assert "kept offline in the run's folder" in said
    assert f"wandb sync {folder}" in said


def test_a_wandb_that_does_not_start_ends_no_run(run, monkeypatch, capsys):
    def init(**settings):
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", init)
    for config in (online(), LoggerConfig(progress=False, wandb=WandbConfig(project="p", mode="offline"))):
        logger = Loggers(run, config, None)
        logger.log("train", 1, {"loss": 0.5})
        logger.close()
        assert "wandb does not start, and gets no rows" in capsys.readouterr().err
        assert len(run.metrics_file.read_text().splitlines()) == 1


@pytest.mark.parametrize(("known", "replayed"), [(0, [0, 1, 2]), (2, [2])])
def test_the_steps_that_wandb_lacks_after_a_kill_are_replayed(known, replayed, run, monkeypatch):
    config = LoggerConfig(progress=False, wandb=WandbConfig(project="prefopt", mode="offline"))
    monkeypatch.setattr(wandb, "init", lambda mode, **settings: Recorder(run.folder, mode))
    first = Loggers(run, config, None)
    for step in range(3):
        first.log("train", step, {"loss": step / 2})
    vouched = first.vouch()
    first.log("train", 3, {"loss": 9.0})  # after the checkpoint: the run computes it again
    first.file.close()
    monkeypatch.setattr(wandb, "init", lambda mode, **settings: Recorder(run.folder, mode, known))
    second = Loggers(run, config, vouched)
    assert second.wandb.rows == [(step, {"train/loss": step / 2}) for step in replayed]
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [0, 1, 2]


def test_training_does_not_end_for_its_logger(run, monkeypatch, capsys):
    def broken(self, numbers, step):
        raise wandb.errors.Error("the service is gone")

    monkeypatch.setattr(Recorder, "log", broken)
    monkeypatch.setattr(wandb, "init", lambda mode, **settings: Recorder(run.folder, mode))
    logger = Loggers(run, LoggerConfig(progress=False, wandb=WandbConfig(project="p", mode="offline")), None)
    for step in (1, 2):
        logger.log("train", step, {"loss": 0.5})
    logger.close()
    assert capsys.readouterr().err.count("wandb failed at step 1") == 1
    assert len(run.metrics_file.read_text().splitlines()) == 2
