"""What the scripts of the reproductions share (scripts/common.sh), with a sweep that does nothing."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "scripts" / "common.sh"
# A sweep says when it begins and ends. It waits until another one has begun, where the test says so.
SWEEP = """
sweep() {
    echo "begin $1" >> "$folder/log"
    for _ in $(seq "${tries:-1}"); do [[ $(grep -c begin "$folder/log") -ge 2 ]] && break; sleep 0.05; done
    echo "end $1" >> "$folder/log"
    [[ $1 != bad ]]
}
"""


def script(folder: Path, arguments: str, lines: str) -> list[str]:
    text = f"folder={folder}\nset -- {arguments}\n. {COMMON}\n{SWEEP}\n{lines}\n"
    return ["bash", "-c", text]


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_blocks_begin_at_once_under_slurm(tmp_path):
    lines = "tries=200\nblock one\nblock two\njoined\necho after"
    process = subprocess.run(script(tmp_path, "launcher=site", lines), capture_output=True, text=True, check=True)
    assert sorted(log(tmp_path)[:2]) == ["begin one", "begin two"]
    assert process.stdout == "after\n"


@pytest.mark.parametrize("arguments", ["launcher=local", "seed=0", "launcher=slurm --dry-run"])
def test_blocks_begin_one_after_another_on_one_machine(arguments, tmp_path):
    subprocess.run(script(tmp_path, arguments, "block one\nblock two\njoined"), check=True)
    assert log(tmp_path) == ["begin one", "end one", "begin two", "end two"]


def test_a_block_that_fails_ends_the_script_when_the_others_are_done(tmp_path):
    lines = "block bad\nblock good\njoined\necho after"
    process = subprocess.run(script(tmp_path, "launcher=slurm", lines), capture_output=True, text=True)
    assert process.returncode == 1
    assert "has failed: sweep bad" in process.stderr
    assert "after" not in process.stdout
    assert {"end bad", "end good"} <= set(log(tmp_path))


def test_ctrl_c_reaches_every_block(tmp_path):
    lines = f"""
    sweep() {{ exec python3 -c "
import signal, time
def leave(*_):
    open('{tmp_path}/left', 'a').write('$1\\n')
    raise SystemExit(130)
signal.signal(signal.SIGINT, leave)
open('{tmp_path}/log', 'a').write('$1\\n')
time.sleep(60)"; }}
    block one; block two; joined"""
    process = subprocess.Popen(script(tmp_path, "launcher=slurm", lines), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() or len(log(tmp_path)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert sorted((tmp_path / "left").read_text().split()) == ["one", "two"]


def test_plug_ins_are_swept_by_their_bases(tmp_path):
    lines = 'sweep() { echo "$*"; }\ntrain dpo,mappo_dpo,ipo,mappo_cpo,arpo_cpo seed=0'
    process = subprocess.run(script(tmp_path, "", lines), capture_output=True, text=True, check=True)
    assert sorted(process.stdout.splitlines()) == [
        "train seed=0 objective=arpo objective/base=cpo",
        "train seed=0 objective=dpo,ipo",
        "train seed=0 objective=mappo objective/base=dpo,cpo",
    ]
