"""Files as people have them: tables, byte order marks, JSON lines called .json, saved data sets, shards that differ."""

import gzip
import json
import math
import os
import random

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from prefopt.data.folders import folder_splits
from prefopt.data.readers import CHUNK, KINDS, kind_of
from prefopt.data.sources import digest, read_rows
from prefopt.errors import UserError
from tests.helpers.tiny import SHARED

ROWS = [{"prompt": f"é {i}", "chosen": 'She said "yes, no"\nand left.', "rejected": ""} for i in range(5)]
CASES = SHARED.parent / "cases" / "rows"


def rows(path, split="train") -> list[dict]:
    return [row for _, row in read_rows(str(path), split)]


def refusal(path, split="train") -> str:
    with pytest.raises(UserError) as error:
        rows(path, split)
    return str(error.value)


def lay(folder, files: dict[str, bytes | str]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*values: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def table(delimiter=",") -> str:
    """ROWS as a table, every cell in quotes."""
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS]
    return "\r\n".join(delimiter.join(cells) for cells in [list(ROWS[0]), *quoted]) + "\r\n"


def arrow(values: list[dict], folder):
    datasets.Dataset.from_list(values).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    return file.read_bytes()


# Tables


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.gz", "\t")]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_a_table_has_the_rows_of_json(name, delimiter, mark, tmp_path):
    content = mark + table(delimiter).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert rows(tmp_path / name) == ROWS


def test_what_pandas_writes_is_read(tmp_path):
    """It writes None as an empty cell and its index as a column without a name."""
    frame = pandas.DataFrame({"prompt": ["a", 'b "c", d'], "chosen": ["x\ny", None], "score": [1.5, math.nan]})
    expected = [
        {"prompt": "a", "chosen": "x\ny", "score": "1.5"},
        {"prompt": 'b "c", d', "chosen": None, "score": None},
    ]
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "a.tsv") == expected
    frame.to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet")[1]["chosen"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a,b\n,""\n', [{"a": None, "b": ""}]),  # an empty cell is null, and two quotes are an empty text
        ("a,b\n1,", [{"a": "1", "b": None}]),
        ("a,b\r1,2\r", [{"a": "1", "b": "2"}]),
        ('a,b\r\n"1\r\n2",3', [{"a": "1\r\n2", "b": "3"}]),
        ("a,b\n\n1,2\n\n", [{"a": "1", "b": "2"}]),
        ('a,b\n5" disk,it\'s "x"\n', [{"a": '5" disk', "b": 'it\'s "x"'}]),
        ('a,b\n"""",""""""\n', [{"a": '"', "b": '""'}]),
        ("a,b\n007,NA\n", [{"a": "007", "b": "NA"}]),  # text is text
        ("a\nx\n\ny\n", [{"a": "x"}, {"a": "y"}]),
    ],
)
def test_cells(text, expected, tmp_path):
    assert rows(lay(tmp_path, {"a.csv": text}) / "a.csv") == expected


def test_cells_longer_than_a_chunk_are_whole(tmp_path):
    """Python's csv module refuses more than 131,072 characters. Quotes and line breaks fall on ends of chunks."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(['"', "\r\n", "é", ",", "word"], k=n)) for n in (CHUNK // 2, 7, CHUNK // 3, 1)]
    frame = pandas.DataFrame({"prompt": texts, "chosen": texts[::-1]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert (tmp_path / "a.csv").stat().st_size > 3 * CHUNK
    assert rows(tmp_path / "a.csv") == frame.to_dict("records")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "a.csv, row 2 (line 3) has 1 cells, and the header has 2"),
        ('a,b\n"1\n1",2\n3,4,5\n', "a.csv, row 2 (line 4) has 3 cells, and the header has 2"),
        ('a,b\n1,"2\n3,4\n', "a.csv, line 2: a cell begins with a double quote, which is never closed"),
        ('a,b\n"1" 2,3\n', "a.csv, line 2: a cell goes on after its closing double quote"),
        (b"a,b\n1,\xe9\n", "a.csv, line 2 is not in UTF-8"),
        ("a,b,a\n1,2,3\n", "a.csv has several columns that are called 'a'"),
        ("a;b\n1;2\n", "a.csv has one column, 'a;b', which looks like several with ';' between them"),
        ("a,b\n", "a.csv is empty"),
        ("", "a.csv is empty"),
    ],
)
def test_bad_tables_are_refused_with_the_row(text, message, tmp_path):
    assert message in refusal(lay(tmp_path, {"a.csv": text}) / "a.csv")


# Encodings and JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.ndjson"])
def test_a_byte_order_mark_is_no_part_of_the_text(name, tmp_path):
    content = lines(*ROWS) if kind_of(name) != ".json" else json.dumps(ROWS)
    data = b"\xef\xbb\xbf" + content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert rows(tmp_path / name) == ROWS


def test_joined_files_keep_their_marks(tmp_path):
    part = gzip.compress(b"\xef\xbb\xbf" + lines(*ROWS).encode())
    assert rows(lay(tmp_path, {"a.jsonl.gz": part + part}) / "a.jsonl.gz") == ROWS * 2


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"])
@pytest.mark.parametrize("name", ["a b.jsonl", "a.json", "a.csv", "a.tsv.gz"])
def test_other_encodings_are_refused_with_a_command_that_converts(name, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {".json": json.dumps(ROWS), ".csv": table(), ".tsv": table("\t")}.get(str(kind_of(name)), lines(*ROWS))
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    message = refusal(name)
    assert f"{name} is in {encoding}, and must be in UTF-8" in message
    assert os.system(message.splitlines()[-1]) == 0
    assert rows(f"utf8-{name.removesuffix('.gz')}") == ROWS


@pytest.mark.parametrize(
    "content",
    [
        lines(*ROWS),
        json.dumps({"version": 1, "data": ROWS, "tags": ["a"]}),
        json.dumps({"none": [], "data": ROWS}, indent=1),
        "\n" + lines(*ROWS).replace("\n", "\r\n\n"),
    ],
    ids=["lines", "object", "indented", "blanks"],
)
def test_json_that_holds_rows_otherwise_is_read(content, tmp_path):
    assert rows(lay(tmp_path, {"a.json": content}) / "a.json") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"train": [{"a": 1}], "test": [{"a": 1}, {"a": 2}]}',
            "an object with train (a list of 1), test (a list of 2)",
        ),
        ('{"prompt": {"0": "Hi"}, "n": 1}', "an object with prompt (an object), n (a number)"),
        ('"text"', "It holds text"),
        ('[\n{"a": 1},\n{"a"', "is not JSON"),
        ('{"a": 1}\n{"a": \n', "row 2 is not JSON"),
        ('{"a": 1}\n[1]\n', "row 2 must be a JSON object, is a list"),
    ],
)
def test_other_json_is_refused_with_what_is_in_it(content, message, tmp_path):
    assert message in refusal(lay(tmp_path, {"a.json": content}) / "a.json")


# Parquet and Arrow


def test_objects_of_different_fields_come_back_from_datasets(tmp_path):
    """`datasets` keeps them as JSON texts of a type of their own."""
    calls = [{"a": [{"city": "Oslo"}, {"n": 1}], "b": {"c": [1]}}, {"a": None, "b": {"c": []}}]
    made = datasets.Dataset.from_list(calls, on_mixed_types="use_json")
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    assert rows(tmp_path / "a.parquet") == rows(tmp_path / "saved") == calls


def test_both_formats_of_arrow_are_read(tmp_path):
    made = pyarrow.Table.from_pylist(ROWS)
    for name, new in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), made.schema) as writer:
            writer.write_table(made, max_chunksize=2)
        assert rows(tmp_path / name) == ROWS
    assert "cannot be read" in refusal(lay(tmp_path, {"c.arrow": b"junk"}) / "c.arrow")


# Folders


def test_a_saved_data_set_is_like_a_file(tmp_path):
    made = datasets.Dataset.from_list([row | {"split": split} for row, split in zip(ROWS, "aabb ", strict=True)])
    folder = tmp_path / "saved"
    made.remove_columns("split").save_to_disk(folder, num_shards=2)
    (folder / "cache-1.arrow").write_bytes(b"of a filter")  # as `datasets` leaves them
    assert rows(folder) == rows(folder, "heldout") == rows(folder, None) == ROWS
    (where, _), *_ = read_rows(str(folder))
    assert where == f"{folder}/data-00000-of-00002.arrow, row 1"
    made.save_to_disk(tmp_path / "split")
    assert [row["prompt"] for row in rows(tmp_path / "split", "b")] == ["é 2", "é 3"]
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "lacks the file data-00001-of-00002.arrow" in refusal(folder)


def test_a_saved_dict_has_the_splits_of_its_folders(tmp_path):
    splits = {"train_prefs": ROWS, "test": ROWS[:2], "dev": ROWS[3:]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(values) for name, values in splits.items()})
    made.save_to_disk(tmp_path / "saved")
    for name, expected in splits.items():
        assert rows(tmp_path / "saved", name) == expected
    assert "no split 'train'; there are: dev, test, train_prefs" in refusal(tmp_path / "saved")
    assert "has the splits dev, test, train_prefs: say which" in refusal(tmp_path / "saved", None)
    assert digest(str(tmp_path / "saved"), "dev") != digest(str(tmp_path / "saved"), "test")


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "sub/data.arrow"])
def test_a_state_names_no_files_elsewhere(name, tmp_path):
    arrow(ROWS, tmp_path / "saved")
    arrow(ROWS, tmp_path / "other")
    (tmp_path / "other" / "data-00000-of-00001.arrow").rename(tmp_path / "outside.arrow")
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert f"lacks the file {name}" in refusal(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("[]")
    assert "state.json is not as `save_to_disk` writes it" in refusal(tmp_path / "saved")


A, B = {"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (A, B | {"source": "web"}),  # another field
        (A | {"system": None}, B | {"system": "Be short."}),  # null in the whole file
        (B | {"tags": ["x"]}, A | {"tags": None}),
    ],
)
def test_shards_that_differ_are_read(kind, first, second, tmp_path):
    shards = [first, second]
    if kind in (".csv", ".tsv"):
        shards = [{k: None if v is None else str(v) for k, v in shard.items()} for shard in shards]
    for n, shard in enumerate(shards):
        file = tmp_path / "data" / f"train-{n}{kind}"
        file.parent.mkdir(exist_ok=True)
        if kind == ".parquet":
            pandas.DataFrame([shard]).to_parquet(file)
        elif kind == ".arrow":
            file.write_bytes(arrow([shard], tmp_path / f"saved{n}"))
        elif kind in (".csv", ".tsv"):
            pandas.DataFrame([shard]).to_csv(file, sep="," if kind == ".csv" else "\t", index=False)
        else:
            file.write_text(json.dumps([shard]) if kind == ".json" else lines(shard))
    assert rows(tmp_path / "data") == shards


@pytest.mark.parametrize(
    ("value", "other", "said"),
    [("high", 3, "a number"), (3, "high", "text"), (["x"], {"x": 1}, "an object"), (True, 1, "a number")],
)
def test_shards_that_contradict_name_file_and_field(value, other, said, tmp_path):
    files = {"train-0.jsonl": lines(A | {"score": value}), "train-1.jsonl": lines(B, B | {"score": other})}
    message = refusal(lay(tmp_path, files))
    assert f"train-1.jsonl, row 2: field 'score' is {said}, and in train-0.jsonl" in message


def test_one_file_may_mix_types(tmp_path):
    """What a layout makes of them is its own affair."""
    files = {"train-0.jsonl": lines(A, A | {"prompt": [{"role": "user", "content": "Hi"}]}), "train-1.jsonl": lines(B)}
    assert len(rows(lay(tmp_path, files))) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
        (["b.jsonl", "a.jsonl.gz", "c/d.jsonl"], {None: ["a.jsonl.gz", "b.jsonl", "c/d.jsonl"]}),
        (["train/0.jsonl", "train/1.jsonl", "held_out/0.jsonl"],
         {"train": ["train/0.jsonl", "train/1.jsonl"], "heldout": ["held_out/0.jsonl"]}),
        (["my-train-2.jsonl", "dev_set.jsonl", "eval.json"],
         {"train": ["my-train-2.jsonl"], "validation": ["dev_set.jsonl"], "test": ["eval.json"]}),
        (["data/train_prefs-00000-of-00002-0a1b.csv", "data/train_prefs-00001-of-00002-0a1b.csv",
          "data/test_sft-00000-of-00001.csv"],
         {"train_prefs": ["data/train_prefs-00000-of-00002-0a1b.csv", "data/train_prefs-00001-of-00002-0a1b.csv"],
          "test_sft": ["data/test_sft-00000-of-00001.csv"]}),
        (["data/train-00000-of-00001.parquet", "train.jsonl"],
         {"train": ["data/train-00000-of-00001.parquet"], None: ["train.jsonl"]}),
        (["latest.jsonl", "contest.csv", "config.json", ".hidden/train.jsonl", "_SUCCESS", "notes.txt"],
         {None: ["contest.csv", "latest.jsonl"]}),
    ],
)  # fmt: skip
def test_names_say_splits_as_in_datasets(names, expected, tmp_path):
    lay(tmp_path, dict.fromkeys(names, ""))
    found = folder_splits("data", tmp_path)
    assert {split: [f.as_posix() for f in files] for split, files in found.items()} == expected


def test_a_split_is_chosen_by_its_name(tmp_path, caplog):
    files = {"train.jsonl": lines(A), "dev.jsonl.gz": gzip.compress(lines(B).encode()), "extra.jsonl": lines(ROWS[0])}
    lay(tmp_path, files)
    assert rows(tmp_path) == [A]
    assert "these are not read: extra.jsonl" in caplog.text
    assert rows(tmp_path, "validation") == rows(tmp_path, "dev") == [B]
    assert rows(tmp_path, "extra") == [ROWS[0]]
    message = refusal(tmp_path, "heldout")
    assert "has no split 'heldout'; there are: train, validation" in message
    assert "dataset.heldout_split" in message


def test_a_folder_without_names_of_splits_is_like_a_file(tmp_path):
    lay(tmp_path, {"b.jsonl": lines(B | {"split": "heldout"}, ROWS[0] | {"split": None}), "a.jsonl": lines(A)})
    assert rows(tmp_path) == [A, ROWS[0] | {"split": None}]
    assert rows(tmp_path, "heldout") == [A, B | {"split": "heldout"}, ROWS[0] | {"split": None}]
    assert len(rows(tmp_path, None)) == 3
    assert rows(tmp_path, "b") == [B, ROWS[0]]  # by the name of the file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no file of rows (.jsonl, .ndjson, .json, .csv"),
        ({"notes.txt": "x"}, "holds no file of rows"),
        ({"train-test.jsonl": lines(A)}, "train-test.jsonl in the folder"),
        ({"train.jsonl": lines(A), "train.csv": "a\n1"}, "which may be copies of the same rows"),
        ({"train.jsonl": lines(A), "train.jsonl.gz": b""}, "which may be copies of the same rows"),
        ({"train.jsonl": ""}, "is empty"),
        ({"train.jsonl": "{"}, "train.jsonl, row 1 is not JSON"),
        ({"README.md": "---\na: [\n---\n", "train.jsonl": lines(A)}, "README.md is no YAML"),
    ],
)
def test_folders_that_cannot_be_read_say_why(files, message, tmp_path):
    assert message in refusal(lay(tmp_path, files))


def test_a_card_without_files_of_data_does_not_matter(tmp_path):
    card = "---\nlicense: mit\n---\n# Data\n"
    assert rows(lay(tmp_path, {"README.md": card, "train-0.jsonl": lines(A | {"x": None}), "train-1.jsonl": lines(B)}))


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"


@pytest.mark.parametrize(
    ("patterns", "splits"),
    [
        ("'*-?.jsonl'", {"train": [A, B | {"source": "web"}]}),
        ("[a-1.jsonl, 'more/**']", {"train": [B | {"source": "web"}, ROWS[0]]}),
        ("{train_prefs: a-0.jsonl, test: [a-1.jsonl]}", {"train_prefs": [A], "test": [B | {"source": "web"}]}),
        ("[{split: train, path: 'a-*.jsonl'}, {split: heldout, path: [more/train.csv]}]",
         {"train": [A, B | {"source": "web"}], "heldout": [ROWS[0]]}),
    ],
)  # fmt: skip
def test_a_card_names_the_files_of_splits(patterns, splits, tmp_path, monkeypatch):
    """Shards may differ there, too: `datasets` would refuse them."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("`datasets` was asked"))
    files = {"README.md": CARD.format(patterns), "a-0.jsonl": lines(A), "a-1.jsonl": lines(B | {"source": "web"})}
    lay(tmp_path / "x[1]", files | {"more/train.csv": "\r\n".join(table().split("\r\n")[:2]), "more/notes.txt": "x"})
    for split, expected in splits.items():
        assert rows(tmp_path / "x[1]", split) == expected
    assert "there are: " + ", ".join(sorted(splits)) in refusal(tmp_path / "x[1]", "none")


def test_what_a_card_names_must_be_there(tmp_path):
    assert "names data that are not there: b*.jsonl" in refusal(lay(tmp_path, {"README.md": CARD.format("b*.jsonl")}))


def test_a_card_with_arguments_of_a_reader_is_for_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"README.md": CARD.format("a.csv\n  sep: ';'"), "a.csv": "prompt;chosen\na;x\n"}
    assert rows(lay(tmp_path / "data", files)) == [{"prompt": "a", "chosen": "x"}]
    (tmp_path / "data" / "a.csv").write_text("prompt;chosen\na;z\n")  # `datasets` alone would give the rows from before
    assert rows(tmp_path / "data") == [{"prompt": "a", "chosen": "z"}]
    (tmp_path / "data" / "a.csv").write_text("prompt;chosen\na;x\nb;y;z\n")
    assert "cannot be loaded: Error tokenizing data" in refusal(tmp_path / "data")


def test_every_file_of_a_folder_is_in_its_digest(tmp_path):
    lay(tmp_path, {"train-0.jsonl": lines(A), "train-1.csv": "prompt\nb\n"})
    before = digest(str(tmp_path))
    (tmp_path / "train-1.csv").write_text("prompt\nc\n")
    assert digest(str(tmp_path)) != before


# Nulls


def test_a_null_split_is_as_if_it_were_absent(tmp_path):
    lay(tmp_path, {"a.jsonl": lines(A | {"split": None}, B | {"split": "heldout"}), "a.csv": "prompt,split\na,\nb,x\n"})
    assert [row["prompt"] for row in rows(tmp_path / "a.jsonl")] == ["a"]
    assert [row["prompt"] for row in rows(tmp_path / "a.jsonl", "heldout")] == ["a", "b"]
    assert [row["prompt"] for row in rows(tmp_path / "a.csv")] == ["a"]


# What people have brought


COUNTS = {
    "alpaca_pref.jsonl": 3, "argilla_uf_cleaned.jsonl": 6, "dict_chosen.jsonl": 1, "multi_turn_completion.jsonl": 2,
    "null_extras.jsonl": 2, "null_rejected.jsonl": 3, "pairs.csv": 4, "pairs.tsv": 4, "pandas_null.parquet": 3,
    "prompt_completion.jsonl": 4, "prompt_repeated.jsonl": 2, "roles_human_gpt.jsonl": 4, "shards": 6,
    "shards_columns": 6, "sharegpt_pairs.jsonl": 4, "sharegpt_sft.jsonl": 4, "std_single": 6, "string_rewards.jsonl": 2,
    "system_column.jsonl": 4, "terminator_inside.jsonl": 4, "thinking.jsonl": 8, "tool_completion.jsonl": 4,
    "tool_completion_text.jsonl": 4, "trl_uf.parquet": 6, "with_system.jsonl": 4,
}  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize("name", COUNTS)
def test_every_case_has_its_rows(name):
    found = rows(CASES / name)
    assert len(found) == COUNTS[name]
    assert rows(CASES / name, None) == found


@pytest.mark.shared
def test_every_case_is_counted():
    assert {path.name for path in CASES.iterdir()} == set(COUNTS)


@pytest.mark.shared
def test_the_values_of_the_cases_that_were_refused():
    assert rows(CASES / "pairs.csv") == rows(CASES / "pairs.tsv")
    assert [row["system"] for row in rows(CASES / "shards")] == [None] * 3 + ["Be short."] * 3
    assert [row.get("source") for row in rows(CASES / "shards_columns")] == [None] * 3 + ["web"] * 3
    assert rows(CASES / "pandas_null.parquet")[0]["chosen"] is None
    assert rows(CASES / "std_single")[0] == {"prompt": "q0", "chosen": "yes", "rejected": "no"}
