"""A policy on the hub: by the page's command, which is hf itself, and by push_to_hub. The hub is a server of tests."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from prefopt.errors import UserError
from prefopt.training.publish import check_push
from prefopt.training.setup import prepare_run, run
from tests.helpers.hub import running_hub
from tests.helpers.tiny import ROOT, records, run_program, save_tiny
from tests.integration.test_security import train_config


def test_the_command_of_the_page_uploads_a_policy_privately(tmp_path):
    (command,) = re.findall(r"^hf (upload .*)$", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    policy = Path(save_tiny(tmp_path / "policy"))
    words = shlex.split(command.replace("YOU/NAME", "lab/mine").replace("runs/RUN/policy", str(policy)))
    with running_hub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "of-a-test", "NO_PROXY": "127.0.0.1"}
        program = str(Path(sys.executable).with_name("hf"))
        process = subprocess.run([program, *words], env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (hub.created["name"], hub.created["visibility"]) == ("mine", "private")
    assert hub.files == {file.name: file.read_bytes() for file in policy.iterdir()}
    assert {"config.json", "model.safetensors"} <= hub.files.keys()
    assert hub.tokens == {"Bearer of-a-test"}


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "of-a-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_run_uploads_its_policy_and_the_same_command_tries_again(online, monkeypatch, overrides, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    arguments = [*overrides(tmp_path / "runs"), "steps=1", "push_to_hub=lab/mine"]
    again = r"(?s)is finished.*not on the hub: .*hf upload lab/mine .*policy \. --private"
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.fails = True
        with pytest.raises(UserError, match=again):
            run(prepare_run(train_config(arguments)), command="a test")
        (record,) = records(tmp_path / "runs")
        assert record["status"] == "finished"
        run(prepare_run(train_config(arguments)))  # it is skipped, and uploaded
    assert records(tmp_path / "runs") == [record]
    policy = tmp_path / "runs" / record["name"] / "policy"
    assert hub.created["visibility"] == "private"
    assert hub.files == {file.name: file.read_bytes() for file in policy.iterdir()}
    assert "README.md" in hub.files
    other = prepare_run(train_config([*overrides(tmp_path / "runs"), "steps=1"]))
    assert other.run.name == record["name"]  # where a policy goes is no part of what it is


@pytest.mark.parametrize(
    ("name", "message"),
    [("a b/c", "is no name on the hub"), ("mine", "push_to_hub=OWNER/mine"), ("a/b/c", "no name")],
)
def test_a_name_that_is_none_is_refused(online, name, message):
    with pytest.raises(UserError, match=message):
        check_push(name)


def test_without_network_token_or_one_name_each_nothing_is_trained(online, monkeypatch, overrides, tmp_path):
    check_push("lab/mine")
    check_push(None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        check_push("lab/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        prepare_run(train_config([*overrides(tmp_path / "runs"), "push_to_hub=lab/mine"]))
    process = run_program("-m", *overrides(tmp_path / "runs"), "seed=0,1", "push_to_hub=lab/mine")
    assert process.returncode == 2
    assert "would all go by one name" in process.stderr
    assert not (tmp_path / "runs").exists()
