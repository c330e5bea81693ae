"""A run: its identity, its folder and its record.

The folder's name has the objective, the model, the data and a hash of everything that decides the result: the resolved
config without the keys in VOLATILE, and the digests of the data files. So the same command finds its run again.
"""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.tracking.process import acquire_lock, owns_lock, process_info, utc_now
from prefopt.tracking.provenance import PACKAGES, provenance, version
from prefopt.tracking.record import load_record, read_record, update_record, write_record
from prefopt.utils.distributed import is_main_process, world_size
from prefopt.utils.fingerprint import fingerprint

# Keys of the config that are no part of a run's identity. Those of the first two lines change no number, but for
# `resume`: what came of it is in the record (`continued_from`). Those of the third change the rounding at most, as the
# number of processes does, so that a run that ran out of memory goes on with less.
VOLATILE = (
    *("runs_dir", "logger", "launcher", "engine", "save_every", "squeeze_alarm", "nonfinite"),
    *("keep_checkpoint", "resume", "push_to_hub"),
    *("micro_batch_tokens", "gradient_checkpointing", "server"),
)


class Run:
    """A run's identity, its folder and its record. `Run(...)` reads nothing; `Run.open(...)` reads the record.

    `folder` holds record.json, metrics.jsonl, samples/, checkpoints/ and, when finished, policy/. `attempt` counts from
    1 how often the run was started.
    """

    def __init__(
        self, config: dict[str, Any], objective_name: str, data_digests: dict[str, str], root: Path | None = None
    ):
        """`config` is the resolved configuration of a training run, as mappings. `data_digests` are the digests of its
        data files, by split. The folder `root` may be moved: of paths in it, what is below it counts."""
        decides = deciding_part(config)
        if root is not None:
            decides = _below(decides, f"{root}/")
        self.id = fingerprint([decides, data_digests])[:8]
        self.name = f"{objective_name}-{config['model']['name']}-{config['dataset']['name']}-{self.id}"
        self.folder = Path(config["runs_dir"]) / self.name
        self.metrics_file = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.policy_folder = self.folder / "policy"

        self._names = {"name": self.name, "id": self.id, "objective": objective_name}
        self._inputs = {"config": config, "data_digests": data_digests}
        self.record: dict[str, Any] = self._names | {"status": "new"} | self._inputs
        self.attempt = 1

    @classmethod
    def open(
        cls, config: dict[str, Any], objective_name: str, data_digests: dict[str, str], root: Path | None = None
    ) -> "Run":
        """The run with what record.json in its folder says, if there is one. Raises UserError for a damaged one."""
        run = cls(config, objective_name, data_digests, root)
        run.reload()
        return run

    def reload(self) -> None:
        """Read record.json, if there is one. Raises UserError for a damaged one."""
        if (self.folder / "record.json").is_file():
            self.record = load_record(self.folder / "record.json")
        # VOLATILE keys may have changed since; a finished run keeps those that it was finished with.
        if not self.finished:
            self.record |= self._inputs
        self.attempt = self.record.get("attempt", 0) + 1

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    def identity(self) -> dict[str, Any]:
        """What all processes of the run must have been given alike: config and digests, by keys with dots."""
        return dict(flatten(self._inputs["config"])) | {
            f"digest of {name}": digest for name, digest in self._inputs["data_digests"].items()
        }

    @property
    def begun(self) -> bool:
        """Whether there is work that a new start would throw away: a policy, a checkpoint, or a stage."""
        return self.finished or any(self.checkpoints.glob("step_*")) or any(self.folder.glob("stage_*"))

    def refuse_changed_model(self, parts: dict[str, str]) -> None:
        """Raise UserError where this run was begun with another model. `parts` are the digests of the model's parts as
        they are now, by the names that the record has under `model`. A part that was not recorded is not compared."""
        changed = changed_parts(self.record, parts)
        if not changed or not self.begun:
            return
        state, old = "was begun from", "goes on from its last checkpoint"
        if self.finished:
            state, old = "is finished, but began from", "is skipped"
        raise UserError(
            f"{self.folder} {state} another model than there is now (changed: {', '.join(changed)}). To train on "
            f"what is there now, move the folder away, or choose another model.name=NAME. With the old files it {old}."
        )

    def hold(self) -> None:
        """Keep other processes off this run (`process.acquire_lock`). Only the main process does; may be called again.

        Raises UserError where another process holds it, or has finished it meanwhile.
        """
        if is_main_process() and not owns_lock(self.folder):
            acquire_lock(self.folder)
            self.reload()  # another process may have worked on it since this one looked
            if self.finished:
                raise UserError(f"{self.folder} has been finished meanwhile by another process; nothing is left to do.")

    def start(self, **facts: Any) -> None:
        """Mark the run as running in this process, and record code, versions and machine. May be called again."""
        self.hold()
        circumstances = {
            "status": "running",
            "attempt": self.attempt,
            "started": self.record.get("started") or utc_now(),
            **provenance(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "error": None,
        }
        self.update(**circumstances | process_info() | facts)

    def update(self, **facts: Any) -> None:
        """Merge `facts` into the record; the main process also writes it."""
        self.record |= facts
        if is_main_process():
            write_record(self.folder, self.record)

    def finish(self, **facts: Any) -> None:
        self.update(status="finished", finished=utc_now(), **facts)

    def interrupt(self, why: str) -> None:
        if owns_lock(self.folder) and not self.finished:  # a finished run that was only tidying up stays finished
            self.update(status="interrupted", error=why)

    def fail(self, error: str) -> None:
        """Record `error`, a traceback, on disk. Does nothing for a run that has not begun, or that another process has.

        Any process of a group may call it: the first one to fail is the one that knows why.
        """
        if self.finished or not (self.folder / "record.json").is_file():
            return
        if is_main_process() and not owns_lock(self.folder):
            return
        with contextlib.suppress(OSError):  # that nothing can be written may be what the error is
            # The other processes fail after the first, with an error that says only that it has gone: keep the first.
            if world_size() == 1 or read_record(self.folder)["status"] != "failed":
                update_record(self.folder, status="failed", finished=utc_now(), error=error)


def deciding_part(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config decides its result."""
    return {key: value for key, value in config.items() if key not in VOLATILE}


def changed_parts(record: dict[str, Any], parts: dict[str, str]) -> list[str]:
    """The parts of a model, by their names under `model` in a run's record, whose digests `parts` are others there."""
    recorded = record.get("model", {})
    return [part for part, value in parts.items() if recorded.get(part, value) != value]


def _below(node: Any, root: str) -> Any:
    """`node` with paths that begin with `root` without that."""
    if isinstance(node, dict):
        return {key: _below(value, root) for key, value in node.items()}
    return node.removeprefix(root) if isinstance(node, str) else node


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of all leaves of a config."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
