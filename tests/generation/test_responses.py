"""The file that keeps responses while they are sampled."""

import json

import pytest

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.errors import UserError
from prefopt.generation.responses import GenerationRequest, PartialFile, generate_resumable
from prefopt.utils import signals
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
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert lines == [{"settings": "digest"}, {"prompt": 2, **ROWS[2]}, {"prompt": 0, **ROWS[0]}]


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_torn_last_line_is_dropped_and_written_again(lost, tmp_path):
    path = tmp_path / "out.partial"
    PartialFile(path, "digest").append(ROWS)
    complete = path.read_bytes()
    path.write_bytes(complete[:-lost])
    file = PartialFile(path, "digest")
    assert file.rows == {2: ROWS[2]}
    file.append({0: ROWS[0]})
    assert path.read_bytes() == complete


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
