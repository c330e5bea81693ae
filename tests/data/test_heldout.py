"""Held-out prompts of data that name none: by content, whole prompts, whatever the order of the rows and the seed."""

import json
import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.config.schema import DatasetConfig
from prefopt.data import cache
from prefopt.data.cache import Limits, Prepared, prepare_dataset
from prefopt.data.dataset import check_dataset, has_heldout, load_split, made_split, split_digest
from prefopt.data.portions import MOST_HELDOUT, heldout_prompts
from prefopt.errors import UserError
from prefopt.reporting.config import DataReportConfig
from prefopt.reporting.data import count_sections
from tests.helpers.tiny import tiny_tokenizer

PAIRS = {"_target_": "prefopt.data.formats.Pairs"}
# 20 prompts, the first five with three answers each.
ROWS = [
    {"prompt": f"p{i}", "chosen": f"good {i} {k}", "rejected": "bad"} for i in range(20) for k in range(3 - 2 * (i > 4))
]


def write(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def dataset(file, **values) -> DatasetConfig:
    return DatasetConfig(**{"name": "test", "train": str(file), "format": PAIRS} | values)


def texts(config: DatasetConfig, split: str) -> list[tuple[str, str]]:
    return [(pair.prompt[0]["content"], pair.chosen) for pair in load_split(config, split).pairs]


def prompts(config: DatasetConfig, split: str) -> set[str]:
    return {prompt for prompt, _ in texts(config, split)}


def test_whole_prompts_are_held_out_whatever_the_order_of_the_rows(tmp_path):
    config = dataset(write(tmp_path / "a.jsonl", ROWS), heldout_share=0.3)
    train, heldout = texts(config, "train"), texts(config, "heldout")
    assert sorted(train + heldout) == sorted((row["prompt"], row["chosen"]) for row in ROWS)
    assert prompts(config, "train").isdisjoint(prompts(config, "heldout"))
    assert len(prompts(config, "heldout")) == 6

    shuffled = [dict(row) for row in ROWS]
    random.Random(0).shuffle(shuffled)
    other = dataset(write(tmp_path / "b.jsonl", shuffled), heldout_share=0.3)
    assert prompts(other, "heldout") == prompts(config, "heldout")
    # More data: what was held out stays so, as far as its share allows.
    more = [*ROWS, *({"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(20))]
    assert prompts(dataset(write(tmp_path / "c.jsonl", more), heldout_share=0.9), "heldout") > prompts(
        config, "heldout"
    )


@given(st.sets(st.text("0123456789abcdef", min_size=12, max_size=12), max_size=40), st.floats(0.01, 0.99))
def test_the_number_of_held_out_prompts(prompts, share):
    held_out, n = heldout_prompts(prompts, share), len(prompts)
    assert held_out <= prompts
    assert len(held_out) == (0 if n < 2 else min(max(1, round(share * n)), n - 1))


def test_at_most_500_prompts_are_held_out():
    assert len(heldout_prompts({f"{i}" for i in range(20_000)}, 0.1)) == MOST_HELDOUT == 500


def test_named_rows_and_a_share_of_zero_hold_nothing_else_out(tmp_path):
    file, other = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:3])
    named = dataset(file, heldout=other)
    assert len(load_split(named, "train")) == len(ROWS)
    assert texts(named, "heldout") == [("p0", f"good 0 {k}") for k in range(3)]
    none = dataset(file, heldout_share=0.0)
    assert not has_heldout(none)
    assert len(load_split(none, "train")) == len(ROWS)
    with pytest.raises(UserError, match=r"heldout_share must be a share of the prompts in \[0, 1\), is 1"):
        check_dataset(dataset(file, heldout_share=1.0))


def test_defects_are_counted_once_and_with_the_training_rows(tmp_path):
    bad = [{"prompt": f"p{i}", "chosen": "same", "rejected": "same"} for i in range(20)]
    config = dataset(write(tmp_path / "a.jsonl", ROWS + bad))
    train, heldout = load_split(config, "train", [[{"role": "user", "content": "p1"}]]), load_split(config, "heldout")
    assert (train.drops, heldout.drops) == ({"identical": 20}, {})
    assert len(train) + len(heldout) == len(ROWS)


def test_a_mixture_without_held_out_rows_holds_out_of_what_is_used_of_it(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", ROWS),
        write(tmp_path / "b.jsonl", [r | {"prompt": f"b{r['prompt']}"} for r in ROWS]),
    ]
    nodes = {name: {"name": name, "train": file, "format": PAIRS} for name, file in zip("ab", files, strict=True)}
    nodes["b"]["weight"] = 2.0
    mixture = DatasetConfig(name="mix", sources=nodes, heldout_share=0.2)
    assert made_split(mixture).of == 40
    assert len(prompts(mixture, "heldout")) == 8
    train, heldout = load_split(mixture, "train"), load_split(mixture, "heldout")
    assert len(heldout) == len({pair.id for pair in heldout.pairs})  # what comes twice is evaluated once
    assert train.sources["a"] + heldout.sources["a"] == len(ROWS)
    assert train.sources["b"] + 2 * heldout.sources["b"] == 2 * len(ROWS)
    nodes["a"]["heldout"] = files[0]
    assert prompts(DatasetConfig(name="mix", sources=nodes, heldout_share=0.2), "heldout") == prompts(
        dataset(files[0]), "train"
    ) | {row["prompt"] for row in ROWS}


def test_a_made_split_has_a_digest_of_its_own(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    digests = {split_digest(dataset(file, heldout_share=share), "heldout") for share in (0.1, 0.2)}
    assert len(digests | {split_digest(dataset(file), "train")}) == 3
    assert split_digest(dataset(file, heldout_share=0.1), "heldout") in digests


def prepared(config: DatasetConfig) -> dict[str, Prepared]:
    return prepare_dataset(config, tiny_tokenizer(), Limits(1800, 512), lambda split, rewards: None, show=False)


def test_the_cache_keeps_the_split_and_a_line_says_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("prefopt"), "propagate", True)
    config = dataset(write(tmp_path / "a.jsonl", ROWS))
    for _ in range(2):
        caplog.clear()
        splits = prepared(config)
        n = splits["heldout"].counts["items"]
        said = " ".join(message.strip() for message in caplog.messages)
        assert f"held out: 2 of 20 prompts ({n} pairs), the same for every seed, since dataset.heldout names" in said
        assert "dataset.heldout_share=0.1" in said
        counts, _ = count_sections(DataReportConfig(dataset=config), splits)
        assert counts.notes[0] in said
        assert len(splits["train"].pairs) + n == len(ROWS)
        assert {prompt[0]["content"] for prompt in splits["heldout"].prompts} == prompts(config, "heldout")
        monkeypatch.setattr(cache, "load_split", None)  # the second time nothing is read

    monkeypatch.undo()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("prefopt"), "propagate", True)
    caplog.clear()
    assert list(prepared(dataset(write(tmp_path / "one.jsonl", ROWS[:3])))) == ["train"]
    assert "held out: nothing, since all rows have the same prompt" in caplog.text
