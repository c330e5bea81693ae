"""A heartbeat in a run's folder, for hosts whose locks do not reach each other: NFS without locks, for one.

Its file names the process that holds the run. While that process works, a thread renews the time of the file. Who finds
the file of another machine watches it: a time that changes is a process that lives. Clocks are not compared.
"""

import json
import logging
import os
import sys
import threading
import time
import uuid
from pathlib import Path

from prefopt.errors import UserError
from prefopt.utils.files import refresh_nfs

log = logging.getLogger(__name__)

BEAT_S = 10.0
SILENT_S = 60.0  # after so long without a beat the process is taken for gone


def machine_id() -> str:
    """What identifies the running kernel: locks reach from one process of it to another, in containers too."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Heartbeat:
    """The heartbeat of a process that has the lock of the run in `folder`. `owner` names it to others."""

    def __init__(self, folder: Path, owner: str):
        self.file = folder / "heartbeat"
        self.text = json.dumps({"machine": machine_id(), "owner": owner, "key": uuid.uuid4().hex})
        self._ended = threading.Event()

    def begin(self) -> None:
        """Beat until `end`. Of a file of another machine, first see for SILENT_S seconds whether it is renewed.

        Raises UserError where it is, and OSError where the folder cannot be written.
        """
        while not self._create():
            seen = self._read()
            if seen is None:  # removed meanwhile
                continue
            elsewhere = _owner(seen[0])
            if elsewhere:
                self._watch(seen, elsewhere)
            aside = self.file.with_name(f"heartbeat.{uuid.uuid4().hex}.tmp")  # two hosts may have the same pid
            aside.write_text(self.text)
            aside.replace(self.file)
            if elsewhere:  # another machine may have watched, too: the last one to write has it
                time.sleep(BEAT_S)
                self._refuse_other()
            break
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self) -> None:
        """Stop, and remove the file unless another process has it."""
        self._ended.set()
        try:
            found = self._read()
            if found and found[0] == self.text:
                self.file.unlink()
        except OSError as error:  # as of a disk that is gone
            log.debug(f"{self.file}: {error}")

    def _create(self) -> bool:
        """Make the file unless it is there: of several machines one succeeds."""
        try:
            with self.file.open("x") as file:
                file.write(self.text)
        except FileExistsError:
            return False
        return True

    def _read(self) -> tuple[str, int] | None:
        """The file's text and time; None where there is none. Opening it asks an NFS server anew, a stat does not."""
        try:
            refresh_nfs(self.file.parent)
            with self.file.open() as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _watch(self, seen: tuple[str, int], owner: str) -> None:
        log.info(f"{self.file.parent}: {owner} may be at work on it; seeing for {SILENT_S:g} s whether it is")
        end = time.monotonic() + SILENT_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 10)
            found = self._read()
            if found is None:  # it has ended
                return
            if found != seen:
                raise self._held(found[0])
        log.info(f"{self.file.parent}: {owner} is gone")

    def _refuse_other(self) -> None:
        found = self._read()
        if found is None or found[0] != self.text:
            raise self._held(found[0] if found else "")

    def _held(self, text: str) -> UserError:
        owner = _owner(text) or "another process"
        return UserError(
            f"{self.file.parent} is held by {owner}, whose lock does not reach this machine. Wait for it, or stop it "
            "there."
        )

    def _beat(self) -> None:
        """Renew the time of the file. Ends the process where another machine has taken the run over."""
        while not self._ended.wait(BEAT_S):
            try:
                found = self._read()
                if found and found[0] == self.text:
                    os.utime(self.file)
            except OSError:  # a disk that is gone: the run itself finds out
                continue
            if found and found[0] != self.text and not self._ended.is_set():
                print(
                    f"error: {self.file.parent} was taken over by {_owner(found[0]) or 'another process'}, since this "
                    f"process gave no sign for {SILENT_S:g} s. It ends here, and the other one goes on.",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(2)


def _owner(text: str) -> str | None:
    """The owner that a heartbeat names, if it is of another machine; else None."""
    try:
        told = json.loads(text)
        return None if told["machine"] == machine_id() else str(told["owner"])
    except (ValueError, KeyError, TypeError):  # it is being written
        return "a process"
