"""What a dry run says that a sweep would take."""

import os
import shutil
import subprocess

import pytest
from omegaconf import open_dict
from safetensors.torch import load_file

from prefopt.config.parse import build, parse
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.launch.estimate import FLOP_PER_HOUR, KNOWN, estimate, parameters, rows
from prefopt.objectives.base import Objective
from prefopt.training.config import TrainConfig
from prefopt.utils.files import write_json
from tests.helpers.tiny import ROOT, run_program
from tests.launch.test_sweeps import composed


def config(*overrides: str) -> TrainConfig:
    cfg = composed("train", [*overrides])
    with open_dict(cfg):
        del cfg["hydra"]
    return parse(cfg, TrainConfig)


@pytest.mark.parametrize(
    ("path", "name", "said"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "", 135e6),
        ("Qwen/Qwen2.5-1.5B-Instruct", "", 1.5e9),
        ("mistralai/Mistral-7B-Instruct-v0.3", "", 7e9),
        ("runs/paper/mmpo/sft/x/policy", "llama3.2-1b", 1e9),
    ],
)
def test_a_model_that_is_not_here_is_as_large_as_its_name_says(path, name, said):
    assert parameters(ModelConfig(name, path)) == said


def test_a_model_that_is_here_is_counted(tiny_folder):
    weights = load_file(tiny_folder / "model" / "model.safetensors")
    assert parameters(ModelConfig("1b", str(tiny_folder / "model"))) == sum(w.numel() for w in weights.values())
    with pytest.raises(UserError, match="lab/policy"):
        parameters(ModelConfig("policy", "lab/policy"))


def test_the_embedded_rows_are_counted_and_those_of_a_known_data_set_known():
    found = rows(config().dataset)
    assert found is not None
    assert found[0] == 384
    assert all(5 < part < 100 for part in found[1])
    known = rows(config("dataset=ultrafeedback_binarized").dataset)
    assert known == (61_135, tuple(c / 4 for c in KNOWN["HuggingFaceH4/ultrafeedback_binarized"][1]))
    assert rows(config("dataset=sftdatasetv3").dataset) is None
    mixed = rows(config("dataset=mmpo_mix", "dataset.sources.orca.count=100").dataset)
    assert mixed is not None
    assert mixed[0] == 61_235


def test_the_estimate_is_arithmetic():
    """6 FLOP a token and parameter in training, 2 for the reference once and in each evaluation."""
    given = [
        "model=hub",
        "model.path=lab/m-1b",
        "dataset=ultrafeedback_binarized",
        "objective=dpo",
        "objective.beta=0.1",
    ]
    given += ["steps=100", "batch_size=10", "eval_every=50", "heldout_pairs=20", "exports=2"]
    given += ["max_prompt_tokens=100", "max_completion_tokens=200"]

    def found(*more: str):
        settings = config(*given, *more)
        each = estimate(settings, build(settings.objective, Objective, "objective"))
        assert each is not None
        return each

    tokens = 100 + 200 + 200  # all means are above the limits
    training, reference, evaluations = 6 * 1000 * tokens, 2 * 1000 * tokens, 2 * 3 * 20 * tokens
    assert found().gpu_hours == pytest.approx(1e9 * (training + reference + evaluations) / FLOP_PER_HOUR)
    assert (found().kept_gb, found().checkpoint_gb) == (2 * 4 + 12, 12)
    assert found("keep_checkpoint=false").kept_gb == 2 * 4
    lora = found("peft=lora_attention", "gradient_checkpointing=true")
    assert lora.gpu_hours == pytest.approx(1e9 * (training + reference + evaluations) / FLOP_PER_HOUR)
    assert lora.checkpoint_gb == 0
    assert found("objective=simpo", "objective.beta=2").gpu_hours == pytest.approx(
        1e9 * (training + evaluations) / FLOP_PER_HOUR
    )


def test_a_dry_run_names_what_is_lacking_and_refuses_nothing(tmp_path):
    process = run_program(
        "-m", "+sweep=mmpo/smollm2_135m_dpo", "model.path=runs/sft/policy", "launcher=slurm", "--dry-run", cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert "Retrying" not in process.stderr  # it asks no hub
    assert process.returncode == 0, process.stderr
    assert "4 jobs of prefopt.train, folders in runs/paper/mmpo/smollm2-135m" in process.stdout
    assert "Estimates for 4 jobs" in process.stdout
    assert "model.path=runs/sft/policy: it is neither a folder here nor a name on the hub" in process.stdout
    assert "prefopt.prefetch 'also=[HuggingFaceH4/orca_dpo_pairs]'" in process.stdout
    assert "Memory of one process in training, GiB" in process.stdout
    assert "smollm2-135m dpo (4 jobs)" in process.stdout
    assert process.stdout.count(" 0.501 ") == 2  # GiB of weights, and of gradients
    assert not list(tmp_path.iterdir())


def test_a_dry_run_does_without_the_size_of_a_model_that_a_stage_before_makes(tmp_path):
    process = run_program(
        "-m", "model=hub", "model.path=runs/sft/policy", "dataset=sentiment_offline", "objective=dpo,ipo", "--dry-run",
        cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "2 jobs of prefopt.train" in process.stdout
    assert "Estimates for 0 jobs" in process.stdout
    assert "model.path=runs/sft/policy: it is neither a folder here nor a name on the hub" in process.stdout


def writes_down(folder, also=":"):
    """The file into which an interpreter writes what it is asked for, and no more but `also`, a shell command; and the
    environment in which the scripts take it."""
    asked, fake = folder / "asked", folder / "python"
    fake.write_text(f'#!/bin/sh\necho "$*" >> {asked}\n{also}\n')
    fake.chmod(0o755)
    return asked, os.environ | {"PREFOPT_PYTHON": str(fake)}


SCRIPTS = sorted(f"{file.parent.name}/{file.stem}" for file in (ROOT / "scripts").glob("*/m*.sh"))


def test_which_scripts_there_are():
    papers = {"mmpo", "mappo", "madpo"}
    lab, mini, paper = ({s.split("/")[1] for s in SCRIPTS if s.startswith(f"{k}/")} for k in ("lab", "mini", "paper"))
    assert lab == paper == papers
    assert mini == papers - {"madpo"}  # of MADPO this size shows nothing


@pytest.mark.parametrize("script", [script for script in SCRIPTS if not script.startswith("lab/")])
def test_the_scripts_submit_every_sweep_of_their_paper(script, tmp_path):
    asked, environment = writes_down(tmp_path)
    command = [str(ROOT / "scripts" / f"{script}.sh"), "launcher.at_once=7", "--dry-run"]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    lines = asked.read_text().splitlines()
    assert all(line.startswith("-m prefopt.train -m +sweep=") for line in lines)
    assert all(line.endswith("launcher.at_once=7 --dry-run") for line in lines)
    named = {line.split("+sweep=")[1].split(" ")[0] for line in lines}
    folder = ROOT / "sweeps" / "sweep"
    assert all((folder / f"{name}.yaml").is_file() for name in named)
    scale, paper = script.split("/")
    if scale == "paper":
        files = {f"{paper}/{f.stem}" for f in (folder / paper).glob("*.yaml")}
        assert named == {f for f in files if not f.split("/")[1].startswith(("_", "tuning_", "online_"))}


@pytest.mark.parametrize("script", [*SCRIPTS, "lab/all", "lab/family"])
def test_the_scripts_get_to_their_end(script, tmp_path):
    """Their own lines, that is, and twice, as after a stop: the interpreter makes no more than the files that the next
    lines move."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    scale, paper = script.split("/")
    (tmp_path / "runs" / scale / paper / "final" / "a").mkdir(parents=True)
    (tmp_path / "runs" / scale / paper / "final" / "a" / "record.json").touch()
    of_lab, qualities = (0, 1, 2, 3, 4, 100, 101), ("high", "medium", "low")
    for kind, seeds in {
        "lab/sft/sft-lab": of_lab,
        **{f"lab/madpo/rewards/reward-lab-lab-{quality}": of_lab for quality in qualities},
        **{f"paper/madpo/rewards/reward-gemma-3-270m-noisy-{quality}": (0,) for quality in qualities},
    }.items():
        for seed in seeds:
            record = tmp_path / "runs" / f"{kind}-{seed}" / "record.json"
            record.parent.mkdir(parents=True)
            format_of_its_own = {"dataset": {"format": {"seed": 0}}}
            write_json(record, {"config": {**format_of_its_own, "seed": seed, "steps": 8}})
    make = 'mkdir -p "$(dirname "${a#*=}")"; : > "${a#*=}"'
    also = f"for a; do case $a in output=*.gz) {make};; esac; done"
    asked, environment = writes_down(tmp_path, also)
    for _ in range(2):
        asked.unlink(missing_ok=True)
        command = [tmp_path / "scripts" / f"{script}.sh"]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")
        last = asked.read_text().splitlines()[-1]
        assert last.startswith(("-m prefopt.papers ", "-m prefopt.report ", "-m prefopt.claims"))
        if scale == "lab":
            sweeps = {word for word in asked.read_text().split() if word.startswith("+sweep=lab/")}
            assert all(
                (ROOT / "sweeps" / "sweep" / f"{word.removeprefix('+sweep=')}.yaml").is_file() for word in sweeps
            )
