"""The money of a command: estimates and payments of all its results, and that nothing is paid where one cannot be
made."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from prefopt.config.schema import SamplingConfig
from prefopt.errors import UserError
from prefopt.evaluation.alpaca import AlpacaResult, Answers
from prefopt.evaluation.answers import OutputsFile
from prefopt.evaluation.config import AlpacaConfig
from prefopt.evaluation.cost import Budget, Estimate, LimitError
from prefopt.evaluation.questions import Question, Questions
from prefopt.evaluation.result_folder import make_all
from prefopt.evaluation.text_judge import TextJudge
from tests.evaluation import test_alpaca, test_arena, test_mtbench
from tests.helpers.judge import TextServer
from tests.helpers.tiny import SHARED, run_program

pytest.importorskip("alpaca_eval")


def test_an_estimate_is_what_is_read_and_written_at_its_price():
    estimate = Estimate((1000.0, 2000.0), {"a": (400, 10), "b": (4, 0)})
    assert (estimate.read, estimate.written) == (101, 10)
    assert estimate.usd == pytest.approx((101 * 1000 + 10 * 2000) / 1e6)
    assert Estimate((1.0, 1.0), {}).usd == 0


def test_the_limit_is_for_all_results_together():
    """Calls that two results need are paid once."""
    one, other = (dict.fromkeys(keys, (4_000_000, 0)) for keys in ("ab", "bc"))
    estimates = [Estimate((1.0, 1.0), calls) for calls in (one, other, {})]
    Budget(3.0).announce_all(estimates)
    with pytest.raises(UserError, match=r"estimate of 3\.00 USD is above .* max_cost, 2\.90 USD\. Nothing was asked"):
        Budget(2.9).announce_all(estimates)

    budget = Budget(2.0)
    budget.announce("m", estimates[0])
    budget.pay(1.5)
    budget.check()
    with pytest.raises(UserError, match=r"is left of max_cost, 0\.50 USD\. Nothing more was asked"):
        budget.announce("m", estimates[1])
    budget.pay(0.6)
    with pytest.raises(LimitError, match=r"cost 2\.10 of 2\.00 USD"):
        budget.check()


def test_calls_end_where_they_have_cost_the_limit(tmp_path):
    """The server counts 9 tokens read where the texts have about 3."""
    server = TextServer(lambda messages, n: "[[5]]")
    judge = TextJudge(replace(test_mtbench.judge_at(server).server, price=[1e6, 0.0]), 0.0, 2048, 4)
    with pytest.raises(UserError, match=r"max_cost is reached: .* of 400\.00 USD\. .* with a higher max_cost"):
        test_mtbench.judged(judge, tmp_path, max_cost=400)
    paid = server.calls
    assert 400 / 9 < paid <= 400 / 9 + 1 + judge.parallel
    assert all(v.value == 5 for v in test_mtbench.judged(judge, tmp_path, max_cost=9 * 100))
    assert (server.calls, max(server.asked.values())) == (100, 1)


def test_a_server_that_counts_nothing_is_paid_by_the_length_of_texts(tmp_path):
    def uncounted(text, n):
        return test_alpaca.logprobs(-0.1, -2.0) | {"usage": None}

    server = test_alpaca.Server(uncounted)
    judge = replace(test_alpaca.small_judge(server), price=[1e6, 0.0])
    budget, names = Budget(1e6), test_alpaca.GeneratorNames("r", "m")
    estimate = judge.estimate(test_alpaca.DUELS, tmp_path)
    judge.annotate(test_alpaca.DUELS, names, tmp_path, budget, "cpu", "float32")
    # A call is counted with its settings, and an estimate without.
    assert estimate.usd < budget.paid < estimate.usd + 8 * 400
    assert judge.estimate(test_alpaca.DUELS, tmp_path).calls == {}


def alpaca_results(server: "test_alpaca.Server", folder, files: int) -> list[AlpacaResult]:
    """Comparisons of files of answers with one baseline."""
    questions = Questions([Question([], f"question {i}?") for i in range(4)], is_alpaca_eval=False)
    judge = replace(test_alpaca.small_judge(server), price=[1000.0, 0.0])
    config = AlpacaConfig(
        baseline=str(folder / "base.json"), backend="transformers", seed=0, precision="float32", device="cpu",
        max_cost=0.0, sampling=SamplingConfig(0.0, 1.0, 8, 8), output=str(folder / "out"),
    )  # fmt: skip
    (folder / "base.json").write_text("[]")
    results = []
    for n in range(files):
        path = folder / f"m{n}.json"
        rows = [{"instruction": f"question {i}?", "output": "yes" * (i + n + 2)} for i in range(4)]
        path.write_text(json.dumps(rows))
        reference = Answers("base", ["no"] * 4, [True] * 4, None)
        results.append(AlpacaResult(config, judge, OutputsFile(f"m{n}", str(path)), questions, lambda r=reference: r))
    return results


def test_alpaca_adds_its_comparisons_before_the_first_call(tmp_path):
    server = test_alpaca.Server()
    results = alpaca_results(server, tmp_path, files=2)
    costs = [result.estimate().usd for result in results]
    with pytest.raises(UserError, match=f"estimate of {sum(costs):.2f} USD is above"):
        list(make_all(results, 0.9 * sum(costs), {}))
    assert server.calls == 0
    # The server counts less than the estimate: what is left is enough for the second.
    folders = [folder for _, folder in make_all(results, 1.1 * sum(costs), {})]
    assert server.calls == 8
    assert all((folder / "record.json").is_file() for folder in folders)
    assert [folder for _, folder in make_all(results, 0.0, {})] == folders


@pytest.mark.shared
def test_arena_adds_its_categories_before_the_first_call(tmp_path):
    """Each of the two would be below the limit."""
    real = SHARED / "judged"
    rows = [row for model in ("o3-mini-2025-01-31", "gemini-2.0-flash-001")
            for row in test_arena.lines(real / "arena_hard_v2.0" / f"baseline_{model}_first20.jsonl")]  # fmt: skip
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row | {"model": "b"}) + "\n" for row in rows))
    server = TextServer(lambda messages, n: "[[A=B]]")
    overrides = [
        *test_arena.local(server), "version=v2.0", f"answers={tmp_path / 'base.jsonl'}", f"files={real}",
        f"baseline={tmp_path / 'base.jsonl'}", f"output={tmp_path / 'out'}", "judge.price=[1000,0]",
    ]  # fmt: skip
    with pytest.raises(UserError, match="is above what is left of max_cost") as error:
        test_arena.start(*overrides, "max_cost=0")
    with pytest.raises(UserError, match="is above what is left of max_cost"):
        test_arena.start(*overrides, f"max_cost={0.9 * estimate_in(error)}")
    assert server.calls == 0


def estimate_in(error) -> float:
    return float(re.search(r"estimate of ([\d.]+) USD", str(error.value)).group(1))


@pytest.mark.shared
def test_nothing_is_asked_before_all_runs_are_whole_and_paid_for(overrides, tmp_path, monkeypatch):
    """Each of two runs would be below the limit; and one of which the tokenizer or the weights are broken."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    process = run_program(*overrides(tmp_path))
    assert process.returncode == 0, process.stderr
    (run,) = (path.parent for path in tmp_path.glob("*/record.json"))
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / "runs" / name)
    server = TextServer(lambda messages, n: "[[5]]")
    price = "judge.price=[1000,0]"

    def start(runs: str, *changes: str) -> None:
        test_mtbench.start(*test_mtbench.local(server, f"run={tmp_path / 'runs' / runs}", *changes))

    with pytest.raises(UserError, match="is above what is left") as error:
        start("a", price, "max_cost=0")
    one = estimate_in(error)
    with pytest.raises(UserError, match="is above what is left") as error:
        start("*", price, f"max_cost={1.5 * one}")
    assert estimate_in(error) == pytest.approx(2 * one, abs=0.02)

    policy = tmp_path / "runs" / "b" / "policy"
    for file in ("model.safetensors", "tokenizer.json"):
        (policy / file).write_bytes(b"{}")
        with pytest.raises(UserError, match=r"cannot be loaded|can be loaded"):
            start("*")
    shutil.rmtree(policy)
    with pytest.raises(UserError, match="has no policy"):
        start("*")
    assert server.calls == 0
    start("a")
    assert server.calls == 160
