"""The first hour: from a raw file in an empty folder to a report of two β, their paired difference, their answers side
by side, and a model that transformers loads. Five commands, each as a process."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.objectives import SIDES
from tests.helpers.tiny import ENVIRONMENT, command, records, run_program, write_pairs

# What a test needs beside what a newcomer types, to be quick.
TINY = ["device=cpu", "precision=float32"]
SMALL = ["batch_size=8", "micro_batch_tokens=400", "eval_every=3", "sampling.max_new_tokens=6"]


def typed(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """What `prefopt PROGRAM ...` prints in `folder`."""
    _, program, *words = line.split()
    process = run_program(
        *words, *more, program=program, cwd=folder, env={"PREFOPT_CACHE": str(folder / "cache")}, curves=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture
def empty(tmp_path) -> Path:
    """A folder with nothing but a file of preferences."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [json.loads(line) for line in write_pairs(tmp_path / "rows.jsonl", 40).read_text().splitlines()]
    ours = [{"question" if key == "prompt" else key: row[key] for key in ("prompt", *SIDES)} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    return folder


@pytest.mark.slow
def test_five_commands(empty, tiny_folder):
    model = ["model=hub", f"model.path={tiny_folder / 'model'}", *TINY]

    # 1. Two β.
    line = "prefopt train -m dataset=pairs.jsonl objective.beta=0.1,0.5 optimizer.lr=1e-3"
    typed(line, empty, *model, *SMALL)
    runs = {record["config"]["objective"]["beta"]: record for record in records(empty / "runs")}
    assert sorted(runs) == [0.1, 0.5]
    for record in runs.values():
        assert record["status"] == "finished"
        assert record["evaluations"][-1]["n"] >= 1  # of prompts that were kept out of the training
        assert (empty / "runs" / record["name"] / "curves.png").is_file()
    a, b = (f"runs/{runs[beta]['name']}" for beta in (0.1, 0.5))

    # 2. Their report, with their paired difference.
    said = typed(f"prefopt report runs_dir=runs output=report compare=[{a},{b}]", empty).stdout
    table = (empty / "report" / "table.md").read_text()
    assert "| dpo | 0.1 |" in table
    assert "| dpo | 0.5 |" in table
    assert a.removeprefix("runs/") in said
    assert any("95 % interval" in file.read_text() for file in (empty / "report").glob("*.md"))
    assert len(list((empty / "report" / "curves").glob("*.png"))) == 2

    # 3. In what they differ.
    assert "objective.beta" in typed(f"prefopt diff {a} {b}", empty).stdout

    # 4. Their answers side by side.
    said = typed(f"prefopt compare run={a} run={b} sampling.max_new_tokens=8", empty, *TINY).stdout
    page = Path(said.strip().splitlines()[-1])
    assert "Review the" in (empty / page).read_text()

    # 5. A talk with one of them.
    process = subprocess.run(
        command(f"run={b}", "sampling.max_new_tokens=4", *TINY, program="chat"),
        cwd=empty, env=ENVIRONMENT | {"PREFOPT_CACHE": str(empty / "cache")}, input="Hello\n/exit\n",
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("> ")

    # And the model is one that transformers loads.
    loaded = AutoModelForCausalLM.from_pretrained(empty / b / "policy")
    tokenizer = AutoTokenizer.from_pretrained(empty / b / "policy")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
