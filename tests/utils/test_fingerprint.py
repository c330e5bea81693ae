"""What a run is, and when a cached result is made again."""

import dataclasses
import importlib
import inspect
import shutil
import sys
from pathlib import Path

import pytest

from prefopt.data.collate import LAYOUTS, Layout
from prefopt.generation.sampler import sample
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import cache_folder
from prefopt.utils.fingerprint import class_names, fingerprint
from tests.helpers.tiny import ROOT, SAMPLED, run_program, tiny_model


def test_moving_a_class_of_prefopt_changes_no_identity():
    here = {
        "objective": {"_target_": "prefopt.objectives.mappo.MaPPO", "base": {"_target_": "prefopt.a.DPO", "beta": 1}}
    }
    moved = {"objective": {"base": {"beta": 1, "_target_": "prefopt.b.c.DPO"}, "_target_": "prefopt.elsewhere.MaPPO"}}
    assert fingerprint(here) == fingerprint(moved)
    assert fingerprint({"_target_": "mine.DPO"}) != fingerprint({"_target_": "yours.DPO"})
    assert fingerprint({"_target_": "prefopt.a.DPO"}) != fingerprint({"_target_": "prefopt.a.IPO"})


def test_class_names_changes_targets_alone():
    @dataclasses.dataclass
    class Config:
        path: str
        nodes: tuple

    config = Config("prefopt.a.B", ({"_target_": "prefopt.a.B", "x": [1, 2.0, None]}, "text"))
    assert class_names(config) == {"path": "prefopt.a.B", "nodes": [{"_target_": "B", "x": [1, 2.0, None]}, "text"]}


def test_values_and_source_both_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "decides_something.py"
    file.write_text("def f():\n    return 1\n")
    module = importlib.import_module("decides_something")
    before = fingerprint([1], module)
    assert before == fingerprint([1], module.f) == fingerprint([1], module, module.f)
    assert before not in (fingerprint([2], module), fingerprint([1]))
    file.write_text("def f():\n    return 2\n")
    assert fingerprint([1], module) != before
    del sys.modules["decides_something"]


def test_a_value_that_json_cannot_write_is_refused():
    with pytest.raises(TypeError):
        fingerprint([object()])


@pytest.mark.slow
def test_an_edited_sampler_draws_anew_and_an_edited_collator_does_not_tokenize_again(overrides, tmp_path):
    copy, cache = tmp_path / "copy", tmp_path / "cache"
    for folder in ("prefopt", "conf", "sweeps"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = [*SAMPLED, "steps=1"]

    def cached(runs: str) -> dict[str, set[str]]:
        process = run_program(*overrides(tmp_path / runs), *arguments, cwd=copy, env={"PREFOPT_CACHE": str(cache)})
        assert process.returncode == 0, process.stderr
        return {
            kind: {f.name for f in (cache / kind).iterdir()} for kind in ("initial_samples", "tokenized", "reference")
        }

    before = cached("before")
    for edited in (sample, Layout):
        with (copy / Path(inspect.getfile(inspect.unwrap(edited))).relative_to(ROOT)).open("a") as file:
            file.write("# edited\n")
    after = cached("after")
    assert len(before["initial_samples"]) == 1
    assert len(after["initial_samples"]) == 2
    assert after["tokenized"] == before["tokenized"]
    assert len(after["reference"]) == 2  # a log-prob does depend on how pairs are laid out


def test_the_models_resolved_configuration_is_part_of_what_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    plain, windowed = tiny_model(300), tiny_model(300, rope_parameters={"rope_type": "yarn", "factor": 2.0})
    score = LogprobComputer("float32", True)
    folders = {cache_folder(model, "the same weights", LAYOUTS["packed"], score) for model in (plain, windowed)}
    assert len(folders) == 2
