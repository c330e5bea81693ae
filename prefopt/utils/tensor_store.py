"""Rows of numbers that were expensive to compute, on disk, by the digest of the tokens that they belong to.

A store is a folder of shards, which are never changed. A shard is named by the digest of its content, so that a damaged
one is noticed, and written in one step, so that a failure loses only the shard at hand. Of the processes of a run the
main one reads and writes them, and all know the rows.
"""

import contextlib
import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from prefopt.utils.distributed import broadcast, is_main_process
from prefopt.utils.files import atomic_write
from prefopt.utils.locks import locked_by_main

log = logging.getLogger(__name__)

SHARD_ROWS = 1024  # rows that are computed before they are written


def hash_tokens(*texts: Sequence[int]) -> bytes:
    """A digest of 16 bytes of these lists of token ids. The lengths count too: [1], [2] and [1, 2], [] differ."""
    lengths, tokens = array("q", map(len, texts)), array("q", [token for text in texts for token in text])
    return hashlib.blake2b(lengths.tobytes() + tokens.tobytes(), digest_size=16).digest()


class TensorCache:
    """Rows of `width` float32 numbers, by keys of 16 bytes. Without a folder it is empty, and nothing can be added."""

    def __init__(self, folder: Path | None = None, width: int = 1):
        self.folder = folder
        self.values = torch.empty(0, width)
        self.rows: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """The rows of `keys`, `(len(keys), width)`. Raises KeyError for a key that is not in the cache."""
        return self.values[[self.rows[key] for key in keys]]

    @contextlib.contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Inside, no other run changes the store, and all shards have been read. `what` names it to those who wait.

        A damaged shard is removed, which the log says: its rows are missing, and are computed anew.
        """
        assert self.folder is not None
        with locked_by_main(self.folder / "lock", what):
            if is_main_process():
                self._read()
            self.rows, self.values = broadcast((self.rows, self.values))
            yield

    def add(self, keys: Sequence[bytes], values: Tensor) -> None:
        """Write a shard of rows. `values` is `(len(keys), width)`. To be called only inside of `locked`."""
        assert self.folder is not None
        if is_main_process():
            data = save({"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
                         "values": values.float().contiguous()})  # fmt: skip
            atomic_write(self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.safetensors", data)
        self.rows |= {key: len(self.values) + i for i, key in enumerate(keys)}
        self.values = torch.cat([self.values, values.float()])

    def _read(self) -> None:
        assert self.folder is not None
        parts, self.rows, n = [self.values[:0]], {}, 0
        for left in self.folder.glob("*.safetensors.*.tmp"):  # of processes that were killed
            left.unlink(missing_ok=True)
        for file in sorted(self.folder.glob("*.safetensors")):
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest()[:24] != file.stem:
                log.warning(f"  {file} is damaged: its content has not the digest in its name. It is made anew.")
                file.unlink()
                continue
            tensors = load(data)
            self.rows |= {key.tobytes(): n + i for i, key in enumerate(tensors["keys"].numpy())}
            parts.append(tensors["values"])
            n += len(parts[-1])
        self.values = torch.cat(parts)  # once: for each shard it would copy all those before it
