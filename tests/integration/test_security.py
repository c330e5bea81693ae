"""SECURITY.md's promises, each by an attack: what it would do if it worked is to create a file, or to show a key.

Those on Hydra's own section are in tests/cli/test_hydra_guard.py."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from prefopt.config.parse import build, parse, register
from prefopt.config.schema import ModelConfig
from prefopt.data import sources
from prefopt.data.formats import Format, Pairs
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.harness import load
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge, LanguageModelJudge
from prefopt.launch.base import Launcher
from prefopt.launch.estimate import parameters
from prefopt.launch.slurm import Slurm
from prefopt.launch.sweep import command_of
from prefopt.models import safe_weights
from prefopt.models.load import (
    check_model,
    load_custom_reward_model,
    load_model,
    load_reward_model,
    load_tokenizer,
    load_trained_reward_model,
    weights_digest,
)
from prefopt.models.lora import merge_adapter
from prefopt.objectives.base import Objective
from prefopt.reporting.compare import Answer, Compared
from prefopt.reporting.compare import page as compare_page
from prefopt.reporting.html import page as papers_page
from prefopt.reporting.paper_common import Figure
from prefopt.reporting.style import plotting, save
from prefopt.reporting.tables import Tabular, text_columns
from prefopt.tracking.policies import Checkpoint
from prefopt.tracking.record import update_record, write_record
from prefopt.tracking.status import RunsConfig, select
from prefopt.training.checkpoint import load_checkpoint
from prefopt.training.config import TrainConfig, check
from prefopt.training.setup import prepare_run
from prefopt.utils import redact
from prefopt.utils.files import resolve_path, write_json
from prefopt.utils.tensor_store import TensorCache
from tests.helpers.tiny import ENVIRONMENT, ROOT

KEY = "sk-live-0123456789-abcdefgh"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)> \"' onload=alert(3) </pre></text>"


class Bomb:
    """What is unpickled creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that no attack may create. The bomb does go off where it is let."""
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Bomb(mark)))
    mark.unlink()
    yield mark
    assert not mark.exists()


def saved(mark: Path) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, stream)
    return stream.getvalue()


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder / "model", tmp_path / "model"))


def train_config(overrides: list[str], *changes: str) -> TrainConfig:
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("train", [*overrides, *changes]), TrainConfig)


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "global_step1/mp_rank_00_model_states.pt", "model.pth"])
@pytest.mark.parametrize("load", [load_model, load_reward_model])
def test_weights_that_are_pickles_are_named_and_not_read(name, load, model, mark):
    (model / "model.safetensors").unlink()
    (model / name).parent.mkdir(exist_ok=True)
    for data in (saved(mark), pickle.dumps(Bomb(mark))):
        (model / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{re.escape(name)} is a pickle .* is not read"):
            load(ModelConfig("m", str(model)), "cpu")


def test_a_pickle_under_another_name_is_none(model, mark, tmp_path):
    for data in (saved(mark), pickle.dumps(Bomb(mark))):
        (model / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"no model can be loaded from model\.path"):
            load_model(ModelConfig("m", str(model)), "cpu")
        step = tmp_path / "checkpoints" / "step_0000001"
        step.mkdir(parents=True, exist_ok=True)
        (step / "meta.json").write_text('{"step": 1}')
        (step / "weights.safetensors").write_bytes(data)
        with pytest.raises((UserError, SafetensorError)):
            load_checkpoint(step)
        folder = tmp_path / "store"
        folder.mkdir(exist_ok=True)
        (folder / f"{hashlib.sha256(data).hexdigest()[:24]}.safetensors").write_bytes(data)
        with pytest.raises((UserError, SafetensorError)), TensorCache(folder).locked("x"):
            pass
        shutil.rmtree(folder)


@pytest.fixture
def pickled(mark, monkeypatch) -> bytes:
    """A pickle that creates a file as soon as anything gives it to torch.load: not by its default `weights_only`."""
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **settings: original(*args, **settings | {"weights_only": False}))
    return saved(mark)


def name_pickle(model: Path, way: str, data: bytes) -> None:
    """Let the files of `model` say, in one `way`, that weights are in a pickle beside or below its safetensors."""
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    if way.startswith("transformers_weights"):
        config["transformers_weights"] = {
            "transformers_weights": "adapter_model.bin",
            "transformers_weights of an index": "other.safetensors.index.json",
            "transformers_weights outside": "../weights.safetensors",
        }[way]
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.bin")}
    file = "other" if "of an index" in way else "model"
    if "index" in way:
        (model / f"{file}.safetensors.index.json").write_text(json.dumps(index))
        (model / "model.safetensors").unlink()
    if way == "adapter":
        (model / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1}')
    (model / "config.json").write_text(json.dumps(config))
    for name in ("weights.bin", "adapter_model.bin", "../weights.safetensors"):
        (model / name).write_bytes(data)


WAYS = ["transformers_weights", "transformers_weights of an index", "transformers_weights outside", "index", "adapter"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reader", ["policy", "reward model", "trained reward model", "custom", "harness"])
def test_no_file_of_a_model_leads_to_a_pickle(reader, way, model, pickled):
    name_pickle(model, way, pickled)
    config = ModelConfig("m", str(model))
    harness = HarnessConfig(batch_size=1, precision="float32", device="cpu", chat_template=False)
    read = {
        "policy": lambda: load_model(config, "cpu"),
        "reward model": lambda: load_reward_model(config, "cpu"),
        "trained reward model": lambda: load_trained_reward_model(config, "cpu"),
        "custom": lambda: load_custom_reward_model(config, "cpu"),
        "harness": lambda: load(Checkpoint("c", config), harness),
    }[reader]
    with pytest.raises(UserError, match=r"no safetensors file of its folder|adapter"):
        read()


@pytest.mark.parametrize("way", ["transformers_weights", "index"])
def test_code_that_comes_to_a_pickle_all_the_same_is_stopped_before_it_reads(way, model, pickled, monkeypatch):
    """What no check of names knows: the pickle is refused where it would be opened."""
    monkeypatch.setattr(safe_weights, "check_weights", lambda path, revision=None: None)
    name_pickle(model, way, pickled)
    with pytest.raises(UserError, match="is a pickle, which could run any code"):
        load_model(ModelConfig("m", str(model)), "cpu")


def test_weights_in_shards_and_under_another_name_are_read(model):
    tensors = load_file(model / "model.safetensors")
    expected = weights_digest(load_model(ModelConfig("m", str(model)), "cpu"))
    (model / "model.safetensors").rename(model / "shard-1.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard-1.safetensors")})
    (model / "model.safetensors.index.json").write_text(index)
    assert weights_digest(load_model(ModelConfig("m", str(model)), "cpu")) == expected
    (model / "model.safetensors.index.json").unlink()
    values = json.loads((model / "config.json").read_text()) | {"transformers_weights": "shard-1.safetensors"}
    (model / "config.json").write_text(json.dumps(values))
    assert weights_digest(load_model(ModelConfig("m", str(model)), "cpu")) == expected


def test_a_pickle_beside_a_gguf_file_is_not_read(mark, pickled, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickled)
    (tmp_path / "m.gguf").write_bytes(pickled)
    with pytest.raises(UserError, match="holds an adapter"):
        load_model(ModelConfig("m", str(tmp_path / "m.gguf")), "cpu")


def test_an_adapters_settings_lead_to_no_pickle(tiny_folder, pickled, tmp_path):
    folder = tmp_path / "adapter"
    peft_model = get_peft_model(load_model(ModelConfig("m", str(tiny_folder / "model")), "cpu"), LoraConfig(r=1))
    peft_model.save_pretrained(folder)
    (tmp_path / "covariance.pt").write_bytes(pickled)
    values = json.loads((folder / "adapter_config.json").read_text())
    values |= {"init_lora_weights": "corda", "corda_config": {"cache_file": str(tmp_path / "covariance.pt")}}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with contextlib.suppress(UserError):  # peft may also leave the file alone, and load the tensors
        merge_adapter(load_model(ModelConfig("m", str(tiny_folder / "model")), "cpu"), str(folder))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(pickled)
    with pytest.raises(UserError, match="would be a pickle"):
        merge_adapter(load_model(ModelConfig("m", str(tiny_folder / "model")), "cpu"), str(folder))


def test_an_adapter_that_is_a_pickle_is_refused(tiny_folder, overrides, mark, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1}')
    (folder / "adapter_model.bin").write_bytes(saved(mark))
    with pytest.raises(UserError, match="would be a pickle"):
        prepare_run(train_config(overrides(tmp_path), f"model.adapter={folder}"))


def test_lm_eval_is_told_to_read_safetensors_and_no_code(monkeypatch):
    import lm_eval.models.huggingface

    seen: dict = {}
    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", lambda **settings: seen.update(settings) or MagicMock())
    config = HarnessConfig(batch_size=1, precision="float32", device="cpu", chat_template=False)
    load(Checkpoint("c", ModelConfig("c", "folder")), config)
    assert (seen["use_safetensors"], seen["trust_remote_code"]) == (True, False)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz", "folder"])
def test_data_that_are_pickles_are_refused(name, mark, tmp_path):
    file = tmp_path / name
    if name == "folder":
        file.mkdir()
        file /= "train.pkl"
    for data in (saved(mark), pickle.dumps(Bomb(mark))):
        file.write_bytes(data)
        with pytest.raises(UserError):
            list(read_rows(str(tmp_path / name)))


def test_a_parquet_file_with_a_pickled_type_is_data(mark, tmp_path):
    """CVE-2023-47248."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(mark)),
    }
    table = pa.table([pa.array(["Hi"])], schema=pa.schema([pa.field("prompt", pa.string(), metadata=metadata)]))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "rows.parquet"))] == [{"prompt": "Hi"}]


# Code that comes with a model, a data set or a config


def code(mark: Path) -> str:
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"


@pytest.mark.parametrize("known", [True, False])
def test_a_models_own_code_is_not_run(known, model, mark):
    (model / "evil.py").write_text(code(mark))
    for name, entry in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        told = json.loads((model / name).read_text()) | {"auto_map": entry}
        if not known:
            told |= {"model_type": "evil", "tokenizer_class": "Evil"}
            told.pop("architectures", None)
        (model / name).write_text(json.dumps(told))
    config = ModelConfig("m", str(model))
    load = [check_model, load_tokenizer, lambda c: load_model(c, "cpu")]
    for function in load:
        if known:
            function(config)  # transformers has this architecture itself
        elif function is not load_tokenizer:
            with pytest.raises(UserError, match="can be loaded from model"):
                function(config)
        else:
            with pytest.raises((UserError, AttributeError)):
                function(config)
    if not known:
        with pytest.raises(UserError, match="can be loaded from model"):
            parameters(config)


def test_a_chat_template_cannot_reach_python(model, mark):
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (model / "chat_template.jinja").write_text(attack)
    with pytest.raises(UserError):
        load_tokenizer(ModelConfig("m", str(model)))


def test_a_data_sets_script_is_not_run(mark, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(code(mark))
    with pytest.raises(UserError, match="holds no file of rows"):
        list(read_rows(str(folder)))


TARGETS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.exec",
    "pathlib.Path.touch",
    "prefopt.launch.slurm.submit",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("base", [Objective, Format, Judge, Launcher])
def test_a_target_that_is_none_of_ours_is_not_called(target, base, mark):
    node = {"_target_": target, "command": f"touch {mark}", "args": f"touch {mark}", "shell": True}
    with pytest.raises(UserError, match=r"where\._target_"):
        build(OmegaConf.create(node), base, "where")
    inside = {"_target_": "prefopt.objectives.mappo.MaPPO", "base": node, "nll_weight": 0}
    with pytest.raises(UserError, match=r"objective\.base\._target_"):
        build(OmegaConf.create(inside), Objective, "objective")


def test_what_stands_in_a_row_is_text(mark, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    texts = ["_target_: os.system", "${oc.env:THE_KEY}", "!!python/object/apply:os.system ['touch x']", "$(touch x)"]
    rows = [
        {"_target_": "os.system", "command": f"touch {mark}", "prompt": "Hi", "chosen": t, "rejected": "n"}
        for t in texts
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [Pairs()(row) for _, row in read_rows(str(tmp_path / "rows.jsonl"))]
    assert [pair.chosen for pair in pairs] == texts  # type: ignore[union-attr]


@pytest.mark.parametrize("tasks", ["/tmp/evil.yaml", "../evil", ["arc_easy", "evil/../../x"], "x;$(touch x)"])
def test_a_task_is_a_name_and_no_file(tasks):
    config = HarnessConfig(
        ModelConfig("m", "p"), {}, None, tasks, "final", "out", None, False, None, 1, "float32", "cpu"
    )
    with pytest.raises(UserError, match="tasks becomes part of file names"):
        check_harness(config)


def test_code_of_a_folder_of_tasks_runs_where_include_names_it_alone(mark, tmp_path, monkeypatch):
    import lm_eval.tasks

    from prefopt.evaluation.harness import run_pending
    from prefopt.evaluation.tasks import preflight, read_own_tasks, task_manager

    # lm-eval's own tasks take seconds to read.
    read = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **settings: read(**settings | {"include_defaults": False}))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n\ndef text(doc):\n    return 'Hi'\n")
    (folder / "rows.jsonl").write_text('{"answer": 0}\n')
    (folder / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: !function code.text\n"
        "doc_to_choice: [a, b]\ndoc_to_target: answer\n"
    )
    monkeypatch.chdir(folder)
    config = HarnessConfig(
        ModelConfig("m", "p"), {}, None, "own_task", "final", "out", None, False, None, 1, "float32", "cpu"
    )
    with pytest.raises(UserError, match=r"task own_task cannot be loaded(?s:.*)need include=FOLDER"):
        run_pending(config)
    own = read_own_tasks(str(folder))
    assert not mark.exists()
    preflight(["own_task"], task_manager(own, ["own_task"]))
    assert mark.exists()
    mark.unlink()


JUDGE = {"prompt_template": "x", "fn_completions": "openai_completions", "completions_kwargs": {"max_tokens": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"fn_completions": "huggingface_local_completions"},
        {"completions_kwargs": {"client_config_path": "evil.yaml"}},  # it may name any class to be called
        {"completions_kwargs": {"openai_api_base": "http://elsewhere"}},
        {"completions_kwargs": {"client_kwargs": {"base_url": "http://elsewhere"}}},
    ],
)
def test_a_judges_description_chooses_no_code_and_no_host(change):
    with pytest.raises(ValueError, match=r"annotator\.(fn_completions|completions_kwargs)"):
        LanguageModelJudge("j", [0, 0], annotator=JUDGE | change)
    LanguageModelJudge("j", [0, 0], annotator=JUDGE)
    with pytest.raises(ValueError, match="one of alpaca-eval's judges"):
        LanguageModelJudge("../../evil", [0, 0])


# Keys


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("THE_API_KEY", KEY)
    return KEY


def test_a_config_with_a_key_is_refused_without_showing_it(key, overrides, tmp_path):
    for change in ("${oc.env:THE_API_KEY}", f"x/{key}/y"):
        with pytest.raises(UserError, match="holds the value of the environment variable THE_API_KEY") as error:
            train_config(overrides(tmp_path), f"dataset.train='{change}'")
        assert key not in str(error.value)
    with pytest.raises(UserError, match=r"where\.pairing holds the value"):
        build(OmegaConf.create({"_target_": "prefopt.data.formats.ScoredResponses", "pairing": key}), Format, "where")


@pytest.mark.parametrize("field", ["key", "base_url"])
def test_a_key_in_the_wrong_field_is_not_shown(field):
    value = {"key": "abcDEF0123456789", "base_url": "http://me:abcDEF0123456789@host/v1"}[field]
    for given in (value, f"http://host/v1?key={value[-9:]}" if field == "base_url" else value):
        with pytest.raises(ValueError, match=field) as error:
            LanguageModelJudge("j", [0, 0], annotator=JUDGE, **{field: given})
        assert "abcDEF" not in str(error.value)
        assert "456789" not in str(error.value)


def test_records_hold_no_key(key, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_SECRET", 'with "quotes" and ünïcode')
    monkeypatch.setenv("SHORT_KEY", "a")
    told = f"401: Bearer {key}, {os.environ['OTHER_SECRET']}, hf_{'a' * 34} and sk-{'b' * 40}"
    write_json(tmp_path / "record.json", {"status": "running", "nested": [{"error": told}]})
    update_record(tmp_path, error=told)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["error"] == record["nested"][0]["error"] == "401: Bearer ***, ***, *** and ***"


def test_nothing_that_a_program_says_shows_a_key(key, tmp_path):
    """Prints, messages, warnings, logging, the traceback of an HTTP client's error."""
    lines = [
        "import logging, os, sys, warnings",
        "from prefopt.cli.program import program",
        "log = logging.getLogger('prefopt.job')",
        "from prefopt.tracking.status import RunsConfig",
        "key = os.environ['THE_API_KEY']",
        "def job(cfg):",
        "    print('print', key); log.info(f'say {key}'); warnings.warn(key); logging.warning(key)",
        "    raise RuntimeError(f'401 for Authorization: Bearer {key}')",
        "program('runs', RunsConfig)(job)()",
    ]
    (tmp_path / "job.py").write_text("\n".join(lines))
    environment = ENVIRONMENT | {"THE_API_KEY": key, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(tmp_path / "job.py")]
    process = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    said = process.stdout + process.stderr
    assert key not in said
    for part in ("print ***", "say ***", "UserWarning: ***", "RuntimeError: 401 for Authorization: Bearer ***"):
        assert part in said
    process = subprocess.run([*call, f"name={key}"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert "the command line holds the value of the environment variable THE_API_KEY" in process.stderr
    assert key not in process.stdout + process.stderr


def test_a_stream_that_masks_is_a_stream(capsys, key):
    stream = redact.RedactingStream(sys.stdout)
    print("a", key, "b", file=stream, flush=True)
    assert capsys.readouterr().out == "a *** b\n"
    assert stream.isatty() is False


# Text of models


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def comparison(text: str) -> str:
    items = [Compared(text, [Answer(text + "!"), Answer(text, finished=False), Answer(text)], preference=2)]
    differences = Tabular("diff", text_columns(text), [[text]], [], title=text)
    return compare_page([text, text, text], {text: text}, items, differences)


def paper(text: str, folder: Path) -> str:
    with plotting() as plt:
        figure, axis = plt.subplots()
        axis.plot([0, 1], label=text)
        axis.set_title(text)
        axis.legend()
        files = save(figure, folder, "figure")
    table = Tabular("t", text_columns(text), [[text]], [], [text], text)
    record = {"name": text, "objective": text, "config": {}, "git": {"commit": text, "dirty": True}, "command": text}
    return papers_page(text, [table], [Figure(text, text, files)], [record], [text])


@pytest.mark.parametrize("make", [comparison, paper], ids=["compare", "papers"])
def test_text_of_models_runs_and_judges_is_text(make: Callable[..., str], tmp_path):
    more = (tmp_path,) if make is paper else ()
    found, harmless = Tags(make(SCRIPT, *more)), Tags(make("harmless", *more))
    if make is comparison:
        assert found.tags == harmless.tags
    tags = {tag for tag, _ in found.tags}
    assert "img" not in tags
    assert [t for t, _ in found.tags].count("script") == [t for t, _ in harmless.tags].count("script")
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert any(SCRIPT in text for text in found.texts)


# Names, paths and the shell


NAMES = [
    "../../x",
    "/x",
    "..",
    ".x",
    "a/b",
    "x;$(touch x)",
    "`touch x`",
    "a\nb",
    "a'b",
    'a"b',
    "a|b",
    "<script>",
    "-\0",
]


@pytest.fixture(scope="module")
def config(overrides, tmp_path_factory) -> TrainConfig:
    config = train_config(overrides(tmp_path_factory.mktemp("runs")))
    check(config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_path_and_no_shell(name, config):
    for part in ("model", "dataset"):
        bad = replace(config, **{part: replace(getattr(config, part), name=name)})
        with pytest.raises(UserError, match=f"{part}.name becomes part of file names"):
            check(bad)


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B-Instruct", "pairs 2.jsonl", "größe_1", "a+b=c@d,e", "__x"])
def test_names_that_people_have_are_names(name, config):
    check(replace(config, model=replace(config.model, name=name)))


@pytest.mark.parametrize("name", ["../*", "/etc/*", "a/../../b"])
def test_runs_are_looked_for_in_their_folder(name, tmp_path):
    with pytest.raises(UserError, match="must be the name of a run's folder"):
        select(RunsConfig(str(tmp_path), name, [], False))


@pytest.mark.parametrize(
    "path", ["package://prefopt/../../x", "package://prefopt//etc/passwd", "package://../x", "package://os.path/x"]
)
def test_a_file_of_a_package_is_inside_of_it(path):
    with pytest.raises(UserError, match="a file inside of that Python package"):
        resolve_path(path)


def slurm(**changes) -> Slurm:
    node = OmegaConf.load(ROOT / "conf" / "launcher" / "slurm.yaml")
    return build(OmegaConf.merge(node, changes), Launcher, "launcher")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [
        {"partition": "gpu\ntouch x"}, {"partition": ";$(touch x)"}, {"account": "../x"}, {"account": "a b"},
        {"options": ["--qos=a\ntouch x"]}, {"options": ["touch x"]}, {"options": ["--qos=a\rtouch x"]},
    ],
    ids=repr,
)  # fmt: skip
def test_slurms_options_stay_on_their_line(changes):
    with pytest.raises(UserError, match=r"launcher\.(partition|account|options)"):
        slurm(**changes)


def test_a_job_script_is_made_of_words(mark, tmp_path, monkeypatch):
    """Run by bash, with folders, a Python and options that would be commands."""
    attack = f"x;touch {mark};$(touch {mark})`touch {mark}`'"
    folder = tmp_path / "$(touch mark)'\"; touch mark #" / "run"
    folder.mkdir(parents=True)
    listing = folder.parent / "jobs_0.txt"
    listing.write_text(f"{folder}\tname\n")
    for name in ("srun", "squeue", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.said\n')
        (tmp_path / name).chmod(0o755)
    slurm_ = slurm(python=f"env -- python;touch {mark}", options=[f"--comment={attack}"])
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "0",
                                "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}  # fmt: skip
    text = slurm_.script("name", 1, (60, 8), listing, folder / "code")
    done = subprocess.run(["bash"], input=text, env=environment, text=True, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "srun.said").read_text().splitlines()
    assert words[-6:] == ["--", "python;touch", str(mark), "-m", "prefopt.job", str(folder)]
    folder = tmp_path / "a\nb"
    folder.mkdir()
    write_record(folder, {"status": "queued", "host": socket.gethostname(), "pid": os.getpid()})
    job = type("Job", (), {"folder": folder, "model": None})
    monkeypatch.setattr("prefopt.launch.slurm.parameters", lambda _: 1)
    with pytest.raises(UserError, match="give another runs_dir"):
        slurm().run([job], folder, folder)  # type: ignore[list-item]


def test_a_recorded_command_is_quoted(mark, tmp_path):
    command = command_of("train", [f"model.path=$(touch {mark})", f"seed=1;touch {mark}"])
    done = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}; {command}"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[2:] == [f"model.path=$(touch {mark})", f"seed=1;touch {mark}"]


# Places outside


def link(folder: Path, secret: Path) -> None:
    (folder / "train.jsonl").symlink_to(secret)


def link_of_a_folder(folder: Path, secret: Path) -> None:
    (folder / "data").symlink_to(secret.parent)


def card(name: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, secret: Path) -> None:
        files = [{"split": "train", "path": name.format(secret=secret)}]
        told = OmegaConf.to_yaml({"configs": [{"config_name": "default", "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{told}---\n# Data\n")

    return write


def zipped(folder: Path, secret: Path) -> None:
    import zipfile

    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("../../outside.jsonl", secret.read_text())


@pytest.mark.parametrize(
    "attack",
    [link, link_of_a_folder, zipped, card("../secret/s.jsonl"), card("{secret}"), card("file://{secret}"),
     card("https://127.0.0.1:9/x.jsonl"), card("zip://x.jsonl::train.zip"), card("hf://datasets/a/b/x.jsonl")],
    ids=["link", "folder", "zip", "parent", "absolute", "file", "https", "hop", "hub"],
)  # fmt: skip
def test_a_data_folder_is_read_inside_of_itself(attack, tmp_path, monkeypatch):
    secret = tmp_path / "secret" / "s.jsonl"
    secret.parent.mkdir()
    secret.write_text('{"prompt": "secret", "chosen": "a", "rejected": "b"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    attack(folder, secret)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the folder was read"))
    with pytest.raises(UserError, match=r"leads out of its folder|is an archive|data outside of its folder"):
        list(read_rows(str(folder)))


def test_a_data_folder_with_a_card_and_a_link_inside_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "rows.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
    (folder / "train.jsonl").symlink_to("own/rows.jsonl")
    card("own/*.jsonl")(folder, folder)
    assert [row["prompt"] for _, row in read_rows(str(folder))] == ["Hi"]
    assert digest(str(folder))


def test_a_card_on_the_hub_names_no_other_host(tmp_path, monkeypatch):
    def download(path: str, name: str, repo_type: str, revision: str | None) -> str:
        if name != "README.md":
            raise LocalEntryNotFoundError(name)
        card("https://127.0.0.1:9/x.jsonl")(tmp_path, tmp_path)
        return str(tmp_path / name)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the data set was read"))
    with pytest.raises(UserError, match=r"data outside of its folder: https://127\.0\.0\.1"):
        list(read_rows("lab/Pairs"))


class Host:
    """Says where to go, with the key that it was sent, or remembers that somebody came."""

    def __init__(self, status: int, location: str = ""):
        self.came: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.came.append(self.headers.get("Authorization") or "")
                self.rfile.read(int(self.headers["Content-Length"]))
                data = json.dumps({"error": {"message": f"you sent {owner.came[-1]}"}}).encode()
                self.send_response(status)
                self.send_header("Location", location)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize("status", [307, 308, 302, 401])
def test_a_judge_is_asked_at_its_host_and_keeps_its_key(status, key, tmp_path):
    pytest.importorskip("alpaca_eval")
    other = Host(200)
    host = Host(status, f"{other.url}/v1/chat/completions")
    annotator = JUDGE | {
        "prompt_template": "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        "completions_kwargs": {"max_tokens": 1, "price_per_token": 0, "requires_chatml": True},
        "fn_completion_parser": "regex_parser",
        "completion_parser_kwargs": {"outputs_to_match": {1: "m", 2: "M"}},
        "batch_size": 1,
    }
    judge = LanguageModelJudge("mine", [0, 0], "THE_API_KEY", f"{host.url}/v1", "model", annotator)
    with pytest.raises(UserError, match="judge mine failed") as error:
        judge.annotate(
            [Comparison(0, [], "q", "a", "b")], GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32"
        )
    assert host.came
    assert not other.came
    assert ("which is not followed" in str(error.value)) == (status != 401)
    assert key not in str(error.value)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]
    import openai

    assert openai.OpenAI.__name__ == "OpenAI"  # the package is as it was


def test_nobody_is_asked_to_convert_a_pickle():
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"]
