"""MT-Bench: published scores from published judgments, through the real client; what a judge's replies are read as; and
a judge that answers in text, with its faults."""

import gzip
import hashlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import SamplingConfig
from prefopt.errors import Interrupted, UserError
from prefopt.evaluation.alpaca_figures import bootstrap
from prefopt.evaluation.benchmark_files import ARENA_HARD, BenchmarkFile
from prefopt.evaluation.config import MtbenchConfig, check_mtbench
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.judged import subjects
from prefopt.evaluation.mtbench import (
    TEMPERATURES,
    TURNS,
    read_answers,
    read_benchmark,
    read_rating,
    run_pending,
    summarize,
)
from prefopt.evaluation.text_judge import ReplyFormat, TextJudge, build_text_judge
from prefopt.prefetch import PrefetchConfig, evaluations
from prefopt.utils.signals import stop_flag
from tests.helpers.harm import HARMS, cut, empty, flip, zero
from tests.helpers.judge import TextServer
from tests.helpers.tiny import ENVIRONMENT, ROOT, SHARED, run_program

pytest.importorskip("alpaca_eval")
REAL = SHARED / "judged" / "mt_bench"
PUBLISHED = {"mamba_0_5_dpo_ep3": 7.3125, "mamba_0_75_dpo_ep1": 7.034375, "mamba_0_875_dpo_ep3": 6.36875}
SECRET = "sk-test-0123456789"


def published_judgments() -> list[dict]:
    with gzip.open(REAL / "model_judgment" / "gpt-4_single.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def server_of(model: str) -> TextServer:
    """It answers each user text of the published judgments of a model with its judgment, and 500 to any other."""
    judgments = {row["user_prompt"]: row["judgment"] for row in published_judgments() if row["model"] == model}
    return TextServer(lambda messages, n: judgments.get(messages[-1]["content"], 500))


def command(server: TextServer, *changes: str) -> list[str]:
    key = "judge.key=PREFOPT_JUDGE_KEY"
    judge = ["judge=gpt4", f"judge.base_url={server.url}", key, f"files={REAL}", "device=cpu", "precision=float32"]
    return [*judge, *changes]


def start(*overrides: str) -> None:
    """The program, in this process."""
    register(MtbenchConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run_pending(parse(compose("mtbench", list(overrides)), MtbenchConfig))


def only_record(folder) -> dict:
    (file,) = folder.glob("*/record.json")
    return json.loads(file.read_text())


# What is published


@pytest.mark.shared
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_judgments_give_the_published_score(model, tmp_path, capsys, monkeypatch):
    server = server_of(model)
    overrides = command(server, f"answers={REAL / 'model_answer' / model}.jsonl", f"output={tmp_path / 'out'}")
    monkeypatch.setenv("PREFOPT_JUDGE_KEY", SECRET)
    start(*overrides)
    said = capsys.readouterr().out
    assert f"{PUBLISHED[model]:.2f} " in said
    record = only_record(tmp_path / "out")
    figures, rows = record["figures"], [r for r in published_judgments() if r["model"] == model]
    assert figures["score"] == PUBLISHED[model]
    for key, turn in (("first_turn", 1), ("second_turn", 2)):
        assert figures[key] == pytest.approx(np.mean([row["score"] for row in rows if row["turn"] == turn]))
    assert figures["interval"][0] < figures["score"] < figures["interval"][1]
    assert record["metric"] == "mt_bench (gpt-4-0613, gpt-4 references)"
    assert record["unfinished"] is None  # a file does not tell
    assert (figures["n"], figures["judgments"], figures["missing"], figures["asked_again"]) == (80, 160, 0, 0)
    assert (server.calls, len(server.asked)) == (160, 160)
    (judgments,) = (tmp_path / "out").glob("*/judgments.jsonl")
    ours = {(r["question_id"], r["turn"]): r for r in map(json.loads, judgments.read_text().splitlines())}
    assert len(ours) == 160
    for row in rows:
        mine = ours[row["question_id"], row["turn"]]
        assert mine["judge"] == ["gpt-4-0613", row["judge"][1]]
        assert all(mine[key] == row[key] for key in ("model", "user_prompt", "judgment", "score"))
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt-4-0613", 0, 2048)
        assert [m["role"] for m in request["messages"]] == ["system", "user"]
    # The templates of the first turn share a system prompt, and those of the second have one each.
    assert len({request["messages"][0]["content"] for request in server.requests}) == 3
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]

    judgments.with_name("record.json").unlink()
    for _ in range(2):  # without its record, and with it
        start(*overrides)
        assert capsys.readouterr().out == said
    assert server.calls == 160


@pytest.mark.shared
def test_the_program_says_the_same_and_asks_for_nothing_twice(tmp_path):
    model = "mamba_0_5_dpo_ep3"
    server = server_of(model)
    overrides = command(server, f"answers={REAL / 'model_answer' / model}.jsonl", f"output={tmp_path / 'out'}")
    process = run_program(*overrides, program="mtbench", env={"PREFOPT_JUDGE_KEY": SECRET})
    assert process.returncode == 0, process.stderr
    assert "7.31 " in process.stdout
    assert "gpt-4-0613: 160 calls for 160 prompts" in process.stderr
    assert server.calls == 160
    refused = run_program(*overrides, "max_cost=1", f"output={tmp_path}", program="mtbench",
                          env={"PREFOPT_JUDGE_KEY": SECRET})  # fmt: skip
    assert refused.returncode == 2
    assert "above what is left of max_cost, 1.00 USD" in refused.stderr
    short = run_program(*overrides, "judge.max_tokens=512", program="mtbench", env={"PREFOPT_JUDGE_KEY": SECRET})
    assert (short.returncode, server.calls) == (2, 160)


@pytest.mark.shared
def test_odd_judgments_are_read_as_ratings_or_not_at_all():
    rows = [json.loads(line) for line in (REAL / "model_judgment" / "odd.jsonl").read_text().splitlines()]
    read = [(row["question_id"], row["score"], read_rating(row["judgment"])) for row in rows]
    unreadable = [(question, score) for question, score, rating in read if rating is None]
    # -1: FastChat finds none either; 0 and 5: it takes single brackets for one; 8 and 9: there are two that differ
    assert sorted({score for _, score in unreadable}) == [-1, 0, 5, 8, 9]
    assert {question for question, score in unreadable if score == 0} == {127}
    assert all(rating == score for _, score, rating in read if rating is not None)
    assert {rating for _, _, rating in read if rating is not None} >= {7.5, 8.5, 9.5}
    assert all(read_rating(row["judgment"]) == row["score"] for row in published_judgments())


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[8]]", 8), ("[[8.5]] as I said: [[8.5]]", 8.5), ("[[9]] or [[10]]", None), ("Rating: [8]", None),
        ("[[0]]", None), ("[[11]]", None), ("[[10]]", 10), ("$ERROR$", None), ("", None), ("x[[rating]]", None),
        ("dp[0]\n[[3.]]", 3),
    ],
)  # fmt: skip
def test_a_rating_is_one_number_from_1_to_10(reply, rating):
    assert read_rating(reply) == rating


@pytest.mark.shared
@pytest.mark.parametrize("references", ["gpt-4", "gpt-4-0125-preview"])
def test_the_references_are_those_that_are_asked_for(references):
    benchmark = read_benchmark(str(REAL.parent), references)
    rows = (REAL / "reference_answer" / f"{references}.jsonl").read_text().splitlines()
    assert benchmark.references == {(r := json.loads(row))["question_id"]: r["choices"][0]["turns"] for row in rows}


@pytest.mark.shared
def test_a_changed_file_is_not_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    for file in (REAL / "question.jsonl", REAL / "judge_prompts.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"gpt-4\.jsonl, SHA-256 f957.*prefopt.prefetch mtbench=true.*files=FOLDER"):
        read_benchmark(str(tmp_path), "gpt-4")
    (tmp_path / "question.jsonl").write_bytes((REAL / "question.jsonl").read_bytes().replace(b"Hawaii", b"Havaii"))
    with pytest.raises(UserError, match=r"question\.jsonl, SHA-256 1195.* is not it"):
        read_benchmark(str(tmp_path), "gpt-4")


def hosted(content: bytes) -> str:
    """The address of a file on a server of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/file" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/file"


def test_prefetch_takes_the_published_file_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = b'{"a": 1}\n{"a": "\xe2\x80\xa8"}\n'
    digests = [hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()]
    for digest in digests:
        file = BenchmarkFile("rows.jsonl", digest, hosted(content), "mtbench=true")
        with pytest.raises(UserError, match="is not here"):
            file.find(None)
        assert file.fetch() == file.find(None) == file.fetch()
        assert file.rows(None) == [{"a": 1}, {"a": "\u2028"}]
        other = replace(file, digest=digest[::-1])
        with pytest.raises(UserError, match=r"is not the published rows\.jsonl"):
            other.fetch()
        assert not other.cached.exists()
        with pytest.raises(UserError, match="404"):
            replace(other, url=file.url + "s").fetch()


@pytest.mark.shared
def test_what_prefetch_finds_is_what_the_programs_read(tmp_path, monkeypatch):
    """From a copy of the published source, with the system prompts as Python."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prompts = ARENA_HARD["v0.1"].settings
    values = json.loads((SHARED / "judged" / prompts.name).read_text())
    source = f"P = {values['coding']['system_prompt']!r}\nJUDGE_SETTINGS = {values!r}\n"
    assert replace(prompts, url=hosted(source.encode())).fetch().read_bytes() == prompts.find(str(SHARED)).read_bytes()
    config = PrefetchConfig(mtbench=True, arena="v0.1", check=True)
    loaders = evaluations(config)
    assert len(loaders) == 8
    assert next(iter(loaders)) == "MT-Bench's question.jsonl"
    for name, load in loaders.items():
        if prompts.name in name:
            load()
            continue
        with pytest.raises(UserError, match=r"prefopt\.prefetch (mtbench=true|arena=v0\.1)"):
            load()
    with pytest.raises(UserError, match=r"arena must be v0\.1 or v2\.0"):
        evaluations(replace(config, arena="v1"))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 80}, "row 1: question_id 80 is none of MT-Bench's, 81 to 160"),
        ({"question_id": [81]}, r"row 1: question_id \[81\] is none"),
        ({"question_id": 81.5}, "question_id 81.5 is none"),
        ({}, "question_id None is none"),
        ({"question_id": 81}, "row 1 must hold the answers to two turns as texts"),
        ({"question_id": 81, "choices": []}, "row 1 must hold the answers to two turns as texts"),
        ({"question_id": 81, "choices": [{"turns": ["a", None]}]}, "row 1 must hold the answers to two turns as texts"),
        ({"question_id": 81, "choices": [{"turns": ["a"]}]}, "row 1 has 1 answers to question 81, which has 2 turns"),
    ],
)
def test_a_row_that_is_no_answer_is_refused(row, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=words):
        read_answers(str(tmp_path / "a.jsonl"), read_benchmark(str(REAL), "gpt-4"))


@pytest.mark.shared
def test_answers_of_other_programs_are_read(tmp_path, caplog):
    """Ids of other types, other fields and orders, and several choices, of which FastChat judges the first."""
    rows = [
        {"choices": [{"turns": ["a", ""], "index": 0}, {"turns": ["c", "d"], "index": 1}], "question_id": "82"},
        {
            "question_id": 81.0,
            "choices": [{"index": 0, "turns": ["e", "f\u2028g"]}],
            "metadata": {"x": 1},
            "split": "t",
        },
    ]
    (tmp_path / "mine.v2.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    answers = read_answers(str(tmp_path / "mine.v2.jsonl"), read_benchmark(str(REAL), "gpt-4"))
    assert {question: answer.turns for question, answer in answers.items()} == {81: ("e", "f\u2028g"), 82: ("a", "")}
    assert "1 rows have several choices. The first is judged" in caplog.text
    server = TextServer(lambda messages, n: "[[5]]")
    run_pending(small_config(server, answers=str(tmp_path / "mine.v2.jsonl"), output=str(tmp_path / "out")))
    assert only_record(tmp_path / "out")["model"] == "mine"
    assert server.calls == 4


@pytest.mark.parametrize("answers", ["nowhere.jsonl", "owner/name", "."])
def test_what_is_no_file_of_answers_is_refused(answers, tmp_path):
    config = small_config(TextServer(lambda messages, n: "[[5]]"), answers=answers, output=str(tmp_path))
    with pytest.raises(UserError, match=f"answers={answers} is no file of a model's answers"):
        subjects(config)


@pytest.mark.shared
def test_some_of_the_questions_give_no_score(tmp_path, capsys):
    lines = (REAL / "model_answer" / "mamba_0_5_dpo_ep3.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:15]))
    keys = {"answers": str(tmp_path / "some.jsonl"), "output": str(tmp_path / "out")}
    run_pending(small_config(server_of("mamba_0_5_dpo_ep3"), **keys))
    figures = only_record(tmp_path / "out")["figures"]
    assert "score" not in figures
    assert figures["n"] == 15
    assert set(figures["categories"]) == {"writing", "roleplay"}
    assert "none: it needs all 80 questions, and here are 15" in capsys.readouterr().out
    (tmp_path / "twice.jsonl").write_text(lines[0] * 2)
    with pytest.raises(UserError, match="row 2 answers question 81 once more"):
        read_answers(str(tmp_path / "twice.jsonl"), read_benchmark(str(REAL), "gpt-4"))


# Figures


def test_the_score_is_the_mean_of_the_ratings_and_its_interval_that_of_the_questions():
    generator = np.random.default_rng(0)
    ratings = {(q, turn): float(generator.integers(1, 11)) for q in range(80) for turn in TURNS}
    categories = {q: "even" if q % 2 == 0 else "odd" for q in range(80)}
    figures = summarize(ratings, categories)
    assert figures["score"] == pytest.approx(np.mean(list(ratings.values())))
    of_questions = np.array([(ratings[q, 1] + ratings[q, 2]) / 2 for q in range(80)])
    assert figures["standard_error"] == pytest.approx(of_questions.std(ddof=1) / 80**0.5)
    assert figures["interval"] == pytest.approx(bootstrap(of_questions))
    assert figures["categories"]["even"] == pytest.approx(of_questions[::2].mean())

    # A missing rating is none: neither a zero nor the mean of the others of its question.
    without = summarize(ratings | {(3, 2): None}, categories)
    assert without["score"] == pytest.approx((sum(ratings.values()) - ratings[3, 2]) / 159)
    assert without["second_turn"] == pytest.approx(np.mean([ratings[q, 2] for q in range(80) if q != 3]))


# A judge that answers in text


def small_config(server: TextServer, **changes) -> MtbenchConfig:
    values = yaml.safe_load((ROOT / "conf" / "judge" / "local.yaml").read_text())
    values |= {"name": "mine", "model": "m", "base_url": server.url, "temperature": 0, "max_tokens": 2048}
    keys = {
        "judge": values | {"parallel": 4, "timeout": 5}, "launcher": None, "checkpoints": "final", "files": str(REAL),
        "references": "gpt-4", "max_new_tokens": 8, "batch_size": 8, "backend": "transformers", "max_cost": 0,
        "seed": 0, "precision": "float32", "device": "cpu",
    }  # fmt: skip
    return MtbenchConfig(**keys | changes)


def judge_at(server: TextServer, **how) -> TextJudge:
    settings = {"temperature": 0.0, "max_tokens": 2048, "parallel": 4} | how
    return TextJudge(build_text_judge(small_config(server).judge).server, **settings)


PROMPTS = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"answer {i}"}] for i in range(100)]
FINISH = "finish"


def judged(judge, folder, prompts=PROMPTS, max_cost=0.0):
    return judge.judge(prompts, ReplyFormat(read_rating, FINISH, 10), folder, Budget(max_cost))


@pytest.fixture
def no_pauses(monkeypatch):
    from types import SimpleNamespace

    from prefopt.evaluation import clients

    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))


def number(messages) -> int:
    return int(messages[1]["content"].split()[1])


def test_faults_are_asked_again_and_a_reply_without_a_rating_is_answered(tmp_path, no_pauses):
    def reply(messages, n):
        i = number(messages)
        if i < 5 and n == 1:
            return (429, 500, 503)[i % 3]
        if 5 <= i < 8:  # a rating after one or two requests to finish
            return f"[[{i}]]" if len(messages) == 2 * (i - 4) + 2 or (i == 7 and len(messages) == 6) else f"hm {i}"
        return f"[[{i % 10 + 1}]]"

    server = TextServer(reply)
    verdicts = judged(judge_at(server), tmp_path)
    assert [v.value for v in verdicts] == [i if 5 <= i < 8 else i % 10 + 1 for i in range(100)]
    assert [len(v.replies) for v in verdicts[4:9]] == [1, 2, 3, 3, 1]
    assert verdicts[6].judgment == "hm 6\nhm 6\n[[6]]"
    longest = max((r["messages"] for r in server.requests), key=len)
    assert [m["role"] for m in longest] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert longest[3]["content"] == longest[5]["content"] == FINISH
    assert max(server.asked.values()) == 2  # those with a fault
    calls = server.calls
    assert judged(judge_at(server, parallel=1), tmp_path) == verdicts
    assert server.calls == calls
    # To another judge nothing is known.
    judged(judge_at(server, max_tokens=4096), tmp_path)
    assert server.calls > calls


@pytest.mark.parametrize("silent", [1, 2])
def test_more_than_one_in_a_hundred_without_a_verdict_is_no_result(silent, tmp_path):
    server = TextServer(lambda messages, n: "no idea" if number(messages) < silent else "[[5]]")
    if silent == 1:
        assert [v.value for v in judged(judge_at(server), tmp_path)] == [None] + [5] * 99
    else:
        with pytest.raises(UserError, match=r"incomplete: m gave no verdict .* for 2 of 100 prompts, after 3 passes"):
            judged(judge_at(server), tmp_path)
    assert server.calls == 100 + 2 * silent


def test_a_server_that_fails_is_no_verdict_and_what_it_said_is_kept(tmp_path, no_pauses):
    bad = {"status": 500}
    server = TextServer(lambda messages, n: bad["status"] if number(messages) == 3 and bad["status"] else "[[5]]")
    with pytest.raises(UserError, match=r"incomplete: .* for 1 of 100 .*(?s:.*)fault 500"):
        judged(judge_at(server), tmp_path)
    bad["status"] = 401
    with pytest.raises(UserError, match=r"judge m failed: .*401.*the same command goes on"):
        judged(judge_at(server), tmp_path)
    bad["status"] = 400  # the vendor refuses this text: it is missing, and the others count
    assert [v.value for v in judged(judge_at(server), tmp_path)].count(None) == 1
    bad["status"] = 0
    before = server.calls
    assert all(v.value == 5 for v in judged(judge_at(server), tmp_path))
    assert server.calls == before + 1


@pytest.mark.parametrize("harm", HARMS)
def test_paid_replies_that_are_whole_outlive_damage(harm, tmp_path, caplog):
    server = TextServer(lambda messages, n: "[[5]]")
    ask = judge_at(server, parallel=1)
    expected = [v.value for v in judged(ask, tmp_path, PROMPTS[:7])]
    (file,) = tmp_path.glob("m-*.jsonl")
    harm(file)
    assert [v.value for v in judged(ask, tmp_path, PROMPTS[:7])] == expected
    assert f"{file} is damaged" in caplog.text
    assert server.calls - 7 in {flip: (1, 2), cut: (4,), zero: (7,), empty: (7,)}[harm]


def test_the_cost_is_told_before_the_first_call(tmp_path, caplog):
    server = TextServer(lambda messages, n: "[[5]]")
    judge = TextJudge(replace(judge_at(server).server, price=[100.0, 200.0]), 0.0, 2048, 4)
    read = sum(len(m["content"]) for prompt in PROMPTS for m in prompt)
    cost = (read / 4 * 100 + 100 * 10 * 200) / 1e6
    with pytest.raises(UserError, match=rf"estimate of {cost:.2f} USD is above .* Nothing was asked for"):
        judged(judge, tmp_path, max_cost=cost / 2)
    assert server.calls == 0
    judged(judge, tmp_path, max_cost=cost + 0.01)
    assert "m: 100 calls for 100 prompts" in caplog.text


def test_a_stopped_job_keeps_what_is_under_way(tmp_path):
    def reply(messages, n):
        if number(messages) == 20:
            stop_flag.is_set = True
        return "[[5]]"

    server = TextServer(reply)
    try:
        with pytest.raises(Interrupted, match="replies are in"):
            judged(judge_at(server), tmp_path)
    finally:
        stop_flag.is_set = False
    stopped = server.calls
    assert 20 < stopped < 100
    judged(judge_at(server), tmp_path)
    assert (server.calls, max(server.asked.values())) == (100, 1)


def test_two_jobs_pay_once(tmp_path):
    server = TextServer(lambda messages, n: time.sleep(0.01) or "[[5]]")
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(judged(judge_at(server), tmp_path, PROMPTS[:30])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert server.calls == 30


def test_claude_is_asked_in_its_own_way(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    server = TextServer(lambda messages, n: ("Rating: [[7]]", "length"))
    values = yaml.safe_load((ROOT / "conf" / "judge" / "claude_haiku.yaml").read_text())
    how = {"base_url": server.host, "temperature": 0.0, "max_tokens": 2048, "parallel": 2}
    judge = build_text_judge(values | how)
    (verdict,) = judged(judge, tmp_path, PROMPTS[:1], max_cost=1)
    assert (verdict.value, verdict.replies[0].finished, verdict.replies[0].model) == (7, False, "served")
    (request,) = server.requests
    assert request["system"] == "s"
    assert [m["role"] for m in request["messages"]] == ["user"]
    assert judge.title == "claude-haiku-4-5"


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (None, "judge is null"),
        ({"_target_": "prefopt.evaluation.judges.RewardJudge",
          "scorer": {"_target_": "prefopt.rewards.scorers.Vader"}, "timeout": 5}, "writes no text"),
    ],
)  # fmt: skip
def test_a_judge_that_writes_no_text_is_refused(judge, words):
    how = {"temperature": 0, "max_tokens": 2048, "parallel": 2}
    with pytest.raises(UserError, match=words):
        build_text_judge((judge or {}) | how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"max_tokens": 512}, "at least 2048, is 512"),
        ({"parallel": 0}, "parallel"),
        ({"temperature": -1.0}, "negative"),
    ],
)
def test_settings_that_lose_verdicts_are_refused(how, words):
    server = TextServer(lambda messages, n: "[[5]]")
    with pytest.raises(UserError, match=words):
        judge_at(server, **how)


def test_settings_of_another_type_are_refused():
    config = small_config(TextServer(lambda messages, n: "[[5]]"))
    for key, value in (("temperature", "hot"), ("max_tokens", "many"), ("parallel", 1.5)):
        with pytest.raises(UserError, match=f"judge\\.{key}.*{value}"):
            build_text_judge(config.judge | {key: value})
    with pytest.raises(UserError, match=r"judge\.max_tokens.* null|judge\.max_tokens.*None"):
        build_text_judge(config.judge | {"max_tokens": None})


def test_a_bad_configuration_is_refused_with_all_that_is_wrong():
    server = TextServer(lambda messages, n: "[[5]]")
    config = small_config(server, references="gpt-5", checkpoints="last", files="nowhere", max_new_tokens=0)
    with pytest.raises(UserError) as error:
        check_mtbench(config)
    for words in ("references must be", "checkpoints must be", "files=nowhere", "max_new_tokens", "output=FOLDER"):
        assert words in str(error.value)


# Jobs


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """The folder of a finished run of the tiny model."""
    runs = tmp_path_factory.mktemp("mtbench")
    process = run_program(*overrides(runs), "exports=1")
    assert process.returncode == 0, process.stderr
    (folder,) = (path.parent for path in runs.glob("*/record.json"))
    return folder


def local(server: TextServer, *changes: str) -> list[str]:
    judge = ["judge=local", f"judge.base_url={server.url}", "judge.model=m"]
    return [*judge, f"files={REAL}", "max_new_tokens=4", "device=cpu", "precision=float32", *changes]


@pytest.mark.shared
def test_a_run_answers_the_second_turn_after_its_own_first(run, monkeypatch, tmp_path):
    from prefopt.generation.sampler import sample
    from prefopt.models.load import load_model, load_tokenizer
    from prefopt.tracking.policies import exported_policies

    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    server = TextServer(lambda messages, n: "[[5]]")
    start(*local(server, f"run={run}"))
    record = only_record(run / "mtbench")
    assert record["figures"]["score"] == 5
    assert record["model"] == f"{run.name}-final"
    assert (record["checkpoint"], record["step"]) == ("final", 4)
    assert record["weights"] == json.loads((run / "record.json").read_text())["final_weights"]
    (file,) = (run / "mtbench").glob("*/model_answer.jsonl")
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, file.open())}
    assert len(answers) == 80
    # What FastChat reads of it, and so does the program itself.
    benchmark = read_benchmark(str(REAL), "gpt-4")
    assert {q: list(c.turns) for q, c in read_answers(str(file), benchmark).items()} == answers

    (policy,) = exported_policies(str(run), "final")
    model, tokenizer = load_model(policy.model, "cpu"), load_tokenizer(policy.model)
    for question in (81, 111, 141):  # writing, math, stem
        row = benchmark.questions[question]
        settings = SamplingConfig(TEMPERATURES[row["category"]], 1.0, 4, 1)
        talk = [{"role": "user", "content": row["turns"][0]}]
        for turn in TURNS:
            ((drawn,),) = sample(model, tokenizer, [talk], settings, seed=0)
            assert drawn.text == answers[question][turn - 1]
            talk += [{"role": "assistant", "content": drawn.text}, {"role": "user", "content": row["turns"][1]}]
    assert record["unfinished"] > 0


@pytest.mark.slow
@pytest.mark.shared
def test_a_stopped_or_killed_job_ends_with_the_same_record_and_asks_for_nothing_twice(run, tmp_path):
    job: dict[str, subprocess.Popen] = {}
    hits: dict[int, signal.Signals] = {}
    count = itertools.count(1)

    def reply(messages, n):
        if (hit := hits.pop(next(count), None)) is not None:
            job["now"].send_signal(hit)
            time.sleep(1)
        return "[[4]]"

    server = TextServer(reply)
    arguments = local(server, f"run={run}", f"output={tmp_path / 'out'}", "judge.parallel=1")
    environment = {**ENVIRONMENT, "PREFOPT_CACHE": str(tmp_path / "cache")}

    def begin() -> subprocess.Popen:
        command = [sys.executable, "-m", "prefopt.mtbench", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        job["now"] = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        return job["now"]

    def end(process: subprocess.Popen, code: int) -> str:
        out, errors = process.communicate()
        assert process.returncode == code, errors
        return out

    for files in (1, 4):  # killed in the first turn, and in the second
        process = begin()
        while len(list((tmp_path / "cache" / "responses").glob("*.jsonl"))) < files:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        end(process, -signal.SIGKILL)
    assert server.calls == 0

    hits[40] = signal.SIGTERM
    end(begin(), 75)
    assert (server.calls, max(server.asked.values())) == (40, 1)
    hits[80] = signal.SIGKILL
    end(begin(), -signal.SIGKILL)
    # What it was asking when it was killed it may ask again: no answer has come.
    both = [begin(), begin()]
    said = {end(process, 0) for process in both}
    assert len(said) == 1
    assert (server.calls, len(server.asked), max(server.asked.values())) == (161, 160, 2)
    whole = only_record(tmp_path / "out")
    assert whole["figures"]["score"] == 4

    for file in ("record.json", "judgments.jsonl"):  # before the record, and before that
        (path,) = (tmp_path / "out").glob(f"*/{file}")
        path.unlink()
        assert end(begin(), 0) == said.copy().pop()
        again = only_record(tmp_path / "out")
        assert {k: again[k] for k in ("figures", "settings", "weights", "metric")} == {
            k: whole[k] for k in ("figures", "settings", "weights", "metric")
        }
    assert server.calls == 161


@pytest.mark.slow
@pytest.mark.shared
def test_a_sweep_judges_each_checkpoint(run, tmp_path):
    server = TextServer(lambda messages, n: "[[6]]")
    changes = [f"run={run}", "checkpoints=final", f"output={tmp_path / 'out'}", "references=gpt-4,gpt-4-0125-preview"]
    process = run_program(
        "-m", *local(server, *changes), f"hydra.sweep.dir={tmp_path / 'sweep'}", program="mtbench",
        env={"PREFOPT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr + process.stdout
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/record.json")]
    assert sorted(r["metric"] for r in records) == [
        "mt_bench (m, gpt-4 references)",
        "mt_bench (m, gpt-4-0125-preview references)",
    ]
    # The same judge is not asked again for what does not depend on the references.
    assert 160 < server.calls < 320
    assert max(server.asked.values()) == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.shared
def test_a_real_model_is_judged_by_a_server_with_faults(tmp_path):
    """SmolLM2-135M-Instruct, and a judge that is late, busy, or gives no rating now and then."""

    def reply(messages, n):
        number = int(hashlib.sha256(messages[1]["content"].encode()).hexdigest(), 16) % 10
        if number == 0 and n == 1:
            return 429
        if number == 1:
            time.sleep(0.3)
        return "Good." if number == 2 and len(messages) == 2 else "Rating: [[5]]"

    server = TextServer(reply)
    changes = ["max_new_tokens=32", f"output={tmp_path / 'out'}"]
    process = run_program(
        *local(server, *changes), program="mtbench", env={"PREFOPT_CACHE": str(tmp_path / "cache")}
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = only_record(tmp_path / "out")["figures"]
    assert (figures["score"], figures["judgments"], figures["missing"]) == (5, 160, 0)
    assert figures["asked_again"] > 5
    calls = server.calls
    again = run_program(*local(server, *changes), program="mtbench", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert (again.returncode, again.stdout, server.calls) == (0, process.stdout, calls)
