"""The reference: the policy as it was before the first step, in one of three forms.

* `Cached` (the default): its log-probs of the pairs that the run will see, on disk. Made once, by the policy itself
  before it is trained, and shared by every objective, beta, seed and learning rate over the same weights and tokens. In
  the packed layout a pair's log-probs do not depend on the pairs beside it (on a CPU not by one bit; not measured on
  a GPU), so they are the policy's own.
* `Resident`: a frozen copy of the policy, which scores every batch again.
* `AdapterOff`: the policy without its adapter, which does the same without the copy.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

import prefopt
from prefopt import UserError
from prefopt.data.layout import Batch, Layout
from prefopt.data.tokenize import TokenizedPair
from prefopt.logps import Scorer
from prefopt.paths import cache_dir, write_whole
from prefopt.progress import Bar, say

SHARD = 1024  # pairs that are computed before they are written
SPOT_CHECKS = 2  # pairs read from the cache that are computed again
# Nats per token by which the same pair's log-prob may differ between two layouts, micro-batches or machines.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}

SIDES = ("chosen", "rejected")


class Reference(ABC):
    """What is left of the initial policy."""

    @abstractmethod
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch) -> Tensor:
        """`(2B,)` float32 nats on the batch's device: all chosen, then all rejected completions of the B `pairs`, which
        lie in `batch`."""

    @abstractmethod
    def model(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """The model itself, for texts that nobody knew beforehand (samples)."""


@dataclass
class Resident(Reference):
    frozen: PreTrainedModel
    score: Scorer

    @classmethod
    def copy_of(cls, policy: PreTrainedModel, score: Scorer) -> "Resident":
        return cls(copy.deepcopy(policy).requires_grad_(False), score)

    @torch.no_grad()
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch) -> Tensor:
        return self.score(self.frozen, batch).sums

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.frozen


@dataclass
class AdapterOff(Reference):
    policy: PreTrainedModel
    score: Scorer

    @torch.no_grad()
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch) -> Tensor:
        with self.model() as model:
            return self.score(model, batch).sums

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        self.policy.disable_adapters()
        try:
            yield self.policy
        finally:
            self.policy.enable_adapters()


@dataclass
class Cached(Reference):
    """`load` makes the model again, for samples. `sums`, `(pairs, 2)` float32, by the key of each pair."""

    load: Callable[[], PreTrainedModel]
    sums: Tensor = field(default_factory=lambda: torch.empty(0, 2))
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int32))
    rows: dict[bytes, int] = field(default_factory=dict)

    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch) -> Tensor:
        found = self.sums[[self.rows[pair_key(p)] for p in pairs]]
        return found.T.flatten().to(batch.lengths.device, non_blocking=True)

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.load()

    def add(self, keys: Sequence[bytes], sums: Tensor, lengths: Tensor) -> None:
        start = len(self.sums)
        self.sums, self.lengths = torch.cat([self.sums, sums]), torch.cat([self.lengths, lengths])
        self.rows |= {key: start + i for i, key in enumerate(keys)}


def cached(
    policy: PreTrainedModel,
    weights: str,
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    micro_batch_tokens: int,
    score: Scorer,
    load: Callable[[], PreTrainedModel],
    show: bool = True,
) -> Cached:
    """The log-probs of `pairs` by `policy`, whose weights have the digest `weights`: read from the user's cache, and
    computed and added to it where they are missing. Other processes that need the same ones wait meanwhile.

    Raises UserError where a file of the cache is damaged, or some of its pairs do not come out as they are written.
    """
    folder = cache_folder(weights, layout, score, policy.device)
    folder.mkdir(parents=True, exist_ok=True)
    # Places in `pairs` and not pairs, which may be more than the memory holds.
    wanted = {pair_key(pairs[i]): i for i in range(len(pairs))}
    with _locked(folder):
        reference = _read(folder, load)
        known = [i for key, i in wanted.items() if key in reference.rows]
        _spot_check(folder, reference, [pairs[i] for i in known[:SPOT_CHECKS]], policy, layout, score)
        missing = [i for key, i in wanted.items() if key not in reference.rows]
        with Bar("reference", len(missing), show and bool(missing)) as bar:
            for start in range(0, len(missing), SHARD):
                shard = [pairs[i] for i in missing[start : start + SHARD]]
                keys, sums, lengths = [], [], []
                for part in layout.micro_batches(shard, micro_batch_tokens, None, SIDES):
                    keys += [pair_key(p) for p in part]
                    sums.append(_compute(policy, layout, score, part))
                    lengths.append(torch.tensor([[len(p.chosen), len(p.rejected)] for p in part], dtype=torch.int32))
                    bar.advance(by=len(part))
                _write(folder, keys, torch.cat(sums), torch.cat(lengths))
                reference.add(keys, torch.cat(sums), torch.cat(lengths))
    say(f"  reference: {len(known)} of {len(wanted)} pairs from the cache, {len(missing)} computed")
    return reference


def cache_folder(weights: str, layout: Layout, score: Scorer, device: torch.device) -> Path:
    """Named by all that decides a log-prob besides the tokens."""
    code = [Path(prefopt.__file__).parent / name for name in ("logps.py", "tiled.py", "segments.py", "data/layout.py")]
    parts = [
        weights,
        layout.name,
        score.precision,
        device.type,
        [importlib.metadata.version(name) for name in ("torch", "transformers")],
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in code],
    ]
    return cache_dir() / "reference" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def pair_key(pair: TokenizedPair) -> bytes:
    """Of the pair's tokens, whatever data set they come from."""
    lengths = array("q", [len(pair.prompt), len(pair.chosen), len(pair.rejected)])
    tokens = array("q", [*pair.prompt, *pair.chosen, *pair.rejected])
    return hashlib.blake2b(lengths.tobytes() + tokens.tobytes(), digest_size=16).digest()


@torch.no_grad()
def _compute(policy: PreTrainedModel, layout: Layout, score: Scorer, pairs: Sequence[TokenizedPair]) -> Tensor:
    """(B, 2) on the CPU."""
    batch = layout.collate(pairs, SIDES).to(policy.device)
    return score(policy, batch).sums.view(2, -1).T.cpu()


def _spot_check(
    folder: Path,
    reference: Cached,
    known: Sequence[TokenizedPair],
    policy: PreTrainedModel,
    layout: Layout,
    score: Scorer,
) -> None:
    for pair in known:
        row = reference.rows[pair_key(pair)]
        wrong = (_compute(policy, layout, score, [pair])[0] - reference.sums[row]).abs()
        lengths = torch.tensor([len(pair.chosen), len(pair.rejected)])
        if not (wrong <= ROUNDING[score.precision] * lengths).all() or not lengths.equal(reference.lengths[row].long()):
            raise UserError(
                f"the reference log-probs of pair {pair.id} in {folder} are off by {wrong.max():.3g} nats from what "
                "the model says. They were damaged, or come from a machine that computes differently. Remove the "
                "folder; they will be made again."
            )


def _read(folder: Path, load_model: Callable[[], PreTrainedModel]) -> Cached:
    reference = Cached(load_model)
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest()[:24] != file.stem:
            raise UserError(f"{file} is damaged: its content does not have the digest in its name. Remove it.")
        tensors = load(data)
        keys = [row.tobytes() for row in tensors["keys"].numpy()]
        reference.add(keys, tensors["sums"], tensors["lengths"])
    return reference


def _write(folder: Path, keys: Sequence[bytes], sums: Tensor, lengths: Tensor) -> None:
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
        "sums": sums,
        "lengths": lengths,
    }
    data = save(tensors)
    write_whole(folder / f"{hashlib.sha256(data).hexdigest()[:24]}.safetensors", data)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of a dead one's."""
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("  reference: another job computes it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
