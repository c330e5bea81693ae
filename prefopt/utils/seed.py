"""One seed out of several numbers."""

FACTOR = 1_000_003  # more than a run has epochs or steps, so two pairs (seed, step) do not give the same number


def mix_seed(*numbers: int) -> int:
    """A seed for torch, from 0 to 2^63 - 1, that depends on every number (integers) and on their order.

    The same numbers give the same seed on every machine, so a resumed run draws what it would have drawn.
    """
    seed = 0
    for number in numbers:
        seed = (seed * FACTOR + number) % 2**63
    return seed
