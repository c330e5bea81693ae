"""Whatever a file of rows or a command line holds: values of the right type, or a UserError that says where. No other
exception, and no end to it that is not soon."""

import gzip
import io
import json
import math
import string
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.config.parse import build, parse
from prefopt.config.schema import DatasetConfig
from prefopt.data.dataset import CANNOT_BE_KEPT, load_split
from prefopt.data.dataset_path import replace_path
from prefopt.data.fields import role_problem
from prefopt.data.formats import (
    Chats,
    Completions,
    Format,
    ImplicitPrompt,
    LabelledCompletions,
    NoisyPreferences,
    Pairs,
    ScoredCompletions,
    ScoredResponses,
    Transcripts,
    TwoResponses,
)
from prefopt.data.items import Chat, Dropped, Labelled, Pair
from prefopt.data.sources import SUFFIXES, read_rows, write_rows
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.rewards.config import ScoreConfig
from prefopt.rewards.rows import requests_of
from prefopt.training.config import TrainConfig, check

fuzz = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "human"])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=8) | JSON}), max_size=4)
TEXT = st.text("ab \n", max_size=8) | st.just("\n\nHuman: a\n\nAssistant: b")
FIELDS = [
    "prompt", "chosen", "rejected", "messages", "system", "id", "chosen_reward", "rejected_reward", "responses",
    "rewards", "finished", "rewards_high", "split", "instruction", "input", "history", "tools", "completion", "label",
    "response_1", "response_2", "completions",
]  # fmt: skip
NUMBERS = st.lists(st.floats() | st.integers() | JSON, max_size=6)
ROW = st.dictionaries(
    st.sampled_from(FIELDS), JSON | TEXT | TURNS | NUMBERS | st.lists(st.text(max_size=4), max_size=6), max_size=10
)
# Rows that are nearly right reach further than those that are not.
NEARLY = st.fixed_dictionaries(
    {"prompt": TEXT | TURNS, "chosen": TEXT | TURNS, "rejected": TEXT | TURNS, "messages": TURNS,
     "responses": st.lists(st.text(max_size=4), min_size=3, max_size=3),
     "rewards": st.lists(st.floats() | st.integers(), min_size=3, max_size=3),
     "completion": TEXT | TURNS, "response_1": TEXT | TURNS, "response_2": TEXT | TURNS, "label": st.integers(0, 2),
     "completions": st.lists(st.fixed_dictionaries({"response": TEXT, "overall_score": st.floats()}), max_size=3)},
    optional={"rewards_high": NUMBERS, "tools": JSON, "system": TEXT,
              "finished": st.lists(st.booleans() | JSON, max_size=4), "chosen_reward": JSON},
)  # fmt: skip
FORMATS: list[Format] = [
    Pairs(), ImplicitPrompt(), Transcripts(), ScoredResponses(), ScoredResponses("best_random"), ScoredResponses("all"),
    NoisyPreferences("high"), NoisyPreferences("low"), Chats(), Completions(), LabelledCompletions(), TwoResponses(),
    ScoredCompletions(),
]  # fmt: skip


def attempt(function: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, str | None]:
    """(what it gives, None), or (None, what one of these errors says)."""
    try:
        return function(), None
    except errors as error:
        return None, str(error)


def is_chat(messages: object) -> bool:
    """Turns that a template could write."""
    return isinstance(messages, list) and all(
        set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values()) for m in messages
    )


def check_item(item: object) -> None:
    if isinstance(item, Pair):
        assert is_chat(item.prompt)
        assert role_problem(item.prompt) is None
        assert isinstance(item.chosen, str)
        assert isinstance(item.rejected, str)
        assert item.chosen_finished in (True, False)
        for reward in (item.chosen_reward, item.rejected_reward):
            assert reward is None or (isinstance(reward, float) and math.isfinite(reward))
    elif isinstance(item, Labelled):
        assert is_chat([*item.prompt, item.completion])
    elif isinstance(item, Chat):
        assert is_chat(item.messages)
        assert role_problem(item.messages[:-1], item.messages[-1]["role"]) is None
    else:
        assert isinstance(item, Dropped)
        assert item.reason in (*CANNOT_BE_KEPT, "bad_reward")


@pytest.mark.parametrize("format_", FORMATS, ids=repr)
@given(row=ROW | NEARLY)
@example(row={"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 10**400})  # too large for a float
@example(row={"prompt": "a", "responses": "abcd", "rewards": [1, 2, 3, 4]})  # a text is a sequence of texts
@example(row={"prompt": "a", "responses": [1, 2, 3, 4], "rewards": [1, 2, 3, 4]})
@example(row={"prompt": "a", "responses": 3, "rewards": [1]})
@example(row={"prompt": "a", "responses": ["b"] * 4, "rewards": dict.fromkeys("abcd", 1)})
@example(row={"prompt": "a", "responses": ["b"] * 4, "rewards": [1, 2, 3, 4], "finished": ["no"] * 4})
@example(row={"prompt": "a", "responses": ["b"] * 4, "rewards": [1, 2, 3, 4], "rewards_high": [1]})
@example(row={"prompt": "a", "responses": ["b"] * 4, "rewards": [1, 2, 3, 4], "rewards_high": ["c"] * 4})
@example(row={"prompt": "a", "responses": ["b"] * 4, "rewards": [-1e308, 1e308, -1e307, 1e307]})  # exp overflows
@fuzz
def test_a_format_gives_items_or_says_what_is_wrong(format_, row):
    made, refusal = attempt(lambda: format_(row), KeyError, ValueError)
    if refusal is not None:
        assert any(name in refusal for name in (*FIELDS, "response", "transcript", "tool_calls"))
        return
    for item in made if isinstance(made, list) else [made]:
        check_item(item)


def read(path, content: bytes) -> list[dict]:
    """The rows; none where the file is refused, with its name."""
    path.write_bytes(content)
    found, refusal = attempt(lambda: [row for _, row in read_rows(str(path))], UserError)
    if refusal is not None:
        assert path.name in refusal
        return []
    assert all(isinstance(row, dict) for row in found)
    write_rows(path.with_suffix(".again"), found)  # text that a program can write again
    return found


VALID = "".join(json.dumps({"prompt": f"é{i}", "chosen": "x", "rejected": "y"}) + "\n" for i in range(20)).encode()


TABLE = b"prompt,chosen,rejected\n" + 'é,"x, ""y""\nz",\n'.encode() * 20


def arrow() -> bytes:
    """As `datasets` writes it."""
    stream, table = io.BytesIO(), pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b"}] * 20)
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return stream.getvalue()


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b"}] * 20), stream)
    return stream.getvalue()


WHOLE = {".jsonl": VALID, ".jsonl.gz": gzip.compress(VALID, mtime=0),
         ".json": b"[" + VALID[:-1].replace(b"\n", b",") + b"]",
         ".json.gz": gzip.compress(b"[]", mtime=0), ".parquet": parquet(), ".arrow": arrow(),
         ".ndjson": VALID, ".csv": TABLE, ".tsv": TABLE.replace(b",", b"\t")}  # fmt: skip
WHOLE |= {f"{kind}.gz": gzip.compress(WHOLE[kind], mtime=0) for kind in (".ndjson", ".csv", ".tsv")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)  # more than the parser's depth
@example(content=b'{"a":' * 3000)
@example(content=b'{"a": ' + b"9" * 5000 + b"}")  # more digits than Python converts
@example(content=b'{"a": "\\ud800"}')  # half a character
@example(content=b'{"split": ["train"]}')  # no value that can be in a set
@example(content=b'\xef\xbb\xbf{"a": 1}')  # a byte order mark
@example(content='{"a": "é"}'.encode("utf-16"))
@example(content=b'{"a": "\xff"}')
@fuzz
def test_any_bytes_are_rows_or_refused(suffix, content, place):
    read(place / f"any{suffix}", content)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@fuzz
def test_a_flipped_bit_is_read_or_refused(suffix, at, bit, place):
    damaged = bytearray(WHOLE[suffix])
    damaged[int(at * len(damaged))] ^= 1 << bit
    read(place / f"flipped{suffix}", bytes(damaged))


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(at=st.floats(0, 1, exclude_max=True))
@fuzz
def test_a_file_without_its_end_gives_what_came_before_or_is_refused(suffix, at, place):
    whole = read(place / f"whole{suffix}", WHOLE[suffix])
    cut = read(place / f"cut{suffix}", WHOLE[suffix][: int(at * len(WHOLE[suffix]))])
    if suffix in (".csv", ".tsv") and cut:
        cut.pop()  # a row that ends early is a row, as long as it has all its cells
    assert cut == whole[: len(cut)]


@given(content=st.lists(ROW | NEARLY | JSON, min_size=1, max_size=3))
@fuzz
def test_a_split_is_pairs_or_refused(content, place):
    """Through columns, policies and defects: the way of every row."""
    file = place / "split.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    config = DatasetConfig("fuzz", str(file), format={"_target_": "prefopt.data.formats.Pairs"}, heldout_share=0.0)
    config.columns = {"chosen_reward": "rewards.a"}
    split, refusal = attempt(lambda: load_split(config, "train"), UserError)
    if refusal is not None:
        assert "split.jsonl" in refusal or "data set fuzz" in refusal
        return
    for item in split:
        check_item(item)


@given(content=st.lists(ROW | NEARLY | JSON, min_size=1, max_size=3))
@example(content=[{"prompt": 3, "completion": {}, "label": [1]}])
@example(content=[{"response_1": "a", "response_2": "b", "label": [1]}])
@example(content=[{"prompt": "a", "completions": [{"response": [], "overall_score": None}]}])
@example(content=[{"chosen": [{"role": 3}], "rejected": [{"from": None, "role": "user"}]}])
@fuzz
def test_a_layout_is_found_or_refused(content, place):
    """And the command that reads it composes: each override has a key and a value that Hydra takes."""
    file = place / "layout.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    overrides, refusal = attempt(lambda: replace_path([f"dataset={file}"], "train"), UserError)
    if refusal is not None:
        assert "layout.jsonl" in refusal
        return
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert {o.key_or_group for o in parsed} >= {"dataset", "dataset.train"}


@given(row=ROW | NEARLY)
@example(row={"prompt": "a", "chosen": [], "rejected": "b"})
@example(row={"prompt": "a", "responses": ["b"], "finished": None})
@fuzz
def test_a_row_is_scored_or_refused(row):
    requests, refusal = attempt(lambda: requests_of("rows.jsonl, row 1", row), UserError)
    if refusal is not None:
        assert refusal.startswith("rows.jsonl, row 1")
        return
    assert all(isinstance(r.response, str) and is_chat(r.prompt) for r in requests)


# The configuration

KEYS = ["steps", "seed", "epochs", "batch_size", "layout", "model", "model.path", "optimizer.lr", "optimizer.betas",
        "dataset.columns", "dataset.sources", "objective", "objective.beta", "peft.target_modules", "logger",
        "patience", "sampling.top_p", "device", "sead", "a.b"]  # fmt: skip
VALUE = (
    JSON
    | st.text(string.printable, max_size=10)
    | st.sampled_from(["nan", "inf", "???", "${seed}", "${", "${nope:}", "-1"])
)


@pytest.fixture(scope="module")
def composed():
    """A whole configuration of a training run, as plain values."""
    from hydra import compose, initialize_config_dir

    from prefopt.config.parse import register
    from prefopt.utils.files import ROOT

    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("train"), resolve=True)


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUE, min_size=1, max_size=3))
@example(changes={"epochs": math.inf})
@example(changes={"objective.beta": math.nan})
@example(changes={"seed": 2**70})
@example(changes={"model.path": "${nope}"})
@example(changes={"steps": "${steps}"})
@fuzz
def test_any_values_are_a_configuration_or_refused(changes, composed):
    node = OmegaConf.create(composed)
    try:
        for key, value in changes.items():
            OmegaConf.update(node, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, AssertionError, AttributeError):
        return  # Hydra would have refused the command line

    def configured() -> TrainConfig:
        config = parse(node, TrainConfig)
        check(config)
        build(config.objective, Objective, "objective")
        return config

    config, refusal = attempt(configured, UserError)
    if refusal is not None:
        assert refusal.strip()
        return
    assert 0 <= config.seed < 2**32
    assert all(map(math.isfinite, (config.optimizer.lr or 0.0, *config.optimizer.betas)))


@given(values=st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=6), JSON, min_size=1))
@fuzz
def test_unknown_keys_are_named(values):
    _, refusal = attempt(lambda: parse(OmegaConf.create(values), ScoreConfig), UserError)
    assert refusal is not None  # there is always something missing
    assert all(f"unknown key {key}" in refusal for key in values if key not in ScoreConfig.__dataclass_fields__)
