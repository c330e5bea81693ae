"""Seeds made of several numbers: the same in every version, since runs are reproducible bit by bit."""

import itertools

from prefopt.utils.seed import mix_seed


def test_seeds_are_what_they_always_were():
    for seed, step in itertools.product((0, 1, 42, 2**32 - 1), (0, 3, 999_999)):
        assert mix_seed(seed, step) == seed * 1_000_003 + step
    assert mix_seed(2**32 - 1, 10**6, 500, 63) == 2507812440222962304


def test_other_numbers_or_another_order_give_another_seed():
    seeds = [mix_seed(*numbers) for n in (2, 3, 4) for numbers in itertools.product((1, 2, 3), repeat=n)]
    assert len(set(seeds)) == len(seeds)
