"""Arena-Hard: published win rates from published verdicts, through the real client; what verdicts count; intervals."""

import gzip
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.errors import UserError
from prefopt.evaluation.arena import read_answers, read_benchmark, run_pending, style
from prefopt.evaluation.arena_figures import (
    VERDICTS,
    games_of,
    outcome,
    question_values,
    read_verdict,
    summarize,
    win_rate,
)
from prefopt.evaluation.benchmark_files import ARENA_HARD, judge_settings
from prefopt.evaluation.config import ArenaConfig
from prefopt.evaluation.text_judge import build_text_judge
from tests.helpers.judge import TextServer
from tests.helpers.tiny import ROOT, SHARED

pytest.importorskip("alpaca_eval")
REAL = SHARED / "judged"
OLD = REAL / "arena_hard_v0.1"
UID = "328c149ed45a41c0b9d6f14659e63599"
QUANTILES = (0.025, 0.975)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def parts(user_prompt: str) -> list[str]:
    """The two answers in what a judge was asked."""
    found = re.findall(r"<\|The Start of Assistant [AB]'s Answer\|>\n(.*?)\n<\|The End of", user_prompt, re.DOTALL)
    assert len(found) == 2
    return found


def model_answers(folder) -> str:
    """The model's answers of the published judgments, as a file of Arena-Hard's."""
    rows = [
        {"uid": row["question_id"], "model": row["model"], "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": {"answer": parts(row["games"][0]["user_prompt"])[1]}},
        ]}
        for row in lines(OLD / "judgments_with_prompts.jsonl")
    ]  # fmt: skip
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "answers.jsonl")


def start(*overrides: str) -> None:
    """The program, in this process."""
    register(ArenaConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run_pending(parse(compose("arena", ["device=cpu", "precision=float32", *overrides]), ArenaConfig))


def local(server: TextServer, model: str = "m") -> list[str]:
    return ["judge=local", f"judge.base_url={server.url}", f"judge.model={model}"]


def only_record(folder) -> dict:
    (file,) = folder.glob("*/record.json")
    return json.loads(file.read_text())


# What is published


@pytest.mark.shared
def test_published_judgments_give_the_published_win_rate(tmp_path, capsys):
    published = lines(OLD / "judgments_with_prompts.jsonl")
    judgments = {g["user_prompt"]: g["judgment"] for row in published for g in row["games"]}
    server = TextServer(lambda messages, n: judgments.get(messages[-1]["content"], 500))
    overrides = [*local(server), f"answers={model_answers(tmp_path)}", f"files={REAL}", f"output={tmp_path / 'out'}"]
    start(*overrides)
    said = capsys.readouterr().out
    assert "43.75 " in said
    record = only_record(tmp_path / "out")
    figures = record["figures"]
    assert figures["win_rate"] == 43.75
    assert (figures["weighted_verdicts"], figures["n"], figures["judgments"], figures["missing"]) == (72, 25, 50, 0)
    assert record["metric"] == "arena-hard-v0.1, 25 of 500 questions (m, against gpt-4-0314)"
    assert (server.calls, len(server.asked)) == (50, 50)
    for request in server.requests:
        assert (request["temperature"], request["max_tokens"]) == (0, 4096)
        assert request["messages"][0]["content"].startswith("Please act as an impartial judge")
    (file,) = (tmp_path / "out").glob("*/judgments.jsonl")
    ours = {row["uid"]: row for row in lines(file)}
    for row in published:
        mine = ours[row["question_id"]]
        assert [g["score"] for g in mine["games"]] == [g["score"] for g in row["games"]]
        assert [g["prompt"][1]["content"] for g in mine["games"]] == [g["user_prompt"] for g in row["games"]]
    file.with_name("record.json").unlink()
    for _ in range(2):
        start(*overrides)
        assert capsys.readouterr().out == said
    assert server.calls == 50


def battles() -> dict[str, list[list[tuple[float, int]]]]:
    """By model and question, the games of the published verdicts: a row for each time that one counts."""
    rows: dict[str, dict[str, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    value = {"model_b": 1.0, "model_a": 0.0}
    with gzip.open(OLD / "battles.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            rows[row["model_b"]][row["question_id"]].append((value.get(row["winner"], 0.5), 1))
    return {model: list(questions.values()) for model, questions in rows.items()}


@pytest.mark.shared
def test_published_verdicts_give_the_published_win_rates_and_too_narrow_an_interval():
    found = {model: win_rate(questions, QUANTILES) for model, questions in battles().items()}
    assert {m: round(f["win_rate"], 4) for m, f in found.items() if m.startswith("gpt")} == {
        "gpt-4-0613": 37.9019,
        "gpt-3.5-turbo-0125": 23.3380,
    }
    others = sorted(round(f["win_rate"], 4) for m, f in found.items() if m.startswith("Llama"))
    assert others == [3.1620, 9.1429, 10.7468, 12.9666, 17.3684, 20.6301]  # the last: unfinished, 171 questions
    board = {
        row.split(",")[0]: row.split(",")[1:4] for row in (OLD / "leaderboard_20240731.csv").read_text().split("\n")
    }
    for model in ("gpt-4-0613", "gpt-3.5-turbo-0125"):
        score, low, high = map(float, board[model])
        figures = found[model]
        assert round(figures["win_rate"], 1) == round(score, 1)
        # Unseeded there, with 100 rounds: the ends of 95 % vary by about half a point.
        assert figures["leaderboard_interval"] == pytest.approx([low, high], abs=0.8)
        narrow, wide = (b - a for a, b in (figures["leaderboard_interval"], figures["interval"]))
        assert 1.3 < wide / narrow < 2.2
        assert wide == pytest.approx(2 * 1.96 * figures["standard_error"], rel=0.05)


@pytest.mark.shared
def test_odd_verdicts_are_read_or_not_at_all():
    rows = [game for row in lines(OLD / "judgments_odd.jsonl") for game in row["games"]]
    recorded = [(game["score"], read_verdict(game["judgment"])) for game in rows]
    assert ("A>>A", None) in recorded
    assert ("A<B", "A<B") in recorded
    assert all(read == score for score, read in recorded if score != "A>>A")
    for row in lines(OLD / "judgments_with_prompts.jsonl"):
        assert all(read_verdict(game["judgment"]) == game["score"] for game in row["games"])


# Verdicts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B"), ("[[A>B]], no: [[b>>a]]", "B>>A"), ("[A<B]", "A<B"),
        ("[[A>>A]]", None), ("[[A>> B]]", None), ("[[A]]", None), ("", None), ("[[A>B]] [B>A]", "A>B"),
        ("[[A>B]] then [[A>>A]]", None),
    ],
)  # fmt: skip
def test_the_last_verdict_counts(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_verdict_and_its_mirror_are_one_and_the_sides_change():
    flip = str.maketrans("AB<>", "BA><")
    for verdict in VERDICTS:
        mirror = verdict.translate(flip)[::-1] if "=" not in verdict else verdict
        assert outcome(verdict, 1) == outcome(verdict.translate(str.maketrans("<>", "><")).translate(
            str.maketrans("AB", "BA")), 1)  # fmt: skip
        value, weight = outcome(verdict, 1)
        assert outcome(verdict, 2) == (1 - value, weight)
        assert weight == (3 if ">>" in verdict or "<<" in verdict else 1)
        assert mirror in VERDICTS


def test_a_game_without_verdict_is_left_out_as_the_version_does_it():
    verdicts = {"a": ("B>>A", "A>B"), "b": ("A>B", None), "c": ("A=B", "A>B"), "d": (None, None), "e": ("A>B", "A>B")}
    old, new = (summarize(verdicts, QUANTILES, ARENA_HARD[version].drops_rows) for version in ("v0.1", "v2.0"))
    # a: 3 of 3 and 1 of 1; b: 0 of 1; c: 0.5 and 1; e: 0 and 1
    assert old["win_rate"] == pytest.approx(100 * (4 + 0 + 1.5 + 1) / (4 + 1 + 2 + 2))
    assert new["win_rate"] == pytest.approx(100 * (4 + 1.5 + 1) / (4 + 2 + 2))
    assert (old["wins"], old["ties"], old["losses"], old["n"]) == (4, 1, 2, 5)
    assert old["strong_share"] == pytest.approx(1 / 7)
    assert old["contradictory_share"] == pytest.approx(1 / 3)  # e: A in both


def test_the_intervals_are_those_of_questions_and_of_single_verdicts():
    generator = np.random.default_rng(3)
    twice = [[(value, 1)] * 2 for value in generator.integers(0, 2, 400).astype(float)]
    figures = win_rate(twice, QUANTILES)
    once = win_rate([games[:1] for games in twice], QUANTILES)
    assert figures["win_rate"] == once["win_rate"]
    assert figures["interval"] == pytest.approx(once["interval"])
    assert figures["standard_error"] == pytest.approx(once["standard_error"])
    wide, narrow = (f["leaderboard_interval"][1] - f["leaderboard_interval"][0] for f in (once, figures))
    assert narrow < 0.9 * wide  # the same questions twice, and it takes them for more


def test_a_value_for_each_question_has_the_mean_and_the_error_of_the_win_rate():
    generator = np.random.default_rng(4)
    verdicts = [tuple(generator.choice(list(VERDICTS), 2)) for _ in range(300)]
    questions = games_of(verdicts, drops_rows=False)
    values, figures = np.array(question_values(questions)), win_rate(questions, QUANTILES)
    assert values.mean() == pytest.approx(figures["win_rate"])
    assert values.std(ddof=1) / 300**0.5 == pytest.approx(figures["standard_error"])
    wide = figures["interval"][1] - figures["interval"][0]
    assert wide == pytest.approx(2 * 1.96 * figures["standard_error"], rel=0.1)


def test_marks_are_counted_outside_of_code():
    text = "# Title\n- one\n1. two\n**bold** and __bold__\n```\n# code\n- code\n```\n"
    assert style([text, ""]) == {"length": len(text) / 2, "headers": 0.5, "list items": 1.0, "bold": 1.0}


# Jobs


@pytest.mark.shared
def test_the_second_version_has_two_figures_and_baselines_of_ones_own(tmp_path, capsys):
    """20 questions of each category, against the published answers as a file of the user's."""
    files = [REAL / "arena_hard_v2.0" / f"baseline_{m}_first20.jsonl"
             for m in ("o3-mini-2025-01-31", "gemini-2.0-flash-001")]  # fmt: skip
    rows = [row for file in files for row in lines(file)]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"role": "assistant", "content": {"answer": "no"}}
    worse = [row | {"model": "mine", "messages": [row["messages"][0], answer]} for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse))

    # The judge likes the longer answer, and A a little more.
    def reply(messages, n):
        a, b = map(len, parts(messages[-1]["content"]))
        return "[[A>>B]]" if a > b else "[[B>A]]"

    server = TextServer(reply)
    overrides = [
        *local(server), "version=v2.0", f"answers={tmp_path / 'mine.jsonl'}", f"files={REAL}",
        f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"published o3-mini-2025-01-31\.jsonl.* is not here"):
        start(*overrides)
    assert server.calls == 0
    start(*overrides, f"baseline={tmp_path / 'base.jsonl'}")
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/record.json")]
    assert sorted(r["metric"] for r in records) == [
        f"arena-hard-v2.0 {category}, 20 of {n} questions (m, against base)"
        for category, n in (("creative_writing", 250), ("hard_prompt", 500))
    ]
    assert all(record["figures"]["win_rate"] == 0 for record in records)
    assert all(record["judge"]["max_tokens"] == 16_000 for record in records)
    systems = {r["messages"][0]["content"] for r in server.requests}
    assert len(systems) == 2
    assert sum("generating your own answer" in system for system in systems) == 1
    assert "0.00 " in capsys.readouterr().out


@pytest.mark.shared
def test_questions_are_read_by_line_feeds_alone():
    assert len(read_benchmark("v2.0", str(REAL)).questions) == 750
    assert any("\u2028" in row["prompt"] for row in read_benchmark("v2.0", str(REAL)).questions.values())


@pytest.mark.shared
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"uid": "x"}, r"row 1: uid 'x' is none of arena-hard-v0\.1's questions.*version=v2\.0"),
        ({"uid": ["x"]}, "is none of arena-hard-v0.1's questions"),
        ({"uid": UID}, "row 1 must hold the user's message and the answer"),
        ({"uid": UID, "messages": [{"role": "user", "content": "q"}]}, "must hold the user's message and the answer"),
        ({"uid": UID, "messages": [{"role": "assistant", "content": {"answer": None}}]}, "must hold the user's"),
        ({"question_id": UID, "choices": [{"turns": ["a", "b"]}]}, "must hold the user's message and the answer"),
    ],
)
def test_a_row_that_is_no_answer_is_refused(row, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=words):
        read_answers(str(tmp_path / "a.jsonl"), read_benchmark("v0.1", str(REAL)))


@pytest.mark.shared
def test_answers_of_the_release_of_2024_are_read(tmp_path):
    """The same answers, in both forms."""
    new = read_answers(model_answers(tmp_path), read_benchmark("v0.1", str(REAL)))
    rows = [
        {"question_id": uid, "answer_id": "x", "model_id": answer.model, "tstamp": 1.0,
         "choices": [{"index": 0, "turns": [{"content": answer.text, "token_len": 7}]}]}
        for uid, answer in new.items()
    ]  # fmt: skip
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_answers(str(tmp_path / "old.jsonl"), read_benchmark("v0.1", str(REAL))) == new
    # Of a model that had a system message, the later form holds it.
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": {"answer": "a", "thought": "t"}}]  # fmt: skip
    (tmp_path / "new.jsonl").write_text(json.dumps({"uid": UID, "model": "m", "messages": talk}) + "\n")
    assert read_answers(str(tmp_path / "new.jsonl"), read_benchmark("v0.1", str(REAL)))[UID].text == "a"


def test_a_judge_with_too_short_replies_is_refused():
    node = {"_target_": "prefopt.evaluation.judges.LanguageModelJudge", "name": "alpaca_eval_gpt4_0613",
            "price": [0, 0], "base_url": "http://127.0.0.1:9", "temperature": 0, "parallel": 1}  # fmt: skip
    assert build_text_judge(node | {"max_tokens": None}, 4096).max_tokens == 4096
    with pytest.raises(UserError, match=r"judge\.max_tokens must be at least 2048, is 512"):
        build_text_judge(node | {"max_tokens": 512}, 4096)


def test_settings_of_the_source_are_read_and_not_run():
    source = b'P = "text"\nimport os\nJUDGE_SETTINGS = {"a": {"baseline": "b", "system_prompt": P}}\n'
    assert json.loads(judge_settings(source)) == {"a": {"baseline": "b", "system_prompt": "text"}}
    for bad in (b"P = f()\n", b"X = 1\n", b"JUDGE_SETTINGS = {**P}\n", b"def"):
        with pytest.raises((ValueError, SyntaxError, LookupError)):
            judge_settings(bad)
