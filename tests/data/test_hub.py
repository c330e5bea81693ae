"""prefetch against a small hub on this machine: the real clients fetch, then the hub is gone and everything works."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import pytest
from huggingface_hub import _tree_cache, constants

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.hub import Data, Model, items, missing, wanted
from prefopt.data.sources import prepared
from prefopt.errors import MissingAssetError
from prefopt.prefetch import PrefetchConfig, prefetch
from tests.helpers.tiny import ENVIRONMENT, ROOT, SHARED, run_program, save_tiny

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train_prefs, path: data/train-*}
  - {split: test_prefs, path: data/test-*}
---
"""


@dataclass
class Hub:
    """Answers what huggingface_hub and datasets ask of the hub. `repositories`: KIND/OWNER/NAME -> revision -> file."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        words = path.strip("/").split("/")
        if words[0] == "api":
            kind, owner, name, *rest = words[1:]
        else:
            kind, owner, name, *rest = words if words[0] == "datasets" else ["models", *words]
        revisions = self.repositories.get(f"{kind}/{owner}/{name}")
        revision = rest[1] if len(rest) > 1 else "main"
        if revisions is None:
            self.reply(request, 404, error="RepoNotFound")
            return
        commits = {commit(revisions[r]): files for r, files in revisions.items()}
        files = revisions.get(revision, commits.get(revision))
        if files is None:
            self.reply(request, 404, error="RevisionNotFound")
            return
        what, inside = rest[0] if rest else "info", "/".join(rest[2:])
        if what == "resolve":
            if inside in files:
                content = files[inside]
                self.reply(request, 200, content, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": commit(files)})
            else:
                self.reply(request, 404, headers={"X-Repo-Commit": commit(files)}, error="EntryNotFound")
        elif what == "tree":
            found = entries(files, inside, "recursive=true" in request.path)
            self.reply(request, 200, found) if found else self.reply(request, 404, error="EntryNotFound")
        elif what == "paths-info":
            asked = json.loads(body)["paths"]
            self.reply(request, 200, [e for e in entries(files, "", True) if e["path"] in asked])
        else:
            siblings = [{"rfilename": file} for file in files]
            self.reply(request, 200, {"id": f"{owner}/{name}", "sha": commit(files), "siblings": siblings})

    def reply(self, request, status: int, content: object = b"", headers=None, error: str = "") -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        extra = {"X-Error-Code": error, "X-Error-Message": error} if error else {}
        for key, value in {"Content-Length": str(len(raw)), **(headers or {}), **extra}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(raw)


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return sha("".join(f"{name} {sha(files[name])}\n" for name in sorted(files)).encode())


def entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below `folder`, as the hub lists them."""
    found: dict[str, dict[str, object]] = {}
    for path, content in files.items():
        found[path] = {"type": "file", "path": path, "size": len(content), "oid": sha(content)}
        for parent in Path(path).parents[:-1]:
            found[str(parent)] = {"type": "directory", "path": str(parent), "oid": sha(str(parent).encode())}
    root = Path(folder)
    return [e for path, e in found.items() if Path(path).parent == root or (recursive and root in Path(path).parents)]


MODEL = ["model=hub", "model.path=lab/tiny"]
DATASET = [
    "dataset=jsonl",
    *("dataset.train=lab/Pairs", "dataset.train_split=train_prefs"),
    *("dataset.heldout=lab/Pairs", "dataset.heldout_split=test_prefs"),
]


def on_the_hub(revision: str | None = None, train_split: str = "train_prefs") -> tuple[ModelConfig, DatasetConfig]:
    """The same in Python."""
    data = DatasetConfig("pairs", "lab/Pairs", "lab/Pairs", train_split, "test_prefs", revision)
    return ModelConfig("tiny", "lab/tiny"), data


@pytest.fixture(scope="module")
def files(tiny_folder, tmp_path_factory) -> dict[str, dict[str, dict[str, bytes]]]:
    """A model with weights in several formats, a data set with a card and two revisions, and one without a card."""
    model = {f.name: f.read_bytes() for f in save_tiny(tmp_path_factory.mktemp("model")).iterdir()}
    train, heldout = [(tiny_folder / f"{name}.jsonl").read_bytes() for name in ("train", "heldout")]
    card, data = {"README.md": CARD.encode()}, ("data/train-0.jsonl", "data/test-0.jsonl")
    return {
        "models/lab/tiny": {
            "main": model
            | dict.fromkeys(("pytorch_model.bin", "tiny.gguf", "onnx/model.onnx", "old/model.safetensors"), b"copy")
        },
        "models/lab/pickled": {
            "main": {name: model[name] for name in ("config.json", "tokenizer.json")} | {"pytorch_model.bin": b"copy"}
        },
        "datasets/lab/Pairs": {
            "main": card | dict(zip(data, (train, heldout), strict=True)),
            "v1": card | dict(zip(data, (train[: train.index(b"\n") + 1], heldout), strict=True)),
        },
        "datasets/lab/plain": {"main": {"train.jsonl": train, "test.jsonl": heldout}},
    }


@pytest.fixture(scope="module")
def fetched(files, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """HF_HOME on the cluster, prefetch's process, and what it asked of a hub that is gone by now."""
    home, cluster = tmp_path_factory.mktemp("hf") / "home", tmp_path_factory.mktemp("cluster")
    with Hub(files) as hub:
        environment = hub.environment | {"HF_HOME": str(home)}
        process = run_program(*MODEL, *DATASET, "also=[lab/plain]", program="prefetch", env=environment)
    for folder in ("hub", "datasets"):
        if (home / folder).is_dir():
            (home / folder).rename(cluster / folder)
    return cluster, process, hub.requests


@pytest.fixture
def cluster(fetched, tmp_path, monkeypatch) -> Path:
    """A copy of HF_HOME on the cluster, which this process uses with the hub switched off."""
    home = tmp_path / "home"
    shutil.copytree(fetched[0], home, symlinks=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home


def test_prefetch_brings_what_is_needed_and_no_more(fetched, files):
    _, process, requests = fetched
    assert process.returncode == 0, process.stderr
    lines = process.stderr.splitlines()
    for kind, name in (("model", "lab/tiny"), ("data", "lab/Pairs"), ("data", "lab/plain")):
        there = commit(files[f"{'models' if kind == 'model' else 'datasets'}/{name}"]["main"])
        assert any(line.startswith(f"{kind} {name}: fetched, ") and there in line for line in lines), process.stderr
    assert "rsync -a " in process.stderr
    assert "HF_HOME=FOLDER HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1" in process.stderr
    assert len(lines) == 3 + 5  # no bars and no log of requests
    assert process.stdout == ""
    names = {Path(request).name for request in requests if request.startswith("GET /lab/tiny/resolve/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any("/old/" in request or "/onnx/" in request for request in requests)
    assert all(name.endswith((".json", ".safetensors", ".jinja")) for name in names)


def test_what_is_there_is_not_fetched_again(fetched, files, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(fetched[0], home, symlinks=True)
    with Hub(files) as hub:
        process = run_program(*MODEL, *DATASET, program="prefetch", env=hub.environment | {"HF_HOME": str(home)})
    assert process.returncode == 0, process.stderr
    assert process.stderr.count(": already there, ") == 2
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


OFFLINE = """
import json, sys
from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.hub import missing
model, dataset = ModelConfig("tiny", "lab/tiny"), DatasetConfig("pairs", *json.loads(sys.argv[1]))
lacking = missing(model, dataset)
light = "torch" not in sys.modules
from prefopt.data.sources import digest, read_rows
rows = {split: [row for _, row in read_rows("lab/Pairs", split)] for split in ("train_prefs", "test_prefs")}
digests = {split: digest("lab/Pairs", split) for split in rows}
from prefopt.models.load import load_model, load_tokenizer
parameters = load_model(model, "cpu").num_parameters()
print(json.dumps([lacking, light, rows, digests, bool(load_tokenizer(model).chat_template), parameters]))
"""


@pytest.mark.slow
def test_afterwards_jobs_run_with_the_hub_switched_off(fetched, files):
    environment = ENVIRONMENT | {"HF_HOME": str(fetched[0]), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    data = json.dumps(["lab/Pairs", "lab/Pairs", "train_prefs", "test_prefs"])
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, data], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    lacking, light, rows, digests, template, parameters = json.loads(process.stdout)
    assert lacking == []
    assert light
    there = files["datasets/lab/Pairs"]["main"]
    for split, name in (("train_prefs", "data/train-0.jsonl"), ("test_prefs", "data/test-0.jsonl")):
        assert rows[split] == [json.loads(line) for line in there[name].splitlines()]
    assert len(set(digests.values())) == 2
    assert template
    assert parameters > 0


def rows_of(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


READ = """
import json, sys
from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.data.hub import missing
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
for name in ("lab/shards", "lab/conflict"):
    dataset = DatasetConfig("pairs", name, None, "train")
    try:
        rows = [row for _, row in read_rows(name, "train")]
    except UserError as error:
        rows = str(error)
    print(json.dumps([missing(ModelConfig("x", "package://x/y.gguf"), dataset), rows, digest(name, "train")]))
"""


@pytest.mark.parametrize("prefetched", [True, False])
@pytest.mark.slow
def test_shards_that_differ_are_read_as_those_of_a_folder(prefetched, tmp_path):
    """A column that is null in one shard, or in one alone, is no conflict; two types of a column are."""
    a, b = {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": "d", "rejected": "s"}
    shards = [[a | {"note": None}], [b | {"note": "said", "more": 1}], [a | {"note": None, "other": ["x"]}]]
    files = {f"data/train-{n:05d}-of-00003.jsonl": rows_of(*rows) for n, rows in enumerate(shards)}
    conflict = {
        "data/train-00000-of-00002.jsonl": rows_of(a | {"note": 1}),
        "data/train-00001-of-00002.jsonl": rows_of(b | {"note": "one"}),
    }
    hub = Hub({"datasets/lab/shards": {"main": files}, "datasets/lab/conflict": {"main": conflict}})
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path)}
    with hub:
        if prefetched:
            words = ["model.path=package://x/y.gguf", "model=hub", "dataset=jsonl", "also=[lab/shards,lab/conflict]"]
            local = tmp_path / "train.jsonl"
            local.write_bytes(rows_of(a))
            process = run_program(
                *words, f"dataset.train={local}", f"dataset.heldout={local}", program="prefetch",
                env=hub.environment | {"HF_HOME": str(tmp_path)},
            )  # fmt: skip
            assert "data lab/shards: fetched" in process.stderr, process.stderr
        else:
            environment |= hub.environment
        command = [sys.executable, "-c", READ]
        online = environment if not prefetched else environment | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, cwd=ROOT, env=online, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (lacking, rows, first), (_, refused, second) = map(json.loads, process.stdout.splitlines())
    assert (lacking, rows) == ([], [row for shard in shards for row in shard])
    assert first != second
    assert "lab/conflict/data/train-00001-of-00002.jsonl, row 1: field 'note' is text" in refused
    assert "in data/train-00000-of-00002.jsonl of the same folder it is a number" in refused


def test_check_lists_what_is_there(cluster, capsys):
    prefetch(PrefetchConfig(*on_the_hub(), also=["lab/plain"], check=True))
    found = [line.partition(": already there, ")[0] for line in capsys.readouterr().err.splitlines()]
    assert found == ["model lab/tiny", "data lab/Pairs", "data lab/plain"]


def test_check_names_all_that_is_missing(tmp_path):
    """Also in a multirun: each job looks for itself."""
    overrides = ["-m", "model=smollm2_135m_offline,hub", "++model.path=lab/tiny,lab/other", *DATASET, "check=true"]
    process = run_program(*overrides, program="prefetch", env={"HF_HOME": str(tmp_path)}, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    for name in ("lab/tiny", "lab/other"):
        assert f"error: missing: model {name}; data lab/Pairs\n" in process.stderr
        assert f"python -m prefopt.prefetch model=hub model.path={name}\n" in process.stderr
    assert "python -m prefopt.prefetch 'also=[lab/Pairs]'" in process.stderr


def test_all_that_fails_is_named_at_once(files, tmp_path):
    also = "also=[lab/nothing,lab/Pairs@v9,lab/plain:no_such,lab/plain,not/a/name]"
    with Hub(files) as hub:
        process = run_program(
            *("model=hub", "model.path=lab/pickled", "dataset=jsonl", f"dataset.train={tmp_path}/none.jsonl"),
            also, program="prefetch", env=hub.environment | {"HF_HOME": str(tmp_path)},
        )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    lines, _, message = process.stderr.partition("error: not fetched: ")
    for item, reason in {
        "model lab/pickled": "no weights in safetensors format",
        f"data {tmp_path}/none.jsonl": "no such file",
        "data lab/nothing": "the hub has none of this name",
        "data lab/Pairs at v9": "it has no revision v9",
        "data lab/plain, configuration no_such": "no_such",
        "data not/a/name": "nor a name on the hub",
    }.items():
        assert f"{item}: FAILED: " in lines
        assert reason in next(line for line in message.splitlines() if line.startswith(f"  {item}: "))
    assert "data lab/plain: fetched" in lines
    assert not list(tmp_path.rglob("*.bin"))


def test_without_the_hub_only_check_works(tmp_path):
    process = run_program(*MODEL, program="prefetch", env={"HF_HOME": str(tmp_path)})
    assert process.returncode == 2
    assert "error: prefetch needs the hub, and it is switched off: unset HF_HUB_OFFLINE" in process.stderr
    process = run_program(
        *MODEL,
        program="prefetch",
        env={"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert "(asked http://127.0.0.1:9)" in process.stderr


def test_the_preflight_passes_what_is_there_or_local(cluster, tiny_folder):
    assert missing(*on_the_hub()) == []
    local = DatasetConfig("x", str(tiny_folder / "train.jsonl"), "no_such.jsonl")
    for path in (str(tiny_folder / "model"), "package://no_such/x.gguf"):  # loading says what is wrong
        assert missing(ModelConfig("x", path), local) == []
    (said,) = missing(ModelConfig("x", "/no/such/folder"), local)
    assert "model.path=/no/such/folder: it is neither a folder here nor a name on the hub" in said


def test_the_preflight_names_what_is_missing_with_the_command(cluster, monkeypatch):
    shutil.rmtree(cluster / "hub")
    shutil.rmtree(cluster / "datasets")
    model, data = missing(*on_the_hub())
    assert model.startswith("no model can be loaded from model.path=lab/tiny: the hub is switched off, and ")
    assert model.endswith("python -m prefopt.prefetch model=hub model.path=lab/tiny")
    assert data.startswith("no data lab/Pairs: the hub is switched off, and ")
    assert data.endswith("python -m prefopt.prefetch 'also=[lab/Pairs]'")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert missing(*on_the_hub()) == []  # jobs fetch it themselves


def test_the_preflight_wants_the_revision_the_splits_and_every_file(cluster, files, monkeypatch):
    """A copy of another revision is none, although `datasets` would take it."""
    (data,) = missing(*on_the_hub("v1"))
    assert "no data lab/Pairs at v1" in data
    assert f"there is default at {commit(files['datasets/lab/Pairs']['main'])}" in data
    assert data.endswith("'also=[lab/Pairs@v1]'")
    (data,) = missing(*on_the_hub(train_split="train"))
    assert "it has no split 'train'; dataset.train_split and heldout_split choose from: train_prefs, test_prefs" in data
    (weights,) = cluster.glob("hub/models--lab--tiny/snapshots/*/model.safetensors")
    weights.unlink()
    (model,) = missing(*on_the_hub())
    assert "is not complete: model.safetensors" in model
    shutil.rmtree(cluster / "hub" / "models--lab--tiny" / "trees")  # as in a cache that something else filled
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    (model,) = missing(*on_the_hub())
    assert "is not complete: it has no weights" in model


def test_each_revision_has_its_own_copy(cluster, files, tmp_path):
    revisions = {name: commit(there) for name, there in files["datasets/lab/Pairs"].items()}
    with Hub(files) as hub:
        process = run_program(
            "also=[lab/Pairs@v1]", program="prefetch", env=hub.environment | {"HF_HOME": str(cluster)}
        )
    assert process.returncode == 0, process.stderr
    assert prepared("lab/Pairs").name == revisions["main"]
    assert prepared("lab/Pairs", "v1").name == prepared("lab/Pairs", revisions["v1"]).name == revisions["v1"]
    with pytest.raises(MissingAssetError, match="has no copy of it"):
        prepared("lab/Pairs", config="other")


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
             "consolidated-00001-of-00001.safetensors", "pytorch_model.bin.index.json", "original/consolidated.00.pth"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
    ],
)  # fmt: skip
def test_wanted_files(weights, kept):
    others = [
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ]
    dropped = ["README.md", "LICENSE", ".gitattributes", "training_args.bin", "checkpoint-5/config.json", "modeling.py"]
    assert wanted([*weights, *others, *dropped]) == sorted([*kept, *others])


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "no config.json"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "no weights in safetensors"),
        (["config.json", "model.safetensors"], "no tokenizer"),
    ],
)
def test_repositories_that_are_no_model(names, lacking):
    with pytest.raises(MissingAssetError, match=lacking):
        wanted(names)


def test_items_of_a_mixture():
    source = {"name": "a", "train": "lab/Pairs", "heldout": "lab/Pairs", "heldout_split": "test"}
    mixture = DatasetConfig("mix", sources={"a": source, "b": {"name": "b", "train": "lab/plain", "revision": "v1"}})
    found = items(ModelConfig("tiny", "lab/tiny", "v2"), mixture, ["lab/Pairs", "lab/tests@v3:main"])
    assert found == [
        Model("lab/tiny", "v2"),
        Data("lab/Pairs", splits=("train", "test")),
        Data("lab/plain", "v1", splits=("train",)),
        Data("lab/tests", "v3", "main"),
    ]


@pytest.mark.slow
def test_tasks_of_the_harness_are_there_afterwards(tmp_path, tiny_folder):
    pytest.importorskip("lm_eval")
    rows = [
        {"id": str(i), "question": "Which?", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "A"}
        for i in range(4)
    ]
    lines = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:"]
    lines += [f"  - {{split: {split}, path: easy.jsonl}}" for split in ("train", "validation", "test")]
    easy = "".join(json.dumps(row) + "\n" for row in rows).encode()
    card = "\n".join([*lines, "---", ""]).encode()
    home = {"HF_HOME": str(tmp_path / "home")}
    local = [f"model.path={tiny_folder / 'model'}", "tasks=arc_easy"]
    with Hub({"datasets/allenai/ai2_arc": {"main": {"README.md": card, "easy.jsonl": easy}}}) as hub:
        process = run_program(*local, program="prefetch", env=hub.environment | home, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "tasks arc_easy: there" in process.stderr
    assert "rsync" in process.stderr
    process = run_program(*local, "check=true", program="prefetch", env=home, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "tasks arc_easy: already there" in process.stderr
    scored = ["model=hub", f"model.path={tiny_folder / 'model'}", f"output={tmp_path / 'out'}", "tasks=arc_easy"]
    scored += ["precision=float32", "device=cpu"]
    offline = home | {"HF_HUB_OFFLINE": "1"}
    process = run_program(*scored, program="harness", env=offline, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    process = run_program(*local[:1], "tasks=[arc_easy,piqa]", "check=true", program="prefetch", env=home, cwd=tmp_path)
    assert process.returncode == 2
    assert "task piqa cannot be loaded" in process.stderr
    assert "task arc_easy cannot" not in process.stderr


@pytest.mark.shared
def test_alpaca_evals_files_are_fetched_and_are_what_they_should_be(tmp_path, tiny_folder):
    shared = SHARED / "alpaca_eval"
    pytest.importorskip("alpaca_eval")
    questions = "alpaca_eval_gpt4_baseline.json"
    files = {questions: (shared / questions).read_bytes(), "df_gamed.csv": b"another file"}
    home = {"HF_HOME": str(tmp_path / "home")}
    local = [f"model.path={tiny_folder / 'model'}", "alpaca=true"]
    with Hub({"datasets/tatsu-lab/alpaca_eval": {"main": files}}) as hub:
        process = run_program(*local, program="prefetch", env=hub.environment | home)
    assert process.returncode == 2
    assert f"AlpacaEval's {questions}: there" in process.stderr
    assert "AlpacaEval's df_gamed.csv: FAILED" in process.stderr
    assert "is not the df_gamed.csv that published figures rest on" in process.stderr
    process = run_program(*local, "check=true", program="prefetch", env=home)
    assert f"AlpacaEval's {questions}: already there" in process.stderr
    assert process.returncode == 2
