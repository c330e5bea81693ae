"""What the processes of a run share: in two it is bit for bit what one computes, also after a fault in the middle."""

import functools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prefopt.generation.sampler
from prefopt.config.schema import EvaluationSamplingConfig, ModelConfig, SamplingConfig, ServerConfig
from prefopt.errors import UserError
from prefopt.generation.responses import GenerationRequest, generate_resumable
from prefopt.generation.server import free_port
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.reference import LoadedOnce, cached
from prefopt.objectives.dpo import DPO
from prefopt.rewards import scorers
from prefopt.rewards.reward_model import RewardModel
from prefopt.training.evaluate import evaluate
from prefopt.utils import signals, tensor_store
from prefopt.utils.distributed import map_shared, rank
from tests.helpers.openai_server import OpenAIServer
from tests.helpers.tiny import tiny_model
from tests.training.test_loop import make_train_state
from tests.training.test_online import make_models

THINGS = ("kettle", "old train", "soup", "bread", "red river")
PROMPTS = [[{"role": "user", "content": f"Review the {thing}."}] for thing in THINGS]
SCORE = LogprobComputer("float32")


def in_processes(n: int, work: Callable[[], None], meet: Path) -> None:
    """Call `work` in `n` processes of one group. Raises what is raised in one of them."""
    meet.unlink(missing_ok=True)
    torch.multiprocessing.start_processes(_process, (n, work, meet), nprocs=n, start_method="fork")


def _process(number: int, n: int, work: Callable[[], None], meet: Path) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(n)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=number, world_size=n)
    work()
    torch.distributed.destroy_process_group()


def share_words() -> None:
    items = ["long", "a", "longest", "bb", "ccc"]
    mine: list[str] = []
    assert map_shared(lambda text: (mine.append(text), text * 2)[1], items, len) == [text * 2 for text in items]
    # From large to small, each to the process with the least so far.
    assert mine == [["longest", "bb"], ["long", "a", "ccc"]][rank()]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A model and a reward model."""
    return make_models(tmp_path_factory.mktemp("models"))


def everything(models: Path, folder: Path) -> None:
    """The reference pass, two evaluations with samples and a reward model, and responses to prompts, into `folder`."""
    os.environ["PREFOPT_CACHE"] = str(folder / "cache")
    own = folder / f"rank{rank()}"  # for the data, which every process reads
    for place in (own, folder / "run"):
        place.mkdir(parents=True, exist_ok=True)
    sampling = EvaluationSamplingConfig(1.0, 1.0, 6, 2, prompts=None)
    state = make_train_state(DPO(0.1), own, sampling=sampling, device="cpu", micro_batch_tokens=200)
    state.prompts = PROMPTS
    state.run = SimpleNamespace(folder=folder / "run", record={"initial_weights": "x", "versions": {}})  # type: ignore[assignment]
    state.oracle = RewardModel(str(models / "reward"), "terminator")
    policy = state.engine.policy
    initial = LoadedOnce(lambda: tiny_model(len(state.tokenizer)).eval(), "cpu")
    state.reference = cached(policy, "w", state.train_pairs, state.layout, 200, SCORE, initial, show=False)
    evaluate(state, 0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    metrics = evaluate(state, 2)
    assert metrics["n"] == metrics["samples"] == 5
    assert abs(metrics["kl"]) > 1e-3

    request = GenerationRequest(
        ModelConfig("tiny", str(models / "model")), PROMPTS, SamplingConfig(1.0, 1.0, 6, 3), 2, 0, "transformers",
        "cpu", "float32",
    )  # fmt: skip
    rows, _ = generate_resumable(request, folder / "run" / "responses.partial", show=False)
    assert [len(row["responses"]) for row in rows] == [2] * 5


def files(folder: Path) -> dict[str, bytes]:
    """What `everything` has left behind."""
    places = (folder / "run", folder / "cache")
    return {str(f.relative_to(folder)): f.read_bytes() for place in places for f in place.rglob("*") if f.is_file()}


@pytest.fixture
def quiet(monkeypatch) -> None:
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
    monkeypatch.setattr(tensor_store, "SHARD_ROWS", 4)


def test_two_processes_leave_the_files_of_one(models, quiet, tmp_path):
    in_processes(2, share_words, tmp_path / "meet")
    for n in (1, 2):
        in_processes(n, functools.partial(everything, models, tmp_path / str(n)), tmp_path / "meet")
    expected = files(tmp_path / "1")
    kinds = {name.split("/")[1] for name in expected}
    assert {"heldout", "samples", "responses.partial", "reference", "rewards", "initial_samples"} <= kinds
    assert len([name for name in expected if name.startswith("cache/reference/")]) == 4  # shards of 4 pairs
    assert files(tmp_path / "2") == expected


@pytest.mark.parametrize(
    ("place", "name", "process"),
    [(tensor_store, "atomic_write", 0), (prefopt.generation.sampler, "sample", 1)],
    ids=["the reference", "responses"],
)
def test_what_two_have_written_before_a_fault_one_goes_on_with(
    place, name, process, models, quiet, tmp_path, monkeypatch
):
    """The second shard of the reference, and the second batch of responses in the second process."""
    work = functools.partial(everything, models, tmp_path / "found")
    with monkeypatch.context() as patch:
        function, calls = getattr(place, name), []

        def failing(*args, **kwargs):
            calls.append(1)
            if rank() == process and len(calls) == 2:
                raise UserError("the fault")
            return function(*args, **kwargs)

        patch.setattr(place, name, failing)
        with pytest.raises(torch.multiprocessing.ProcessRaisedException):
            in_processes(2, work, tmp_path / "meet")
    begun = files(tmp_path / "found")
    assert len([name for name in begun if name.startswith("cache/reference/")]) == (1 if process == 0 else 4)
    in_processes(1, work, tmp_path / "meet")
    in_processes(1, functools.partial(everything, models, tmp_path / "whole"), tmp_path / "meet")
    assert files(tmp_path / "found") == files(tmp_path / "whole")


def test_a_function_of_the_users_is_called_in_one_process(tmp_path):
    def score() -> None:
        def of_process(self, requests, *others):
            (tmp_path / f"called by {rank()}").touch()
            return [0.5] * len(requests)

        scorers.Vader.rewards = of_process  # type: ignore[method-assign]
        request = scorers.Request({}, 0, [], "text", True, "here")
        assert scorers.rewards_shared(scorers.Vader(), [request] * 3, "cpu", "float32", False) == [0.5] * 3

    in_processes(2, score, tmp_path / "meet")
    assert [file.name for file in tmp_path.glob("called*")] == ["called by 0"]


def serve(folder: Path, port: int) -> None:
    OpenAIServer(str(folder), port)
    threading.Event().wait()


def ask_server(models: Path, folder: Path, port: int) -> None:
    folder.mkdir(exist_ok=True)
    request = GenerationRequest(
        ModelConfig("tiny", str(models / "model")), PROMPTS, SamplingConfig(1.0, 1.0, 6, 3), 2, 0, "server", "cpu",
        "float32", ServerConfig(None, f"http://127.0.0.1:{port}/v1", 60.0), folder / "server.log",
    )  # fmt: skip
    rows, _ = generate_resumable(request, folder / "responses.partial", show=False)
    (folder / f"rank{rank()}.json").write_text(json.dumps(rows))


def test_two_processes_get_the_same_from_a_server_as_one(models, quiet, tmp_path):
    port = free_port()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(models / "model", port))
    server.start()
    try:
        for n in (1, 2):
            in_processes(n, functools.partial(ask_server, models, tmp_path / str(n), port), tmp_path / "meet")
    finally:
        server.kill()
    whole = (tmp_path / "1" / "rank0.json").read_text()
    assert [len(row["responses"]) for row in json.loads(whole)] == [2] * 5
    assert [(tmp_path / "2" / f"rank{i}.json").read_text() for i in (0, 1)] == [whole] * 2
