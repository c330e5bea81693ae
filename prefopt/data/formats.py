"""A row of a data set -> `Pair` or `Chat`. A format is a frozen dataclass that is called on one row.

The `_target_` under `format` in a data set's YAML names it. Error messages quote the first line of its docstring.
"""

import math
import random
import re
import reprlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from prefopt.data.build_items import Scored, chat_of, one_each, pair_of, pair_of_chats, win_rates
from prefopt.data.fields import (
    TRANSCRIPT,
    answer,
    as_number,
    common_prefix,
    content_id,
    label_text,
    listed,
    messages,
    nested,
    read_prompt,
    role_problem,
    text,
    tools_of,
    transcript,
    with_system,
)
from prefopt.data.items import Chat, Dropped, Item, Labelled, Pair, Row

# The fields that every format reads for the prompt; see `read_prompt`.
PROMPT_FIELDS = ("id", "prompt", "instruction", "input", "history", "system", "tools")
SIDE_FIELDS = (
    *("chosen", "rejected", "chosen_reward", "rejected_reward"),
    *("weight", "chosen_token_weights", "rejected_token_weights"),
)


class Format(ABC):
    @abstractmethod
    def __call__(self, row: Row) -> Item | Dropped | Labelled | Sequence[Item]:
        """The item or items of a row. Raises KeyError for a missing field and ValueError for a field of the wrong
        kind; of these, a `RowDefect` costs the row alone if its policy is to drop."""

    def fields(self) -> tuple[str, ...] | None:
        """The fields that the format reads: the names that `dataset.columns` may have. None: not declared."""
        return None

    def combine(
        self, items: Iterable[tuple[str, Item | Dropped | Labelled]]
    ) -> Iterator[tuple[str, Item | Dropped | Labelled]]:
        """What the rows give together, from ("file, row n", what one row gives) of all rows. Most formats look at one
        row at a time."""
        yield from items


@dataclass(frozen=True)
class Pairs(Format):
    """{prompt (or instruction and input), chosen, rejected}, and optionally id, system, tools, weights and rewards.

    `prompt` is text or messages that end with the user's turn; or it is put together from Alpaca's `instruction` and
    `input`, with a blank line between them. The rewards are `chosen_reward` and `rejected_reward`. `chosen` and
    `rejected` are text, a message, or a list of one message. `system` is text that opens the conversation. `weight`
    multiplies the pair's loss, and is 1 where it is absent. `chosen_token_weights` and `rejected_token_weights` hold a
    number for each token of the completion, as the policy's tokenizer and template write it, its terminator included.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        prompt, chosen, rejected = read_prompt(row), answer(row, "chosen"), answer(row, "rejected")
        return role_problem(prompt) or pair_of(row, prompt, chosen, rejected)

    def fields(self) -> tuple[str, ...]:
        return PROMPT_FIELDS + SIDE_FIELDS


@dataclass(frozen=True)
class Steps(Format):
    """{prompt, initial_reason_steps, chosen, rejected}: two next steps of a solution, after those so far (Step-DPO).

    The steps so far follow the prompt as the beginning of the answer, and nothing of them is learnt. `chosen` and
    `rejected` are text that goes on right behind them, and end without a terminator (arXiv 2406.18629, and its code).
    The other fields are those of `Pairs`.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        opening = text(row, "initial_reason_steps")
        sides = [{"role": "assistant", "content": opening + text(row, side)} for side in ("chosen", "rejected")]
        prompt = read_prompt(row)
        pair = role_problem(prompt) or pair_of(row, prompt, *sides)
        if isinstance(pair, Dropped):
            return pair
        return replace(pair, opening=opening, chosen_finished=False, rejected_finished=False)

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "initial_reason_steps", *SIDE_FIELDS)


@dataclass(frozen=True)
class ImplicitPrompt(Format):
    """{chosen, rejected}: two conversations (or texts) with a common beginning, which is the prompt.

    Conversations are lists of messages that differ in the last one, the assistant's (ultrafeedback_binarized,
    orca_dpo_pairs). A field `prompt` is not read. Conversations that differ earlier are dropped (`sides_part_early`).

    Of two texts, the longest common beginning that ends at a blank becomes the user's turn.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            start = common_prefix(chosen, rejected)
            # Back to the last blank, so that no word is divided between prompt and completion.
            start = max((m.end() for m in re.finditer(r"\s+", chosen[:start])), default=0)
            if not chosen[:start].strip():
                raise ValueError("chosen and rejected have no common beginning that could be the prompt")
            prompt = with_system(row, [{"role": "user", "content": chosen[:start].strip()}])
            sides = [{"role": "assistant", "content": side[start:]} for side in (chosen, rejected)]
            return pair_of(row, prompt, *sides)
        return pair_of_chats(row, *(with_system(row, messages(row[side], side)) for side in ("chosen", "rejected")))

    def fields(self) -> tuple[str, ...]:
        return ("id", "system", "tools", *SIDE_FIELDS)


@dataclass(frozen=True)
class Transcripts(Format):
    """{chosen, rejected}: texts "\\n\\nHuman: ... \\n\\nAssistant: ..." with a common beginning (Anthropic hh-rlhf).

    Where a `prompt` is such a text and the sides only go on from there, they are read together.
    """

    def __call__(self, row: Row) -> Pair | Dropped:
        sides = [text(row, side) for side in ("chosen", "rejected")]
        if row.get("prompt") is not None and not all(TRANSCRIPT.match(side) for side in sides):
            sides = [text(row, "prompt") + side for side in sides]
        return pair_of_chats(row, *(with_system(row, transcript(side)) for side in sides))

    def fields(self) -> tuple[str, ...]:
        return ("id", "prompt", "system", "tools", *SIDE_FIELDS)


@dataclass(frozen=True)
class ScoredResponses(Format):
    """{prompt, responses: [text], rewards: [number], finished: [bool]}: pairs chosen among n scored responses.

    `pairing`:
    * `best_worst`: one pair, the highest reward against the lowest;
    * `best_random`: one pair, the highest against another one, drawn by the row's prompt, so the same in every run;
    * `all`: every two responses with different rewards;
    * `group`: all responses together, for objectives that read them so, and for the best alone (objective=sft). A row
      of tied rewards is kept, and so are equal and empty responses.

    The rewards of a pair are at least `min_gap` apart. A row without such a pair is dropped (`no_preference`). Of equal
    rewards the first is taken. `finished` (optional) is false for responses that were cut off. Responses without a
    usable reward are passed over if the policy `bad_reward` is to keep; otherwise the row is dropped.

    With `win_rates` a pair carries other rewards than those that chose it: of response i the mean over all j, itself
    included, of sigma(r_i - r_j), the probability that it beats another response of its prompt. r must be log-odds.
    These are the soft labels of SPPO (arXiv 2405.00675).
    """

    pairing: str = "best_worst"
    min_gap: float = 0.0
    win_rates: bool = False

    def __post_init__(self) -> None:
        if self.pairing not in ("best_worst", "best_random", "all", "group"):
            raise ValueError(f"pairing must be best_worst, best_random, all or group, got {self.pairing!r}")
        if self.min_gap < 0:
            raise ValueError(f"min_gap must not be negative, got {self.min_gap}")
        if self.pairing == "group" and (self.min_gap or self.win_rates):
            raise ValueError("pairing=group takes all responses and their own rewards: leave min_gap and win_rates out")

    def __call__(self, row: Row) -> Pair | Dropped | list[Item]:
        scored = Scored.read(row)
        rewards = scored.rewards

        def apart(w: int, l: int) -> bool:
            return rewards[w] > rewards[l] and rewards[w] - rewards[l] >= self.min_gap

        if len(rewards) < 2 and scored.defects:
            return Dropped("bad_reward", scored.defects["bad_reward"])
        order = scored.order
        # Of equal rewards the first: `order` is stable, so its first is; the highest has to be looked up.
        best, worst = rewards.index(rewards[order[-1]]), order[0]
        if problem := role_problem(scored.prompt):
            return problem
        if self.pairing == "group":
            if len(rewards) < 2:
                raise ValueError("pairing=group needs two responses at least")
            return scored.group()
        shown = win_rates(rewards) if self.win_rates else rewards
        if self.pairing == "all":
            indices = [(w, l) for w in range(len(rewards)) for l in range(len(rewards)) if apart(w, l)]
            pairs: list[Item] = [scored.pair(w, l, f"{scored.name}/{w}-{l}", shown) for w, l in indices]
            return pairs or Dropped("no_preference")
        if self.pairing == "best_random":
            others = [i for i in range(len(rewards)) if apart(best, i)]
            worst = random.Random(content_id(scored.prompt)).choice(others) if others else best
        return scored.pair(best, worst, rewards=shown) if apart(best, worst) else Dropped("no_preference")

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "responses", "rewards", "finished")


@dataclass(frozen=True)
class ScoredCompletions(ScoredResponses):
    """{prompt, completions: [{response, overall_score}]}: pairs chosen among n scored completions (UltraFeedback).

    `response` and `score` name the fields of a completion; a name may lead into a nested object
    ("annotations.honesty.Rating"). `pairing` and `min_gap` as in `ScoredResponses`.
    """

    response: str = "response"
    score: str = "overall_score"

    def __call__(self, row: Row) -> Pair | Dropped | list[Item]:
        completions = listed(row, "completions", dict, "objects")
        found = {
            "responses": [nested(completion, self.response) for completion in completions],
            "rewards": [nested(completion, self.score) for completion in completions],
        }
        return super().__call__({key: row[key] for key in PROMPT_FIELDS if key in row} | found)

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "completions")


@dataclass(frozen=True)
class NoisyPreferences(Format):
    """{prompt, responses, rewards}: two samples and an off-policy text. One pair, labelled with noise.

    The task of MADPO's experiment (arXiv 2510.05342), as its authors built it. The first two responses are samples of
    the policy; the third and last one is a text of somebody else with a low reward. `quality` says in which share of
    the rows the pair is the better sample and that text: 0 (high), 1/2 (medium), 1 (low). In the other rows it is the
    two samples.

    The label is drawn afterwards: i is preferred to j with probability sigma(label_scale (r_i - r_j)), r the true
    `rewards`. All draws are a function of prompt, quality and `seed`.

    An objective reads other rewards: those in the field `rewards_QUALITY`, which come from a reward model that was
    trained on this quality. Without that field the pair has no rewards. `reward_error` makes that model worse by a
    known amount: the standard deviation of a normal error, in the rewards' unit, that each of its rewards gets.
    """

    quality: str = "high"
    label_scale: float = 6.0
    seed: int = 0
    reward_error: float = 0.0

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise ValueError(f"quality must be {', '.join(QUALITIES)}, got {self.quality!r}")
        if self.label_scale <= 0:
            raise ValueError(f"label_scale must be positive, got {self.label_scale}")
        if self.reward_error < 0:
            raise ValueError(f"reward_error must not be negative, got {self.reward_error}")

    def __call__(self, row: Row) -> Pair | Dropped:
        scored = Scored.read(row)
        if scored.defects:
            return Dropped("bad_reward", scored.defects["bad_reward"])
        if problem := role_problem(scored.prompt):
            return problem
        n = len(scored.rewards)
        if n != 3:
            raise ValueError(f"a row needs 3 responses, two samples and an off-policy text; this one has {n}")
        # The number and order of draws is part of the data: one more or less would change every label.
        draw = random.Random(content_id(self.quality, self.seed, scored.prompt))
        better = max(0, 1, key=lambda i: scored.rewards[i])
        first, second = (better, 2) if draw.random() < QUALITIES[self.quality] else (0, 1)
        # Beyond 700 the probability is 0 or 1 in float64, and exp would overflow.
        log_odds = max(-700.0, min(700.0, self.label_scale * (scored.rewards[first] - scored.rewards[second])))
        if draw.random() >= 1 / (1 + math.exp(-log_odds)):
            first, second = second, first
        key = f"rewards_{self.quality}"
        prior = one_each(row, key, n) if row.get(key) is not None else [None] * n
        numbers = [as_number(reward) for reward in prior]
        if bad := [value for value, reward in zip(prior, numbers, strict=True) if value is not None and reward is None]:
            return Dropped("bad_reward", f"{key!r} holds {reprlib.repr(bad[0])}, which is no finite number")
        if self.reward_error:
            error = random.Random(content_id("reward_error", self.quality, self.seed, scored.prompt))
            numbers = [r if r is None else r + self.reward_error * error.gauss() for r in numbers]
        return scored.pair(first, second, rewards=numbers)

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "responses", "rewards", "finished", f"rewards_{self.quality}")


# The share of the rows in which `NoisyPreferences` takes the off-policy text.
QUALITIES = {"high": 0.0, "medium": 0.5, "low": 1.0}


@dataclass(frozen=True)
class TwoResponses(Format):
    """{prompt, response_1, response_2, label}: two responses and which is better, by a label or by votes.

    `labels` are the fields that hold the label or the votes (PandaLM: [annotator1, annotator2, annotator3]). A vote is
    `first`, `second` or one of `ties`, compared as text without regard to case. More than half of the votes decide;
    without such a majority, and with a majority of ties, the row is dropped (`no_preference`). A null is no vote.
    """

    labels: list[str] = field(default_factory=lambda: ["label"])
    first: str = "1"
    second: str = "2"
    ties: list[str] = field(default_factory=lambda: ["0"])

    def __post_init__(self) -> None:
        names = [name.lower() for name in (self.first, self.second, *self.ties)]
        if len(set(names)) < len(names):
            raise ValueError(f"first, second and ties must be different labels, got {names}")
        if not self.labels:
            raise ValueError("labels must name at least one field")

    def __call__(self, row: Row) -> Pair | Dropped:
        known = {self.first.lower(): "first", self.second.lower(): "second"}
        known |= {name.lower(): "tie" for name in self.ties}
        votes = Counter[str]()
        for name in self.labels:
            vote = label_text(row[name])
            if vote is None:
                continue
            if vote not in known:
                raise ValueError(
                    f"field {name!r} must be {self.first} (the first response is better), {self.second} (the second) "
                    f"or {' or '.join(self.ties)} (a tie), is {reprlib.repr(row[name])}; dataset.format.first, .second "
                    "and .ties set other labels"
                )
            votes[known[vote]] += 1
        prompt, first, second = read_prompt(row), answer(row, "response_1"), answer(row, "response_2")
        if problem := role_problem(prompt):
            return problem
        if votes["first"] * 2 > votes.total():
            return pair_of(row, prompt, first, second)
        if votes["second"] * 2 > votes.total():
            return pair_of(row, prompt, second, first)
        return Dropped("no_preference", f"the votes are {dict(votes) or 'missing'}")

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "response_1", "response_2", "weight", *self.labels)


@dataclass(frozen=True)
class LabelledCompletions(Format):
    """{prompt, completion, label: true or false}: a completion and whether it is good (KTO); pairs of a prompt's two.

    The rows of one prompt are put together, wherever they stand: its first good completion with its first bad one, the
    second with the second, and so on. So no completion is used twice. What is left over, and the completions of a
    prompt with labels of one kind alone, are dropped (`unpaired_label`). The rows of a source are held in memory.
    `label` may also be 1 and 0, or their names as text. Without a prompt, `messages` is the whole conversation.
    """

    def __call__(self, row: Row) -> Labelled | Dropped:
        label = label_text(row["label"])
        if label is None:
            return Dropped("unpaired_label", "field 'label' is null")
        if label not in ("true", "1", "false", "0"):
            raise ValueError(f"field 'label' must be true or false, is {reprlib.repr(row['label'])}")
        if "messages" in row and not {"prompt", "instruction"} & set(row):
            *prompt, completion = with_system(row, messages(row["messages"], "messages"))
        else:
            prompt, completion = read_prompt(row), answer(row, "completion")
        if problem := role_problem(prompt, completion["role"]):
            return problem
        return Labelled(prompt, completion, label in ("true", "1"), tools_of(row))

    def combine(
        self, items: Iterable[tuple[str, Item | Dropped | Labelled]]
    ) -> Iterator[tuple[str, Item | Dropped | Labelled]]:
        by_prompt: dict[str, tuple[list[tuple[str, Labelled]], list[tuple[str, Labelled]]]] = {}
        for where, item in items:
            if isinstance(item, Labelled):
                sides = by_prompt.setdefault(content_id(item.prompt, item.tools), ([], []))
                sides[0 if item.is_good else 1].append((where, item))
            else:
                yield where, item
        for good, bad in by_prompt.values():
            for (where, chosen), (_, rejected) in zip(good, bad, strict=False):
                row = {"tools": chosen.tools}
                yield where, pair_of(row, chosen.prompt, chosen.completion, rejected.completion)
            for where, _ in good[len(bad) :] + bad[len(good) :]:
                yield where, Dropped("unpaired_label", "the prompt has no completion with the other label for it")

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "messages", "completion", "label")


@dataclass(frozen=True)
class Chats(Format):
    """{messages: [{role, content}]}: conversations for supervised fine-tuning (smol-smoltalk, UltraChat, ShareGPT)."""

    def __call__(self, row: Row) -> Chat | Dropped:
        return chat_of(row, with_system(row, messages(row["messages"], "messages")))

    def fields(self) -> tuple[str, ...]:
        return ("id", "messages", "system", "tools")


@dataclass(frozen=True)
class Completions(Format):
    """{prompt (or instruction and input), completion}: a prompt and its answer, for supervised fine-tuning.

    Read as a `Chat`, of which every turn of the assistant is learnt; so a prompt may hold none.
    """

    def __call__(self, row: Row) -> Chat | Dropped:
        prompt, completion = read_prompt(row), answer(row, "completion")
        if any(message["role"] == "assistant" for message in prompt):
            raise ValueError(
                "'prompt' holds turns of the assistant, which would be learnt, too. If they shall be, give the whole "
                "conversation in 'messages', for dataset.format._target_=prefopt.data.formats.Chats"
            )
        return chat_of(row, [*prompt, completion])

    def fields(self) -> tuple[str, ...]:
        return (*PROMPT_FIELDS, "completion")
