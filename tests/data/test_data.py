"""Files to pairs, pairs to batches, and the order in which they come."""

import collections
import doctest
import gzip
import hashlib
import json
import math
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import prefopt.data.collate
from prefopt.config.parse import build, parse
from prefopt.config.schema import DatasetConfig
from prefopt.data.collate import LAYOUTS
from prefopt.data.dataset import CANNOT_BE_KEPT, check_dataset, load_split, split_digest
from prefopt.data.formats import Chats, Format, ImplicitPrompt, NoisyPreferences, Pairs, ScoredResponses, Transcripts
from prefopt.data.items import Dropped, Pair
from prefopt.data.sampler import permutation, step_indices
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.objectives.dpo import DPO
from prefopt.objectives.madpo import MADPO
from prefopt.objectives.mappo import MaPPO
from prefopt.rewards.scorers import Vader
from prefopt.training.build import check_rewards
from tests.helpers.rewards import rewards_of
from tests.helpers.tiny import ROOT, write_pairs


def dataset(name="jsonl", **values) -> DatasetConfig:
    node = OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")
    return parse(OmegaConf.merge(node, {"name": "test", "heldout_share": 0.0}, values), DatasetConfig)  # type: ignore[arg-type]


SCORED = {"prompt": "a", "responses": ["x", "y"]}
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
    assert ScoredResponses()(row | {"rewards": [0.5, 0.5, 0.5]}) == Dropped("no_preference")


def test_split_fields_select_rows_and_drops_are_counted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [GOOD | {"split": "train"}, GOOD | {"split": "heldout"}, GOOD | {"chosen": "bad"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    train, heldout = (load_split(dataset(train=str(file), heldout=str(file)), s) for s in ("train", "heldout"))
    assert (len(train.pairs), dict(train.drops)) == (1, {"identical": 1})
    assert (len(heldout.pairs), dict(heldout.drops)) == (1, {"identical": 1})
    assert split_digest(dataset(train=str(file)), "train") == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_an_objective_needs_is_checked_against_the_data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (GOOD, GOOD | {"chosen_reward": 1, "rejected_reward": 0})))
    rewards = load_split(dataset(train=str(file)), "train").rewards
    with pytest.raises(UserError, match=r"needs the prior rewards .* 1 of 2 train items have none"):
        check_rewards(MaPPO(DPO(0.1)), "train", rewards)
    check_rewards(DPO(0.1), "train", rewards)


def test_rewards_outside_an_objectives_range_are_refused_with_the_way_out(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD | {"chosen_reward": 7.75, "rejected_reward": 1, "id": "seven"}))
    rewards = load_split(dataset(train=str(file)), "train").rewards
    with pytest.raises(UserError, match=r"needs rewards in \[0, 1\]; seven .* has 7\.75.*reward_scale"):
        check_rewards(MaPPO(DPO(0.1)), "train", rewards)
    check_rewards(MADPO(0.1), "train", rewards)
    scaled = load_split(dataset(train=str(file), reward_scale=[1, 10]), "train")
    assert (scaled.pairs[0].chosen_reward, scaled.pairs[0].rejected_reward) == (0.75, 0.0)
    check_rewards(MaPPO(DPO(0.1)), "train", scaled.rewards)
    with pytest.raises(UserError, match=r"row 1: chosen_reward 7\.75 is outside dataset\.reward_scale=\[1.*, 5.*\]"):
        load_split(dataset(train=str(file), reward_scale=[1, 5]), "train")


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
        (json.dumps(GOOD | {"chosen": 3}), r"row 1: not text \(field 'chosen' must be text, is int\)"),
        (json.dumps(GOOD | {"prompt": [{"role": "user"}]}), r"row 1: each message"),
        (json.dumps(GOOD | {"prompt": []}), r"row 1: field 'prompt' must be"),
        (
            json.dumps(GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}),
            r"row 1: wrong roles .*assistant, assistant",
        ),
        (json.dumps(GOOD | {"prompt": " "}), r"nothing is left .* \(missing_text: 1\)"),
        (json.dumps(GOOD | {"chosen_reward": "high"}), r"nothing is left .* \(bad_reward: 1\)"),
        (json.dumps(GOOD | {"chosen": "bad"}), r"nothing is left .* \(identical: 1\)"),
        (json.dumps(GOOD | {"split": "dev"}), r"no row of .* has split 'train'; there are: dev"),
    ],
)
def test_bad_files_are_refused_with_file_and_row(tmp_path, lines, message):
    file = tmp_path / "pairs.jsonl"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(UserError, match=message):
        load_split(dataset(train=str(file)), "train")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", gzip.compress(b"{}", mtime=0)[:-4]])
def test_bytes_that_are_not_text_are_refused(tmp_path, content):
    file = tmp_path / ("pairs.jsonl" + (".gz" if content[:2] == b"\x1f\x8b" else ""))
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read|is in UTF-16"):
        load_split(dataset(train=str(file)), "train")


@pytest.mark.parametrize(
    "change",
    [{"rewards": [1.0]}, {"responses": []}, {"responses": None}, {"finished": [True]}, {"rewards": "ab"}],
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
    assert stream[:n] == permutation(n, seed, 0).tolist()
    if n > 9:
        assert len({tuple(permutation(n, s, e).tolist()) for s in (seed, seed + 1) for e in (0, 1)}) == 4


def test_layout_docstring():
    assert doctest.testmod(prefopt.data.collate).failed == 0


def test_padded_pairs_put_chosen_before_rejected():
    pairs = [TokenizedPair("a", [1], [5, 2], [6, 7, 2]), TokenizedPair("b", [1, 3], [8, 2], [9, 2])]
    batch = LAYOUTS["padded"].collate(pairs)
    completions = [batch.labels[batch.completions == c].tolist() for c in range(4)]
    assert completions == [[5, 2], [8, 2], [6, 7, 2], [9, 2]]
    assert batch.lengths.tolist() == [2, 2, 3, 2]
    assert batch.attention_mask.sum(-1).tolist() == [3, 4, 4, 4]


def test_the_embedded_data_is_what_its_readme_says():
    config = dataset("sentiment_offline")
    rows = [row for split in ("train", "heldout") for _, row in read_rows(config.train, split)]
    assert collections.Counter(row["split"] for row in rows) == {"train": 384, "heldout": 64}
    assert len({row["prompt"] for row in rows}) == 448
    assert {len(row["responses"]) for row in rows} == {8}
    for row in rows[::16]:
        assert row["rewards"] == pytest.approx(rewards_of(Vader(), *row["responses"]), abs=1e-6)
    train = load_split(config, "train")
    assert len(train.pairs) + sum(train.drops.values()) == 384
    assert all(p.chosen_reward > p.rejected_reward for p in train.pairs)  # type: ignore[operator]
    assert {p.id for p in train.pairs}.isdisjoint(p.id for p in load_split(config, "heldout").pairs)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_layouts_of_well_known_data_sets():
    """The same preference in each layout gives the same pair."""
    prompt = messages("Hello", "Hi", "Well?")
    expected = (prompt, "Good.", "Bad.")
    transcript = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Well?\n\nAssistant: "
    last = [{"role": "assistant", "content": "Good."}], [{"role": "assistant", "content": "Bad."}]
    for make, row in [
        (Pairs(), {"prompt": prompt, "chosen": "Good.", "rejected": "Bad."}),
        (Pairs(), {"prompt": prompt, "chosen": last[0], "rejected": last[1]}),
        (ImplicitPrompt(), {"prompt": "Hello", "chosen": prompt + last[0], "rejected": prompt + last[1]}),
        (Transcripts(), {"chosen": transcript + "Good.", "rejected": transcript + "Bad."}),
    ]:
        pair = make(row)
        assert isinstance(pair, Pair), row
        assert (pair.prompt, pair.chosen, pair.rejected) == expected, row
    pair = Pairs()({"prompt": "Well?", "system": "Be kind.", "chosen": "Good.", "rejected": "Bad."})
    assert pair.prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Well?"}]  # type: ignore[union-attr]
    pair = ImplicitPrompt()({"chosen": "The sky is blue.", "rejected": "The sky is blank."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (messages("The sky is"), "blue.", "blank.")  # type: ignore[union-attr]


def test_the_option_for_whole_conversations_reads_them():
    row = {"prompt": "a", "chosen": messages("a", "b"), "rejected": messages("a", "c")}
    with pytest.raises(ValueError, match="single assistant message") as error:
        Pairs()(row)
    key, _, target = str(error.value).rpartition(" ")[2].partition("=")
    assert key == "dataset.format._target_"
    assert build({"_target_": target}, Format, "dataset.format")(row) == ImplicitPrompt()(row)


@pytest.mark.parametrize(
    ("make", "row", "reason"),
    [
        (Pairs(), {"prompt": messages("a", "b"), "chosen": "x", "rejected": "y"}, "wrong_roles"),
        (Pairs(), {"prompt": [*messages("a"), *messages("b")], "chosen": "x", "rejected": "y"}, "wrong_roles"),
        (ImplicitPrompt(), {"chosen": messages("a"), "rejected": messages("a", "b")}, "wrong_roles"),
        (
            ImplicitPrompt(),
            {"chosen": messages("a", "b", "c", "d"), "rejected": messages("a", "x", "c", "e")},
            "sides_part_early",
        ),
        (Chats(), {"messages": messages("a", "b", "c")}, "wrong_roles"),
        (
            ScoredResponses(min_gap=0.5),
            {"prompt": "a", "responses": ["x", "y"], "rewards": [0.1, 0.5]},
            "no_preference",
        ),
    ],
)
def test_rows_that_give_nothing(make, row, reason):
    result = make(row)
    assert isinstance(result, Dropped)
    assert result.reason == reason


def test_pairs_among_scored_responses():
    row = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "rewards": [0.1, 0.4, 0.9, 0.9]}

    def made(**values) -> set[tuple[str, str]]:
        pairs = ScoredResponses(**values)(row)
        assert not isinstance(pairs, Dropped)
        return {(p.chosen, p.rejected) for p in (pairs if isinstance(pairs, list) else [pairs])}  # type: ignore[union-attr]

    assert made() == {("c", "a")}
    assert made(pairing="all") == {("b", "a"), ("c", "a"), ("c", "b"), ("d", "a"), ("d", "b")}
    assert made(pairing="all", min_gap=0.6) == {("c", "a"), ("d", "a")}
    (drawn,) = made(pairing="best_random")
    assert drawn[0] == "c"
    assert drawn[1] in ("a", "b")
    assert made(pairing="best_random") == {drawn}


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    rows = [GOOD | {"id": str(i)} for i in range(3)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", rows)
    write(tmp_path / "folder" / "test.jsonl", rows[:1])
    for name in ("a.jsonl", "b.json", "c.json.gz", "d.parquet", "folder"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == rows, name
    assert [row for _, row in read_rows(str(tmp_path / "folder"), "test")] == rows[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", "must hold a list of JSON objects, .* It holds an object without fields"),
        ("a.json", b"[1]", "row 1 must be a JSON object, is a number"),
        ("a.json", b'{"a": 1}\n{"a": 2', "row 2 is not JSON: .* one JSON object, in UTF-8"),
        ("a.parquet", b"PAR1 but no more", "cannot be read"),
        ("folder", None, r"folder holds no file of rows \(\.jsonl"),
    ],
)
def test_other_bad_sources_are_refused(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


DEFECTS = {
    "empty_completion": GOOD | {"chosen": " "},
    "identical": GOOD | {"chosen": "bad"},
    "tied_rewards": GOOD | {"chosen_reward": 1, "rejected_reward": 1},
    "duplicate_prompt": GOOD | {"chosen": "better"},
    "contradicting_rewards": GOOD | {"chosen_reward": 0.2, "rejected_reward": 0.9},
    "bad_reward": GOOD | {"chosen_reward": "N/A", "rejected_reward": 0.9},
    "wrong_roles": GOOD | {"prompt": messages("a", "b")},
    "multi_turn_completion": GOOD | {"chosen": messages("a", "b", "c", "d")[1:]},
    "missing_text": GOOD | {"rejected": None},
    "not_text": GOOD | {"rejected": True},
}


@pytest.mark.parametrize("reason", DEFECTS)
@pytest.mark.parametrize("policy", ["keep", "drop", "fail"])
def test_each_defect_has_a_policy_and_a_count(tmp_path, reason, policy):
    file = write(tmp_path / "rows.jsonl", [GOOD, DEFECTS[reason] | {"id": "bad row"}])
    config = dataset(train=file, policies={reason: policy})
    if reason in CANNOT_BE_KEPT and policy == "keep":
        with pytest.raises(UserError, match=rf"dataset\.policies\.{reason} must be one of drop, fail, is 'keep'"):
            check_dataset(config)
    elif policy == "fail":
        said = reason.replace("_", " ")
        with pytest.raises(UserError, match=rf"rows\.jsonl, row 2: {said}.*set dataset\.policies\.{reason}=drop"):
            load_split(config, "train")
    else:
        split = load_split(config, "train")
        assert len(split.pairs) == (2 if policy == "keep" else 1)
        assert dict(split.kept if policy == "keep" else split.drops)[reason] == 1


def test_unknown_reasons_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown key policies\.boring"):
        dataset(train="x.jsonl", policies={"boring": "drop"})


def test_training_prompts_that_are_held_out_are_dropped_or_kept(tmp_path):
    file = write(tmp_path / "rows.jsonl", [GOOD, GOOD | {"prompt": "Bye"}])
    assert [p.prompt for p in load_split(dataset(train=file), "train", [messages("Hello")]).pairs] == [messages("Bye")]
    kept = load_split(dataset(train=file, policies={"prompt_in_heldout": "keep"}), "train", [messages("Hello")])
    assert (len(kept.pairs), dict(kept.kept)) == (2, {"prompt_in_heldout": 1})


def mixture(tmp_path, **changes) -> DatasetConfig:
    a = write(tmp_path / "a.jsonl", [GOOD | {"prompt": f"a{i}"} for i in range(10)])
    b = write(tmp_path / "b.jsonl", [{"question": f"b{i}", "chosen": "x", "rejected": "y"} for i in range(10)])
    pairs = {"_target_": "prefopt.data.formats.Pairs"}
    sources = {
        "a": {"name": "a", "train": a, "heldout": a, "format": pairs},
        "b": {"name": "b", "train": b, "format": pairs, "columns": {"prompt": "question"}},
    }
    for name, values in changes.items():
        sources[name] |= values
    return DatasetConfig(name="both", sources=sources, heldout_share=0.0)


def test_a_mixture_keeps_splits_and_names_its_sources(tmp_path):
    config = mixture(tmp_path, a={"heldout": None})
    check_dataset(config)
    train = load_split(config, "train")
    assert dict(train.sources) == {"a": 10, "b": 10}
    assert [p.source for p in train.pairs] == ["a"] * 10 + ["b"] * 10
    heldout = load_split(mixture(tmp_path), "heldout")
    assert dict(heldout.sources) == {"a": 10, "b": 0}
    assert split_digest(config, "train") != split_digest(config, "heldout")


@pytest.mark.parametrize(
    ("portion", "n"), [({"weight": 0.5}, 5), ({"weight": 2.3}, 23), ({"count": 3}, 3), ({"count": 12}, 12)]
)
def test_a_source_gives_its_portion_and_always_the_same(tmp_path, portion, n):
    chosen = [
        p.prompt[0]["content"] for p in load_split(mixture(tmp_path, a=portion), "train").pairs if p.source == "a"
    ]
    assert len(chosen) == n
    assert set(collections.Counter(chosen).values()) <= {n // 10, n // 10 + 1}
    # The same part, whatever the other source does.
    again = load_split(mixture(tmp_path, a=portion, b={"count": 1}), "train").pairs
    assert [p.prompt[0]["content"] for p in again if p.source == "a"] == chosen
    fewer = {
        p.prompt[0]["content"] for p in load_split(mixture(tmp_path, a={"count": 2}), "train").pairs if p.source == "a"
    }
    assert fewer <= set(chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.5, "count": 3}, "give weight .* or count .* not both"),
        ({"weight": 0.0}, r"dataset\.sources\.a\.weight must be positive"),
        ({"count": 0}, r"dataset\.sources\.a\.count must be at least 1"),
        ({"train": None}, r"dataset\.sources\.a needs rows of its own"),
        (
            {"policies": {"identical": "ignore"}},
            r"dataset\.sources\.a\.policies\.identical must be one of drop, fail, keep",
        ),
        ({"nonsense": 1}, r"unknown key dataset\.sources\.a\.nonsense"),
        ({"reward_scale": [1, 1]}, r"dataset\.sources\.a\.reward_scale must be"),
        ({"format": {"_target_": "prefopt.data.formats.Nope"}}, r"dataset\.sources\.a\.format"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        check_dataset(mixture(tmp_path, a=change))


def test_pairs_and_chats_do_not_mix(tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": messages("a", "b")}])
    config = mixture(tmp_path, a={"train": chats, "format": {"_target_": "prefopt.data.formats.Chats"}})
    with pytest.raises(UserError, match="mixes pairs with chats"):
        load_split(config, "train")


def noisy(quality: str, n: int = 3000, **values) -> list[Pair]:
    """Of rows with two samples and an off-policy text, which are their rewards."""
    make = NoisyPreferences(quality, **values)
    draw = random.Random(0)
    rows = [{"prompt": f"p{i}", "rewards": [draw.random(), draw.random(), -draw.random()]} for i in range(n)]
    return [make(row | {"responses": [str(r) for r in row["rewards"]]}) for row in rows]  # type: ignore[misc]


@pytest.mark.parametrize(("quality", "share"), [("high", 0), ("medium", 0.5), ("low", 1)])
def test_quality_is_the_share_of_pairs_with_the_off_policy_text(quality, share):
    pairs = noisy(quality)
    found = [sorted((float(p.chosen), float(p.rejected))) for p in pairs]
    assert sum(low < 0 for low, _ in found) / len(found) == pytest.approx(share, abs=0.04 * (share == 0.5))
    # Beside that text stands the better sample: the larger of two uniform numbers has the mean 2/3, any one 1/2.
    better = [high for low, high in found if low < 0]
    assert not better or sum(better) / len(better) == pytest.approx(2 / 3, abs=0.03)
    assert not [high for low, high in found if high < 0]
    assert noisy(quality, 20) == pairs[:20]
    assert noisy(quality, 20, label_scale=0.1, seed=1) != noisy(quality, 20, label_scale=0.1)


def test_labels_are_drawn_by_bradley_terry():
    pairs = noisy("high", label_scale=4.0)
    gaps = [abs(float(p.chosen) - float(p.rejected)) for p in pairs]
    for low in (0.0, 0.25, 0.5):
        inside = [p for p, gap in zip(pairs, gaps, strict=True) if low < gap <= low + 0.25]
        right = sum(float(p.chosen) > float(p.rejected) for p in inside) / len(inside)
        expected = [1 / (1 + math.exp(-4 * abs(float(p.chosen) - float(p.rejected)))) for p in inside]
        mean = sum(expected) / len(expected)
        assert right == pytest.approx(mean, abs=4 * math.sqrt(mean * (1 - mean) / len(inside)))


def test_an_error_of_the_reward_model_has_its_size_and_leaves_the_labels():
    rows = [
        {"prompt": f"p{i}", "responses": list("abc"), "rewards": [0.1, 0.2, 0.0], "rewards_high": [1, 2, 3]}
        for i in range(2000)
    ]
    exact, wrong = ([NoisyPreferences(reward_error=size)(row) for row in rows] for size in (0.0, 2.0))
    assert [p.chosen for p in wrong] == [p.chosen for p in exact]
    errors = [w.chosen_reward - e.chosen_reward for w, e in zip(wrong, exact, strict=True)]
    errors += [w.rejected_reward - e.rejected_reward for w, e in zip(wrong, exact, strict=True)]
    assert abs(sum(errors) / len(errors)) < 5 * 2 / math.sqrt(len(errors))
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) == pytest.approx(2, rel=0.06)
    assert NoisyPreferences(reward_error=2.0)(rows[0]) == wrong[0]


def test_a_noisy_pair_carries_the_rewards_of_the_reward_model_of_its_quality():
    row = {"prompt": "p", "responses": list("abc"), "rewards": [0.1, 0.2, 0.0], "rewards_low": [5, 6, 7]}
    pair = NoisyPreferences("low")(row)
    assert {pair.chosen: pair.chosen_reward, pair.rejected: pair.rejected_reward} == {"b": 6, "c": 7}
    pair = NoisyPreferences("high")(row)
    assert pair.chosen_reward is pair.rejected_reward is None
    with pytest.raises(ValueError, match="reward_error must not be negative"):
        NoisyPreferences(reward_error=-1)
    with pytest.raises(ValueError, match="needs 3 responses"):
        NoisyPreferences()({"prompt": "p", "responses": ["a"], "rewards": [1]})
    with pytest.raises(ValueError, match="quality must be high, medium, low"):
        NoisyPreferences("best")
    with pytest.raises(ValueError, match="label_scale must be positive"):
        NoisyPreferences(label_scale=0)
