"""The file that keeps responses while they are sampled."""

import json

import pytest

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.errors import UserError
from prefopt.generation.responses import GenerationRequest, PartialFile, generate_resumable
from prefopt.utils import signals
from prefopt.utils.store import unseal
from tests.helpers.harm import HARMS, cut, empty, flip, zero
from tests.helpers.tiny import save_tiny

ROWS = {
    2: {"responses": ["a\u2028b", "ü"], "finished": [True, False]},
    0: {"responses": ["", "\r"], "finished": [False] * 2},
}


def test_a_partial_file_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "out.partial"
    file = PartialFile(path, "digest")
    assert file.rows == {}
    assert not path.exists()
    for prompt, row in ROWS.items():
        file.append({prompt: row})
    assert file.rows == PartialFile(path, "digest").rows == ROWS
    header, *lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert unseal(header) == {"settings": "digest"}
    assert [unseal(line, "digest") for line in lines] == [{"prompt": 2, **ROWS[2]}, {"prompt": 0, **ROWS[0]}]


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_torn_last_line_is_dropped_and_written_again(lost, tmp_path, caplog):
    path = tmp_path / "out.partial"
    PartialFile(path, "digest").append(ROWS)
    complete = path.read_bytes()
    path.write_bytes(complete[:-lost])
    file = PartialFile(path, "digest")
    assert file.rows == {2: ROWS[2]}
    file.append({0: ROWS[0]})
    assert path.read_bytes() == complete
    assert not caplog.text


@pytest.mark.parametrize("harm", HARMS)
def test_responses_that_are_whole_outlive_damage(harm, tmp_path, caplog):
    """Whichever part of the file is damaged; and no response is another than was sampled."""
    path = tmp_path / "out.partial"
    rows = {i: {"responses": [f"response {i}" * 9], "finished": [True]} for i in range(5)}
    PartialFile(path, "digest").append(rows)
    complete = path.read_bytes()
    harm(path)
    file = PartialFile(path, "digest")
    expected = {flip: {0, 1, 3, 4}, cut: {0, 1}, zero: set(), empty: set()}[harm]
    assert set(file.rows) == expected
    assert all(rows[i] == row for i, row in file.rows.items())
    assert (f"{path} is damaged: {len(expected)} of its lines are whole" in caplog.text) == (harm in (flip, zero))
    file.append({i: row for i, row in rows.items() if i not in file.rows})
    assert len(path.read_bytes()) == len(complete)
    assert PartialFile(path, "digest").rows == rows


def test_a_damaged_first_line_costs_nothing(tmp_path, caplog):
    path = tmp_path / "out.partial"
    PartialFile(path, "digest").append(ROWS)
    complete = path.read_bytes()
    path.write_bytes(bytes([complete[0] ^ 1]) + complete[1:])
    assert PartialFile(path, "digest").rows == ROWS
    assert path.read_bytes() == complete
    assert "is damaged" in caplog.text


def test_a_torn_first_line_begins_the_file_again(tmp_path):
    path = tmp_path / "out.partial"
    path.write_bytes(b'{"settings": "di')
    file = PartialFile(path, "digest")
    file.append(ROWS)
    assert PartialFile(path, "digest").rows == ROWS


def test_a_file_of_other_settings_is_refused_and_kept(tmp_path):
    path = tmp_path / "out.partial"
    PartialFile(path, "digest").append(ROWS)
    complete = path.read_bytes()
    with pytest.raises(UserError, match="was begun with other settings"):
        PartialFile(path, "another")
    assert path.read_bytes() == complete


def test_prompts_that_carry_the_template_already_are_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
    model = ModelConfig("tiny", str(save_tiny(tmp_path / "model")))
    prompts = [[{"role": "user", "content": text}] for text in ("Hello", "<|im_start|>user\nHello<|im_end|>")]
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=2, batch_size=2)
    request = GenerationRequest(model, prompts, sampling, 1, 0, "transformers", "cpu", "float32")
    generate_resumable(request, tmp_path / "partial.jsonl", show=False)
    assert "1 of 2 prompts hold special tokens or other markup of the chat template" in caplog.text
