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
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prefopt.data.collate
from prefopt.data.collate import Batch, Layout
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models import chunked_logprobs, logprobs, packed_attention
from prefopt.models.load import resolved_config
from prefopt.models.logprobs import LogprobComputer
from prefopt.objectives import SIDES
from prefopt.utils import tensor_store
from prefopt.utils.console import Bar, say
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.tensor_store import TensorCache, hash_tokens

SPOT_CHECKS = 2  # pairs read from the cache that are computed again
# Nats per token by which the same pair's log-prob may differ between two layouts, micro-batches or machines.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}


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
    score: LogprobComputer

    @classmethod
    def copy_of(cls, policy: PreTrainedModel, score: LogprobComputer) -> "Resident":
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
    score: LogprobComputer

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
    """`load` makes the model again, for samples. `known` holds, by the key of each pair, the log-probs of its chosen
    and its rejected completion and how many tokens these have."""

    load: Callable[[], PreTrainedModel]
    known: TensorCache = field(default_factory=TensorCache)

    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch) -> Tensor:
        sums = self.known.get([pair_key(p) for p in pairs])[:, :2]
        return sums.T.flatten().to(batch.lengths.device, non_blocking=True)

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.load()


def cached(
    policy: PreTrainedModel,
    weights: str,
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    micro_batch_tokens: int,
    score: LogprobComputer,
    load: Callable[[], PreTrainedModel],
    show: bool = True,
) -> Cached:
    """The log-probs of `pairs` by `policy`, whose weights have the digest `weights`: read from the user's cache, and
    computed and added to it where they are missing. Other processes that need the same ones wait meanwhile.

    Raises UserError where a file of the cache is damaged, or some of its pairs do not come out as they are written.
    """
    known = TensorCache(cache_folder(policy, weights, layout, score), 4)
    # Places in `pairs` and not pairs, which may be more than the memory holds.
    wanted = {pair_key(pairs[i]): i for i in range(len(pairs))}
    with known.locked("reference"):
        found = [i for key, i in wanted.items() if key in known]
        _spot_check(known, [pairs[i] for i in found[:SPOT_CHECKS]], policy, layout, score)
        missing = [i for key, i in wanted.items() if key not in known]
        with Bar("reference", len(missing), show and bool(missing)) as bar:
            for start in range(0, len(missing), tensor_store.SHARD_ROWS):
                shard = [pairs[i] for i in missing[start : start + tensor_store.SHARD_ROWS]]
                keys, values = [], []
                for part in layout.micro_batches(shard, micro_batch_tokens, None, SIDES):
                    keys += [pair_key(p) for p in part]
                    values.append(_compute(policy, layout, score, part))
                    bar.advance(by=len(part))
                known.add(keys, torch.cat(values))
    say(f"  reference: {len(found)} of {len(wanted)} pairs from the cache, {len(missing)} computed")
    return Cached(load, known)


def cache_folder(policy: PreTrainedModel, weights: str, layout: Layout, score: LogprobComputer) -> Path:
    """Named by all that decides a log-prob besides the tokens."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    decides = [weights, resolved_config(policy), layout.name, score.precision, policy.device.type, versions]
    key = fingerprint(decides, logprobs, chunked_logprobs, packed_attention, prefopt.data.collate)
    return cache_dir() / "reference" / key[:24]


def pair_key(pair: TokenizedPair) -> bytes:
    """Of the pair's tokens, whatever data set they come from."""
    return hash_tokens(pair.prompt, pair.chosen, pair.rejected)


@torch.no_grad()
def _compute(policy: PreTrainedModel, layout: Layout, score: LogprobComputer, pairs: Sequence[TokenizedPair]) -> Tensor:
    """(B, 4) on the CPU: the log-probs of both sides, and their lengths."""
    batch = layout.collate(pairs, SIDES).to(policy.device)
    sums = score(policy, batch).sums.view(2, -1).T.cpu()
    return torch.cat([sums, torch.tensor([[float(len(p.chosen)), float(len(p.rejected))] for p in pairs])], 1)


def _spot_check(
    known: TensorCache, pairs: Sequence[TokenizedPair], policy: PreTrainedModel, layout: Layout, score: LogprobComputer
) -> None:
    for pair in pairs:
        (written,), (computed,) = known.get([pair_key(pair)]), _compute(policy, layout, score, [pair])
        wrong, lengths = (computed - written).abs(), computed[2:]
        if not (wrong[:2] <= ROUNDING[score.precision] * lengths).all() or wrong[2:].any():
            raise UserError(
                f"the reference log-probs of pair {pair.id} in {known.folder} are off by {wrong[:2].max():.3g} nats "
                "from what the model says. They were damaged, or come from a machine that computes differently. Remove "
                "the folder; they will be made again."
            )
