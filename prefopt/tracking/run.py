"""A run: what it is, where it lies, and what became of it.

The folder's name says objective, model and data, and ends in a hash of everything that decides the result: the
resolved config without the keys in VOLATILE, and the digests of the data files. The same command finds its run again.
"""

import contextlib
import platform
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.tracking.process import acquire_lock, owns_lock, process_info, utc_now
from prefopt.tracking.provenance import PACKAGES, provenance, version
from prefopt.tracking.record import load_record, read_record, update_record
from prefopt.utils.distributed import is_main_process, world_size
from prefopt.utils.files import write_json
from prefopt.utils.fingerprint import fingerprint

# Where things are written and run, how they are shown, how often they are saved, and whether a step that cannot be
# taken ends the run changes no number. How much is computed at a time changes no more than their rounding, as the
# number of processes does; a run that ran out of memory goes on with less.
VOLATILE = (
    *("runs_dir", "logger", "launcher", "engine", "save_every", "squeeze_alarm", "nonfinite"),
    *("micro_batch_tokens", "gradient_checkpointing"),
)


class Run:
    """`folder` holds record.json, metrics.jsonl, samples/, checkpoints/ and, when finished, policy/.

    `config` is the resolved configuration of a training run, as mappings.
    """

    def __init__(self, config: dict[str, Any], objective_name: str, data_digests: dict[str, str]):
        identity = {key: value for key, value in config.items() if key not in VOLATILE}
        self.id = fingerprint([identity, data_digests])[:8]
        self.name = f"{objective_name}-{config['model']['name']}-{config['dataset']['name']}-{self.id}"
        self.folder = Path(config["runs_dir"]) / self.name
        self.metrics_file = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.policy_folder = self.folder / "policy"
        self._known = {"name": self.name, "id": self.id, "objective": objective_name}
        self._asked = {"config": config, "data_digests": data_digests}
        self._read()
        self.attempt = self.record.get("attempt", 0) + 1

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    def _read(self) -> None:
        self.record: dict[str, Any] = self._known | {"status": "new"}
        file = self.folder / "record.json"
        if file.is_file():
            self.record = load_record(file)
        self.record |= {} if self.finished else self._asked

    def hold(self) -> None:
        """Keep other processes off this run (`liveness.hold`). Only the first process does.

        Raises UserError where another one holds it, or has finished it meanwhile.
        """
        if is_main_process() and not owns_lock(self.folder):
            acquire_lock(self.folder)
            self._read()  # what another process did with it since this one looked
            if self.finished:
                raise UserError(f"{self.folder} has been finished meanwhile by another process; nothing is left to do.")

    def start(self, **facts: Any) -> None:
        """Mark the run as running here and now, and write down under which circumstances. May be called again."""
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
        """Merge `facts` into the record and replace record.json in one step. Only the first process does."""
        self.record |= facts
        if is_main_process():
            write_json(self.folder / "record.json", self.record)

    def finish(self, **facts: Any) -> None:
        self.update(status="finished", finished=utc_now(), **facts)

    def interrupt(self, why: str) -> None:
        if owns_lock(self.folder):
            self.update(status="interrupted", error=why)

    def fail(self, error: str) -> None:
        if not (self.folder / "record.json").is_file() or (is_main_process() and not owns_lock(self.folder)):
            return  # it has not begun, or it is another process's
        # Any process may be the one that failed first; those that were waiting for it fail after it.
        with contextlib.suppress(OSError):  # nothing can be written: that may be what the error is
            if world_size() == 1 or read_record(self.folder)["status"] != "failed":
                update_record(self.folder, status="failed", finished=utc_now(), error=error)
