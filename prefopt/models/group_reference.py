"""Log-probs of groups' responses by a model that does not change: cached on disk, response by response.

`prefopt.models.reference` keeps the sums of pairs, this keeps the sums of single responses, or the log-probs of their
tokens where an objective asks for them (`needs` "tokens").
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from prefopt.data.collate import Batch, Layout, completions_of
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.logprobs import LogprobComputer, Logps
from prefopt.models.reference import (
    AdapterOff,
    Cached,
    LoadedOnce,
    add_missing,
    cache_folder,
    rounding,
    unconfirmed,
)
from prefopt.objectives import GROUP
from prefopt.utils.tensor_store import TensorCache, hash_tokens

log = logging.getLogger(__name__)

BLOCK = 64  # tokens: the rows of a cache are as wide as the longest response of the run, rounded up to a multiple


@dataclass
class CachedGroups(Cached):
    """`known` maps the key of a prompt with a response to the log-probs of its tokens, 0 behind its end, or to their
    sum."""

    tokens: bool = False

    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        """Without `prefixes`: they are a pair's."""
        rows, device = self._rows(pairs), batch.lengths.device
        tokens = rows[:, : batch.longest].to(device, non_blocking=True) if self.tokens else None
        return Logps(_sums(rows).to(device, non_blocking=True), batch.lengths, tokens)

    def _rows(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """(C, width), in the order of a batch's completions."""
        return self.known.get(_keys_in_order(pairs))


def cached_groups(
    model: PreTrainedModel,
    weights: str,
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    micro_batch_tokens: int,
    score: LogprobComputer,
    samples: AdapterOff | LoadedOnce,
    tokens: bool,
    show: bool = True,
) -> CachedGroups:
    """As `prefopt.models.reference.cached`, of all responses of the groups `pairs`, token by token with `tokens`."""
    longest = max(len(c) for i in range(len(pairs)) for c in completions_of(pairs[i], GROUP)) if len(pairs) else 1
    width = -(-longest // BLOCK) * BLOCK if tokens else 1
    known = TensorCache(cache_folder(model, weights, layout, score) / f"responses_{width}", width)

    def compute(part: Sequence[TokenizedPair]) -> Tensor:
        """(C, width), on the CPU."""
        with torch.no_grad():
            logps = score(model, layout.collate(part, GROUP).to(model.device))
        if not tokens:
            return logps.sums[:, None].cpu()
        assert logps.tokens is not None
        return pad(logps.tokens, (0, width - logps.tokens.shape[1])).cpu()

    with known.locked("reference"):
        # A group is computed as a whole, since its prompt is computed once.
        wanted = {b"".join(_keys(pairs[i])): i for i in range(len(pairs))}
        missing = [i for i in wanted.values() if not all(key in known for key in _keys(pairs[i]))]
        lacking = set(missing)
        present = [i for i in wanted.values() if i not in lacking]
        for i in present[:1]:
            _spot_check(known, pairs[i], compute([pairs[i]]), score.precision)
        add_missing(known, pairs, missing, layout, micro_batch_tokens, GROUP, compute, _keys_in_order, show)
    log.info(f"  reference: {len(present)} of {len(wanted)} groups from the cache, {len(missing)} computed")
    return CachedGroups(samples, known, tokens=tokens)


def _keys(pair: TokenizedPair) -> list[bytes]:
    """A digest of the tokens of the prompt and of each response."""
    return [hash_tokens(pair.prompt, completion) for completion in completions_of(pair, GROUP)]


def _keys_in_order(pairs: Sequence[TokenizedPair]) -> list[bytes]:
    """The keys of the groups' responses in the order in which a batch holds them: all first ones, all second ones..."""
    groups = [_keys(pair) for pair in pairs]
    return [keys[k] for k in range(max(map(len, groups))) for keys in groups if k < len(keys)]


def _sums(rows: Tensor) -> Tensor:
    return rows.sum(-1, dtype=torch.float64).float()


def _spot_check(known: TensorCache, pair: TokenizedPair, computed: Tensor, precision: str) -> None:
    """Raises UserError if the cached log-probs of a group differ from those that were computed by more than
    rounding."""
    wrong = (_sums(known.get(_keys(pair))) - _sums(computed)).abs()
    lengths = torch.tensor([float(len(completion)) for completion in completions_of(pair, GROUP)])
    if not (wrong <= rounding(precision, lengths)).all():
        raise unconfirmed(f"group {pair.id}", known, wrong)
