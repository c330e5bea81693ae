"""`prefopt PROGRAM ...` is `python -m prefopt.PROGRAM ...`."""

import difflib
import runpy
import sys
from pathlib import Path

from prefopt.cli.help import overview, show, wants_help
from prefopt.utils.redact import find_secret

PROGRAMS = (
    *("train", "online", "chat", "sample", "score", "rank", "harness", "alpaca", "compare", "diff", "report", "papers"),
    *("mtbench", "arena", "judge_check", "reward_bench", "claims", "token_weights"),
    *("runs", "prefetch", "data_report", "lab", "objectives"),
)


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview(PROGRAMS), end="")
        return
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"Did you mean prefopt {near[0]}?" if near else f"The programs are: {', '.join(PROGRAMS)}."
        print(f"error: there is no program {name!r}. {hint}", file=sys.stderr)
        sys.exit(2)
    here = str(Path.cwd())
    if here not in sys.path and not sys.flags.safe_path:  # as python -m does: modules of the user's are found
        sys.path.insert(0, here)
    sys.argv = [f"prefopt {name}", *arguments]
    # Before the program imports torch; a command line with a key is left to it, which refuses without showing it.
    if wants_help(arguments) and name not in ("objectives", "diff") and not find_secret("\n".join(arguments)):
        sys.exit(show(name, arguments))
    runpy.run_module(f"prefopt.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
