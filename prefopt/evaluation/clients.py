"""alpaca-eval as a library, without its messages; and the clients that it asks judges with, whose calls have limits."""

import functools
import json
import logging
import queue
import re
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from prefopt.evaluation.cost import Budget, LimitError, cost, tokens_in

CLIENTS = {"openai": "OpenAI", "anthropic": "Anthropic"}  # a vendor's package: the class of its client
VENDOR_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}

ATTEMPTS = 8  # at one call, while the server fails or is not reached
TIMEOUTS_PER_CALL = 3  # a call ends after so many times the time of one attempt
MAX_BYTES = 4 * 2**20  # of an answer, unpacked; a judge's is a few KB
FAILURES_IN_A_ROW = 5  # calls that failed, with none between that did not: nothing more is asked
REFUSALS_IN_A_ROW = 20  # the same for calls that the server refused
UNAVAILABLE = (408, 409, 425, 429)  # and 500 and above: the same call may succeed later
REFUSES_ALL = (401, 402, 403, 404, 405, 407, 410)  # and redirects: about the key, the account or the address


@contextmanager
def alpaca_eval() -> Iterator[Any]:
    """The package `alpaca_eval`, for use inside the `with` block. Its log messages and warnings are dropped: the
    callers check what can go wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import alpaca_eval as package  # sets the level of the root logger, so the level is read after it

        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.CRITICAL)
        try:
            yield package
        finally:
            root.setLevel(level)


class BadAnswerError(Exception):
    """What a server sent is no answer: too much, not to be unpacked, or not of the API's form."""


@dataclass
class Calls:
    """What became of the calls to a judge's server, and what they cost: `price` is USD per million tokens read and
    written, paid of `budget`.

    `refused` holds what the server said to each question that it refused; these are not asked again. After `failure`
    nothing is asked any more. alpaca-eval gets an answer without a preference in both cases, so that it keeps the
    preferences that it has.
    """

    budget: Budget
    price: Sequence[float]
    refused: dict[str, str] = field(default_factory=dict)
    failure: Exception | None = None
    last_error: Exception | None = None  # of a call that failed, also where later ones did not
    failures_in_a_row: int = 0
    refusals_in_a_row: int = 0

    def may_ask(self, question: str) -> bool:
        """Whether a call is to be made. Where the budget is spent, that is the failure."""
        try:
            self.budget.check()
        except LimitError as error:
            self.failure = self.failure or error
        return self.failure is None and question not in self.refused

    def succeeded(self, read: int, written: int) -> None:
        """`read`, `written`: tokens."""
        self.failures_in_a_row = self.refusals_in_a_row = 0
        self.budget.pay(cost(self.price, read, written))

    def failed(self, error: Exception, status: int | None) -> None:
        self.last_error = error
        self.failures_in_a_row += 1
        for_all = status is not None and (300 <= status < 400 or status in REFUSES_ALL)
        if self.failure is None and (for_all or self.failures_in_a_row >= FAILURES_IN_A_ROW):
            self.failure = error

    def refuse(self, question: str, error: Exception) -> None:
        self.refused[question] = str(error)
        self.refusals_in_a_row += 1
        if self.failure is None and self.refusals_in_a_row >= REFUSALS_IN_A_ROW:
            self.failure = error


@contextmanager
def vendor_client(
    vendor: str, base_url: str, key: str, seconds: float, calls: Calls, stand_in: bool = False
) -> Iterator[Any]:
    """The vendor's client, which asks `base_url` and no other host, whatever the environment says of clients.

    An attempt at a call has `seconds` for its whole answer. No redirect is followed. An address without TLS is asked
    without the environment's proxy, which would read the key and the texts. A call that fails raises nothing: it gives
    None, or, with `stand_in`, an answer that holds nothing.
    """
    module = import_module(vendor)
    http = module.DefaultHttpxClient(follow_redirects=False, timeout=seconds, trust_env=base_url.startswith("https:"))
    http.send = functools.partial(_send, http.send, seconds)
    client = getattr(module, CLIENTS[vendor])(
        api_key=key,
        base_url=base_url,
        http_client=http,
        timeout=seconds,
        max_retries=0,  # `_ask` tries again
        default_headers={"Accept-Encoding": "identity"},
    )
    if vendor == "openai":
        endpoints = [(client.chat.completions, _check_chat, _no_chat), (client.completions, _check_text, _no_text)]
    else:
        endpoints = [(client.messages, _check_message, _no_message)]
    for endpoint, check, empty in endpoints:
        nothing = empty if stand_in else _none
        endpoint.create = functools.partial(_ask, module, calls, seconds, endpoint.create, check, nothing)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def judge_client(vendor: str, base_url: str, key: str, seconds: float, calls: Calls) -> Iterator[None]:
    """Inside, alpaca-eval asks by a `vendor_client`.

    alpaca-eval makes a client for each call. The class that it looks up is replaced by one that gives it this one.
    """
    module = import_module(vendor)
    original = getattr(module, CLIENTS[vendor])
    with vendor_client(vendor, base_url, key, seconds, calls, stand_in=True) as client:
        setattr(module, CLIENTS[vendor], lambda **_: client)
        try:
            yield
        finally:
            setattr(module, CLIENTS[vendor], original)


def _none() -> None:
    pass


def _ask(
    module: Any,
    calls: Calls,
    seconds: float,
    create: Callable[..., Any],
    check: Callable[[Any], str],
    nothing: Callable[[], Any],
    **request: Any,
) -> Any:
    """The server's answer to a request, or what `nothing` gives. What went wrong is in `calls`."""
    question = json.dumps(request, sort_keys=True, default=str)
    end = time.monotonic() + TIMEOUTS_PER_CALL * seconds
    for attempt in range(ATTEMPTS):
        if not calls.may_ask(question):
            return nothing()
        try:
            answer = create(**request)
            try:
                text = check(answer)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                raise BadAnswerError(f"the server's answer is not that of a judge: {str(answer)[:200]!r}") from None
        except Exception as error:  # the clients raise what their HTTP and JSON libraries do, besides their own
            status = getattr(error, "status_code", None)
            if isinstance(error.__cause__, BadAnswerError | TimeoutError):
                error = error.__cause__  # the client says "Connection error" of them
            elif isinstance(error, json.JSONDecodeError):
                error = BadAnswerError(f"the server's answer is not JSON: {error}")
            if status is not None and 400 <= status < 500 and status not in (*UNAVAILABLE, *REFUSES_ALL):
                calls.refuse(question, error)
                return nothing()
            later = status in UNAVAILABLE or (status or 0) >= 500
            later = later or isinstance(error, module.APIConnectionError | TimeoutError)
            pause = max(min(0.5 * 2**attempt, 8.0), _retry_after(error))
            if not later or attempt == ATTEMPTS - 1 or time.monotonic() + pause > end:
                calls.failed(error, status)
                return nothing()
            time.sleep(pause)
        else:
            calls.succeeded(*_tokens(answer, question, text))
            return answer
    return nothing()


def _tokens(answer: Any, question: str, text: str) -> tuple[int, int]:
    """Read and written, as the server counts them; where it does not, about as many as the texts have."""
    usage = getattr(answer, "usage", None)

    def count(fields: Sequence[str], of_text: str) -> int:
        said = [getattr(usage, field, None) for field in fields]
        return next((n for n in said if isinstance(n, int) and n > 0), tokens_in(len(of_text)))

    return count(("prompt_tokens", "input_tokens"), question), count(("completion_tokens", "output_tokens"), text)


def _retry_after(error: Exception) -> float:
    """The seconds that the server asks to wait, 60 at most; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = headers.get("retry-after", "")
    return min(float(said), 60.0) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", said) else 0.0


def failure_reason(error: Exception) -> str:
    """An error of a judge's client in words, with its cause: the clients write no more than "Connection error"."""
    cause = error.__cause__
    return f"{error or type(error).__name__}" + (f" ({cause})" if cause and str(cause) else "")


def _send(send: Callable[..., Any], seconds: float, request: Any, *, stream: bool = False, **settings: Any) -> Any:
    """`send` of an HTTP client, with limits on the time and the size of the whole answer.

    The clients' own time limit is for each read, so it never ends a server that sends a byte now and then. Raises
    TimeoutError, BadAnswerError, or what `send` raises.
    """
    del stream  # the whole answer is read in any case
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = time.monotonic() + seconds

    def work() -> None:
        try:
            response = send(request, stream=True, **settings)
            try:
                results.put(_read(response, request, end))
            finally:
                response.close()
        except Exception as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        result = TimeoutError()
    if isinstance(result, TimeoutError):
        raise TimeoutError(f"no whole answer in {seconds:g} seconds (judge.timeout)")
    if isinstance(result, Exception):
        raise result
    return result


def _read(response: Any, request: Any, end: float) -> Any:
    """The same response with its whole content in it, unpacked."""
    content = b""
    for part in response.iter_raw():
        content += part
        if len(content) > MAX_BYTES:
            raise BadAnswerError(f"the server's answer is larger than {MAX_BYTES // 2**20} MiB")
        if time.monotonic() > end:
            raise TimeoutError
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("gzip", "deflate"):
        try:
            content = zlib.decompressobj(wbits=47).decompress(content, MAX_BYTES + 1)  # 47: gzip or zlib
        except zlib.error:
            raise BadAnswerError("the server's answer cannot be unpacked") from None
        if len(content) > MAX_BYTES:
            raise BadAnswerError(f"the server's answer is larger than {MAX_BYTES // 2**20} MiB when it is unpacked")
    elif encoding != "identity":
        raise BadAnswerError(f"the server's answer is packed in a way that was not asked for ({encoding[:40]!r})")
    dropped = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in dropped]
    return type(response)(response.status_code, headers=headers, content=content, request=request)


# What alpaca-eval reads of an answer, and its text. The vendors' clients do not check what a server sends.


def _check_chat(answer: Any) -> str:
    for choice in answer.choices:
        choice.model_dump()
        if choice.message.role != "assistant" or not isinstance(choice.message.content, str | None):
            raise ValueError
        choice.message.content = choice.message.content or ""
        if choice.message.tool_calls or choice.message.function_call:
            raise ValueError
    text = answer.choices[0].message.content
    _fill_usage(answer)
    return str(text)


def _check_text(answer: Any) -> str:
    for choice in answer.choices:
        choice.model_dump()
        if not isinstance(choice.text, str):
            raise ValueError
    text = answer.choices[0].text
    _fill_usage(answer)
    return str(text)


def _check_message(answer: Any) -> str:
    answer.model_dump()
    text = answer.content[0].text
    if not isinstance(text, str):
        raise ValueError
    return text


def _fill_usage(answer: Any) -> None:
    """Some servers leave the number of tokens out. alpaca-eval computes a price of it, which nothing here reads."""
    from openai.types import CompletionUsage

    if not isinstance(getattr(answer.usage, "total_tokens", None), int):
        answer.usage = CompletionUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


def _no_chat() -> Any:
    from openai.types.chat import ChatCompletion

    message = {"role": "assistant", "content": ""}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    return ChatCompletion.model_validate(
        {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [choice], "usage": _NO_TOKENS}
    )


def _no_text() -> Any:
    from openai.types import Completion

    choice = {"index": 0, "finish_reason": "stop", "text": "", "logprobs": None}
    return Completion.model_validate(
        {"id": "", "object": "text_completion", "created": 0, "model": "", "choices": [choice], "usage": _NO_TOKENS}
    )


def _no_message() -> Any:
    from anthropic.types import Message

    return Message.model_validate(
        {
            "id": "", "type": "message", "role": "assistant", "model": "", "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": ""}],
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
    )  # fmt: skip


_NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
