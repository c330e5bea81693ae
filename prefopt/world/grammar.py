"""A grammar of short reviews in which every quantity is exact: docs/laboratory.md.

    prompt    review the QUALITY KIND from the PLACE
    review    clause (and clause | but clause)*
    clause    the ASPECT is [not] [INTENSIFIER] ADJECTIVE

An adjective has a grade from -3 to 3, an intensifier multiplies it, and "not" turns it round and halves it: this is the
sentiment of a clause. Three rules reach beyond a clause, and a review that breaks one is not grammatical:

* every aspect belongs to the family of the prompt's kind;
* no aspect comes twice;
* "and" joins adjectives of one sign, "but" of opposite signs, whatever "not" does to the clauses.

A grammatical review has one parse, so its probability is the product of the choices that made it.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

KINDS = {  # by the family whose aspects they have
    "appliance": ["kettle", "toaster", "lamp", "radio"],
    "lodging": ["hotel", "hostel", "cabin", "inn"],
    "performance": ["film", "play", "opera", "musical"],
    "dish": ["soup", "stew", "curry", "pie"],
    "transport": ["train", "bus", "ferry", "tram"],
    "reading": ["novel", "diary", "atlas", "magazine"],
}
ASPECTS = {
    "appliance": ["switch", "cord", "case", "handle", "weight", "manual"],
    "lodging": ["room", "bed", "shower", "staff", "breakfast", "garden"],
    "performance": ["plot", "cast", "music", "ending", "script", "stage"],
    "dish": ["taste", "smell", "sauce", "spice", "texture", "portion"],
    "transport": ["seat", "driver", "window", "timetable", "ticket", "route"],
    "reading": ["cover", "print", "paper", "index", "preface", "style"],
}
QUALITIES = [
    *("old", "new", "small", "big", "red", "blue", "green", "quiet"),
    *("modern", "simple", "famous", "foreign", "cheap", "local", "rare", "popular"),
]
PLACES = [
    *("station", "market", "harbour", "village", "capital", "museum", "valley", "island", "castle", "bridge"),
    *("forest", "square", "coast", "airport", "school", "theatre", "river", "suburb", "border", "mountain"),
]
ADJECTIVES = {  # by their grade
    3: ["superb", "wonderful", "brilliant", "perfect"],
    2: ["good", "lovely", "fine", "pleasant"],
    1: ["decent", "fair", "passable", "acceptable"],
    -1: ["plain", "dull", "bland", "mediocre"],
    -2: ["bad", "poor", "nasty", "weak"],
    -3: ["awful", "terrible", "horrible", "dreadful"],
}
INTENSIFIERS = {"slightly": 0.5, "rather": 0.75, "very": 1.5, "extremely": 2.0}
NOT = -0.5

# The probabilities of the choices. What is not named is uniform: the words of a grade, the aspects that are left.
P_POSITIVE = 0.5  # of the first adjective
P_GRADE = {1: 0.5, 2: 0.3, 3: 0.2}  # of an adjective's grade without its sign
# By whether the adjective is positive. From this difference, and because "and" is more frequent, a model learns the
# adjectives' signs. From the rule of "and" and "but" alone it does not, in many hundred steps.
P_NOT = {True: 0.25, False: 0.1}
P_INTENSIFIER = {
    True: {"": 0.4, "slightly": 0.05, "rather": 0.1, "very": 0.25, "extremely": 0.2},
    False: {"": 0.4, "slightly": 0.25, "rather": 0.2, "very": 0.1, "extremely": 0.05},
}
P_AND = 0.75  # and not "but"
P_MORE = (0.75, 0.5, 0.25, 0.0)  # of another clause after the first, the second, ...

FAMILY = {kind: family for family, kinds in KINDS.items() for kind in kinds}
GRADE = {word: grade for grade, words in ADJECTIVES.items() for word in words}
WORDS = sorted(
    {"review", "the", "from", "is", "not", "and", "but", *QUALITIES, *PLACES, *FAMILY, *GRADE, *INTENSIFIERS}.union(
        *ASPECTS.values()
    )
)
PHRASE = re.compile(rf"\b(not )?(?:({'|'.join(INTENSIFIERS)}) )?({'|'.join(GRADE)})\b")
CLAUSE = re.compile(rf"the (\w+) is {PHRASE.pattern}")
HALF = 6.0  # a review's sentiment at which its reward is 1/2 + 1/sqrt(8)


@dataclass(frozen=True)
class Clause:
    aspect: str
    negated: bool
    intensifier: str  # "": none
    adjective: str

    @property
    def sentiment(self) -> float:
        """Exact in floating point: a multiple of 1/8."""
        return GRADE[self.adjective] * INTENSIFIERS.get(self.intensifier, 1.0) * (NOT if self.negated else 1.0)

    @property
    def is_positive(self) -> bool:
        """Of the adjective's grade, on which the rule of "and" and "but" looks."""
        return GRADE[self.adjective] > 0

    def __str__(self) -> str:
        words = ["the", self.aspect, "is", "not" if self.negated else "", self.intensifier, self.adjective]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Review:
    clauses: tuple[Clause, ...]
    conjunctions: tuple[str, ...]  # "and" or "but", one fewer than the clauses

    def __str__(self) -> str:
        parts = itertools.zip_longest(map(str, self.clauses), self.conjunctions)
        return " ".join(word for part in parts for word in part if word)


def prompts() -> list[str]:
    """All prompts, in a fixed order."""
    return [f"review the {q} {kind} from the {place}" for kind in FAMILY for q in QUALITIES for place in PLACES]


def family_of(prompt: str) -> str:
    """The family of the kind that the prompt asks about. Raises ValueError for what is no prompt of this world."""
    words = prompt.split()
    if len(words) == 7 and words[3] in FAMILY:
        return FAMILY[words[3]]
    raise ValueError(f"{prompt!r} is no prompt of the laboratory, such as {prompts()[0]!r}")


def draw(family: str, rng: random.Random) -> Review:
    """A review from the grammar's distribution."""
    aspects = rng.sample(ASPECTS[family], len(P_MORE))
    clauses: list[Clause] = []
    conjunctions = []
    is_positive = rng.random() < P_POSITIVE
    for aspect, p_more in zip(aspects, P_MORE, strict=True):
        negated = rng.random() < P_NOT[is_positive]
        (intensifier,) = rng.choices(list(P_INTENSIFIER[is_positive]), list(P_INTENSIFIER[is_positive].values()))
        (size,) = rng.choices(list(P_GRADE), list(P_GRADE.values()))
        adjective = rng.choice(ADJECTIVES[size if is_positive else -size])
        clauses.append(Clause(aspect, negated, intensifier, adjective))
        if rng.random() >= p_more:
            break
        joined = rng.random() < P_AND
        conjunctions.append("and" if joined else "but")
        is_positive = is_positive == joined
    return Review(tuple(clauses), tuple(conjunctions))


def parse(family: str, text: str) -> Review | None:
    """The parse of a review; None where it is not grammatical."""
    parts = re.split(" (and|but) ", text)
    matches = [CLAUSE.fullmatch(part) for part in parts[::2]]
    clauses = tuple(Clause(m[1], bool(m[2]), m[3] or "", m[4]) for m in matches if m)
    review = Review(clauses, tuple(parts[1::2]))
    return review if all(matches) and keeps_rules(family, review) else None


def keeps_rules(family: str, review: Review) -> bool:
    """Whether a sequence of clauses keeps the three rules, and is no longer than the grammar's."""
    aspects = [clause.aspect for clause in review.clauses]
    signs = [clause.is_positive for clause in review.clauses]
    joins = ["and" if left == right else "but" for left, right in itertools.pairwise(signs)]
    return (
        len(aspects) <= len(P_MORE)
        and set(aspects) <= set(ASPECTS[family])
        and len(set(aspects)) == len(aspects)
        and list(review.conjunctions) == joins
    )


def broken(family: str, review: Review, rng: random.Random) -> list[Review]:
    """Three reviews of the same words but one, each of which breaks one of the three rules. `review` has two clauses or
    more."""
    n = rng.randrange(1, len(review.clauses))
    other = rng.choice(sorted(set(ASPECTS) - {family}))
    aspects = [rng.choice(ASPECTS[other]), review.clauses[n - 1].aspect]
    flipped = list(review.conjunctions)
    flipped[n - 1] = "but" if flipped[n - 1] == "and" else "and"
    return [replace(review, conjunctions=tuple(flipped))] + [
        replace(review, clauses=(*review.clauses[:n], replace(review.clauses[n], aspect=a), *review.clauses[n + 1 :]))
        for a in aspects
    ]


def log_probability(family: str, text: str) -> float:
    """log p(text) under the grammar, in nats; -inf for what is not grammatical."""
    review = parse(family, text)
    if review is None:
        return -math.inf
    p = P_POSITIVE if review.clauses[0].is_positive else 1 - P_POSITIVE
    for n, clause in enumerate(review.clauses):
        p /= len(ASPECTS[family]) - n
        p_not, grade = P_NOT[clause.is_positive], GRADE[clause.adjective]
        p *= p_not if clause.negated else 1 - p_not
        p *= P_INTENSIFIER[clause.is_positive][clause.intensifier] * P_GRADE[abs(grade)] / len(ADJECTIVES[grade])
        p *= P_MORE[n] if n < len(review.conjunctions) else 1 - P_MORE[n]
    for conjunction in review.conjunctions:
        p *= P_AND if conjunction == "and" else 1 - P_AND
    return math.log(p)


def reached() -> list[tuple[float, float]]:
    """Of the first clause, the second, ...: the probability that a review has it, and that its adjective is then
    positive."""
    found = [(1.0, P_POSITIVE)]
    for p_more in P_MORE[:-1]:
        p, positive = found[-1]
        found.append((p * p_more, positive * P_AND + (1 - positive) * (1 - P_AND)))
    return found


def entropy() -> float:
    """The entropy of a review given its prompt, in nats: by the chain rule, over the choices of `draw`."""
    word = _entropy(P_GRADE.values()) + math.log(len(ADJECTIVES[1]))
    phrase = {sign: word + _entropy(P_INTENSIFIER[sign].values()) + _entropy([P_NOT[sign]]) for sign in P_NOT}
    total = _entropy([P_POSITIVE])
    for n, ((p, positive), p_more) in enumerate(zip(reached(), P_MORE, strict=True)):
        clause = math.log(len(ASPECTS["dish"]) - n) + positive * phrase[True] + (1 - positive) * phrase[False]
        total += p * (clause + _entropy([p_more]) + p_more * _entropy([P_AND]))
    return total


def mean_length() -> float:
    """The expected number of a review's tokens, with the one that ends it."""
    words = {sign: 4 + P_NOT[sign] + 1 - P_INTENSIFIER[sign][""] for sign in P_NOT}
    # Behind every clause stands a conjunction, or the end.
    return sum(p * (positive * words[True] + (1 - positive) * words[False] + 1) for p, positive in reached())


def facts() -> dict[str, float]:
    """What is known of the grammar without a model: nats of a review, its tokens, and nats of a token."""
    nats, tokens = entropy(), mean_length()
    return {"entropy": nats, "tokens": tokens, "entropy_per_token": nats / tokens}


def _entropy(probabilities: Iterable[float]) -> float:
    """Of a choice; of one probability alone, with that of its opposite."""
    found = list(probabilities)
    return -sum(p * math.log(p) for p in [*found, 1 - sum(found)] if p > 1e-12)


def sentiment(text: str) -> float:
    """The sum of graded sentiment: of a grammatical review, that of its clauses.

    It reads phrases ([not] [INTENSIFIER] ADJECTIVE) wherever they stand, so it is no judge of grammar: a text that
    breaks every rule has a sentiment, too.
    """
    return sum(Clause("", bool(no), intensifier, word).sentiment for no, intensifier, word in PHRASE.findall(text))


def reward(text: str) -> float:
    """`sentiment` on (0, 1): 1/2 + s / (2 sqrt(s^2 + HALF^2)), as VADER brings a sum to a bounded scale."""
    total = sentiment(text)
    return 0.5 + 0.5 * total / math.hypot(total, HALF)
