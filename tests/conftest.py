import signal
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from prefopt.utils.console import configure_logging
from tests.helpers import tiny

configure_logging()  # what is called in this process talks as in a program
torch.set_num_threads(1)  # as in tests/helpers/tiny.py
# What starts in the background inherits that SIGINT is ignored, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No timed assertions: a busy machine must not fail a property.
settings.register_profile("prefopt", deadline=None)
settings.load_profile("prefopt")


def pytest_collection_modifyitems(items):
    if not tiny.SHARED.is_dir():
        skip = pytest.mark.skip(reason="needs the real data that lie beside the authors' checkouts")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """model/ (a tiny random Llama with its tokenizer), train.jsonl and heldout.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_tiny(folder / "model")
    tiny.write_pairs(folder / "train.jsonl", 12)
    tiny.write_pairs(folder / "heldout.jsonl", 6, start=100)
    return folder


@pytest.fixture(scope="session")
def overrides(tiny_folder):
    """overrides(runs_dir) -> the command line of a 4-step run of the tiny model."""
    return lambda runs: tiny.tiny_overrides(tiny_folder / "model", tiny_folder, runs)


@pytest.fixture(scope="session")
def grid(tiny_folder, overrides, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished grid of the tiny model with an oracle: (runs folder, the process)."""
    runs = tmp_path_factory.mktemp("grid")
    process = tiny.run_program(
        "-m", *overrides(runs), *tiny.SAMPLED, "objective=dpo,mmpo", "objective.beta=0.05,0.5",
        "launcher.at_once=2", "logger.curves=true",
        env={"PREFOPT_CACHE": str(tiny_folder / "cache")},
    )  # fmt: skip
    return runs, process
