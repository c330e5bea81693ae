"""Files to pairs, pairs to batches, and the order in which they come."""

import collections
import dataclasses
import doctest
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import prefopt.data.layout
from prefopt import UserError
from prefopt.config import DatasetConfig, parse
from prefopt.data.formats import Drop, Pair, Pairs, ScoredResponses, load_split, read_rows
from prefopt.data.layout import padded_pairs
from prefopt.data.sampler import permutation, step_indices
from prefopt.data.tokenize import TokenizedPair
from prefopt.posthoc.oracle import Vader
from tests.tiny import ROOT, write_pairs


def dataset(name="jsonl", **values) -> DatasetConfig:
    node = OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")
    return parse(OmegaConf.merge(node, {"name": "test"}, values), DatasetConfig)  # type: ignore[arg-type]


GOOD = {"prompt": "Hello", "chosen": "good", "rejected": "bad"}


def test_pairs_of_text_and_of_messages_are_the_same():
    messages = [{"role": "user", "content": "Hello"}]
    assert Pairs()(GOOD) == Pairs()(GOOD | {"prompt": messages})
    assert Pairs()(GOOD | {"id": 7, "chosen_reward": 1, "rejected_reward": 0.5}) == Pair(
        "7", messages, "good", "bad", chosen_reward=1.0, rejected_reward=0.5
    )


def test_scored_responses_pair_best_with_worst():
    row = {"prompt": "Hi", "responses": ["a", "b", "c"], "rewards": [0.5, 0.9, 0.1], "finished": [True, True, False]}
    pair = ScoredResponses()(row)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("b", "c")
    assert (pair.chosen_reward, pair.rejected_reward) == (0.9, 0.1)
    assert (pair.chosen_finished, pair.rejected_finished) == (True, False)
    assert ScoredResponses()(row | {"rewards": [0.5, 0.5, 0.5]}) == Drop("tied_rewards")


def test_split_fields_select_rows_and_drops_are_counted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [GOOD | {"split": "train"}, GOOD | {"split": "heldout"}, GOOD | {"chosen": "bad"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    train, heldout = (load_split(dataset(train=str(file), heldout=str(file)), s) for s in ("train", "heldout"))
    assert (len(train.pairs), dict(train.drops)) == (1, {"identical": 1})
    assert (len(heldout.pairs), dict(heldout.drops)) == (1, {"identical": 1})
    assert train.digest == heldout.digest


def test_what_an_objective_needs_is_checked_against_the_data(tmp_path):
    from types import SimpleNamespace

    from prefopt.train import check_objective

    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (GOOD, GOOD | {"chosen_reward": 1, "rejected_reward": 0})))
    splits = {"train": load_split(dataset(train=str(file)), "train")}
    objective = SimpleNamespace(name="mappo", needs={"rewards"}, reward_range=(0.0, 1.0))
    with pytest.raises(UserError, match=r"needs the prior rewards .* 1 of 2 train pairs have none"):
        check_objective(objective, splits)  # type: ignore[arg-type]
    objective.needs = set()
    check_objective(objective, splits)  # type: ignore[arg-type]


def test_rewards_outside_an_objectives_range_are_refused_with_the_way_out(tmp_path):
    from prefopt.objectives.dpo import DPO
    from prefopt.objectives.madpo import MADPO
    from prefopt.objectives.mappo import MaPPO
    from prefopt.train import check_objective

    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD | {"chosen_reward": 7.5, "rejected_reward": 0}))
    splits = {"train": load_split(dataset(train=str(file)), "train")}
    with pytest.raises(UserError, match=r"needs rewards in \[0, 1\]; .* has 7\.5.* \(r - 1\) / 9"):
        check_objective(MaPPO(DPO(0.1)), splits)
    check_objective(MADPO(0.1), splits)


def test_gzip_is_read_by_its_name(tmp_path):
    plain = write_pairs(tmp_path / "a.jsonl", 3)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert [r for _, r in read_rows(str(plain))] == [r for _, r in read_rows(f"{plain}.gz")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"does not exist"),
        ("", r"is empty"),
        ("\n\n", r"is empty"),
        (
            '{"prompt": "Hello", "chosen": "x"}',
            r"pairs\.jsonl, row 1 has no field 'rejected' \(its fields: prompt, chosen",
        ),
        (json.dumps(GOOD) + "\n" + '{"chosen": "x", "rejected": "y"}', r"row 2 has no field 'prompt'"),
        (json.dumps(GOOD) + "\n{oops", r"row 2 is not JSON"),
        ("[1, 2]", r"row 1 must be a JSON object, is a list"),
        (json.dumps(GOOD | {"chosen": 3}), r"row 1: field 'chosen' must be text, is int"),
        (json.dumps(GOOD | {"prompt": [{"role": "user"}]}), r"row 1: each message"),
        (json.dumps(GOOD | {"prompt": []}), r"row 1: field 'prompt' must be"),
        (json.dumps(GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}), r"must end with the user's turn"),
        (json.dumps(GOOD | {"prompt": " "}), r"'prompt' is empty"),
        (json.dumps(GOOD | {"chosen_reward": "high"}), r"'chosen_reward' must be a number"),
        (json.dumps(GOOD | {"chosen_reward": float("nan")}), r"'chosen_reward' must be a number"),
        (json.dumps(GOOD | {"chosen": "bad"}), r"no pair is left .* \(identical: 1\)"),
        (json.dumps(GOOD | {"split": "dev"}), r"no pair is left .* \(no row has split 'train'\)"),
    ],
)
def test_bad_files_are_refused_with_file_and_row(tmp_path, lines, message):
    file = tmp_path / "pairs.jsonl"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(UserError, match=message):
        load_split(dataset(train=str(file)), "train")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", gzip.compress(b"{}")[:-4]])
def test_bytes_that_are_not_text_are_refused(tmp_path, content):
    file = tmp_path / ("pairs.jsonl" + (".gz" if content[:2] == b"\x1f\x8b" else ""))
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_split(dataset(train=str(file)), "train")


@pytest.mark.parametrize(
    "change",
    [{"rewards": [1.0]}, {"responses": []}, {"responses": None}, {"finished": [True]}, {"rewards": ["a", "b"]}],
)
def test_bad_scored_responses_are_refused(tmp_path, change):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "responses": ["a", "b"], "rewards": [0.1, 0.2]} | change))
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1"):
        load_split(dataset("sentiment_offline", train=str(file)), "train")


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 9))
def test_every_pair_comes_once_an_epoch_and_in_another_order_next(n, seed, batch_size):
    stream = [i for step in range(3 * n) for i in step_indices(n, seed, step, batch_size)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert stream[:n] == permutation(n, seed, 0)
    if n > 9:
        assert len({tuple(permutation(n, s, e)) for s in (seed, seed + 1) for e in (0, 1)}) == 4


def test_layout_docstring():
    assert doctest.testmod(prefopt.data.layout).failed == 0


def test_padded_pairs_put_chosen_before_rejected():
    pairs = [TokenizedPair("a", [1], [5, 2], [6, 7, 2]), TokenizedPair("b", [1, 3], [8, 2], [9, 2])]
    batch = padded_pairs(pairs)
    completions = [batch.labels[batch.completions == c].tolist() for c in range(4)]
    assert completions == [[5, 2], [8, 2], [6, 7, 2], [9, 2]]
    assert batch.lengths.tolist() == [2, 2, 3, 2]
    assert batch.attention_mask.sum(-1).tolist() == [3, 4, 4, 4]


def test_the_embedded_data_is_what_its_readme_says():
    config = dataset("sentiment_offline")
    rows = [row for _, row in read_rows(config.train)]
    assert collections.Counter(row["split"] for row in rows) == {"train": 384, "heldout": 64}
    assert len({row["prompt"] for row in rows}) == 448
    assert {len(row["responses"]) for row in rows} == {8}
    oracle = Vader()
    for row in rows[::16]:
        assert row["rewards"] == pytest.approx([oracle([], r) for r in row["responses"]], abs=1e-6)
    train = load_split(config, "train")
    assert len(train.pairs) + sum(train.drops.values()) == 384
    assert all(p.chosen_reward > p.rejected_reward for p in train.pairs)  # type: ignore[operator]
    assert {dataclasses.astuple(p)[0] for p in train.pairs}.isdisjoint(
        p.id for p in load_split(config, "heldout").pairs
    )
