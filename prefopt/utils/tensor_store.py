"""Numbers that were expensive to compute, on disk, each under the digest of what it belongs to.

A store is a folder of shards that are never changed: each is named by its content, so a damaged one is seen, and is
written whole, so what was computed before a failure is kept.
"""

import contextlib
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from prefopt.errors import UserError
from prefopt.utils.files import atomic_write
from prefopt.utils.locks import locked

SHARD_ROWS = 1024  # items that are computed before they are written


def hash_tokens(*texts: Sequence[int]) -> bytes:
    """16 bytes that stand for these lists of token ids, whatever they come from."""
    lengths, tokens = array("q", map(len, texts)), array("q", [token for text in texts for token in text])
    return hashlib.blake2b(lengths.tobytes() + tokens.tobytes(), digest_size=16).digest()


class TensorCache:
    """A row of `width` float32 numbers by a key of 16 bytes. Without a folder it is empty, and stays so."""

    def __init__(self, folder: Path | None = None, width: int = 1):
        self.folder = folder
        self.values = torch.empty(0, width)
        self.rows: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """`(len(keys), width)`. Raises KeyError for a key that is not there."""
        return self.values[[self.rows[key] for key in keys]]

    @contextlib.contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Inside, no other process has this store, and all that is on disk has been read. `what` names it to those who
        wait.

        Raises UserError for a damaged file.
        """
        assert self.folder is not None
        with locked(self.folder / "lock", what):
            self._read()
            yield

    def add(self, keys: Sequence[bytes], values: Tensor) -> None:
        """Write a shard. `values`: `(len(keys), width)`. Only inside of `locked`."""
        assert self.folder is not None
        data = save({"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
                     "values": values.float().contiguous()})  # fmt: skip
        atomic_write(self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.safetensors", data)
        self.rows |= {key: len(self.values) + i for i, key in enumerate(keys)}
        self.values = torch.cat([self.values, values.float()])

    def _read(self) -> None:
        assert self.folder is not None
        parts, self.rows, n = [self.values[:0]], {}, 0
        for file in sorted(self.folder.glob("*.safetensors")):
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest()[:24] != file.stem:
                raise UserError(f"{file} is damaged: its content does not have the digest in its name. Remove it.")
            tensors = load(data)
            self.rows |= {key.tobytes(): n + i for i, key in enumerate(tensors["keys"].numpy())}
            parts.append(tensors["values"])
            n += len(parts[-1])
        self.values = torch.cat(parts)  # once: for each shard it would copy all those before it
