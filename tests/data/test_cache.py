"""Tokenized data on disk: shared where all is the same, made again where anything differs, whole or not there."""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefopt.config.parse import parse
from prefopt.config.schema import DatasetConfig, PoliciesConfig
from prefopt.data import cache
from prefopt.data.cache import Limits, Prepared, TokenizedPairs, prepare_dataset
from prefopt.data.dataset import load_split
from prefopt.data.tokenize import tokenize
from prefopt.errors import UserError
from tests.helpers.harm import HARMS
from tests.helpers.tiny import CHATML, ENVIRONMENT, ROOT, tiny_tokenizer, write_pairs

LIMITS = Limits(1800, 512)


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> DatasetConfig:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    node = OmegaConf.load(ROOT / "conf" / "dataset" / "jsonl.yaml")
    files = {
        "train": str(write_pairs(tmp_path / "train.jsonl", 12)),
        "heldout": str(write_pairs(tmp_path / "heldout.jsonl", 6, start=100)),
    }
    return parse(OmegaConf.merge(node, {"name": "test"}, files), DatasetConfig)  # type: ignore[arg-type]


def run(dataset: DatasetConfig, tokenizer=None, limits: Limits = LIMITS) -> dict[str, Prepared]:
    return prepare_dataset(dataset, tokenizer or tiny_tokenizer(), limits, lambda split, rewards: None, show=False)


def made(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "tokenized").iterdir()}


def test_what_comes_back_is_what_was_tokenized(dataset):
    prepared = run(dataset)
    assert list(prepared) == ["train", "heldout"]
    for name, split in prepared.items():
        expected, *_ = tokenize(tiny_tokenizer(), list(load_split(dataset, name)), 1800, 512)
        assert isinstance(split.pairs, TokenizedPairs)
        assert list(split.pairs) == expected
        assert split.pairs[2:4] == expected[2:4]
        assert split.pairs[-1] == expected[-1]
        with pytest.raises(IndexError):
            split.pairs[len(expected)]
        counts = {
            "items": len(expected),
            "kind": "pairs",
            "sources": {"test": len(expected)},
            "dropped": {},
            "kept": {},
        }
        assert split.counts == counts
    assert prepared["train"].prompts == []
    assert prepared["heldout"].prompts == [p.prompt for p in load_split(dataset, "heldout").pairs]


@pytest.mark.slow
def test_a_second_use_and_another_process_read_no_row_again(dataset, tmp_path, monkeypatch):
    first = run(dataset)
    names = made(tmp_path)

    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(cache, "load_split", refuse)
    assert list(run(dataset)["train"].pairs) == list(first["train"].pairs)
    code = (
        "import sys; from omegaconf import OmegaConf; from prefopt.config.schema import DatasetConfig; "
        "from prefopt.config.parse import parse; "
        "from tests.data.test_cache import run; run(parse(OmegaConf.create(sys.argv[1]), DatasetConfig))"
    )
    text = json.dumps(dataclasses.asdict(dataset))
    subprocess.run([sys.executable, "-c", code, text], cwd=ROOT, check=True, env=ENVIRONMENT, capture_output=True)
    assert made(tmp_path) == names


def test_whatever_decides_the_tokens_is_in_the_key(dataset, tmp_path):
    run(dataset)
    seen = made(tmp_path)

    def is_new() -> bool:
        nonlocal seen
        before, seen = seen, made(tmp_path)
        return len(seen) == len(before) + 1

    template, special = tiny_tokenizer(), tiny_tokenizer()
    template.chat_template = CHATML.replace("'<|im_start|>' +", "'<|im_start|>' + '' +")  # one expression, same text
    run(dataset, template)
    assert is_new()
    special.add_tokens(["soup"])
    run(dataset, special)
    assert is_new()
    run(dataset, limits=Limits(1800, 511))
    assert is_new()
    run(dataclasses.replace(dataset, policies=PoliciesConfig(tied_rewards="drop")))
    assert is_new()
    run(dataclasses.replace(dataset, columns={"chosen": "rejected", "rejected": "chosen"}))
    assert is_new()
    with Path(str(dataset.train)).open("a") as file:
        file.write(" ")
    run(dataset)
    assert is_new()
    run(dataclasses.replace(dataset, oracle={"_target_": "prefopt.rewards.scorers.Vader"}))
    assert not is_new()  # what samples are scored by changes no token


def _prepare_together(dataset: DatasetConfig, barrier) -> None:
    barrier.wait()
    run(dataset)


def test_processes_that_prepare_the_same_data_at_once_do_not_disturb_each_other(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_prepare_together, args=(dataset, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    (folder,) = made(tmp_path)  # no leftovers
    assert len(run(dataset)["train"].pairs) == 12
    assert made(tmp_path) == {folder}


def test_a_preparation_that_fails_leaves_nothing(dataset, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cache, "tokenize", broken)
    with pytest.raises(OSError, match="disk full"):
        run(dataset)
    assert made(tmp_path) == set()
    monkeypatch.setattr(cache, "tokenize", tokenize)
    with pytest.raises(UserError, match=r"nothing is left of the heldout split \(dropped: prompt_too_long 6\)"):
        run(dataset, limits=Limits(3, 512))
    assert made(tmp_path) == set()


def test_the_check_comes_before_tokenization_and_again_with_the_cache(dataset):
    def refuse(split, rewards):
        raise UserError(f"{split} {rewards['items']} {rewards['lacking']} {rewards['low'][0]} {rewards['high'][0]}")

    for _ in range(2):
        with pytest.raises(UserError, match=r"(train|heldout) \d+ 0 0\.2 0\.9"):
            prepare_dataset(dataset, tiny_tokenizer(), LIMITS, refuse, show=False)
        run(dataset)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["train.arrow", "heldout.json"])
def test_damaged_tokens_are_named_and_made_anew(name, harm, dataset, tmp_path, capsys):
    first = run(dataset)
    expected = [(list(split.pairs), split.prompts, split.counts) for split in first.values()]
    (folder,) = made(tmp_path)
    harm(tmp_path / "cache" / "tokenized" / folder / name)
    capsys.readouterr()
    assert [(list(split.pairs), split.prompts, split.counts) for split in run(dataset).values()] == expected
    said = capsys.readouterr().err
    assert f"{folder} is damaged: {name} has the checksum" in said
    run(dataset)
    assert "damaged" not in capsys.readouterr().err
    assert made(tmp_path) == {folder}
