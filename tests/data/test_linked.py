"""Linked pairs: found in the rows, together in every micro-batch, and trained on by SymMPO."""

import json
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.cache import Prepared
from prefopt.data.linked import LinkedPairs, link
from prefopt.data.sampler import permutation, run_indices, step_indices
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.objectives.symmpo import SymMPO
from prefopt.training.evaluate import evaluate_pairs
from prefopt.training.loop import EarlyStopping, resume, save
from prefopt.training.setup import build_components
from tests.helpers.tiny import records, run_program, tiny_overrides
from tests.launch.test_estimate import config as composed
from tests.training.test_loop import make_train_state, step


def pair(name: str, prompt: int, chosen: int, rejected: int, source: str = "rows") -> TokenizedPair:
    return TokenizedPair(name, [prompt], [chosen, 0], [rejected, 0], source=source)


def split(*pairs: TokenizedPair, **sources: int) -> Prepared:
    counts = {"items": len(pairs), "kind": "pairs", "sources": sources or {"rows": len(pairs)}, "kept": {}}
    return Prepared(list(pairs), [], counts | {"dropped": {"identical": 1}}, {}, longest=3)


def are_linked(a: TokenizedPair, b: TokenizedPair) -> bool:
    return (a.chosen, a.rejected) == (b.rejected, b.chosen) and a.prompt != b.prompt


A, B, C, D = pair("a", 1, 10, 11), pair("b", 2, 20, 21), pair("c", 3, 11, 10), pair("d", 4, 21, 20)


def test_partners_are_found_whatever_the_order_of_the_rows():
    found = link(split(A, B, C, D), "train split")
    assert [p.id for p in found.pairs] == ["a", "c", "b", "d"]
    assert found.pairs[1:3] == [C, B]
    assert found.counts == split(A, B, C, D).counts
    assert [p.id for p in link(split(D, C, A, B), "").pairs] == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("others", "dropped"),
    [
        ([pair("e", 5, 30, 31)], {"no_partner": 1}),
        ([pair("e", 5, 30, 31), pair("f", 6, 30, 32)], {"no_partner": 2}),
        ([pair("e", 5, 30, 31), pair("f", 5, 31, 30)], {"no_partner": 2}),  # the same prompt, labelled both ways
        ([pair("e", 5, 30, 30)], {"no_partner": 1}),  # itself
        ([pair("e", 5, 30, 31), pair("f", 6, 31, 30), pair("g", 7, 31, 30)], {"several_partners": 3}),
        ([pair(n, i, 30 + i % 2, 31 - i % 2) for i, n in enumerate("efgh", 5)], {"several_partners": 4}),
    ],
)
def test_other_pairs_are_dropped_and_counted(others, dropped):
    found = link(split(*others, A, C), "train split")
    assert [p.id for p in found.pairs] == ["a", "c"]
    assert found.counts["dropped"] == {"identical": 1} | dropped
    assert found.counts["items"] == 2
    assert found.counts["sources"] == {"rows": 2}
    with pytest.raises(UserError, match=rf"no linked pairs in the train split .*{next(iter(dropped))}.*first e\)"):
        link(split(*others), "train split")


def test_partners_may_be_of_two_sources():
    pairs = replace(A, source="one"), replace(C, source="two"), pair("e", 5, 30, 31, "three")
    assert link(split(*pairs, one=1, two=1, three=1), "").counts["sources"] == {"one": 1, "two": 1, "three": 0}


@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 5))
def test_the_sampler_keeps_partners_together(couples, seed, half):
    n, batch_size = 2 * couples, 2 * half
    stream = [i for step in range(3 * n) for i in step_indices(n, seed, step, batch_size, linked=True)]
    assert all(i % 2 == 0 and j == i + 1 for i, j in zip(stream[::2], stream[1::2], strict=True))
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    if couples > 9:
        assert len({tuple(permutation(n, s, e, True).tolist()) for s in (seed, seed + 1) for e in (0, 1)}) == 4
    assert run_indices(n, seed, 1, batch_size, linked=True) == sorted(set(stream[:batch_size]))


def make_linked(tmp_path, **changes):
    """A train state of `make_train_state` whose pairs are linked: of each two, the second takes over the first one's
    completions, exchanged. They lie in the rows as even ones and then odd ones."""
    train_state = make_train_state(SymMPO(0.1), tmp_path, batch_size=6, **changes)
    first, second = train_state.train_pairs[::2], train_state.train_pairs[1::2]
    second = [replace(b, chosen=a.rejected, rejected=a.chosen) for a, b in zip(first, second, strict=True)]
    pairs = LinkedPairs([*first, *second], [i for k in range(8) for i in (k, 8 + k)])
    train_state.train_pairs, train_state.heldout_pairs = pairs, pairs[:4]
    return train_state


@pytest.mark.parametrize("n", [1, 2, 3])
def test_partners_share_a_micro_batch_in_every_process(n, tmp_path, monkeypatch):
    """Over two epochs of 16 pairs, in steps of 6: some end an epoch and begin the next."""
    train_state = make_linked(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(n))
    seen = []
    for number in range(6):
        for r in range(n):
            monkeypatch.setenv("RANK", str(r))
            parts = [m.pairs for m in train_state.step_micro_batches(number) if m.pairs]
            assert all(len(part) == 2 and are_linked(*part) for part in parts)
            seen += [p.id for part in parts for p in part]
    assert sorted(Counter(seen).values()) == [2] * 12 + [3] * 4


def test_held_out_partners_share_a_micro_batch(tmp_path):
    train_state = make_linked(tmp_path)
    parts = [m.pairs for m in train_state.micro_batches(train_state.heldout_pairs)]
    assert [len(part) for part in parts] == [2, 2]
    assert all(are_linked(*part) for part in parts)


def test_a_run_learns_and_goes_on_bit_for_bit(tmp_path):
    """After 3 of 8 steps, within an epoch."""

    def state():
        train_state = make_linked(tmp_path, steps=8)
        (tmp_path / "metrics.jsonl").touch()
        train_state.run = SimpleNamespace(
            folder=tmp_path, checkpoints=tmp_path / "checkpoints", metrics_file=tmp_path / "metrics.jsonl"
        )
        return train_state

    whole, first, second = state(), state(), state()
    pairs = whole.train_pairs[:]
    before = evaluate_pairs(whole, 0, pairs)
    losses = [step(whole, n)["loss"] for n in range(8)]
    after = evaluate_pairs(whole, 8, pairs)
    assert before["loss"] == pytest.approx(whole.objective.step0_loss, abs=1e-5)
    assert after["loss"] < before["loss"] - 0.01
    assert after["margin"] > before["margin"]

    assert [step(first, n)["loss"] for n in range(3)] == losses[:3]
    save(first, EarlyStopping(), SimpleNamespace(vouch=lambda: {"length": 0, "sha256": sha256().hexdigest()}), 3)
    done, *_ = resume(second)
    assert [step(second, n)["loss"] for n in range(done, 8)] == losses[3:]
    assert all(map(torch.equal, second.engine.policy.parameters(), whole.engine.policy.parameters()))


def write_linked(path, couples: int, start: int = 0, lonely: int = 0) -> None:
    """Contrary system prompts, first all of one kind and then all of the other."""
    texts = {
        i: (f"Tea number {i} is a drink.", f"Tea number {i}, made of leaves.") for i in range(start, start + couples)
    }
    rows = [
        {"system": system, "prompt": f"What is tea {i}?", "chosen": answers[k], "rejected": answers[1 - k]}
        for k, system in enumerate(("Be brief.", "Explain."))
        for i, answers in texts.items()
    ]
    rows += [{"prompt": f"Tea or coffee {i}?", "chosen": "Tea.", "rejected": f"Coffee {i}."} for i in range(lonely)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_program_trains_on_linked_rows(tiny_folder, tmp_path):
    write_linked(tmp_path / "train.jsonl", 6, lonely=1)
    write_linked(tmp_path / "heldout.jsonl", 2, start=100)
    options = tiny_overrides(tiny_folder / "model", tmp_path, tmp_path / "runs")
    process = run_program(*options, "objective=symmpo", "steps=6", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    assert "12 pairs are linked; dropped: no_partner 1, first" in " ".join((process.stdout + process.stderr).split())
    (record,) = records(tmp_path / "runs")
    assert record["data"]["train"]["dropped"] == {"no_partner": 1}
    assert record["data"]["train"]["items"] == 12
    assert record["data"]["heldout"]["items"] == 4
    rows = [
        json.loads(line) for line in (tmp_path / "runs" / record["name"] / "metrics.jsonl").read_text().splitlines()
    ]
    heldout = [row["loss"] for row in rows if row["split"] == "heldout"]
    assert heldout[0] == pytest.approx(2 * 0.693147, abs=1e-5)
    assert heldout[-1] < heldout[0]
    assert all(row["symmpo/margin_gap"] >= 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dataset.heldout=null"], "dataset.heldout_share=0.1 would hold out one prompt without the other"),
        (["batch_size=3"], "batch_size=3 must be a multiple of objective.micro_batch_size=2"),
        (["heldout_pairs=3"], "heldout_pairs must be even"),
        (
            ["objective=mappo", "objective.base._target_=prefopt.objectives.symmpo.SymMPO"],
            "must be a dataclass derived from Pairwise",
        ),
    ],
)
def test_what_would_part_them_is_refused_before_anything_is_read(options, message, tiny_folder, overrides, tmp_path):
    config = composed(*overrides(tmp_path), "objective=symmpo", *options)
    with pytest.raises(UserError, match=message):
        build_components(config)
