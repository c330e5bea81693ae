"""The policies that a run has left, for the jobs that evaluate them."""

from dataclasses import dataclass
from pathlib import Path

from prefopt.errors import UserError
from prefopt.tracking.archive import last_step
from prefopt.tracking.record import record_of


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be loaded, and what it is called; of a run, after `step` optimizer steps."""

    name: str
    path: str
    step: int | None = None
    revision: str | None = None


def exported_policies(run: str, which: str) -> list[Checkpoint]:
    """`final`: the finished policy; `all`: those that `exports` has kept as well, in the order of their steps.

    Raises UserError where there is none.
    """
    record, folder = record_of(run), Path(run)
    final = [Checkpoint("final", str(folder / "policy"), last_step(record))] * (folder / "policy").is_dir()
    earlier = [
        Checkpoint(path.name, str(path), int(path.name.removeprefix("step_")))
        for path in sorted((folder / "policies").glob("step_*"))
        if path.suffix != ".tmp"
    ]
    found = final if which == "final" else [*earlier, *final]
    if not found:
        raise UserError(f"{folder} has no policy yet: it is {record['status']}. Finish it: {record.get('command')}")
    return found
