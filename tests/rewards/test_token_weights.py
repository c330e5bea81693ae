"""Weights of tokens from two models: by hand, aligned to the tokens that training counts, and refused where they are
not."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig
from prefopt.data.formats import Pairs
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import encode_completion
from prefopt.errors import UserError
from prefopt.models.load import load_model, load_tokenizer
from prefopt.rewards.config import TokenWeightsConfig
from prefopt.rewards.token_weights import check_token_weights, weighted_rows, write_token_weights
from tests.helpers.tiny import ROOT, records, run_program, save_tiny, tiny_overrides, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and pairs, of which one has no preference."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("good", "bad")):
        save_tiny(folder / name, seed)
    file = write_pairs(folder / "pairs.jsonl", 8)
    with file.open("a") as rows:
        rows.write(json.dumps({"prompt": "Say it.", "chosen": "It.", "rejected": None}) + "\n")
    return folder


def config(folder, *overrides: str) -> TokenWeightsConfig:
    register(TokenWeightsConfig)
    files = [f"input={folder / 'pairs.jsonl'}", f"output={folder / 'out.jsonl'}"]
    models = [f"positive={folder / 'good'}", f"negative={folder / 'bad'}", "precision=float32", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("token_weights", [*files, *models, *overrides]), TokenWeightsConfig)


def test_weights_are_the_formula_on_each_token(folder):
    """Each completion alone in the models' own forward pass. A row without a pair stays as it is."""
    rows, weighted = weighted_rows(config(folder, "scale=0.7", "low=-0.1", "high=0.2"), show=False)
    before = [row for _, row in read_rows(str(folder / "pairs.jsonl"), None)]
    assert weighted == 8
    assert rows[8] == before[8]
    models = [load_model(ModelConfig("m", str(folder / name)), "cpu") for name in ("good", "bad")]
    tokenizer = load_tokenizer(ModelConfig("m", str(folder / "good")))
    seen = []
    for row, plain in zip(rows[:8], before, strict=False):
        assert {key: row[key] for key in plain} == plain
        pair = Pairs()(plain)
        for side, sign in (("chosen", 1), ("rejected", -1)):
            prompt, completion = encode_completion(tokenizer, pair.prompt, getattr(pair, side), True)
            with torch.no_grad():
                good, bad = (
                    m(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    for m in models
                )
            d = (good - bad)[range(len(completion)), completion].tolist()
            expected = [math.exp(sign * 0.7 * min(max(x, -0.1), 0.2)) for x in d]
            assert row[f"{side}_token_weights"] == pytest.approx(expected, abs=2e-5)
            seen += expected
    assert len({round(w, 3) for w in seen}) > 5


def test_what_it_writes_trains_with_either_reference_and_what_does_not_fit_is_refused(folder, tmp_path):
    weighted = tmp_path / "weighted.jsonl"
    write_token_weights(config(folder, f"output={weighted}"))
    rows = [row for _, row in read_rows(str(weighted), None) if row["rejected"]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    common = [*tiny_overrides(folder / "good", tmp_path, tmp_path / "runs"), "objective=tis_dpo"]
    environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
    for more in (["reference=cached"], ["reference=resident"]):
        process = run_program(*common, *more, env=environment)
        assert process.returncode == 0, process.stderr
    a, b = records(tmp_path / "runs")
    assert a["config"]["reference"] != b["config"]["reference"]
    assert a["final_weights"] == b["final_weights"]
    assert a["evaluations"] == b["evaluations"]
    assert a["evaluations"][0]["loss"] == pytest.approx(math.log(2))
    assert a["evaluations"][-1]["loss"] != a["evaluations"][0]["loss"]

    lacking = rows[0] | {"chosen_token_weights": None, "rejected_token_weights": None}
    for changed, message in (
        (lacking, "needs weights for the tokens of both completions, and 1 of 6 train items have none"),
        (rows[0] | {"chosen_token_weights": [1.0]}, "train.jsonl, row 1: chosen_token_weights holds 1 numbers, and"),
    ):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [changed, *rows[1:6]]))
        process = run_program(*common, env=environment)
        assert process.returncode == 2
        assert message in " ".join(process.stderr.split())


def test_what_cannot_be_is_refused(folder, tmp_path):
    for overrides, message in (
        (["scale=0"], "scale must be positive"),
        (["low=1", "high=0"], "low must not be above high"),
        ([f"output={folder / 'pairs.jsonl'}"], "is what is read"),
    ):
        with pytest.raises(UserError, match=message):
            check_token_weights(config(folder, *overrides))
    other = save_tiny(tmp_path / "other", 1)
    tokenizer = load_tokenizer(ModelConfig("m", str(other)))
    tokenizer.chat_template = "{# another one #}" + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="have different tokenizers or chat templates"):
        weighted_rows(config(folder, f"negative={other}"), show=False)
    (tmp_path / "scored.jsonl").write_text(json.dumps({"prompt": "a", "responses": ["b", "c"], "rewards": [1, 0]}))
    with pytest.raises(UserError, match="weights of tokens belong to rows of one pair each"):
        weighted_rows(config(folder, f"input={tmp_path / 'scored.jsonl'}"), show=False)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 600, "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(UserError, match=r"long.jsonl, row 1 has \d+ tokens, and the models read 512"):
        weighted_rows(config(folder, f"input={tmp_path / 'long.jsonl'}"), show=False)
