"""Programs as processes that import nothing: each is forked from one that has imported all, and has computed nothing.

Starting Python and importing torch and transformers takes longer than most of what the tests ask the programs to do.
The tests that are about the start itself, or that kill, start real ones (`tiny.command`).
"""

import atexit
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PROGRAMS = (
    "train",
    "report",
    "papers",
    "runs",
    "harness",
    "alpaca",
    "score",
    "sample",
    "online",
    "prefetch",
    "compare",
)
_server: subprocess.Popen[str] | None = None


def run(arguments: list[str], program: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What subprocess.run(["python", "-m", f"prefopt.{program}", *arguments]) gives."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=Path(__file__).parent.parent,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_server.kill)
    assert _server.stdin
    assert _server.stdout
    with tempfile.TemporaryDirectory() as folder:
        asked = {"arguments": arguments, "program": program, "cwd": str(cwd), "env": env, "folder": folder}
        _server.stdin.write(json.dumps(asked) + "\n")
        _server.stdin.flush()
        code = int(_server.stdout.readline())
        out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([program, *arguments], code, out, err)


def serve() -> None:
    for program in PROGRAMS:
        importlib.import_module(f"prefopt.{program}")
    for module in ("datasets", "peft", "matplotlib.pyplot", "prefopt.loop", "prefopt.engine", "prefopt.generate"):
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(work(asked))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def work(asked: dict) -> int:
    """In the child: become the program, and return its exit code."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(asked["folder"]) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path.insert(0, asked["cwd"])
    module = importlib.import_module(f"prefopt.{asked['program']}")
    sys.argv = [str(module.__file__), *asked["arguments"]]
    code: object = 0
    try:
        module.main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1 if code else 0


if __name__ == "__main__":
    serve()
