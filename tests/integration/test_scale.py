"""What is large costs no more than it must: counted in reads, questions and bytes, since a time would be the machine's.
`python -m benchmarks.scale` measures the same at full size."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import given
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

import prefopt.launch.sweep
import prefopt.tracking.status
from benchmarks import scale
from hydra_plugins.prefopt import PointsSweeper
from prefopt.cli.multirun import Point
from prefopt.config.parse import register
from prefopt.config.schema import DatasetConfig, LoggerConfig
from prefopt.data import sources
from prefopt.data.cache import CHUNK, SCHEMA, TokenizedPairs, chunk_by_source
from prefopt.data.dataset import load_split
from prefopt.data.sampler import step_indices
from prefopt.launch import estimate
from prefopt.launch.sweep import wait_for_runs
from prefopt.reporting.labels import labels, sort_by_label
from prefopt.tracking.metrics import read_metrics
from prefopt.tracking.process import process_info
from prefopt.tracking.status import RunStatus
from prefopt.train import SWEEP
from prefopt.training.config import TrainConfig
from prefopt.training.loggers import Loggers
from prefopt.utils import files
from prefopt.utils.files import read_lines_reversed
from tests.helpers.tiny import ROOT

# A sweep


def composed(static: list[str], arguments: list[str]) -> tuple[list[Point], int]:
    """The points of a multirun, and how often Hydra was asked to compose one from its files."""
    register(TrainConfig)
    found: list[list[Point]] = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        given = [*static, *arguments]
        master = loader.load_configuration("train", given, RunMode.MULTIRUN)
        HydraConfig.instance().set_config(master)
        asked = []
        real = loader.load_sweep_config

        def counted(*args):
            asked.append(args)
            return real(*args)

        loader.load_sweep_config = counted  # type: ignore[method-assign]
        sweeper = PointsSweeper(None)
        sweeper.setup(hydra_context=SimpleNamespace(config_loader=loader), task_function=found.append, config=master)
        sweeper.sweep(given)
    return found[0], len(asked)


GRIDS = {
    "values": (["seed=1,2,3", "objective.beta=0.1,0.2"], 1),
    "files": (["objective=dpo,mappo", "seed=1,2"], 2),
    "files of files": (["objective=mappo", "objective/base=ipo,simpo", "objective.base.beta=0.5,0.7"], 2),
    "lists, additions, mappings": (
        [
            "optimizer.betas=[0.9,0.95],[0.8,0.9]", "+dataset.columns={prompt: q}", "~objective.label_smoothing",
            "++dataset.oracle={a: 1},null",
        ],
        1,
    ),
    "both after each other": (["optimizer.lr=1e-3", "peft=none,lora_attention", "peft.r=8,16"], 2),
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_points_are_what_hydra_composes_and_each_choice_of_files_is_read_once(grid, tmp_path):
    arguments, choices = GRIDS[grid]
    points, asked = composed([f"runs_dir={tmp_path}"], arguments)
    assert asked == choices < len(points)
    assert not list(tmp_path.iterdir())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for point in points:
            expected = compose("train", point.overrides)
            assert OmegaConf.to_container(point.cfg) == OmegaConf.to_container(expected)
    assert len({tuple(point.overrides) for point in points}) == len(points)


@pytest.mark.parametrize("wrong", ["sead=1,2", "objective=dpo,nonsense", "+seed=1,2"])
def test_a_point_that_hydra_would_refuse_is_refused(wrong, tmp_path):
    with pytest.raises(HydraException):
        composed([f"runs_dir={tmp_path}"], [wrong])


def count(monkeypatch, place, name: str) -> list[tuple]:
    """The calls of a function."""
    calls: list[tuple] = []
    real = getattr(place, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)
    return calls


@pytest.mark.parametrize("n", [2, 8])
def test_planning_reads_data_and_model_once_and_asks_slurm_once(n, overrides, tmp_path, monkeypatch):
    sources._sha256_of.cache_clear()
    estimate._parameters.cache_clear()
    hashed, models = count(monkeypatch, hashlib, "file_digest"), count(monkeypatch, AutoModelForCausalLM, "from_config")
    monkeypatch.setattr(prefopt.tracking.status, "slurm_queue", lambda: questions.append(1) or {"7_0": "RUNNING"})
    more = ["launcher=slurm", "launcher.gpus=0", f"seed={','.join(map(str, range(n)))}"]
    points, _ = composed(overrides(tmp_path), more)
    questions: list[int] = []
    _, jobs = SWEEP.plan_jobs(points, Path())
    assert not questions
    for job in jobs:
        record = {"status": "running", "config": {"steps": 1}, "name": job.run.name, "id": job.id}
        files.write_json(
            job.folder / "record.json", record | process_info() | {"host": "elsewhere", "slurm_job": "7_0"}
        )
    launcher, jobs = SWEEP.plan_jobs(points, Path())
    assert [job.state for job in jobs] == ["running"] * n
    assert len(questions) == 1
    assert len(hashed) == 2, "train and heldout"
    assert len({launcher.resources(job) for job in jobs}) == 1
    assert len(models) == 1


def test_waiting_does_not_look_again_at_what_has_finished(tmp_path, monkeypatch):
    folders = [tmp_path / f"run{i}" for i in range(6)]
    for folder in folders:
        files.write_json(folder / "record.json", {"name": "run", "status": "finished"})
    files.write_json(folders[0] / "record.json", {"name": "run", "status": "queued"} | process_info())
    reads = count(monkeypatch, prefopt.tracking.status, "read_record")
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 5:
            files.write_json(folders[0] / "record.json", {"name": "run", "status": "finished"})

    monkeypatch.setattr(prefopt.launch.sweep.time, "sleep", sleep)
    assert [each.state for each in wait_for_runs(folders)] == ["finished"] * 6
    assert [each.folder for each in wait_for_runs(folders)] == folders
    assert [sum(folder == f for (f,) in reads) for folder in folders] == [7, *[2] * 5]  # by two waits


class Counted:
    """A value that counts how often it is looked at."""

    looks = 0

    def __init__(self, value: int):
        self.value = value

    def __repr__(self) -> str:
        Counted.looks += 1
        return str(self.value)


def record(objective: str, **config) -> dict:
    return {"objective": objective, "name": "n", "config": {"objective": {"beta": 0.1}} | config}


@pytest.mark.parametrize("n", [10, 100])
def test_labels_look_at_every_value_of_a_run_once(n):
    Counted.looks = 0
    found = labels([record("dpo", x=Counted(i % 2), y=Counted(7)) for i in range(n)])
    assert Counted.looks == 2 * n + n  # each to compare, and the one that differs to be shown
    assert found == [f"dpo β=0.1 x={i % 2}" for i in range(n)]


values = st.dictionaries(st.sampled_from("abc"), st.sampled_from([None, 1, "1", 2, 2.0, 0.5, 0.50001, "x"]))


@given(st.lists(st.tuples(st.sampled_from(["dpo", "ipo"]), values), max_size=6))
def test_labels_are_the_same_where_the_runs_are(runs):
    """Of one objective; null is what the run lacks, and 2.0 is 2, but "1" is not 1."""
    found = labels([record(o, **v) for o, v in runs])
    same = [(o, {k: repr(2 if x == 2 else x) for k, x in v.items() if x is not None}) for o, v in runs]
    assert [[a == b for b in found] for a in found] == [[a == b for b in same] for a in same]


def test_a_label_has_what_differs_and_no_more_and_gives_the_order():
    runs = [
        record("dpo", optimizer={"lr": 1e-5}, steps=8),
        record("dpo", optimizer={"lr": 2e-5}, steps=8, patience=None),
        {"objective": "madpo", "config": {"objective": {"beta": 0.1, "tau": 6.906754778648554, "only": None}}},
        {"objective": "madpo", "config": {"objective": {"beta": 0.1, "tau": 2.0, "only": "damping"}}},
    ]
    assert labels(runs) == [
        "dpo β=0.1 optimizer.lr=1e-05",
        "dpo β=0.1 optimizer.lr=2e-05",
        "madpo β=0.1 tau=6.907",
        "madpo β=0.1 only=damping tau=2",
    ]
    assert sort_by_label(runs[::-1]) == [*runs[:2], runs[3], runs[2]]
    assert sort_by_label([record("dpo", seed=seed) for seed in (10, 2)])[0]["config"]["seed"] == 2
    assert labels(runs, without=["objective.tau"])[2:] == ["madpo β=0.1", "madpo β=0.1 only=damping"]


# A metrics file


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\xc3"]), max_size=30).map(b"".join), st.integers(1, 9))
def test_lines_from_the_end_are_the_lines(tmp_path_factory, data, block):
    file = tmp_path_factory.getbasetemp() / "lines"
    file.write_bytes(data)
    found = list(read_lines_reversed(file, block))
    assert [line for _, line in found] == (data.split(b"\n")[::-1] if data else [])
    for place, line in found:
        assert data[place : place + len(line)] == line
        assert place == 0 or data[place - 1 : place] == b"\n"


def write_metrics(folder: Path, n: int) -> Path:
    """`n` training steps after an evaluation, and an evaluation ten steps before the end."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(n):
            row = {"step": step, "split": "train", "loss": 0.5, "filler": "x" * 40}
            if step in (0, n - 10):
                file.write(json.dumps({"step": step, "split": "heldout", "accuracy": step / n}) + "\n")
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """The sizes of all reads of files that are opened to read bytes."""
    sizes: list[int] = []
    real = Path.open

    def counted(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        if mode != "rb":
            return file

        class Counting:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def seek(self, *place):
                return file.seek(*place)

            def read(self, size):
                sizes.append(size)
                return file.read(size)

        return Counting()

    monkeypatch.setattr(Path, "open", counted)
    return sizes


@pytest.mark.parametrize("n", [2_000, 20_000])
def test_listings_read_the_end_of_a_metrics_file_and_resuming_its_beginning_once(n, tmp_path, bytes_read):
    folder = write_metrics(tmp_path / "run", n)
    file = folder / "metrics.jsonl"
    size = file.stat().st_size
    found = RunStatus(folder, {}, "running", None).metrics()
    assert (found["step"], found["accuracy"]) == (n - 1, (n - 10) / n)
    assert sum(bytes_read) <= 2**16
    with file.open("a") as lines:
        lines.write('{"step": 999999, "sp')
    bytes_read.clear()
    run = SimpleNamespace(metrics_file=file)
    beginning = "".join(file.read_text().splitlines(keepends=True)[: n - 2]).encode()
    vouched = {"length": len(beginning), "sha256": hashlib.sha256(beginning).hexdigest()}
    bytes_read.clear()
    quiet = LoggerConfig(progress=False)
    logger = Loggers(run, quiet, vouched)  # type: ignore[arg-type]
    assert sum(bytes_read) <= len(beginning)
    assert logger.vouch() == vouched
    logger.close()
    assert file.read_text().encode() == beginning
    assert file.stat().st_size < size
    assert len(list(read_metrics(file))) == n - 2
    Loggers(run, quiet, None).close()  # type: ignore[arg-type]
    assert not file.stat().st_size


def test_a_log_of_a_dead_run_is_read_from_its_end(tmp_path, bytes_read):
    (tmp_path / "log.txt").write_bytes(b"Error: early\n" + b"x\n" * 200_000 + b"OSError: late \xff\nafter\n\n")
    assert RunStatus(tmp_path, {}, "died", None).why.endswith("its log: OSError: late �")
    assert sum(bytes_read) <= 2**16
    (tmp_path / "log.txt").write_text("one\ntwo\n\n")
    assert RunStatus(tmp_path, {}, "died", None).why.endswith("its log: two")
    (tmp_path / "log.txt").write_text("")
    assert RunStatus(tmp_path, {}, "died", None).why.endswith("its log: empty")


def peak(what) -> int:
    """Bytes that Python and Arrow hold at most while it runs, beyond those before."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    what()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most + pa.total_allocated_bytes() - before


def test_rows_of_metrics_are_read_one_by_one(tmp_path):
    def through(n: int) -> int:
        file = write_metrics(tmp_path / str(n), n) / "metrics.jsonl"
        return peak(lambda: sum(1 for _ in read_metrics(file)))

    through(10)
    assert abs(through(8_000) - through(1_000)) < 50_000  # of 700 kB more


# A data set


def test_memory_mapped_pairs_take_no_more_memory_when_there_are_more(tmp_path):
    def through(n: int) -> int:
        file = tmp_path / f"{n}.arrow"
        row = {"id": "i", "prompt": [1] * 50, "chosen": [2] * 50, "rejected": [3] * 50, "source": "s"}
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for _ in range(n // 100):
                writer.write_batch(pa.RecordBatch.from_pylist([row] * 100, schema=SCHEMA))
        pairs = TokenizedPairs(file)
        assert len(pairs) == n
        return peak(lambda: sum(len(pair.prompt) for pair in pairs))

    through(100)
    assert abs(through(2_000) - through(200)) < 100_000  # of 1 MB more


@pytest.mark.slow
def test_a_split_is_never_held_whole(tmp_path):
    def through(n: int) -> int:
        file = tmp_path / f"{n}.jsonl"
        with file.open("w") as lines:
            for i in range(n):
                row = {"prompt": f"Number {i}", "chosen": f"good {i} " * 200, "rejected": f"bad {i} " * 200}
                lines.write(json.dumps(row) + "\n")
        config = DatasetConfig("many", str(file), format={"_target_": "prefopt.data.formats.Pairs"}, heldout_share=0.0)

        def read() -> None:
            split = load_split(config, "train")
            assert len(split) == n
            assert max(len(chunk) for _, chunk in chunk_by_source(split)) == CHUNK
            assert sum(len(chunk) for _, chunk in chunk_by_source(split)) == n

        return peak(read)

    few, many = 2 * CHUNK, 6 * CHUNK
    assert (through(many) - through(few)) / (many - few) < 300  # bytes a pair, of more than 3,000


def test_the_order_of_an_epoch_takes_eight_bytes_a_pair():
    step_indices(10, 0, 0, 4)
    assert peak(lambda: step_indices(200_000, 3, 5, 64)) < 8 * 200_000


# The bench


def test_the_bench_shows_small_and_large_beside_each_other():
    call = {"seconds": 1.0, "peak_mib": 2.0}
    part = {"n": 7, "small": {"megabytes": 1, "x": call}, "large": {"megabytes": 9, "x": call | {"seconds": 3.0}}}
    text = scale.table({"pairs": part, "jobs": part, "lines": part})
    assert "| 1 and 7 jobs | x | seconds | 1.0 | 3.0 |" in text
    assert scale.own_memory(process_info()["pid"]) > 10
    assert scale.own_memory(2**30) == 0


@pytest.mark.slow
@pytest.mark.long
def test_the_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "FEW", {"pairs": 200, "jobs": 1, "lines": 10})
    monkeypatch.setattr(scale, "STEPS", 4)
    monkeypatch.setattr("sys.argv", ["scale", "--pairs=400", "--jobs=8", "--lines=1000", f"--output={tmp_path}"])
    scale.main()
    results = json.loads((tmp_path / "scale.json").read_text())
    assert results["jobs"]["large"]["planned"]["seconds"] > 0
    assert results["pairs"]["large"]["again"]["peak_mib"] > 0
