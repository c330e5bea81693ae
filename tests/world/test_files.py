"""The laboratory's files, the program that makes them, and its scorer."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from prefopt.config.schema import ModelConfig
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import encode_prompt
from prefopt.errors import UserError
from prefopt.models.load import load_model, load_tokenizer
from prefopt.rewards.lab import ReviewSentiment
from prefopt.rewards.scorers import Request
from prefopt.utils.store import checksums
from prefopt.world import files, grammar
from tests.helpers.tiny import run_program


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder that `prefopt lab` makes."""
    folder = tmp_path_factory.mktemp("lab") / "world"
    process = run_program(f"output={folder}", program="lab")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1:] == [f"  {name}: {value:.4f}" for name, value in grammar.facts().items()]
    return folder


@pytest.fixture(scope="module")
def tokenizer(made):
    return load_tokenizer(ModelConfig("lab", str(made / "model")))


def rows(made: Path, name: str, split: str | None = None) -> list[dict]:
    return [row for _, row in read_rows(str(made / name), split)]


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    files.make_files(tmp_path, str(made), 0)
    assert checksums(tmp_path) == {name: digest for name, digest in checksums(made).items() if name != "world.json"}


def test_a_whole_folder_stays_a_damaged_one_is_made_anew_and_no_other_is_touched(made, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert run_program(f"output={made}", program="lab").returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}

    (made / "prompts.jsonl.gz").write_bytes(b"")
    process = run_program(f"output={made}", program="lab")
    assert process.returncode == 0
    assert "damaged" in process.stdout + process.stderr
    assert len(rows(made, "prompts.jsonl.gz", "train")) == files.TRAIN

    process = run_program(f"output={made}", "seed=1", program="lab")
    assert process.returncode == 2
    assert f"error: {made} is the world of seed=0" in process.stderr
    (tmp_path / "mine.txt").write_text("")
    process = run_program(f"output={tmp_path}", program="lab")
    assert process.returncode == 2
    assert "holds other files" in process.stderr


def test_rows(made):
    train, heldout = (rows(made, "prompts.jsonl.gz", split) for split in ("train", "heldout"))
    prompts = [row["prompt"] for row in train + heldout]
    assert (len(train), len(heldout)) == (files.TRAIN, files.HELDOUT)
    assert len(set(prompts)) == len(prompts)
    reviews = rows(made, "reviews.jsonl.gz", "train")
    assert Counter(row["prompt"] for row in reviews) == {row["prompt"]: files.REVIEWS for row in train}
    assert all(grammar.parse(grammar.family_of(row["prompt"]), row["completion"]) for row in reviews)


def test_one_choice_of_a_question_is_grammatical(made):
    questions = rows(made, "tasks/choices.jsonl")
    assert len(questions) == files.QUESTIONS
    for row in questions:
        family = grammar.family_of(row["prompt"])
        right = [grammar.parse(family, choice) is not None for choice in row["choices"]]
        assert right == [i == row["answer"] for i in range(4)]
    counts = Counter(row["answer"] for row in questions)
    assert all(abs(counts[i] - 125) < 4 * (500 * 3 / 16) ** 0.5 for i in range(4))


def test_a_token_is_a_word(tokenizer):
    rng = random.Random(0)
    texts = [*grammar.prompts()[::97], *(str(grammar.draw("dish", rng)) for _ in range(100))]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == text.split()
        assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in tokenizer(" ".join(grammar.WORDS))["input_ids"]


def test_template(tokenizer):
    prompt = [{"role": "user", "content": "review the old pie from the market"}]
    ids = encode_prompt(tokenizer, prompt)
    expected = ["<user>", "review", "the", "old", "pie", "from", "the", "market", "<end>", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    answer = [*prompt, {"role": "assistant", "content": "the taste is fair"}]
    text = tokenizer.apply_chat_template(answer, tokenize=False)
    assert text == "<user>review the old pie from the market<end><assistant>the taste is fair<end>"
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.pad_token != tokenizer.eos_token


def test_model(made, tokenizer):
    model = load_model(ModelConfig("lab", str(made / "model")), "cpu")
    assert model.num_parameters() == 168_960
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def request(prompt: str, response: str, finished: bool = True) -> Request:
    return Request({}, 0, [{"role": "user", "content": prompt}], response, finished, "row 1")


def test_scorer():
    prompt = "review the old pie from the market"
    requests = [
        request(prompt, "the taste is good"),
        request(prompt, "the room is good"),
        request(prompt, "the taste is good", finished=False),
    ]
    scorer = ReviewSentiment()
    assert scorer.rewards(requests, "cpu", "float32") == [grammar.reward("the taste is good")] * 3
    kept = {"grammatical": [1, 0, 0], "grammatical_reward": [grammar.reward("the taste is good"), 0, 0]}
    assert scorer.further_figures(requests) == kept
    assert scorer.probability(0.75) == 0.75
    with pytest.raises(UserError, match="row 1: 'Hello' is no prompt of the laboratory"):
        scorer.further_figures([request("Hello", "the taste is good")])


def test_a_run_knows_which_samples_are_grammatical(made, tmp_path):
    scored = [
        row | {"responses": ["the taste is good", "the taste is bad"], "rewards": [1, 0]}
        for split in ("train", "heldout")
        for row in rows(made, "prompts.jsonl.gz", split)[:8]
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    process = run_program(
        "model=lab", f"model.path={made / 'model'}", "dataset=lab_pairs", f"dataset.train={tmp_path / 'scored.jsonl'}",
        f"dataset.heldout={tmp_path / 'scored.jsonl'}", f"runs_dir={tmp_path}", "steps=1", "batch_size=4",
        "sampling.max_new_tokens=8", "logger=quiet", env={"PREFOPT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (record,) = tmp_path.glob("*/record.json")
    metrics = json.loads(record.read_text())["evaluations"][-1]
    assert (metrics["sample_grammatical"], metrics["samples"]) == (0, 8)
    lines = [json.loads(line) for line in (record.parent / "samples" / "step_0000001.jsonl").read_text().splitlines()]
    assert [line["grammatical"] for line in lines] == [0] * 8
    assert [line["reward"] for line in lines] == [grammar.reward(line["response"]) for line in lines]


@pytest.mark.slow
def test_fine_tuning_comes_near_the_entropy(made, tmp_path):
    """From nothing, in 300 steps."""
    process = run_program(
        "objective=sft", "model=lab", f"model.path={made / 'model'}", "dataset=lab_reviews",
        f"dataset.train={made / 'reviews.jsonl.gz'}", f"dataset.heldout={made / 'reviews.jsonl.gz'}", "steps=300",
        "batch_size=64", "layout=padded", "precision=float32", "optimizer.lr=1e-2", "sampling.prompts=0",
        f"runs_dir={tmp_path}", "logger=quiet",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (record,) = tmp_path.glob("*/record.json")
    floor = grammar.facts()["entropy_per_token"]
    assert floor < json.loads(record.read_text())["evaluations"][-1]["loss"] < floor + 0.25
