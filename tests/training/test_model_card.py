"""The model card of a policy says what the run's record says, and text in it is text."""

import copy
import json

import pytest
import yaml
from huggingface_hub import ModelCard

from prefopt.training.model_card import base_license, model_card
from tests.helpers.tiny import records


@pytest.fixture(scope="module")
def record(grid) -> dict:
    return records(grid[0])[0]


def test_a_policy_has_a_card_that_the_hub_reads(grid, record):
    card = ModelCard.load(grid[0] / record["name"] / "policy" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefopt", "preference-optimization", record["objective"]],
    }
    last = record["evaluations"][-1]
    for said in (
        f"| optimizer | lr={record['config']['optimizer']['lr']}",
        f"| base model | {record['config']['model']['path'].rpartition('/')[2]} |",
        f"beta={record['config']['objective']['beta']}",
        record["git"]["commit"],
        f"{last['kl']:.3f} ± {last['kl_se']:.3f} | {last['samples']} |",
        "names no license",
    ):
        assert said in card.text, said
    configuration = card.text.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(configuration)["batch_size"] == record["config"]["batch_size"]


def test_before_training_all_pairs_tie_and_have_no_accuracy(record):
    (row,) = [
        line for line in model_card(record, False, record["evaluations"]).splitlines() if line.startswith("| accuracy")
    ]
    assert row.split(" | ")[1] == "–"
    assert "±" in row.split(" | ")[2]


def test_names_in_a_card_are_text(record):
    record = copy.deepcopy(record)
    record["name"] = "<script>alert(1)</script>"
    record["config"]["dataset"]["name"] = "a | b\n# c"
    record["config"]["model"] |= {"path": "someone/base\n---\nlicense: mit", "revision": None}
    text = model_card(record, False, [])
    assert "<script>" not in text
    assert "a \\| b # c" in text
    assert "No held-out data." in text
    front = text.split("---\n")[1]
    assert "license" not in yaml.safe_load(front)


def test_the_base_models_license_is_taken_over(tmp_path, record):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert base_license(str(tmp_path)) == "apache-2.0"
    record = copy.deepcopy(record)
    record["config"]["model"]["path"] = str(tmp_path)
    assert ModelCard(model_card(record, False, [])).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("no card")
    assert base_license(str(tmp_path)) is None
