"""Print the settings in which two runs differ.

    python -m prefopt.diff runs/A runs/B
    python -m prefopt.diff 13d6e1fe 09dc9217          # ids, or names, of runs below runs/

A setting that one run lacks has a dash.
"""

import sys
from pathlib import Path

from prefopt.cli.help import wants_help
from prefopt.errors import UserError
from prefopt.reporting.differences import config_differences, print_table
from prefopt.tracking.archive import Record
from prefopt.tracking.record import record_of

USAGE = "prefopt diff A B (two folders of runs, or ids of runs below runs/)"


def find_run(name: str, below: Path = Path("runs")) -> Record:
    """The record of the run in the folder `name`, or of the one run somewhere in `below` whose folder is called so or
    ends with -`name`. Raises UserError where there is none, or several."""
    if (Path(name) / "record.json").is_file():
        return record_of(name)
    found = [] if "/" in name else [f.parent for f in sorted(below.rglob("record.json"))]
    found = [folder for folder in found if folder.name == name or folder.name.endswith(f"-{name}")]
    if len(found) == 1:
        return record_of(str(found[0]))
    if found:
        raise UserError(f"{name} is the id of several runs: {', '.join(map(str, found))}. Name the folder: {USAGE}")
    raise UserError(
        f"{name} is no run's folder, and no run below {below}/ has that id. prefopt runs lists them: {USAGE}"
    )


def main() -> None:
    names = sys.argv[1:]
    if wants_help(names):
        print(__doc__)
        return
    try:
        if len(names) != 2:
            raise UserError(f"two runs are compared, not {len(names)}: {USAGE}")
        a, b = (find_run(name) for name in names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"A: {a['name']}\nB: {b['name']}")
    table = config_differences(a, b)
    if not table.rows:
        print("They differ in no setting, and not in their data, initial weights or commit.")
        return
    print_table(table)


if __name__ == "__main__":
    main()
