"""The reference: the policy as it was before the first step, in one of these forms.

* `Cached` (the default): log-probs of the run's pairs, on disk. The policy computes them before it is trained. Every
  objective, beta, seed and learning rate with the same weights and tokens shares them. In the packed layout the
  log-probs of a pair do not depend on the pairs beside it (on a CPU not by one bit; not measured on a GPU), so they are
  exactly those that the policy computes before its first step.
* `Resident`: a frozen copy of the policy, which scores every batch. As `Following` it moves towards the policy.
* `AdapterOff`: the policy with its adapter switched off, which scores every batch, without a copy in memory.
"""

import contextlib
import copy
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prefopt.data.collate
import prefopt.data.segments
from prefopt.data.collate import Batch, Layout, groups_of
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models import chunked_logprobs, logprobs, packed_attention
from prefopt.models.fingerprint import loaded_model
from prefopt.models.frozen import freeze
from prefopt.models.logprobs import LogprobComputer, Logps
from prefopt.models.value_head import without_value_head
from prefopt.objectives import SIDES
from prefopt.utils import tensor_store
from prefopt.utils.console import Bar
from prefopt.utils.distributed import map_shared
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.tensor_store import TensorCache, hash_tokens

log = logging.getLogger(__name__)

Further = Literal["prefixes", "weighted"]  # the fields of `Logps` that a cache may hold besides the sums
SPOT_CHECKS = 2  # cached pairs that are computed again, to notice a damaged cache
# Nats by which the log-prob of the same completion may differ between two layouts, micro-batches or machines, for one
# token. The tokens' errors are independent, so those of n tokens add up to the root of n. Between micro-batches in
# bfloat16 on a processor with AMX the standard deviation for one token is 0.06 nats (SmolLM2-135M, 80 completions).
ROUNDING = {"float32": 1e-3, "bfloat16": 0.35}


def rounding(precision: str, lengths: Tensor) -> Tensor:
    """(B,) nats that rounding may explain for completions of these lengths, (B,) in tokens."""
    return ROUNDING[precision] * lengths.sqrt()


class Reference(ABC):
    """The initial policy: its log-probs, and the model."""

    @abstractmethod
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        """Log-probs, and `prefixes` if requested, of the B `pairs`, on the batch's device: `(2B,)`, first the chosen
        completions, then the rejected ones. `batch` holds the same pairs. Of groups `(C,)`, as `batch` holds their
        responses. `tokens` is there where the model computes them now, and in the cache of an objective that needs
        them. `distributions` is there where the model computes them now."""

    def follow(self, policy: PreTrainedModel, done: int) -> bool:
        """Move towards `policy` after `done` optimizer steps, and say whether it has moved. Only `Following` does."""
        return False

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it, by name."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state

    @abstractmethod
    def model(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """The model, for texts that do not exist before the run (samples)."""


@dataclass
class Resident(Reference):
    frozen: PreTrainedModel
    score: LogprobComputer

    @classmethod
    def copy_of(cls, policy: PreTrainedModel, score: LogprobComputer) -> "Resident":
        return cls(freeze(copy.deepcopy(policy), score.precision), score)

    @torch.no_grad()
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        return self.score(self.frozen, batch, prefixes=prefixes)

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.frozen


@dataclass
class Following(Resident):
    """TR-DPO's reference (Gorbatovski et al. 2024, arXiv 2404.09656): after every `every` optimizer steps
    theta_ref <- alpha theta + (1 - alpha) theta_ref, a hard update at alpha 1 and a soft one below.

    Its weights are float32, whatever the precision: in bfloat16 a small move would be rounded away. All weights are
    trained, so policy and reference have the same ones, in the same order.
    """

    every: int
    alpha: float

    @classmethod
    def starting_at(cls, policy: PreTrainedModel, score: LogprobComputer, every: int, alpha: float) -> "Following":
        return cls(freeze(copy.deepcopy(policy), "float32"), score, every, alpha)

    @torch.no_grad()
    def follow(self, policy: PreTrainedModel, done: int) -> bool:
        if done % self.every:
            return False
        for mine, theirs in zip(self.frozen.parameters(), without_value_head(policy).parameters(), strict=True):
            mine.mul_(1 - self.alpha).add_(theirs, alpha=self.alpha)
        return True

    def state(self) -> dict[str, Tensor]:
        return dict(self.frozen.named_parameters())

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, weight in self.frozen.named_parameters():
            weight.copy_(state[name])


@dataclass
class AdapterOff(Reference):
    policy: PreTrainedModel
    score: LogprobComputer

    @torch.no_grad()
    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        with self.model() as model:
            return self.score(model, batch, prefixes=prefixes)

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        self.policy.disable_adapters()
        try:
            yield self.policy
        finally:
            self.policy.enable_adapters()


@dataclass
class Cached(Reference):
    """`samples` gives the model, for samples. `known` maps the key of a pair to four numbers: the log-probs of its
    chosen and its rejected completion, and the lengths of these in tokens. Each of the `further` log-probs that the
    objective needs, fields of `Logps`, is two more numbers."""

    samples: "AdapterOff | LoadedOnce"
    known: TensorCache = field(default_factory=TensorCache)
    further: Sequence[Further] = ()

    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        known = self.known.get([pair_key(p, self.further) for p in pairs])

        def sides(start: int) -> Tensor:
            return known[:, start : start + 2].T.flatten().to(batch.lengths.device, non_blocking=True)

        more = {name: sides(4 + 2 * i) for i, name in enumerate(self.further)}
        return Logps(sides(0), batch.lengths, prefixes=more.get("prefixes"), weighted=more.get("weighted"))

    def model(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        return self.samples.model()


class LoadedOnce:
    """The model that `load` loads onto `device` when it is first asked for. Between two uses it is on the CPU."""

    def __init__(self, load: Callable[[], PreTrainedModel], device: str):
        self.load, self.device = load, device
        self.loaded: PreTrainedModel | None = None

    @contextlib.contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        if self.loaded is None:
            self.loaded = self.load()
        try:
            yield self.loaded.to(self.device)  # type: ignore[arg-type]  # torch's own `to` takes a name
        finally:
            self.loaded.to("cpu")  # type: ignore[arg-type]


def cached(
    policy: PreTrainedModel,
    weights: str,
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    micro_batch_tokens: int,
    score: LogprobComputer,
    samples: AdapterOff | LoadedOnce,
    show: bool = True,
    further: Sequence[Further] = (),
) -> Cached:
    """The reference with the log-probs of `pairs` by `policy`, whose weights have the digest `weights`. They are read
    from the user's cache; the missing ones are computed by all processes of the run, micro-batch by micro-batch, and
    added. Meanwhile, other runs that need the same cache wait. With `further` log-probs it is another cache, which
    holds these too.

    Raises UserError for a damaged file of the cache, and for a cached pair whose log-probs the policy does not confirm.
    """
    known = TensorCache(cache_folder(policy, weights, layout, score, further), 4 + 2 * len(further))
    # Indices into `pairs`, because all pairs at once may not fit into memory.
    wanted = {pair_key(pairs[i], further): i for i in range(len(pairs))}
    with known.locked("reference"):
        present = [i for key, i in wanted.items() if key in known]
        _spot_check(known, [pairs[i] for i in present[:SPOT_CHECKS]], policy, layout, score, further)

        missing = [i for key, i in wanted.items() if key not in known]

        def compute(part: Sequence[TokenizedPair]) -> Tensor:
            return _compute(policy, layout, score, part, further)

        def keys(part: Sequence[TokenizedPair]) -> list[bytes]:
            return [pair_key(pair, further) for pair in part]

        add_missing(known, pairs, missing, layout, micro_batch_tokens, SIDES, compute, keys, show)
    log.info(f"  reference: {len(present)} of {len(wanted)} pairs from the cache, {len(missing)} computed")
    return Cached(samples, known, further)


def add_missing(
    known: TensorCache,
    pairs: Sequence[TokenizedPair],
    missing: Sequence[int],
    layout: Layout,
    micro_batch_tokens: int,
    completions: Sequence[str],
    compute: Callable[[Sequence[TokenizedPair]], Tensor],
    keys: Callable[[Sequence[TokenizedPair]], list[bytes]],
    show: bool,
) -> None:
    """Add to `known` the rows of the pairs or groups whose indices are `missing`, shard by shard. All processes of the
    run `compute` micro-batches with these `completions`: (rows, width), in the order of their `keys`. A row that is
    known, as that of a response which two groups have, is not added again."""
    with Bar("reference", len(missing), show and bool(missing)) as bar:

        def counted(part: list[TokenizedPair]) -> Tensor:
            values = compute(part)
            bar.advance(by=len(part))
            return values

        for start in range(0, len(missing), tensor_store.SHARD_ROWS):
            shard = [pairs[i] for i in missing[start : start + tensor_store.SHARD_ROWS]]
            parts = layout.micro_batches(shard, micro_batch_tokens, None, completions)
            values = map_shared(counted, parts, lambda part: layout.tokens(groups_of(part, completions)))
            rows: dict[bytes, int] = {}
            for i, key in enumerate(key for part in parts for key in keys(part)):
                if key not in known:
                    rows.setdefault(key, i)
            if rows:
                known.add(list(rows), torch.cat(values)[list(rows.values())])
            bar.advance(by=start + len(shard) - bar.done)  # what the other processes have computed


def cache_folder(
    policy: PreTrainedModel, weights: str, layout: Layout, score: LogprobComputer, further: Sequence[Further] = ()
) -> Path:
    """The folder of these log-probs. Its name is a digest of everything besides the tokens that decides its rows."""
    decides = [*loaded_model(policy, weights), layout.name, score.precision, *further]
    key = fingerprint(
        decides, logprobs, chunked_logprobs, packed_attention, prefopt.data.collate, prefopt.data.segments
    )
    return cache_dir() / "reference" / key[:24]


def pair_key(pair: TokenizedPair, further: Sequence[Further] = ()) -> bytes:
    """A digest of the pair's tokens, the same in every data set, and of their weights where the log-probs have them."""
    texts = [pair.prompt, pair.chosen, pair.rejected]
    if "weighted" in further:
        for weights in (pair.chosen_token_weights, pair.rejected_token_weights):
            texts.append(list(array("f", weights or []).tobytes()))
    return hash_tokens(*texts)


@torch.no_grad()
def _compute(
    policy: PreTrainedModel,
    layout: Layout,
    score: LogprobComputer,
    pairs: Sequence[TokenizedPair],
    further: Sequence[Further],
) -> Tensor:
    """(B, 4) float32 on the CPU: log-probs of chosen and rejected, lengths of chosen and rejected. Two more numbers for
    each of the `further` log-probs follow."""
    batch = layout.collate(pairs, SIDES).to(policy.device)
    logps = score(policy, batch, prefixes="prefixes" in further)
    parts = [logps.sums, logps.lengths, *(getattr(logps, name) for name in further)]
    return torch.cat([part.view(2, -1).T.cpu() for part in parts], 1)


def _spot_check(
    known: TensorCache,
    pairs: Sequence[TokenizedPair],
    policy: PreTrainedModel,
    layout: Layout,
    score: LogprobComputer,
    further: Sequence[Further],
) -> None:
    """Raises UserError if the cached log-probs of `pairs` differ from the policy's by more than rounding."""
    for pair in pairs:
        (written,) = known.get([pair_key(pair, further)])
        (computed,) = _compute(policy, layout, score, [pair], further)
        wrong, lengths = (computed - written).abs(), computed[2:4]
        if not (wrong[:2] <= rounding(score.precision, lengths)).all() or wrong[2:4].any():
            raise unconfirmed(f"pair {pair.id}", known, wrong[:2])


def unconfirmed(what: str, known: TensorCache, wrong: Tensor) -> UserError:
    """The error where `known` differs by `wrong` from what the model says of `what`."""
    return UserError(
        f"the reference log-probs of {what} in {known.folder} are off by {wrong.max():.3g} nats from what the model "
        "says. They were damaged, or come from a machine that computes differently. Remove the folder; they will be "
        "made again."
    )
