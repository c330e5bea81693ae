"""A real run, SmolLM2-135M after two steps of DPO, through the programs that evaluate it offline: MT-Bench, Arena-Hard,
RewardBench, and the report of all three."""

import json
from dataclasses import replace

import pytest
import torch

from prefopt.evaluation import arena, mtbench
from prefopt.evaluation.reward_bench_rows import LLMBAR
from prefopt.tracking.policies import exported_policies
from tests.evaluation import test_arena, test_mtbench
from tests.evaluation.test_reward_bench import write
from tests.helpers.judge import TextServer
from tests.helpers.tiny import SHARED, run_program

pytest.importorskip("alpaca_eval")
pytestmark = [pytest.mark.slow, pytest.mark.shared]
QUESTIONS = 5  # of Arena-Hard's 500: both sides answer them; of MT-Bench's, one of each category
PAIRS = 10  # of each of LLMBar's subsets
STEPS = 2
BETA = 0.1


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """No answers of an earlier start of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("real") / "runs"
    process = run_program(
        "model=smollm2_135m_offline", "dataset=jsonl", f"dataset.train={tiny_folder / 'train.jsonl'}",
        f"dataset.heldout={tiny_folder / 'heldout.jsonl'}", "objective=dpo", f"objective.beta={BETA}",
        f"runs_dir={runs}", f"steps={STEPS}", "batch_size=4", "optimizer.lr=1e-4", "schedule=constant",
        "sampling.prompts=0", "device=cpu", "precision=float32", "logger=quiet",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (folder,) = (path.parent for path in runs.glob("*/record.json"))
    return folder


def only_record(run, program: str) -> dict:
    (file,) = (run / program).glob("*/record.json")
    return json.loads(file.read_text())


def test_its_conversations_are_rated(run, monkeypatch):
    whole = mtbench.read_benchmark(str(SHARED / "judged"), "gpt-4")
    some = {question: row for question, row in whole.questions.items() if question % 10 == 1}
    monkeypatch.setattr(mtbench, "read_benchmark", lambda *_: replace(whole, questions=some))
    server = TextServer(lambda messages, n: "Rating: [[7]]" if "Start of Reference" in str(messages) else "[[5]]")
    test_mtbench.start(*test_mtbench.local(server, f"run={run}"))
    record = only_record(run, "mtbench")
    assert record["weights"] == json.loads((run / "record.json").read_text())["final_weights"]
    assert (record["figures"]["n"], record["figures"]["missing"], server.calls) == (8, 0, 16)
    assert {name for name, mean in record["figures"]["categories"].items() if mean == 7} == set(mtbench.WITH_REFERENCE)
    assert len(record["figures"]["categories"]) == 8


def test_its_answers_are_compared_with_the_initial_models(run, monkeypatch):
    whole = arena.read_benchmark("v0.1", str(SHARED / "judged"))
    some = dict(list(whole.questions.items())[:QUESTIONS])
    monkeypatch.setattr(arena, "read_benchmark", lambda *_: replace(whole, questions=some))

    def reply(messages, n):
        a, b = test_arena.parts(messages[-1]["content"])
        return "[[A=B]]" if a == b else "[[A>B]]"

    server = TextServer(reply)
    test_arena.start(*test_arena.local(server), f"run={run}", "baseline=initial", "max_new_tokens=16")
    record, trained = only_record(run, "arena"), json.loads((run / "record.json").read_text())
    assert (record["weights"], record["baseline"]["weights"]) == (trained["final_weights"], trained["initial_weights"])
    # Whichever answer stands first wins a game each.
    assert (record["figures"]["win_rate"], record["figures"]["n"], record["figures"]["missing"]) == (50, QUESTIONS, 0)
    assert record["figures"]["wins"] == record["figures"]["losses"] > 0
    assert record["unfinished"]["model"] > 0


def test_its_implicit_rewards_are_those_of_the_models_own_logits(run, tmp_path):
    from prefopt.models.load import load_model, load_tokenizer

    rows: dict[str, list[dict]] = {}
    for line in (SHARED / "preferences" / "llmbar.jsonl").read_text().split("\n")[:-1]:
        row = json.loads(line)
        rows.setdefault(row["subset"], []).append(row)
    some = [row for of_subset in rows.values() for row in of_subset[:PAIRS]]
    process = run_program(
        f"run={run}", f"rows={write(tmp_path / 'llmbar.jsonl', *some)}", "device=cpu", "precision=float32",
        program="reward_bench",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    record = only_record(run, "reward_bench")
    assert [figure["n"] for figure in record["figures"]["subsets"].values()] == [PAIRS] * len(LLMBAR)

    (policy,), row = exported_policies(str(run), "final"), some[0]
    initial = replace(policy.model, path=record["reward"]["reference"])
    tokenizer = load_tokenizer(policy.model)
    messages = [{"role": "user", "content": row["input"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = [0.0, 0.0]
    for sign, model in ((1, policy.model), (-1, initial)):
        network = load_model(model, "cpu").eval()
        for side, n in enumerate((row["label"], 3 - row["label"])):
            answer = tokenizer(row[f"output_{n}"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = network(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].double()
            logps = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
            expected[side] += sign * BETA * logps.sum().item()
    (file,) = (run / "reward_bench").glob("*/rewards.jsonl")
    assert json.loads(file.read_text().split("\n")[0])["rewards"] == pytest.approx(expected, abs=1e-3)
    assert any(abs(reward) > 0.01 for reward in expected)  # the run has moved


def test_the_report_has_those_that_are_a_figure(run):
    """Some of MT-Bench's questions are none."""
    process = run_program(f"runs_dir={run.parent}", f"output={run.parent / 'report'}", program="report")
    assert process.returncode == 0, process.stderr
    table = (run.parent / "report" / "table.md").read_text()
    for name in ("arena-hard-v0.1", "Chat Hard (5 of 6 subsets)"):
        assert name in table
