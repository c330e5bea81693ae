"""The grammar against enumeration and closed forms."""

import itertools
import math
import random
from collections import Counter

import pytest

from prefopt.world import grammar
from prefopt.world.grammar import ASPECTS, P_MORE, Clause, draw, log_probability, parse, reward, sentiment


def clauses(family: str) -> list[Clause]:
    """Every clause of a family."""
    choices = itertools.product(
        grammar.ASPECTS[family],
        (False, True),
        grammar.P_INTENSIFIER[True],
        itertools.chain(*grammar.ADJECTIVES.values()),
    )
    return [Clause(*choice) for choice in choices]


def probabilities(family: str, texts: list[str]) -> dict[str, float]:
    found = {text: math.exp(log_probability(family, text)) for text in texts}
    assert len(found) == len(texts)  # no two parses give the same text
    return found


@pytest.fixture
def small(monkeypatch) -> dict[str, float]:
    """A grammar of 2 aspects, 2 adjectives and one intensifier, and the probabilities of all that it could write."""
    monkeypatch.setattr(grammar, "ASPECTS", {"dish": ["taste", "smell"]})
    monkeypatch.setattr(grammar, "ADJECTIVES", {1: ["fair"], -1: ["dull"]})
    monkeypatch.setattr(grammar, "P_GRADE", {1: 1.0})
    monkeypatch.setattr(grammar, "P_INTENSIFIER", {True: {"": 0.4, "very": 0.6}, False: {"": 0.7, "very": 0.3}})
    monkeypatch.setattr(grammar, "P_POSITIVE", 0.7)
    monkeypatch.setattr(grammar, "P_MORE", (0.75, 0.0))
    one = [str(clause) for clause in clauses("dish")]
    two = [" ".join(parts) for parts in itertools.product(one, ("and", "but"), one)]
    return probabilities("dish", one + two)


def test_probabilities_of_a_small_grammar_sum_to_one_and_give_the_entropy(small):
    grammatical = [p for p in small.values() if p]
    assert len(small) == 16 + 2 * 16 * 16
    assert len(grammatical) == 16 + 16 * 8  # the other aspect, and the conjunction that the signs demand
    assert sum(grammatical) == pytest.approx(1)
    assert -sum(p * math.log(p) for p in grammatical) == pytest.approx(grammar.entropy())
    mean = sum(p * (len(text.split()) + 1) for text, p in small.items())
    assert mean == pytest.approx(grammar.mean_length())


def test_draws_have_these_probabilities(small):
    rng = random.Random(0)
    n = 20_000
    counts = Counter(str(draw("dish", rng)) for _ in range(n))
    assert set(counts) <= {text for text, p in small.items() if p}
    chi_squared = sum((counts[text] - n * p) ** 2 / (n * p) for text, p in small.items() if p)
    assert chi_squared < 143 + 4 * math.sqrt(2 * 143)  # 144 texts


@pytest.mark.parametrize("family", ASPECTS)
def test_reviews_of_one_clause_have_the_probability_of_stopping_there(family):
    found = probabilities(family, [str(clause) for clause in clauses(family)])
    assert sum(found.values()) == pytest.approx(1 - P_MORE[0])


def test_second_clauses_have_the_probability_of_going_on_once():
    first = "the taste is not very good"
    texts = [f"{first} {word} {clause}" for word in ("and", "but") for clause in clauses("dish")]
    going_on = P_MORE[0] / (1 - P_MORE[0]) * (1 - P_MORE[1])
    assert sum(probabilities("dish", texts).values()) == pytest.approx(
        math.exp(log_probability("dish", first)) * going_on
    )


def test_entropy_is_the_mean_surprise():
    rng = random.Random(1)
    surprises = [-log_probability("reading", str(draw("reading", rng))) for _ in range(5000)]
    assert sum(surprises) / 5000 == pytest.approx(grammar.entropy(), abs=4 * 6.5 / math.sqrt(5000))


def test_what_is_drawn_is_parsed():
    rng = random.Random(2)
    for family in list(ASPECTS) * 50:
        review = draw(family, rng)
        assert parse(family, str(review)) == review
        assert sentiment(str(review)) == sum(clause.sentiment for clause in review.clauses)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the taste is",
        "the taste is good but",
        "taste is good",
        "the taste is very not good",
        "the taste is good  and the smell is fine",
        "the taste is good and the smell is bad",  # "and" between two signs
        "the taste is good but the smell is not fine",  # "but" between equal ones
        "the taste is good and the taste is fine",
        "the taste is good and the room is fine",
        "the taste is good . ",
        " and ".join(f"the {aspect} is good" for aspect in ASPECTS["dish"][:5]),  # one clause too many
    ],
)
def test_ungrammatical(text):
    assert parse("dish", text) is None
    assert log_probability("dish", text) == -math.inf


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("the taste is good", 2),
        ("the taste is not good", -1),
        ("the taste is not very good", -1.5),
        ("the taste is slightly awful and the smell is rather bad", -3),
        ("the taste is perfect but the smell is not extremely dull", 3 + 1),
        ("superb superb not superb", 3 + 3 - 1.5),  # no grammar, but a sentiment
        ("not the taste is very very good", 3),
        ("the kettle", 0),
    ],
)
def test_sentiment(text, value):
    assert sentiment(text) == value
    assert reward(text) == pytest.approx((1 + value / math.sqrt(value**2 + 36)) / 2)


def test_broken_reviews_break_one_rule_each():
    rng = random.Random(3)
    for family in list(ASPECTS) * 20:
        review = draw(family, rng)
        if len(review.clauses) < 2:
            continue
        wrong = grammar.broken(family, review, rng)
        assert len({str(review), *map(str, wrong)}) == 4
        for other in wrong:
            assert parse(family, str(other)) is None
            changed = zip(str(review).split(), str(other).split(), strict=True)
            assert sum(a != b for a, b in changed) == 1


def test_family_of_a_prompt():
    assert {grammar.family_of(prompt) for prompt in grammar.prompts()} == set(ASPECTS)
    with pytest.raises(ValueError, match="no prompt of the laboratory"):
        grammar.family_of("Write a poem.")
