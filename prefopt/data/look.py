"""The first rows of a file: which fields they have, of what kind the values are, and which layouts fit them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from prefopt.data.fields import (
    ROLES,
    TRANSCRIPT,
    as_messages,
    as_number,
    is_absent,
    is_parts,
    label_text,
    messages,
    nested,
    responses_of,
)
from prefopt.data.formats import (
    Chats,
    Completions,
    Format,
    ImplicitPrompt,
    LabelledCompletions,
    Pairs,
    ScoredCompletions,
    ScoredResponses,
    Steps,
    Transcripts,
    TwoResponses,
)
from prefopt.data.items import Row
from prefopt.data.overrides import Layout

# Other names of our fields.
PROMPTS = ("question", "query", "input", "problem", "conversations", "conversation", "messages", "input.messages")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
COMPLETIONS = ("completion", "output", "response", "answer")
SYSTEMS = ("system_prompt", "system_message", "sys")
OPPOSITES = (
    ("chosen", "rejected"), ("preferred", "non_preferred"), ("preferred", "dispreferred"), ("preferred", "rejected"),
    ("accepted", "rejected"), ("winner", "loser"), ("better", "worse"), ("good", "bad"), ("positive", "negative"),
)  # fmt: skip
ABOUT_A_SIDE = re.compile(r"(model|source|id|name|score|rating|reward)s?$")  # what says something about a completion
RESPONSE = re.compile(r"(response|output|answer|completion|candidate|generation|reply)[_ -]?(1|a|0)$", re.IGNORECASE)
VOTE = re.compile(r"label|preference|preferred|winner|choice|chosen|vote|better|annotator|rater", re.IGNORECASE)
GOOD_OR_BAD = re.compile(r"label|kto_tag|is_good|good|desirable|thumbs_up|accepted", re.IGNORECASE)
TIES = ("tie", "both", "equal", "same", "draw", "neither")
RESPONSE_LISTS = ("responses", "completions", "outputs", "answers", "candidates", "generations")
TEXT_KEYS = ("response", "text", "content", "completion", "output", "answer")
SCORE_KEYS = ("overall_score", "score", "rating", "reward")


def has(row: Row, path: str) -> bool:
    """Whether a row has the field, whose name may lead into a nested object."""
    try:
        return path in row or nested(row, path) is not None
    except KeyError:
        return False


class Look:
    """The first rows of a file: which fields they have, and of what kind the values are."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.names = list(dict.fromkeys(name for row in rows for name in row))

    def describe(self) -> str:
        """The fields with the kinds of their values."""
        kinds = []
        for name in self.names:
            found = sorted({type(v).__name__ for v in self.values(name)}) or ["null"]
            kinds.append(f"{name} ({' or '.join(found)})")
        return f"fields: {', '.join(kinds) or 'none'}"

    def values(self, name: str) -> list[Any]:
        """The values of a field, which may be nested, without nulls."""
        found = (row[name] if name in row else nested(row, name) for row in self.rows if has(row, name))
        return [value for value in found if value is not None]

    def mostly(self, name: str, test: Any) -> bool:
        """Whether more than half of the rows have the field with a value for which `test` holds."""
        return sum(map(bool, map(test, self.values(name)))) * 2 > len(self.rows)

    def is_text(self, name: str) -> bool:
        return self.mostly(name, lambda value: isinstance(value, str) or is_parts(value))

    def is_conversation(self, name: str) -> bool:
        return self.mostly(name, is_conversation)

    def is_completion(self, name: str) -> bool:
        """Text, a message, or a list of messages."""
        return self.mostly(name, lambda value: isinstance(value, str) or is_parts(value) or is_conversation(value))

    def layouts(self) -> Iterator[Layout]:
        """The layouts whose fields the rows have; several only where they mean something else."""
        sides = self.sides()
        if sides:
            for names in sides:
                yield from self.preferences(names, f"{names[0]} is preferred to {names[1]}" if sides[1:] else "")
        elif responses := self.two_responses():
            yield from self.two_labelled(responses)
        else:
            yield from list(self.scored()) or list(self.labelled()) or self.supervised()

    def sides(self) -> list[tuple[str, str]]:
        """The names of the preferred and the other completion."""
        pairs = []
        for good, bad in OPPOSITES:
            for name in self.names:
                # Whole words: "chosen_response" and "rejected_response", but not "goodness".
                other = re.sub(rf"(?<![a-z]){good}(?![a-z])", bad, name, flags=re.IGNORECASE)
                if other == name or other not in self.names or ABOUT_A_SIDE.search(name):
                    continue
                if self.is_completion(name) and self.is_completion(other):
                    pairs.append((name, other))
        return pairs[:1] if pairs[:1] == [("chosen", "rejected")] else pairs

    def preferences(self, sides: tuple[str, str], meaning: str) -> Iterator[Layout]:
        """Rows with a preferred and another completion."""
        columns = {ours: name for ours, name in zip(("chosen", "rejected"), sides, strict=True) if ours != name}
        columns |= self.system()
        rows = [(row.get(sides[0]), row.get(sides[1]), row) for row in self.rows]
        rows = [(chosen, rejected, row) for chosen, rejected, row in rows if chosen and rejected]
        whole = [row for chosen, _, row in rows if is_whole_conversation(chosen)]
        if len(whole) * 2 > len(rows):
            if lost := next((row for row in whole if not prompt_is_inside(row, row[sides[0]])), None):
                text = str(lost["prompt"])
                meaning = f"the conversations alone, which do not begin with the field prompt ({text[:60]!r})"
            yield Layout(ImplicitPrompt, columns, meaning=meaning)
            return
        texts = [(c, r, row) for c, r, row in rows if isinstance(c, str) and isinstance(r, str)]
        if len(texts) * 2 > len(rows):
            prompts = [row["prompt"] for _, _, row in texts if isinstance(row.get("prompt"), str)]
            if mostly(texts, lambda row: TRANSCRIPT.match(row[0]) and TRANSCRIPT.match(row[1])) or (
                prompts
                and mostly(prompts, lambda prompt: re.match(r"\s*Human:.*\n\nAssistant:\s*$", prompt, re.DOTALL))
            ):
                yield Layout(Transcripts, columns, policies={"wrong_roles": "drop"}, meaning=meaning)
                return
            if prompts and mostly(texts, lambda row: is_repeated(row[2].get("prompt"), row[0], row[1])):
                yield Layout(Pairs, columns, meaning="the answers repeat the prompt, and the repetition is learnt")
                yield Layout(
                    ImplicitPrompt, columns, meaning="the texts are prompt and answer; what they share is the prompt"
                )
                return
        format_ = Steps if self.is_text("initial_reason_steps") else Pairs
        for prompt, about in self.prompts():
            yield Layout(format_, columns | prompt, meaning=about or meaning)
        if not any(True for _ in self.prompts()) and mostly(
            texts, lambda row: row[0].split()[:1] == row[1].split()[:1]
        ):
            yield Layout(ImplicitPrompt, columns, meaning="whole texts; their common beginning is the prompt")

    def prompts(self) -> list[tuple[dict[str, str], str]]:
        """(columns, what it means where there is a choice) of the fields that may be the prompt."""
        direct = [name for name in ("prompt", "instruction") if self.is_text(name) or self.is_conversation(name)]
        if len(direct) == 2:
            same = all(row.get("prompt") == row.get("instruction") for row in self.rows)
            return [({}, "")] if same else [({"prompt": name}, f"the prompt is the field {name}") for name in direct]
        context = "context" if self.is_text("context") else ""
        if direct == ["instruction"] and context and not self.is_text("input"):
            return [({"input": context}, "")]
        if direct:
            return [({}, "")]
        names = [name for name in PROMPTS if self.is_text(name) or self.is_conversation(name)]
        found = [({"prompt": name}, f"the prompt is the field {name}" if names[1:] else "") for name in names]
        if len(names) == 1 and context:
            both = {"instruction": names[0], "input": context}
            return [
                (both, f"the prompt is {names[0]}, a blank line and {context}"),
                ({"prompt": names[0]}, f"the prompt is {names[0]}; {context} is not read"),
            ]
        return found

    def system(self) -> dict[str, str]:
        """The columns that bring the system message."""
        names = [name for name in SYSTEMS if self.is_text(name)] if "system" not in self.names else []
        return {"system": names[0]} if names else {}

    def two_responses(self) -> tuple[str, str] | None:
        """The names of two responses, which differ in their last character."""
        for name in self.names:
            if match := RESPONSE.fullmatch(name):
                last = match[2]
                other = name[:-1] + {"1": "2", "0": "1", "a": "b", "A": "B"}[last]
                if other in self.names and self.is_completion(name) and self.is_completion(other):
                    return name, other
        return None

    def two_labelled(self, responses: tuple[str, str]) -> Iterator[Layout]:
        """Two responses with a label or with votes."""
        columns = {
            ours: name for ours, name in zip(("response_1", "response_2"), responses, strict=True) if ours != name
        }
        columns |= self.system()
        labels: dict[str, list[str]] = {}  # annotator1, annotator2, ... are the votes of one question
        for name in self.names:
            if VOTE.match(name) and 0 < len({label_text(v) for v in self.values(name)}) <= 5:
                labels.setdefault(re.sub(r"\d+$", "", name), []).append(name)
        for stem, names in labels.items():
            values = {label_text(v) for name in names for v in self.values(name)} - {None}
            conventions = list(label_conventions({str(v) for v in values}, responses))
            for prompt, about in self.prompts():
                for first, second, ties in conventions:
                    options: dict[str, Any] = {"labels": names} if names != ["label"] else {}
                    if (first, second, ties) != ("1", "2", ["0"]):
                        options |= {"first": first, "second": second, "ties": ties}
                    meanings = [f"by the field {stem}"] if len(labels) > 1 else []
                    if len(conventions) > 1:
                        meanings.append(
                            f"{first}: {responses[0]} is better; {second}: {responses[1]}; {ties[0]}: a tie"
                        )
                    meanings += [about] if about else []
                    yield Layout(TwoResponses, columns | prompt, options, meaning="; ".join(meanings))

    def scored(self) -> Iterator[Layout]:
        """Several responses with their scores."""
        for name in self.names:
            if name in RESPONSE_LISTS and self.mostly(name, lambda v: isinstance(v, list) and v and is_objects(v)):
                text = [key for key in TEXT_KEYS if self.mostly(name, lambda v, k=key: all(k in c for c in v))]
                score = [key for key in SCORE_KEYS if self.mostly(name, lambda v, k=key: all(has(c, k) for c in v))]
                for key in score[:1] if score[:1] == ["overall_score"] else score:
                    if not text:
                        continue
                    options = {"response": text[0]} if text[0] != "response" else {}
                    options |= {"score": key} if key != "overall_score" else {}
                    columns = ({"completions": name} if name != "completions" else {}) | self.system()
                    for prompt, about in self.prompts():
                        meaning = [about, f"the reward is {key}" if score[1:] and key != "overall_score" else ""]
                        yield Layout(
                            ScoredCompletions, columns | prompt, options, meaning="; ".join(filter(None, meaning))
                        )
                return
        responses = [n for n in RESPONSE_LISTS if self.mostly(n, is_texts)]
        rewards = [n for n in self.names if self.mostly(n, is_numbers)]
        if "rewards" in rewards:
            rewards = ["rewards"]
        for name in responses[:1]:
            for reward in rewards:
                columns = {ours: n for ours, n in (("responses", name), ("rewards", reward)) if ours != n}
                for prompt, about in self.prompts():
                    meaning = [about, f"the rewards are {reward}" if rewards[1:] else ""]
                    yield Layout(
                        ScoredResponses,
                        columns | self.system() | prompt,
                        meaning="; ".join(filter(None, meaning)),
                    )

    def labelled(self) -> Iterator[Layout]:
        """Completions with a label, good or bad (KTO)."""
        labels = [
            name
            for name in self.names
            if GOOD_OR_BAD.fullmatch(name)
            and self.values(name)
            and {label_text(v) for v in self.values(name)} <= {"true", "false", "0", "1", None}
        ]
        for label in labels[:1]:
            columns = ({"label": label} if label != "label" else {}) | self.system()
            answers = self.completions()
            yield from self.answered(LabelledCompletions, columns, answers)
            for name in self.conversations() if not answers else []:
                yield Layout(LabelledCompletions, columns | ({"messages": name} if name != "messages" else {}))
                return

    def answered(self, kind: type[Format], columns: dict[str, str], answers: list[str]) -> Iterator[Layout]:
        """Prompts with an answer, which is one of the fields `answers`."""
        for name in answers:
            renamed = {"completion": name} if name != "completion" else {}
            for prompt, about in self.prompts():
                meaning = [about, f"the answer is {name}" if answers[1:] else ""]
                yield Layout(kind, columns | renamed | prompt, meaning="; ".join(filter(None, meaning)))

    def conversations(self) -> list[str]:
        """The fields that hold conversations in which the assistant speaks."""
        return [name for name in CONVERSATIONS if self.mostly(name, is_answered)]

    def completions(self) -> list[str]:
        """The fields that may be the answer to the prompt."""
        return [name for name in COMPLETIONS if self.is_completion(name)]

    def supervised(self) -> Iterator[Layout]:
        """Conversations, or prompts with an answer, for supervised fine-tuning."""
        conversations = self.conversations()
        for name in conversations:
            columns = ({"messages": name} if name != "messages" else {}) | self.system()
            yield Layout(Chats, columns, meaning=f"the conversation is {name}" if conversations[1:] else "")
        if not conversations:
            yield from self.answered(Completions, self.system(), self.completions())


def label_conventions(values: set[str], responses: tuple[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """(label of the first response, of the second, labels of a tie): the conventions that fit the values seen."""
    a, b = (name.lower() for name in responses)
    ties = sorted(v for v in values if v.startswith(TIES))
    if values <= {"0", "1", "2"} and "2" in values:
        yield "1", "2", ["0"]
        return
    if values <= {"0", "1"}:
        if a[-1] == "0":
            yield "0", "1", ["tie"]
            return
        yield "1", "2", ["0"]
        yield "0", "1", ["tie"]
        yield "1", "0", ["tie"]
        return
    if values <= {"-1", "0", "1"}:
        yield "1", "-1", ["0"]
        yield "-1", "1", ["0"]
        return
    for first, second in ((a, b), (a[-1], b[-1]), (f"model_{a[-1]}", f"model_{b[-1]}"), ("1", "2"), ("a", "b"),
                          ("first", "second"), ("left", "right")):  # fmt: skip
        if values <= {first, second, *ties}:
            yield first, second, ties or ["tie"]
            return


def mostly(values: Sequence[Any], test: Any) -> bool:
    """Whether `test` holds for more than half of the values."""
    return bool(values) and sum(map(bool, map(test, values))) * 2 > len(values)


def is_objects(value: Any) -> bool:
    """Whether `value` is a list of objects that are no messages."""
    return isinstance(value, list) and all(isinstance(v, dict) and not {"role", "from"} & set(v) for v in value)


def is_texts(value: Any) -> bool:
    """Whether `value` is a list of responses."""
    try:
        return isinstance(value, list) and bool(responses_of({"responses": value}))
    except ValueError:
        return False


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and mostly(value, lambda v: as_number(v) is not None)


def is_conversation(value: Any) -> bool:
    """Whether `value` is a message or a list of messages, whatever they hold."""
    values = [value] if isinstance(value, dict) else value
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(m, dict) and bool({"role", "from"} & set(m)) for m in values)
    )


def role_of(message: dict[str, Any]) -> str:
    role = str(message.get("role") or message.get("from")).strip().lower()
    return ROLES.get(role, role)


def is_whole_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages that does not begin with the assistant."""
    return is_conversation(value) and isinstance(value, list) and role_of(value[0]) != "assistant"


def is_answered(value: Any) -> bool:
    """Whether `value` is a list of messages, some of them the assistant's."""
    return is_conversation(value) and isinstance(value, list) and "assistant" in map(role_of, value)


def is_repeated(prompt: Any, chosen: str, rejected: str) -> bool:
    """Whether both texts begin with the prompt."""
    return (
        isinstance(prompt, str) and not is_absent(prompt) and chosen.startswith(prompt) and rejected.startswith(prompt)
    )


def prompt_is_inside(row: Row, conversation: Any) -> bool:
    """Whether the field `prompt`, if there, is said in the conversation, too: it is not read."""
    if is_absent(row.get("prompt")):
        return True
    try:
        prompt, chat = as_messages(row["prompt"]), messages(conversation, "chosen")
    except ValueError:
        return True  # a defect of this row, to be counted later
    if isinstance(row["prompt"], str):
        return any(prompt[0]["content"].strip() in message["content"] for message in chat)
    return all(message in chat for message in prompt)
