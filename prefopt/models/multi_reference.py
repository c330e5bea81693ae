"""Several references as one: the virtual reference of MRPO (Le et al. 2024, arXiv 2405.16388)."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.config.schema import MultiReferenceConfig
from prefopt.data.collate import Batch
from prefopt.data.tokenize import TokenizedPair
from prefopt.models.logprobs import Logps
from prefopt.models.reference import Reference


@dataclass
class MultiReference(Reference):
    """`members`: the references, of which the first is the one that the others are clipped to, and whose model the KL
    of samples is to."""

    members: Sequence[Reference]
    config: MultiReferenceConfig

    def logps(self, pairs: Sequence[TokenizedPair], batch: Batch, prefixes: bool = False) -> Logps:
        """Raises NotImplementedError for `prefixes`: the paper defines no virtual reference of a part."""
        if prefixes:
            raise NotImplementedError("prefixes of several references")
        logps = torch.stack([member.logps(pairs, batch).sums.view(2, -1) for member in self.members])
        return Logps(virtual_logps(logps, self.config).flatten(), batch.lengths)

    def model(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        return self.members[0].model()


def virtual_logps(logps: Tensor, config: MultiReferenceConfig) -> Tensor:
    """The log-probs of the virtual reference, `(2, B)`, chosen first, from those of K references, `(K, 2, B)`.

    * `mean` harmonic: log of 1 / sum_k alpha_k / p_k, which is -log sum_k alpha_k exp(-rp_k), MRPO's closed form;
      geometric: sum_k alpha_k rp_k.
    * `weights` None: adaptive, alpha_k = |rp_k,w - rp_k,l| / sum_j |rp_j,w - rp_j,l|, for each pair. The authors' code
      for K = 2 exchanges the two weights; the formula is taken here. Where no reference prefers a side, they are equal.
    * `clip` e: rp_k of all but the first are brought into [(1 + e_y) rp_1, (1 - e_y) rp_1], with e_w + e_l = e and
      e_w : e_l = |b_w| : |b_l|, b the mean of the K log-probs. The weights see what was before.

    Formulas and e = 0.1 are those of the authors' code, read there, and of the paper as quoted by others.
    """
    k = len(logps)
    gaps = (logps[:, 0] - logps[:, 1]).abs()  # (K, B)
    if config.weights is None:
        total = gaps.sum(0)
        weights = torch.where(total > 0, gaps / total, 1 / k)
    else:
        weights = logps.new_tensor(config.weights)[:, None].expand_as(gaps)
    if config.clip is not None:
        first, means = logps[0], logps.mean(0).abs()  # (2, B)
        share = config.clip * means / means.sum(0).clamp(min=torch.finfo(logps.dtype).tiny)
        others = torch.minimum(torch.maximum(logps[1:], (1 + share) * first), (1 - share) * first)
        logps = torch.cat([first[None], others])
    if config.mean == "geometric":
        return (weights[:, None] * logps).sum(0)
    return -(weights.log()[:, None] - logps).logsumexp(0)
