"""The loggers beside metrics.jsonl: each row once, also after a kill. wandb without key, without network, and beside
its environment variables."""

import csv
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
from prefopt.training import wandb_logger
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


@pytest.mark.slow
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
    [
        ("WANDB_PROJECT", "other"), ("WANDB_MODE", "disabled"), ("WANDB_DIR", "/elsewhere"), ("WANDB_RUN_ID", "x"),
        ("WANDB_ENTITY", "others"), ("WANDB_RUN_GROUP", "other"), ("WANDB_TAGS", "a"),
    ],
)  # fmt: skip
def test_what_the_environment_says_otherwise_is_refused(name, value, monkeypatch):
    given = WandbConfig(project="prefopt", mode="offline", entity="ours", group="grid", tags=["a", "b"])
    config = LoggerConfig(progress=False, wandb=given)
    check_logger(config)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment says {name}={value}"):
        check_logger(config)
    check_logger(LoggerConfig(progress=False))  # nobody asked for wandb
    if name in ("WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS"):  # what the config leaves open
        check_logger(LoggerConfig(progress=False, wandb=WandbConfig(project="prefopt", mode="offline")))


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
    assert logger.others["wandb"].wandb.rows == [(1, {"train/loss": 0.5})]
    logger.close()
    said = capsys.readouterr().err
    assert asked == ["online", "offline"]
    assert "wandb cannot be reached, so its rows are kept offline in the run's folder: no such host" in said
    assert f"wandb sync {run.folder}/wandb/offline-run-1" in said


@pytest.mark.slow
def test_the_real_wandb_without_network_goes_on_offline(run, monkeypatch, capsys):
    monkeypatch.setattr(wandb_logger, "INIT_SECONDS", 2)
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
    assert second.others["wandb"].wandb.rows == [(step, {"train/loss": step / 2}) for step in replayed]
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [0, 1, 2]


def test_entity_group_and_tags_go_to_wandb(run, monkeypatch):
    given = []
    monkeypatch.setattr(wandb, "init", lambda **settings: given.append(settings) or Recorder(run.folder, "offline"))
    config = WandbConfig(project="p", mode="offline", entity="ours", group="demo", tags=["a", "b"])
    Loggers(run, LoggerConfig(progress=False, wandb=config), None).close()
    assert {key: given[0][key] for key in ("entity", "group", "tags")} == {
        "entity": "ours",
        "group": "demo",
        "tags": ["a", "b"],
    }


def test_each_evaluation_is_a_table_of_at_most_64_samples(run):
    """The real wandb, offline: what it writes into the run's folder."""
    wandb.teardown()
    (run.folder / "samples").mkdir(exist_ok=True)
    prompt, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief"}
    samples = [{"prompt": [prompt], "response": f"r{i}", "reward": i / 2} for i in range(70)]
    samples[1] = {"prompt": [system, prompt], "response": "no oracle"}
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (run.folder / "samples" / "step_0000002.jsonl").write_text(text)
    config = LoggerConfig(progress=False, wandb=WandbConfig(project="p", mode="offline"))
    logger = Loggers(run, config, None)
    logger.log("train", 2, {"loss": 0.5})
    logger.log("heldout", 2, {"loss": 0.4})
    logger.close()
    wandb.teardown()
    (file,) = run.folder.glob("wandb/offline-run-*/files/media/table/heldout/samples_2_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["prompt", "response", "reward"]
    assert len(table["data"]) == 64
    assert table["data"][:3] == [
        ["Hi", "r0", 0.0],
        ["system: Be brief\n\nuser: Hi", "no oracle", None],
        ["Hi", "r2", 1.0],
    ]


def all_rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def csv_rows(run: Run) -> list[dict]:
    """The rows of metrics.csv as those of metrics.jsonl."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    whole = ("step", "n")
    kept = [{key: value for key, value in row.items() if value} for row in read]
    return [{k: v if k == "split" else int(v) if k in whole else float(v) for k, v in row.items()} for row in kept]


def tensorboard_rows(run: Run) -> dict[str, list[tuple[int, float]]]:
    """By tag, all (step, value) in the event files of the run, repeated ones too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


ROWS = [
    ("heldout", 0, {"loss": 0.7, "n": 6}),
    ("train", 1, {"loss": 0.1 + 0.2, "lr": 1e-5}),
    ("train", 2, {"loss": 0.6, "lr": 5e-6, "dpo/new": 3.0, "reliability": [{"n": 1}]}),
    ("heldout", 2, {"loss": 0.65, "n": 6}),
]


def copies(run: Run) -> tuple[list[dict], dict[str, list[tuple[int, float]]]]:
    return csv_rows(run), tensorboard_rows(run)


def test_a_resumed_run_has_each_row_once_in_its_csv_and_in_tensorboard(run):
    """A run that is killed after its checkpoint at step 1, and has logged step 2 by then."""
    pytest.importorskip("tensorboard")
    config = LoggerConfig(progress=False, csv=True, tensorboard=True)
    logger = Loggers(run, config, None)
    for row in ROWS:
        logger.log(*row)
    logger.close()
    whole = copies(run)
    assert whole[0] == [{k: v for k, v in row.items() if k != "reliability"} for row in all_rows(run)]
    assert whole[1]["heldout/loss"] == [(0, pytest.approx(0.7)), (2, pytest.approx(0.65))]
    assert set(whole[1]) == {"heldout/loss", "heldout/n", "train/loss", "train/lr", "train/dpo/new"}

    first = Loggers(run, config, None)
    for row in ROWS[:2]:
        first.log(*row)
    vouched = first.vouch()
    first.log("train", 2, {"loss": 9.0, "lost": 1.0})
    first.file.close()
    first.others["tensorboard"].writer.flush()
    with (run.folder / "metrics.csv").open("a") as file:
        file.write("2,hel")  # a line that the kill has cut
    second = Loggers(run, config, vouched)
    for row in ROWS[2:]:
        second.log(*row)
    second.close()
    assert copies(run) == whole


def test_tensorboard_without_its_package_is_refused(monkeypatch):
    config = LoggerConfig(progress=False, tensorboard=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package tensorboard: pip install -e '.\[tensorboard\]'"):
        check_logger(config)
    check_logger(LoggerConfig(progress=False, csv=True))


def test_a_csv_file_that_cannot_be_written_ends_no_run(run, capsys):
    (run.folder / "metrics.csv").mkdir()
    logger = Loggers(run, LoggerConfig(progress=False, csv=True), None)
    logger.log("train", 1, {"loss": 0.5})
    logger.close()
    assert "csv does not start, and gets no rows" in capsys.readouterr().err
    assert len(all_rows(run)) == 1


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
