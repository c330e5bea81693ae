"""Iterative pairwise ranking: the winner is the judge's best, by n - 1 comparisons, none of which is paid for twice."""

import re
import threading

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.data.formats import ScoredResponses
from prefopt.data.sources import read_rows, write_rows
from prefopt.errors import Interrupted, UserError
from prefopt.evaluation.config import RankConfig
from prefopt.evaluation.ranking import Candidates, rank, read_choice
from tests.helpers.judge import TextServer
from tests.helpers.tiny import ROOT, run_program

pytest.importorskip("alpaca_eval")
ROWS = [
    {"prompt": "Name a colour.", "responses": ["red 2", "blue 5", "green 3", "blue 5"], "finished": [True] * 4},
    {"prompt": "Name a river.", "responses": ["Rhine 9", "Elbe 1", "Ganges 4"], "finished": [True, False, True]},
    {"prompt": "Name a tree.", "responses": ["oak 1", "ash 2"], "id": "c", "rewards": [0, 0], "rewards_01": [0, 0]},
]
REWARDS = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0]]
CALLS = 2 + 2 + 1  # the second "blue 5" is the running winner's text


def answers(messages) -> list[int]:
    """The number in each answer."""
    return [int(n) for n in re.findall(r"(\d)\n\[end of answer", messages[1]["content"])]


def best(messages, n):
    a, b = answers(messages)
    return f"I think so. [[{'A' if a > b else 'B'}]]"


def config(server: TextServer, folder, *overrides: str) -> RankConfig:
    register(RankConfig)
    write_rows(folder / "in.jsonl", ROWS)
    given = ["judge=local", f"judge.base_url={server.url}", "judge.model=m", "judge.parallel=1"]
    files = [f"input={folder / 'in.jsonl'}", f"output={folder / 'out.jsonl'}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("rank", [*given, *files, *overrides]), RankConfig)


def test_the_best_wins_by_one_call_less_than_there_are_responses(tmp_path):
    server = TextServer(best)
    rows = rank(config(server, tmp_path), tmp_path / "replies")
    assert [row["rewards"] for row in rows] == REWARDS
    assert server.calls == CALLS
    assert rows[1]["finished"] == ROWS[1]["finished"]
    assert "rewards_01" not in rows[2]
    assert rank(config(server, tmp_path), tmp_path / "replies") == rows
    assert server.calls == CALLS  # all replies are known


def test_what_was_ranked_becomes_the_paper_s_pairs():
    row = ROWS[1] | {"rewards": [1.0, 0.0, 0.0]}
    pairs = ScoredResponses("all")(row)
    assert [(p.chosen, p.rejected) for p in pairs] == [("Rhine 9", "Elbe 1"), ("Rhine 9", "Ganges 4")]
    first = ScoredResponses("best_worst")(row)
    assert (first.chosen, first.rejected) == ("Rhine 9", "Elbe 1")


def test_a_judge_that_likes_a_side_likes_no_response():
    sides = [Candidates([{"role": "user", "content": str(i)}], ["one", "two"]).is_first(1) for i in range(200)]
    assert 70 < sum(sides) < 130


def test_stopped_in_the_middle_it_pays_for_the_rest_alone(tmp_path, monkeypatch):
    stop = threading.Event()

    class Flag:
        @property
        def is_set(self):
            return stop.is_set()

    def stopping(messages, n):
        if server.calls == 4:
            stop.set()
        return best(messages, n)

    server = TextServer(stopping)
    monkeypatch.setattr("prefopt.evaluation.text_judge.stop_flag", Flag())
    with pytest.raises(Interrupted, match="4 replies are in"):
        rank(config(server, tmp_path), tmp_path / "replies")
    stop.clear()
    rows = rank(config(server, tmp_path), tmp_path / "replies")
    assert [row["rewards"] for row in rows] == REWARDS
    assert set(server.asked.values()) == {1}  # nothing was asked twice


def test_without_a_verdict_there_is_no_reward_and_with_many_no_result(tmp_path, monkeypatch):
    def reply(messages, n):
        return "no idea" if "Elbe" in messages[1]["content"] else best(messages, n)

    server = TextServer(reply)
    with pytest.raises(UserError, match="gave no verdict that can be read for 1 of 3"):
        rank(config(server, tmp_path), tmp_path / "replies")
    candidates = Candidates([{"role": "user", "content": "x"}], ["one", "two", "three"])
    candidates.take(1, type("Missing", (), {"value": None})())  # type: ignore[arg-type]
    assert candidates.rewards == [1.0, None, 0.0]


def test_the_last_verdict_counts():
    assert read_choice("First I thought [[A]], but it is [[B]].") == "B"
    assert read_choice("A") is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Hi", "responses": ["a"]}], "has one response"),
        ([{"prompt": "Hi"}], "has no field 'responses'"),
        ([{"prompt": "Hi", "responses": [1, 2]}], "must be text"),
        ([{"prompt": [{"role": "assistant", "content": "Hi"}], "responses": ["a", "b"]}], "user and assistant in turn"),
    ],
)
def test_what_cannot_be_ranked_is_refused_before_anything_is_asked(rows, message, tmp_path):
    server = TextServer(best)
    of_run = config(server, tmp_path)
    write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match=f"row 1.*{message}"):
        rank(of_run, tmp_path / "replies")
    assert server.calls == 0


def test_more_than_the_limit_is_not_spent(tmp_path):
    server = TextServer(best)
    with pytest.raises(UserError, match="max_cost"):
        rank(config(server, tmp_path, "judge.price=[1000.0,1000.0]", "max_cost=0.01"), tmp_path / "replies")
    assert server.calls == 0


def test_the_program_writes_the_rows(tmp_path):
    server = TextServer(best)
    write_rows(tmp_path / "in.jsonl", ROWS)
    given = ["judge=local", f"judge.base_url={server.url}", "judge.model=m"]
    files = [f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl.gz'}"]
    process = run_program(*given, *files, program="rank")
    assert process.returncode == 0, process.stderr
    rows = [row for _, row in read_rows(str(tmp_path / "out.jsonl.gz"))]
    assert [row["rewards"] for row in rows] == REWARDS
    assert {row["judge"] for row in rows} == {"m"}
    (replies,) = (tmp_path / "out.jsonl.gz.replies").glob("*.jsonl")
    assert len(replies.read_text().splitlines()) == CALLS
