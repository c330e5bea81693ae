"""The wheel, installed into an environment that does not know the checkout, and used from a folder beside nothing."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.tiny import ENVIRONMENT, ROOT, records, tiny_overrides

pytestmark = pytest.mark.slow

MODULE = """
from dataclasses import dataclass

from prefopt.data.formats import Pairs
from prefopt.objectives.dpo import DPO
from prefopt.training.optim import Schedule
from prefopt.rewards.scorers import RewardScorer


@dataclass(frozen=True)
class Sharp(DPO):
    sharpness: float = 1.0

    def losses(self, inputs, chosen, rejected):
        return super().losses(inputs, self.sharpness * chosen, self.sharpness * rejected)


@dataclass(frozen=True)
class Questions(Pairs):
    def __call__(self, row):
        return super().__call__({"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]})


@dataclass(frozen=True)
class Flat(Schedule):
    share: float

    def __call__(self, step, steps):
        return self.share


@dataclass(frozen=True)
class Length(RewardScorer):
    @property
    def label(self):
        return "length"

    def rewards(self, requests, device, precision, show=True):
        return [float(len(request.response)) for request in requests]


def brevity(prompts, responses):
    return [-len(response) for response in responses]
"""
YAMLS = {
    "objective/sharp.yaml": "_target_: mine.Sharp\nbeta: 0.1\nsharpness: 2.0\n",
    "schedule/flat.yaml": "_target_: mine.Flat\nshare: 0.5\n",
    "scorer/length.yaml": "_target_: mine.Length\n",
    "dataset/questions.yaml": (
        "name: questions\ntrain: own.jsonl\nheldout: own.jsonl\nformat:\n  _target_: mine.Questions\n"
        "policies: {prompt_in_heldout: keep}\noracle:\n  _target_: mine.Length\n"
    ),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, and the packages of this one without its prefopt."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("prefopt_lab-*.whl")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    # A line of a .pth is a folder whose own .pth files are not read: the editable prefopt is not found through it.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    return environment / "bin"


@pytest.fixture
def call(installed, tiny_folder, tmp_path):
    """call(program, *arguments) in an empty folder; the process, which has ended well."""
    empty = tmp_path / "empty"
    empty.mkdir()
    variables = {"PREFOPT_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"}
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("PYTHON")} | variables

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        words = [str(installed / command[0]), *command[1:]]
        process = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return process

    run.folder = empty  # type: ignore[attr-defined]
    return run


def tiny(runs: str, tiny_folder: Path) -> list[str]:
    return tiny_overrides(tiny_folder / "model", tiny_folder, Path(runs))


def test_what_is_installed_is_the_wheel(call, installed):
    code = "import prefopt, hydra_plugins.prefopt as h; print(prefopt.__file__, h.__file__, sep='\\n')"
    for line in call("python", "-c", code).stdout.splitlines():
        assert line.startswith(str(installed.parent))
    said = call("prefopt", "--help").stdout
    assert "Train one policy" in said
    assert "objective.beta=0.1" in call("prefopt", "train", "--help").stdout
    assert "mmpo" in call("prefopt", "objectives").stdout


def test_a_run_by_either_command_is_the_same(call, tiny_folder):
    call("prefopt", "train", *tiny("runs", tiny_folder), "steps=2")
    call("python", "-m", "prefopt.train", *tiny("again", tiny_folder), "steps=2")
    (first,), (second,) = (records(call.folder / name) for name in ("runs", "again"))
    assert first["status"] == second["status"] == "finished"
    assert first["final_weights"] == second["final_weights"]
    assert first["id"] == second["id"]
    assert first["versions"]["prefopt-lab"]
    assert first["git"] is None  # an installed package is of no checkout, also where its environment lies in one
    assert first["name"] in call("prefopt", "runs").stdout.replace("\n", "")


def test_a_sweep_runs_on_a_copy_of_what_is_installed(call, tiny_folder, installed):
    call("prefopt", "train", "-m", *tiny("runs", tiny_folder), "steps=1", "objective=dpo,mmpo")
    found = records(call.folder / "runs")
    assert [(r["status"], r["objective"]) for r in found] == [("finished", "dpo"), ("finished", "mmpo")]
    (code,) = {r["code"] for r in found}
    assert Path(code).is_relative_to(call.folder / "runs" / "code")
    assert (Path(code) / "prefopt" / "job.py").is_file()
    assert "mmpo" in call("prefopt", "train", "-m", *tiny("new", tiny_folder), "+sweep=objectives", "--dry-run").stdout
    assert not (call.folder / "new").exists()


@pytest.mark.parametrize("command", [["prefopt", "train"], ["python", "-m", "prefopt.train"]], ids=lambda c: c[0])
def test_a_folder_of_ones_own(call, command, tiny_folder):
    """An objective, a format, a schedule, a scorer and a reward function in a module in the current folder."""
    folder = call.folder
    (folder / "mine.py").write_text(MODULE)
    for name, text in YAMLS.items():
        (folder / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "own" / name).write_text(text)
    rows = [{"q": f"What is {i}?", "good": f"It is {i}.", "bad": f"Who knows {i}?"} for i in range(8)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [o for o in tiny("runs", tiny_folder) if not o.startswith("dataset")]
    own = ["--config-dir", "own", "dataset=questions", "schedule=flat", "sampling.max_new_tokens=4"]
    given.append("sampling.prompts=null")
    call(*command, *own, *given, "steps=2", "objective=sharp")
    call(*command, "-m", *own, *given, "steps=2", "objective=sharp", "objective.sharpness=3.0,4.0")
    found = records(folder / "runs")
    assert sorted(r["config"]["objective"]["sharpness"] for r in found) == [2.0, 3.0, 4.0]
    for record in found:
        assert record["status"] == "finished"
        assert record["name"].startswith("mine-model-questions-")
        assert record["evaluations"][-1]["oracle_reward"] > 0
    pairs = [{"prompt": "How?", "chosen": "So, with care.", "rejected": "No."}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    score = [*command[:-1], command[-1].replace("train", "score")]
    call(*score, "--config-dir", "own", "scorer=length", "input=pairs.jsonl", "output=scored.jsonl", "device=cpu")
    (row,) = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert (row["chosen_reward"], row["rejected_reward"]) == (14.0, 3.0)
    call(*score, "scorer=function", "scorer.function=mine.brevity", "input=pairs.jsonl", "output=f.jsonl", "device=cpu")
    (row,) = [json.loads(line) for line in (folder / "f.jsonl").read_text().splitlines()]
    assert (row["chosen_reward"], row["rejected_reward"]) == (-14.0, -3.0)
