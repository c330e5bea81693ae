"""Secrets in texts and records: all of them masked, and nothing else."""

import json

import pytest

from prefopt.utils.files import write_json
from prefopt.utils.redact import find_secret, redact, redact_values

KEY = "sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8xYz-abcdefgh"


@pytest.fixture(autouse=True)
def no_other_secrets(monkeypatch):
    monkeypatch.setattr("os.environ", {})


def secret(monkeypatch, value: str, name: str = "THE_API_KEY") -> None:
    monkeypatch.setenv(name, value)


RECORD = {
    "status": "finished",
    "metrics": {"heldout_accuracy": 0.5, "oracle_reward": None},
    "best": "heldout_accuracy",
    "note": "held-out accuracy of the finished run",
    "flags": [True, 12345678, "oracle_reward"],
    "ruler": "-" * 80 + " " * 20,
}


@pytest.mark.parametrize(
    "value",
    ["finished", "oracle_reward", "heldout_accuracy", "Held-Out Accuracy", "ACCURACY", "        ", "\t\n      ",
     "objective.beta", "accuracy of the finished"],
    ids=repr,
)  # fmt: skip
def test_a_value_that_is_a_word_or_blank_changes_nothing(value, monkeypatch, tmp_path):
    secret(monkeypatch, value)
    write_json(tmp_path / "record.json", RECORD)
    assert json.loads((tmp_path / "record.json").read_text()) == RECORD
    text = json.dumps(RECORD, indent=8)
    assert redact(text) == text
    assert find_secret(text) is None


@pytest.mark.parametrize(
    "value", ["heldout_accuracy1", "12345678", "finished-1", "oracle_reward:x9", '": "fini', "--------1"]
)
def test_keys_and_states_of_a_record_stay(value, monkeypatch, tmp_path):
    """A secret damages texts at most: what programs read again stays."""
    secret(monkeypatch, value)
    write_json(tmp_path / "record.json", RECORD)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record.keys() == RECORD.keys()
    assert (record["status"], record["metrics"], record["best"]) == ("finished", RECORD["metrics"], "heldout_accuracy")
    assert record["flags"] == RECORD["flags"]


@pytest.mark.parametrize("start", range(0, len(KEY) - 8, 3))
@pytest.mark.parametrize("length", [8, 12, 20])
def test_fragments_of_a_key_are_masked(start, length, monkeypatch):
    secret(monkeypatch, KEY)
    fragment = KEY[start : start + length]
    text = f"Incorrect API key provided: {fragment}. See the docs."
    if len(fragment) >= 8:
        assert redact(text) == "Incorrect API key provided: ***. See the docs."


def test_the_two_ends_of_a_key_are_masked(monkeypatch):
    secret(monkeypatch, KEY)
    assert redact(f"key {KEY[:10]}********{KEY[-8:]}!") == "key ***************!".replace("*" * 15, "*" * 14)
    assert redact(f"{KEY[:7]} {KEY[3:10]}") == f"{KEY[:7]} {KEY[3:10]}"  # shorter parts are in many texts


def test_what_a_key_shares_with_other_texts_stays(monkeypatch):
    """A word inside of a key, the beginnings of URLs and of files."""
    secret(monkeypatch, "x9-finished-2b7")
    secret(monkeypatch, "https://host.example/a1b2c3d4e5", "HOOK_TOKEN")
    text = "finished: https://huggingface.co/models and /home/me/models"
    assert redact(text) == text
    assert redact("at https://host.example/a1b2c3d4e5!") == "at ***!"


def test_the_path_of_a_file_is_no_secret(monkeypatch, tmp_path):
    file = tmp_path / "key1.json"
    file.write_text("{}")
    secret(monkeypatch, str(file), "GOOGLE_APPLICATION_CREDENTIALS")
    assert redact(f"reading {file}") == f"reading {file}"
    file.unlink()


def test_a_value_with_a_newline_at_its_end_is_masked_without(monkeypatch):
    secret(monkeypatch, f"{KEY}\n")
    assert redact(f"Bearer {KEY},") == "Bearer ***,"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:hunter2@host:8000/v1", "http://me:***@host:8000/v1"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("to https://a.b:p%40ss@host/x and https://c:d@host/y", "to https://a.b:***@host/x and https://c:***@host/y"),
        ("postgres://me:p@ss:w@host/db", "postgres://me:***@host/db"),
        ("GET https://host/v1?api_key=abc&n=2&token=x#y", "GET https://host/v1?api_key=***&n=2&token=***#y"),
        ("http://localhost:8000/v1 and me@host.org", "http://localhost:8000/v1 and me@host.org"),
        ("ssh://git@github.com/a/b, a:b@c", "ssh://git@github.com/a/b, a:b@c"),
        ("https://host/a?n=1&keys=2", "https://host/a?n=1&keys=2"),
    ],
)
def test_passwords_in_urls_are_masked(text, masked):
    assert redact(text) == masked
    assert redact_values({"a": [text]}) == {"a": [masked]}
