"""Every file that a run leaves, weights and caches too, has the rights that the umask gives."""

import stat
import subprocess
import sys

import pytest

from tests.helpers.tiny import ENVIRONMENT, ROOT


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct)
@pytest.mark.slow
def test_files_of_a_run_follow_the_umask(umask, overrides, tmp_path):
    command = [sys.executable, "-m", "prefopt.train", *overrides(tmp_path / "runs")]
    command += ["peft=lora_attention", "reference=cached", "save_every=2"]
    environment = ENVIRONMENT | {"PREFOPT_CACHE": str(tmp_path / "cache")}
    process = subprocess.run(command, cwd=ROOT, env=environment, umask=umask, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rights = {file: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.suffix for file in rights} > {".safetensors", ".arrow", ".json", ".jsonl"}
    # A lock of filelock's and a script may have fewer or more; the data have exactly these.
    kinds = (".safetensors", ".arrow", ".json", ".jsonl", ".jinja", ".txt")
    data = {str(f.relative_to(tmp_path)): oct(r) for f, r in rights.items() if f.suffix in kinds}
    wrong = {name: right for name, right in data.items() if right != oct(0o666 & ~umask)}
    assert not wrong
