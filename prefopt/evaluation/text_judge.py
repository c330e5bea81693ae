"""A judge that answers in text: a language model that is asked conversations, whose replies are kept and read.

Every reply is written to disk as it comes, and is not asked for again. A reply in which no verdict can be read is
answered with a request to finish; what is missing then is counted, and is never taken for a verdict.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import MISSING, OmegaConf

from prefopt.config.parse import build, keys_without_field, parse
from prefopt.data.items import Message
from prefopt.errors import Interrupted, UserError
from prefopt.evaluation.clients import Calls, vendor_client
from prefopt.evaluation.cost import Budget, Estimate
from prefopt.evaluation.judges import Judge, LanguageModelJudge, check_server, what_failed
from prefopt.tracking.record import find_result
from prefopt.utils.console import Bar
from prefopt.utils.files import atomic_write, cache_dir, safe_name, with_filename
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.locks import locked
from prefopt.utils.redact import redact
from prefopt.utils.signals import stop_flag
from prefopt.utils.store import format_sealed_line, read_sealed_lines

log = logging.getLogger(__name__)

T = TypeVar("T")

PASSES = 3  # over the conversations without a verdict
MOST_MISSING = 0.01  # of the verdicts; with more of them missing there is no result
LEAST_TOKENS = 2048  # of a reply: shorter ones end before their verdict


@dataclass(frozen=True)
class Reply:
    """What a judge has answered. `model`: what its server calls itself. `finished`: False where the token limit cut it
    off. `tstamp`: seconds since 1970."""

    text: str
    model: str
    finished: bool
    tstamp: float


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What was read in the last of a judge's `replies` to a conversation; None: nothing could be. Each but the first
    answers a request to finish."""

    value: T | None
    replies: list[Reply]

    @property
    def judgment(self) -> str:
        return "\n".join(reply.text for reply in self.replies)


@dataclass(frozen=True)
class ReplyFormat(Generic[T]):
    """What a judge is to write. `read`: the verdict in a reply; None where there is none that can be read. `finish`:
    what the judge is told then, after its reply. `tokens`: about as many a reply has, for the estimate of the cost."""

    read: Callable[[str], T | None]
    finish: str
    tokens: int


class ReplyFile:
    """A judge's replies by the key of what it was asked, as sealed JSON lines (`utils/store.py`)."""

    def __init__(self, path: Path):
        """Read the file, if there is one. Lines that are not whole are dropped, which the log says."""
        self.path = path
        rows, whole = read_sealed_lines(path)
        if not whole:
            log.warning(f"  {path} is damaged: {len(rows)} of its replies are whole. The others are asked for again.")
            atomic_write(path, "".join(map(format_sealed_line, rows)))
        self.replies: dict[str, Reply] = {row.pop("key"): Reply(**row) for row in rows}
        self.adding = threading.Lock()

    def add(self, key: str, reply: Reply) -> None:
        """Write a reply to the disk. Raises OSError with the file's name where there is no room."""
        line = format_sealed_line({"key": key, **vars(reply)})
        with self.adding, with_filename(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self.replies[key] = reply


@dataclass(frozen=True)
class TextJudge:
    """The model of a `LanguageModelJudge`, asked by itself and not through alpaca-eval."""

    server: LanguageModelJudge
    temperature: float
    max_tokens: int  # of a reply
    parallel: int  # calls under way at the same time

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"judge.temperature must not be negative, is {self.temperature:g}")
        if self.max_tokens < LEAST_TOKENS:
            raise UserError(
                f"judge.max_tokens must be at least {LEAST_TOKENS}, is {self.max_tokens}: a judge that is cut off "
                "gives no verdict"
            )
        if self.parallel < 1:
            raise UserError(f"judge.parallel must be at least 1, is {self.parallel}")

    @property
    def title(self) -> str:
        """The judge's name in metrics and folders: its model's. Where a file has the same, the folder's digest tells
        them apart."""
        return self.server.model_name

    def describe(self) -> dict[str, Any]:
        """Everything besides the texts that decides a reply, for records. It holds no secrets."""
        return {
            "name": self.title,
            "base_url": self.server.address,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    @property
    def check_file(self) -> Path:
        """Where prefopt.judge_check keeps how this judge agrees with published judgments."""
        name = f"{safe_name(self.title)}-{fingerprint([self.title, self.server.address])[:8]}"
        return cache_dir() / "judge_checks" / name / "record.json"

    def checked(self, what: str) -> dict[str, Any] | None:
        """The judge's check on `what`, ratings or verdicts; None where there was none."""
        return (find_result(self.check_file) or {}).get(what)

    def key(self, messages: Sequence[Message]) -> str:
        """SHA-256 of what decides the reply to a conversation."""
        return hashlib.sha256(json.dumps([self.describe(), list(messages)], sort_keys=True).encode()).hexdigest()

    def judge(
        self,
        prompts: Sequence[list[Message]],
        form: ReplyFormat[T],
        folder: Path,
        budget: Budget,
        most_missing: float = MOST_MISSING,
    ) -> list[Verdict[T]]:
        """A verdict on each prompt, in their order.

        Args:
            prompts: Conversations that end with the user's turn.
            form: What the replies are read as. Without a verdict the judge is told to finish, in each of PASSES passes
                but the first.
            folder: Replies are kept in it, in a file for each judge.
            budget: What the command may pay.
            most_missing: The share of verdicts that may be missing.

        Raises:
            UserError: the estimated cost is above what is left of `budget`, the judge's server fails, or more
                than `most_missing` of the verdicts are missing.
            Interrupted: after SIGTERM or SIGUSR2, when the calls under way have ended.
        """
        path = self._reply_file(folder)
        # The lock keeps a second job with the same judge from paying for the same replies.
        with locked(path.with_suffix(".lock"), f"replies of {self.title}"):
            file = ReplyFile(path)
            talks = [_Talk[T](list(prompt)) for prompt in prompts]
            calls = Calls(budget, self.server.price)
            for _ in range(PASSES):
                pending = [talk for talk in talks if talk.value is None]
                to_ask = self._unknown([talk.messages for talk in pending], file.replies)
                if to_ask:
                    what = (
                        f"{self.title}: {len(to_ask)} calls for {len(prompts)} prompts (the others are known or equal)"
                    )
                    budget.announce(what, self._estimate(to_ask, form.tokens, path))
                    self._ask(list(to_ask.values()), file, calls)
                for talk in pending:
                    if reply := file.replies.get(self.key(talk.messages)):
                        talk.take(reply, form)

        missing = [i for i, talk in enumerate(talks) if talk.value is None]
        unanswered = [i for i in missing if talks[i].awaits_reply(file, self)]
        if len(missing) > most_missing * len(prompts) or len(unanswered) > len(calls.refused):
            listed = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
            then = "the same command goes on from there" if unanswered else "the same command would ask for none again"
            raise UserError(
                f"incomplete: {self.title} gave no verdict that can be read for {len(missing)} of {len(prompts)} "
                f"prompts, after {PASSES} passes (prompts {listed}), so there is no score.{what_failed(calls)}\nIts "
                f"replies are kept in {file.path}; {then}. With a higher judge.max_tokens all are asked for anew."
            )
        return [Verdict(talk.value, talk.replies) for talk in talks]

    def estimate(self, prompts: Sequence[list[Message]], reply_tokens: int, folder: Path) -> Estimate:
        """The calls that `judge` will make, but for requests to finish."""
        path = self._reply_file(folder)
        rows, _ = read_sealed_lines(path)  # as it is: another job may be writing it
        return self._estimate(self._unknown(prompts, {row["key"] for row in rows}), reply_tokens, path)

    def _reply_file(self, folder: Path) -> Path:
        return folder / f"{safe_name(self.title)}-{fingerprint(self.describe())[:8]}.jsonl"

    def _unknown(self, conversations: Sequence[list[Message]], known: Container[str]) -> dict[str, list[Message]]:
        """By their keys, those without a reply. Of equal ones, one."""
        keys = {self.key(messages): messages for messages in conversations}
        return {key: messages for key, messages in keys.items() if key not in known}

    def _estimate(self, to_ask: dict[str, list[Message]], reply_tokens: int, path: Path) -> Estimate:
        characters = {key: sum(len(str(m["content"])) for m in messages) for key, messages in to_ask.items()}
        return Estimate(self.server.price, {(path, key): (n, reply_tokens) for key, n in characters.items()})

    def _ask(self, conversations: Sequence[list[Message]], file: ReplyFile, calls: Calls) -> None:
        """Ask for the replies to all these, and add them to `file`. Those that fail or are refused are in `calls`.
        Raises UserError where the server fails, and Interrupted."""
        server = self.server
        client_of = vendor_client(server.vendor, server.address, server.secret, server.timeout, calls)
        with client_of as client, contextlib.ExitStack() as stack:

            def work(messages: list[Message]) -> None:
                if stop_flag.is_set:
                    return
                if reply := self._call(client, messages):
                    file.add(self.key(messages), reply)

            bar = stack.enter_context(Bar("judging", len(conversations)))
            pool = ThreadPoolExecutor(self.parallel)
            # Without waiting for what has not begun, whatever ends this; what is under way is paid for, and kept.
            stack.callback(pool.shutdown, cancel_futures=True)
            for future in as_completed([pool.submit(work, messages) for messages in conversations]):
                future.result()
                bar.advance()
        if stop_flag.is_set:
            raise Interrupted(f"{len(file.replies)} replies are in {file.path}")
        check_server(self.title, calls, file.path)

    def _call(self, client: Any, messages: list[Message]) -> Reply | None:
        """None where there is no reply."""
        settings = {"model": self.server.model_name, "temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.server.vendor == "openai":
            answer = client.chat.completions.create(messages=messages, **settings)
            if answer is None:
                return None
            text, finished = answer.choices[0].message.content, answer.choices[0].finish_reason != "length"
        else:
            system = [str(m["content"]) for m in messages if m["role"] == "system"]
            others = [m for m in messages if m["role"] != "system"]
            answer = client.messages.create(system="\n\n".join(system), messages=others, **settings)
            if answer is None:
                return None
            text, finished = answer.content[0].text, answer.stop_reason != "max_tokens"
        # A server's answer may repeat the key that it was sent.
        return Reply(redact(text), redact(str(answer.model)), finished, time.time())


@dataclass
class _Talk(Generic[T]):
    """A conversation with a judge, until a verdict can be read."""

    messages: list[Message]

    def __post_init__(self) -> None:
        self.value: T | None = None
        self.replies: list[Reply] = []

    def take(self, reply: Reply, form: ReplyFormat[T]) -> None:
        self.replies.append(reply)
        self.value = form.read(reply.text)
        if self.value is None:  # an empty text is refused by some servers
            self.messages.append({"role": "assistant", "content": reply.text if reply.text.strip() else "…"})
            self.messages.append({"role": "user", "content": form.finish})

    def awaits_reply(self, file: ReplyFile, judge: TextJudge) -> bool:
        """Whether a call for it has failed or was refused."""
        return len(self.replies) < PASSES and judge.key(self.messages) not in file.replies


@dataclass
class How:
    """The keys of `judge` that say how it is asked."""

    temperature: float = MISSING
    max_tokens: int = MISSING
    parallel: int = MISSING


def build_text_judge(node: Any, max_tokens: int | None = None) -> TextJudge:
    """The judge that a program's `judge` describes: a choice of conf/judge, and the keys of `How`. `max_tokens` stands
    for a null there. Raises UserError for one that writes no text, and what `LanguageModelJudge.check` does."""
    values = dict(node or {})
    if "_target_" not in values:
        raise UserError("judge is null: give a judge of conf/judge that writes texts, such as judge=gpt4")
    given = {f.name: values.pop(f.name) for f in fields(How) if f.name in values}
    if "timeout" in keys_without_field(values):  # the programs set it for every judge
        del values["timeout"]
    server = build(values, Judge, "judge")
    if not isinstance(server, LanguageModelJudge):
        raise UserError(f"judge: {server.title} writes no text. Give a language model, such as judge=gpt4")
    if given.get("max_tokens") is None:
        given["max_tokens"] = max_tokens
    how = parse(OmegaConf.create(given), How, "judge.")
    server.check()
    return TextJudge(server, **vars(how))
