"""The tests of ranks_cases.py, which fork the process that they run in.

They have a process of their own: that of the other tests has threads, and a fork may wait for what they held.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT


@pytest.mark.slow
def test_what_two_processes_share(tmp_path):
    cases = Path(__file__).with_name("ranks_cases.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'cases'}",
        str(cases),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout
    assert "5 passed" in process.stdout
