"""What a command may pay a judge: estimated before it asks, and counted as answers come."""

import logging
import math
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from prefopt.errors import UserError

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # for estimates: English text, any tokenizer


def tokens_in(characters: int) -> int:
    """About as many tokens have this many characters."""
    return math.ceil(characters / CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class Estimate:
    """Calls to a judge. `calls`: of each, by what tells it from others, the characters that it reads and the tokens
    that it writes. `price`: USD per million tokens read and written."""

    price: Sequence[float]
    calls: dict[Hashable, tuple[int, int]]

    @property
    def read(self) -> int:
        """Tokens."""
        return tokens_in(sum(characters for characters, _ in self.calls.values()))

    @property
    def written(self) -> int:
        """Tokens."""
        return sum(tokens for _, tokens in self.calls.values())

    @property
    def usd(self) -> float:
        return cost(self.price, self.read, self.written)


def cost(price: Sequence[float], read: int, written: int) -> float:
    """USD of as many tokens."""
    return (read * price[0] + written * price[1]) / 1e6


class LimitError(Exception):
    """A call was not made, because the limit is reached."""


@dataclass
class Budget:
    """USD that one command may pay, for all its results, and what it has paid."""

    limit: float
    paid: float = 0.0
    paying: threading.Lock = field(default_factory=threading.Lock)

    def announce(self, what: str, estimate: Estimate) -> None:
        """Print what these calls will cost. Raises UserError where that is more than what is left."""
        read, written, usd = estimate.read, estimate.written, estimate.usd
        log.info(f"{what}, about {read:,} tokens to read and {written:,} to write, about {usd:.2f} USD")
        left = self.limit - self.paid
        if usd > left:
            more = " more" if self.paid else ""
            raise UserError(
                f"the estimate of {usd:.2f} USD is above what is left of max_cost, {max(left, 0):.2f} USD. Nothing"
                f"{more} was asked for."
            )

    def announce_all(self, estimates: Iterable[Estimate]) -> None:
        """The same for all results of a command, before the first call. Of one alone it is said where it is made."""
        found = [estimate for estimate in estimates if estimate.calls]
        if len(found) > 1:
            # A call that several results need is made once.
            together = Estimate(found[0].price, {key: call for one in found for key, call in one.calls.items()})
            self.announce(f"{len(found)} results need {len(together.calls)} calls", together)

    def pay(self, usd: float) -> None:
        with self.paying:
            self.paid += usd

    def check(self) -> None:
        """Before a call. Raises LimitError where the limit is reached."""
        if self.paid > self.limit:
            raise LimitError(f"max_cost is reached: the calls have cost {self.paid:.2f} of {self.limit:.2f} USD.")
