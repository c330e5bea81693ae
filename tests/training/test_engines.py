"""What goes with which engine: the cases of engine_cases.py, which fork the process that they run in, and refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.training.config import check
from tests.helpers.tiny import ROOT
from tests.launch.test_estimate import config


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["as_one and fsdp", "as_one and zero2", "another_engine", "loss_curve"])
def test_what_goes_with_an_engine(chosen, tmp_path):
    pytest.importorskip("deepspeed")
    cases = Path(__file__).with_name("engine_cases.py")
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'cases'}", "-k", chosen, "-o", "timeout=300"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(cases)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        ("fsdp", "compile=true"),
        ("fsdp", "optimizer=adamw_8bit"),
        ("zero2", "optimizer=adamw_8bit"),
        ("fsdp", "peft.quantize=true"),
        ("zero2", "peft.quantize=true"),
    ],
)
def test_what_does_not_go_with_an_engine_is_refused(engine, option):
    adapter = ["peft=lora_attention"] if "peft" in option else []
    with pytest.raises(UserError, match=f"{option.removesuffix('=true')} and engine={engine} do not go together"):
        check(config(f"engine={engine}", option, *adapter, "device=cpu", "precision=float32"))
