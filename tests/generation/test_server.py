"""backend=server, against a server of a real tiny model, and against faulty ones."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.config.schema import ModelConfig, SamplingConfig, ServerConfig
from prefopt.errors import Interrupted, UserError
from prefopt.generation import guard
from prefopt.generation.responses import GenerationRequest, generate_resumable
from prefopt.generation.server import ModelServer, fill, spread
from prefopt.models.load import load_tokenizer, weights_digest
from prefopt.utils import signals
from tests.helpers.openai_server import OpenAIServer
from tests.helpers.tiny import ROOT, save_tiny

SCRIPT = ROOT / "tests" / "helpers" / "openai_server.py"
SERVER = f"{sys.executable} {SCRIPT} {{model}} {{port}}"
URL = "http://127.0.0.1:{port}/v1"
PROMPTS = [[{"role": "user", "content": f"Review the {thing}."}] for thing in ("kettle", "old train", "soup")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("server") / "policy")


@pytest.fixture(autouse=True)
def stop_flag(monkeypatch):
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
    monkeypatch.setattr(signals, "stop_flag", signals.StopFlag())


def ask(model: Path, out: Path, server: ServerConfig | None, n: int = 2, **sampling):
    values = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "batch_size": 4} | sampling
    backend = "server" if server else "transformers"
    request = GenerationRequest(
        *(ModelConfig("tiny", str(model)), PROMPTS, SamplingConfig(**values), n, 0, backend, "cpu", "float32"),
        *(server, out.with_suffix(".log")),
    )
    rows, _ = generate_resumable(request, out, show=False)
    return rows


def running(url: str) -> ServerConfig:
    return ServerConfig(None, url, 60.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(what, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("fault", ["none", "text"])
def test_the_most_likely_responses_are_those_of_transformers(fault, model, tmp_path):
    served = OpenAIServer(str(model), fault=fault)
    found = ask(model, tmp_path / "a", running(served.url), temperature=0.0)
    assert found == ask(model, tmp_path / "b", None, temperature=0.0)
    assert served.drawn() == len(PROMPTS)  # the same response is asked for once


def test_prompts_are_sent_as_ids_and_several_at_a_time(model, tmp_path):
    served = OpenAIServer(str(model), seconds=0.05)
    ask(model, tmp_path / "a", running(served.url))
    drawn = [body for body in served.requests if "logprobs" not in body]
    assert len(drawn) == 2 * len(PROMPTS) == len({body["seed"] for body in drawn})
    assert all(type(token) is int for body in drawn for token in body["prompt"])
    assert {(body["max_tokens"], body["temperature"], body["top_p"]) for body in drawn} == {(4, 1.0, 1.0)}
    assert served.most_running > 1


def test_an_interrupted_call_goes_on_and_ends_with_the_same_rows(model, tmp_path, monkeypatch):
    served = OpenAIServer(str(model))
    whole = ask(model, tmp_path / "whole", running(served.url), batch_size=1)
    asked = served.drawn()
    answer = served.answer

    def and_stop(body):
        signals.stop_flag.is_set = served.drawn() >= asked + 3
        return answer(body)

    monkeypatch.setattr(served, "answer", and_stop)
    with pytest.raises(Interrupted, match=r"[12] of 3 prompts"):
        ask(model, tmp_path / "parts", running(served.url), batch_size=1)
    monkeypatch.setattr(served, "answer", answer)
    signals.stop_flag.is_set = False
    before = served.drawn()
    assert ask(model, tmp_path / "parts", running(served.url), batch_size=1) == whole
    assert served.drawn() - before < asked
    before = served.drawn()
    assert ask(model, tmp_path / "parts", running(served.url), batch_size=1) == whole
    assert served.drawn() == before


@pytest.mark.slow
def test_a_server_is_started_kept_in_a_log_and_ended(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a job's processes, and none of the server's business
    command = f"bash -c 'echo $$; env | grep -c WORLD_SIZE; exec {SERVER}'"
    found = ask(model, tmp_path / "a", ServerConfig(command, URL, 120.0))
    asked, pid, of_job, *_, url = (tmp_path / "a.log").read_text().splitlines()
    assert asked.startswith("$ bash")
    assert str(model) in asked
    assert of_job == "0"
    assert url.startswith("http://127.0.0.1:")
    assert not alive(int(pid))
    assert found == ask(model, tmp_path / "b", running(OpenAIServer(str(model)).url))


@pytest.mark.slow
def test_a_server_that_dies_is_said_with_its_log_and_another_goes_on(model, tmp_path):
    with pytest.raises(UserError, match="the server ended with exit code 137") as error:
        ask(model, tmp_path / "a", ServerConfig(f"{SERVER} dies", URL, 120.0), batch_size=1)
    assert "/v1" in str(error.value)  # what it has written
    served = OpenAIServer(str(model))
    found = ask(model, tmp_path / "a", running(served.url), batch_size=1)
    assert served.drawn() == 2 * len(PROMPTS) - 2  # it answered two
    assert found == ask(model, tmp_path / "b", running(served.url))


@pytest.mark.parametrize("fault", ["none", "text"])
def test_another_model_is_refused_before_anything_is_drawn(fault, model, tmp_path):
    served = OpenAIServer(str(save_tiny(tmp_path / "other", seed=1)), fault=fault)
    with pytest.raises(UserError, match=r"has not loaded the model .*policy.*differ by \d"):
        ask(model, tmp_path / "a", running(served.url))
    assert served.drawn() == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_logprobs", "gives no log-probs"),
        ("other_ids", "reads other token ids"),
        ("garbage", "does not answer as OpenAI's /v1/completions does"),
        ("html", "does not answer as OpenAI's /v1/completions does"),
        ("refuses", "the prompt is longer than this model reads"),
    ],
)
def test_what_a_faulty_server_does_is_said(fault, message, model, tmp_path):
    served = OpenAIServer(str(model), fault=fault)
    with pytest.raises(UserError, match=message):
        ask(model, tmp_path / "a", running(served.url))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bash -c 'echo no GPU is free; exit 3' {model}", r"(?s)exit code 3\..*no GPU is free"),
        ("/nowhere/vllm serve {model}", r"(?s)exit code 127\..*No such file"),
        ("bash -c 'sleep 600' {model}", r"not ready within server.timeout=0.5"),
    ],
)
def test_a_server_that_does_not_start_is_said(command, message, model, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        ask(model, tmp_path / "a", ServerConfig(command, "http://127.0.0.1:9/v1", 0.5))
    assert time.monotonic() - began < 60  # and not the 600 of sleep


def guarded(*command: str, seconds: float = 0.5, **settings) -> subprocess.Popen:
    words = [sys.executable, "-I", guard.__file__, str(seconds), *command]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **settings)


STUBBORN = "trap '' TERM; sleep 600 & echo $! $$; wait; wait"  # a child, and neither ends at SIGTERM


@pytest.mark.parametrize("how", ["closed", "SIGTERM"])
def test_a_server_and_its_children_end_with_the_job(how):
    process = guarded("bash", "-c", STUBBORN)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert all(map(alive, pids))
    if how == "closed":
        process.stdin.close()
    else:
        process.terminate()
    assert process.wait(60) == 128 + signal.SIGKILL
    assert not any(map(alive, pids))


def test_a_server_ends_when_the_job_is_killed(tmp_path):
    job = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {guard.__file__!r}, '0.5', 'bash', '-c', {STUBBORN!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", job], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(map(alive, pids))
        process.kill()
        until(lambda: not any(map(alive, pids)))


def test_slurms_signal_does_not_reach_the_server():
    process = guarded("bash", "-c", "kill -USR2 $$; echo outlived")
    assert process.stdout.readline() == "outlived\n"
    assert process.wait(60) == 0


def test_only_the_placeholders_are_filled_in():
    values = {"model": "/m", "port": "1", "precision": "float32"}
    assert fill("{model} {port} {precision} '{\"a\": {}}'", values) == "/m 1 float32 '{\"a\": {}}'"


def test_the_prompts_of_the_check_are_different_ones():
    lengths = [len(ids) for ids in spread([[1] * n for n in (9, 1, 1, 5, 3, 7, 2, 4, 6, 8)])]
    assert lengths == [1, 3, 5, 7]
    assert spread([[1], [1]]) == [[1]]


def test_an_adapter_is_merged_into_the_folder_that_is_served(model, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    torch.nn.init.normal_(next(p for name, p in adapted.named_parameters() if "lora_B" in name))
    adapted.save_pretrained(tmp_path / "adapter")
    config = ModelConfig("adapted", str(model), adapter=str(tmp_path / "adapter"))
    with ModelServer(config, load_tokenizer(config), "float32") as served:
        folder = served._folder(served.model)
        assert weights_digest(AutoModelForCausalLM.from_pretrained(folder)) == served.weights
        assert (Path(folder) / "tokenizer.json").is_file()
    assert not Path(folder).exists()
    with ModelServer(ModelConfig("tiny", str(model)), load_tokenizer(config), "float32") as whole:
        assert whole._folder(whole.model) == str(model)
        assert whole.weights != served.weights
