"""A judge's check against published judgments: figures of judges whose errors are known, and the record that its
figures carry."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.errors import UserError
from prefopt.evaluation.arena_figures import VERDICTS
from prefopt.evaluation.config import JudgeCheckConfig
from prefopt.evaluation.judge_check import check, compare_ratings, compare_verdicts, read_ratings, read_verdicts
from tests.evaluation import test_arena
from tests.helpers.judge import TextServer
from tests.helpers.tiny import ROOT, SHARED

pytest.importorskip("alpaca_eval")
REAL = SHARED / "judged"
RATINGS = REAL / "mt_bench" / "model_judgment" / "gpt-4_single.jsonl.gz"
VERDICTS_FILE = REAL / "arena_hard_v0.1" / "judgments_with_prompts.jsonl"


def start(server: TextServer, *overrides: str) -> dict:
    register(JudgeCheckConfig)
    judge = ["judge=local", f"judge.base_url={server.url}", "judge.model=m", f"files={REAL}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return check(parse(compose("judge_check", [*judge, *overrides]), JudgeCheckConfig))


def test_known_errors_have_known_figures():
    published = [1.0, 2.0, 3.0, 4.0, 8.0]
    same = compare_ratings(published, published)
    assert (same["correlation"], same["difference"], same["within_1"]) == (pytest.approx(1), 0, 1)
    kind = compare_ratings(published, [3.0, 4.0, None, 6.0, 10.0])
    assert (kind["n"], kind["correlation"], kind["difference"], kind["within_1"]) == (4, pytest.approx(1), 2, 0)
    turned = compare_ratings(published, [-p for p in published])
    assert turned["rank_correlation"] == pytest.approx(-1)
    assert compare_ratings(published, [5.0] * 5)["correlation"] is None


def test_a_judge_that_likes_one_side_is_seen():
    generator = np.random.default_rng(0)
    published = [str(v) for v in generator.choice(list(VERDICTS), 200)]
    same = compare_verdicts(published, published)
    assert same["agreement"] == 1
    assert same["judge"] == same["published"]
    always_a = compare_verdicts(published, ["A>B"] * 200)
    assert always_a["judge"] == {"win_rate": 50, "contradictory_share": 1}
    assert always_a["agreement"] < 0.6
    some = compare_verdicts(published, [None, *published[1:]])
    assert (some["n"], some["agreement"]) == (199, 1)


@pytest.mark.shared
def test_the_published_judge_agrees_with_itself_and_its_figures_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    with gzip.open(RATINGS, "rt") as file:
        rows = [json.loads(line) for line in file]
    judgments = {row["user_prompt"]: row["judgment"] for row in rows}
    games = [game for row in test_arena.lines(VERDICTS_FILE) for game in row["games"]]
    judgments |= {game["user_prompt"]: game["judgment"] for game in games}
    unreadable = {text for text in judgments if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 30 == 0}

    def reply(messages, n):
        return "no idea" if messages[1]["content"] in unreadable else judgments.get(messages[1]["content"], 500)

    server = TextServer(reply)
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:120]))
    start(server, f"ratings={tmp_path / 'some.jsonl'}")
    record = start(server, f"verdicts={VERDICTS_FILE}")
    ratings, verdicts = record["ratings"], record["verdicts"]
    missing = sum(row["user_prompt"] in unreadable for row in rows[:120])
    assert (ratings["n"], ratings["missing"], ratings["asked_again"]) == (120 - missing, missing, missing)
    assert missing > 1.2  # more than a benchmark's result may lack
    assert (ratings["correlation"], ratings["difference"]) == (pytest.approx(1), 0)
    assert (verdicts["agreement"], verdicts["published"]["win_rate"]) == (1, 43.75)
    assert "same winner" in capsys.readouterr().out
    calls = server.calls
    start(server, f"verdicts={VERDICTS_FILE}")
    assert server.calls == calls

    # The next figure of this judge holds the check.
    answers = test_arena.model_answers(tmp_path)
    unreadable.clear()
    output = f"output={tmp_path / 'out'}"
    test_arena.start(*test_arena.local(server), f"answers={answers}", f"files={REAL}", output)
    assert test_arena.only_record(tmp_path / "out")["judge_check"] == verdicts
    assert "100.0 % the same winner" in capsys.readouterr().out


@pytest.mark.shared
def test_what_holds_no_published_judgments_is_refused(tmp_path):
    odd = REAL / "mt_bench" / "model_judgment" / "odd.jsonl"
    with pytest.raises(UserError, match="row 1 must hold a judgment of FastChat's with its prompt"):
        read_ratings(str(odd), str(REAL))
    with pytest.raises(UserError, match="row 1 must hold a judgment of Arena-Hard's with its prompts"):
        read_verdicts(str(REAL / "arena_hard_v0.1" / "judgments_odd.jsonl"), str(REAL))
    with pytest.raises(UserError, match="ratings=FILE of FastChat's"):
        start(TextServer(lambda messages, n: "[[5]]"))
    assert len(read_verdicts(str(VERDICTS_FILE), str(REAL))[0]) == 50
    prompts, _ = read_ratings(str(RATINGS), str(REAL))
    assert len(prompts) == 480
    assert {len(prompt) for prompt in prompts} == {2}


@pytest.mark.shared
def test_judgments_of_other_versions_are_read(tmp_path):
    """Those of version 2.0 hold the conversation, and null for a game that has no reply."""
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    game = {"score": "A>B", "judgment": {"answer": "[[A>B]]"}, "prompt": asked}
    rows = [
        {"uid": "a", "category": "hard_prompt", "games": [game, game | {"score": "B>>A"}]},
        {"uid": "b", "category": "hard_prompt", "games": [game, None]},
        {"uid": "c", "category": "hard_prompt", "games": [game, game | {"score": ["A>B"]}]},
    ]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_verdicts(str(file), str(REAL)) == ([asked, asked], ["A>B", "B>>A"])
    for games in (None, [game], [game, "A>B"], [game, {"score": "A>B"}], [game, game | {"prompt": [{"role": "user"}]}]):
        file.write_text(json.dumps({"games": games}) + "\n")
        with pytest.raises(UserError, match="row 1 must hold a judgment of Arena-Hard's"):
            read_verdicts(str(file), str(REAL))

    row = {"judge": ["gpt-4", "single-v1"], "user_prompt": "q", "score": 7, "turn": 1}
    scores = [row, row | {"score": 8.5}, row | {"score": -1}, row | {"score": None}, row | {"score": float("nan")}]
    file.write_text("".join(json.dumps(row) + "\n" for row in scores))
    assert read_ratings(str(file), str(REAL))[1] == [7, 8.5]
    for change, words in (
        ({"score": "7"}, "must hold a judgment of FastChat's"),
        ({"judge": "gpt-4"}, "must hold a judgment of FastChat's"),
        ({"judge": ["gpt-4", "mine"]}, "the template 'mine' is none of FastChat's: pair-v2, "),
    ):
        file.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(UserError, match=words):
            read_ratings(str(file), str(REAL))
