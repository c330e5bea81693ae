"""What a run began from: a model of the same name with other contents is another model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.fields import as_messages
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig
from prefopt.evaluation.harness import record_file
from prefopt.evaluation.initial import initial_model
from prefopt.generation.responses import GenerationRequest, generate_resumable
from prefopt.models.fingerprint import model_files
from prefopt.models.load import weights_digest
from prefopt.tracking.policies import Checkpoint
from prefopt.training.config import TrainConfig
from prefopt.training.setup import prepare_run
from prefopt.utils import signals
from tests.helpers.tiny import CHATML, ROOT, records, run_program, save_tiny, tiny_model, tiny_tokenizer


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(values | changes))


def retrain(model: Path) -> None:
    tiny_model(len(tiny_tokenizer()), seed=5).save_pretrained(model)


def new_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text(CHATML.replace("assistant\n", "assistant \n"))


CHANGES = {
    "weights": retrain,
    "config": lambda model: edit(model / "config.json", rope_theta=5000.0),
    "tokenizer and template": new_template,
}
OTHERS = {
    "config": lambda model: edit(model / "generation_config.json", eos_token_id=[2, 7]),
    "tokenizer and template": lambda model: edit(model / "tokenizer_config.json", add_bos_token=True),
}


@pytest.mark.parametrize(("part", "change"), [*CHANGES.items(), *OTHERS.items()])
def test_a_changed_file_changes_its_part_of_the_model_alone(part, change, tmp_path):
    model = ModelConfig("tiny", str(save_tiny(tmp_path)))
    before = model_files(model)
    assert set(before) == set(CHANGES)
    change(tmp_path)
    after = model_files(model)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_what_changes_no_number_is_no_part_of_the_model(tmp_path):
    model = save_tiny(tmp_path / "model")
    before = model_files(ModelConfig("tiny", str(model)))
    edit(model / "config.json", transformers_version="9", _name_or_path="elsewhere")
    edit(model / "generation_config.json", repetition_penalty=3.0)
    edit(model / "trainer_state.json", epoch=3)
    (model / "README.md").write_text("# trained again")
    os.utime(model / "model.safetensors")
    moved = shutil.move(model, tmp_path / "other")
    assert model_files(ModelConfig("another name", str(moved))) == before


def test_the_files_that_keys_name_are_parts_of_the_model(tmp_path):
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "tokenizer")
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    plain = ModelConfig("tiny", str(model))
    for config, change in (
        (replace(plain, tokenizer=str(other)), lambda: new_template(other)),
        (replace(plain, chat_template=str(template)), lambda: template.write_text(CHATML + " ")),
    ):
        before = model_files(config)
        change()
        after = model_files(config)
        assert {name for name in before if before[name] != after[name]} == {"tokenizer and template"}
    gguf = tmp_path / "model.gguf"
    digests = []
    for content in (b"GGUF", b"GGUF2"):
        gguf.write_bytes(content)
        digests.append(model_files(ModelConfig("tiny", str(gguf))))
    assert [set(d) for d in digests] == [{"weights"}] * 2
    assert digests[0] != digests[1]
    assert model_files(ModelConfig("tiny", "nobody/nothing")) == {}


def test_files_in_the_hubs_cache_are_known_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    config = ModelConfig("tiny", "a/b")

    def publish(commit: str, weights: str) -> dict[str, str]:
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs" / weights).write_bytes(b"")  # the content is not read
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{weights}")
        (snapshot / "config.json").write_text('{"model_type": "llama"}')
        return model_files(config)

    first, readme, trained = publish("1" * 40, "abc"), publish("2" * 40, "abc"), publish("3" * 40, "def")
    assert first == readme  # another commit with the same files
    assert first["weights"] != trained["weights"]
    assert model_files(replace(config, revision="1" * 40)) == first


def test_buffers_in_the_checkpoint_are_weights():
    def digest(value: float, persistent: bool) -> str:
        model = tiny_model(40)
        model.model.layers[0].register_buffer("bias", torch.tensor(value), persistent)
        return weights_digest(model)

    assert digest(0.0, True) != digest(1.0, True)
    assert digest(0.0, False) == digest(1.0, False) == weights_digest(tiny_model(40))


@pytest.fixture
def planned(overrides, tmp_path):
    """planned(*changes) -> the run of this command line, as `prefopt.train` prepares it."""
    register(TrainConfig)

    def plan(*changes: str):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("train", [*overrides(tmp_path / "runs"), *changes]), TrainConfig)
        return prepare_run(config).run

    return plan


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory) -> Path:
    """The folder of model/ and runs/ with a finished run of it."""
    folder = tmp_path_factory.mktemp("finished")
    save_tiny(folder / "model")
    for _ in range(2):
        process = run_program(*overrides(folder / "runs"), f"model.path={folder / 'model'}")
        assert process.returncode == 0, process.stderr
    assert "finished, skipped" in process.stderr
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize("part", CHANGES)
def test_a_finished_run_of_another_model_is_not_skipped(part, finished, copy, overrides):
    args = [*overrides(finished / "runs"), f"model.path={finished / 'model'}"]
    # Alone, or in a sweep, which starts nothing.
    command = ["-m", *args, "seed=0,1"] if part == "weights" else args
    try:
        CHANGES[part](finished / "model")
        refused = run_program(*command)
        assert refused.returncode == 2, refused.stderr
        assert f"began from another model than there is now (changed: its {part})" in refused.stderr
        assert "model.name=NAME" in refused.stderr
        assert len(records(finished / "runs")) == 1
        (record,) = records(finished / "runs")
        with pytest.raises(UserError, match=f"changed: its {part}"):
            initial_model(str(finished / "runs" / record["name"]))
    finally:
        shutil.rmtree(finished / "model")
        shutil.copytree(copy / "model", finished / "model")
    assert record == records(copy / "runs")[0]
    assert initial_model(str(finished / "runs" / record["name"])).path == str(finished / "model")


@pytest.mark.parametrize("part", CHANGES)
def test_an_interrupted_run_does_not_go_on_with_another_model(part, planned, tmp_path):
    model = save_tiny(tmp_path / "model")
    run = planned(f"model.path={model}")
    run.start(model={f"its {name}": value for name, value in model_files(ModelConfig("tiny", str(model))).items()})
    run.interrupt("Ctrl-C")
    CHANGES[part](model)
    planned(f"model.path={model}")  # nothing is lost yet: it begins with what is there now
    (run.checkpoints / "step_0000001").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"was begun from another model than there is now \(changed: its {part}\)"):
        planned(f"model.path={model}")


def test_adapter_and_reference_are_parts_of_what_a_run_began_from(planned, tmp_path):
    from prefopt.training.setup import model_parts

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter / "adapter_config.json", r=8)
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "reference")
    run = planned(f"model.path={model}", f"model.adapter={adapter}", f"reference_model={other}")

    def config():
        register(TrainConfig)
        values = run.record["config"]
        return replace(TrainConfig(), model=ModelConfig(**values["model"]), reference_model=values["reference_model"])

    before = model_parts(config())
    edit(adapter / "adapter_config.json", r=4)
    retrain(other)
    after = model_parts(config())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"its adapter", "the weights of reference_model"}


def test_the_record_of_an_evaluation_is_that_of_one_training(tmp_path):
    model = save_tiny(tmp_path / "model")
    config = HarnessConfig(run=None, output=str(tmp_path), chat_template=False)

    def file() -> Path:
        return record_file(config, tmp_path, Checkpoint("tiny", ModelConfig("tiny", str(model))), "arc_easy", {})

    first = file()
    os.utime(model / "model.safetensors")
    assert file() == first
    retrain(model)
    assert file() != first


def test_answers_in_the_cache_are_those_of_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
    model, cache = save_tiny(tmp_path / "model"), tmp_path / "responses"
    cache.mkdir()
    prompts = [as_messages("Hi"), as_messages("Review the train.")]
    sampling = SamplingConfig(1.0, 1.0, 6, 4)
    request = GenerationRequest(ModelConfig("t", str(model)), prompts, sampling, 1, 0, "transformers", "cpu", "float32")

    def kept() -> int:
        generate_resumable(request, cache, show=False)
        return len(list(cache.glob("*.jsonl")))

    assert [kept(), kept()] == [1, 1]
    edit(model / "generation_config.json", repetition_penalty=3.0)
    assert kept() == 1
    edit(model / "generation_config.json", eos_token_id=[2, 71])
    assert kept() == 2
    new_template(model)
    assert kept() == 3
    edit(model / "config.json", sliding_window=4, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    assert kept() == 4
    retrain(model)
    assert kept() == 5
