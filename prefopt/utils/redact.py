"""Secrets stay in the environment: none goes into a config or a command line, and texts show *** instead.

A secret is the value of an environment variable with a name such as OPENAI_API_KEY or HF_TOKEN, a text of a form that
only API keys have, or a password in a URL. Values that are ordinary words, blanks or files are none.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, cast

from prefopt.utils.plain import encodable, printable

NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
FORM = re.compile(r"\b(sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,})")
SHORTEST = 8  # characters: a shorter value, or fragment of one, may be a word that occurs anywhere
WORDS = re.compile(r"([A-Z]?[a-z]{1,16}|[A-Z]{1,16})([\s_./:,-]+([A-Z]?[a-z]{1,16}|[A-Z]{1,16}))*")
# Of such a value, errors may repeat parts. Texts with blanks, quotes or a scheme have parts that occur anywhere.
TOKEN = re.compile(r"(?!/)[\w.~+/=:@!#$%^&*-]+")
URL_PASSWORD = re.compile(r"(?<=://)([^\s/:@\"']*):[^\s/\"']+@")  # USER:PASSWORD@
URL_KEY = re.compile(r"([?&][\w-]*(?:key|token|secret|password|signature)=)[^\s&#\"']+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with *** for every secret in it, also where JSON has escaped it, and for fragments of SHORTEST characters
    or more."""
    return _redact(text, _secrets())


def _redact(text: str, secrets: dict[str, str]) -> str:
    text = URL_KEY.sub(r"\1***", URL_PASSWORD.sub(r"\1:***@", text))
    for value in sorted(secrets, key=len, reverse=True):  # the longer first: it may begin with a shorter one
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(form, "***")
        text = _redact_fragments(text, value)
    return FORM.sub("***", text)


def redact_values(content: Any) -> Any:
    """`content`, as JSON has it, with the secrets in its texts redacted. Its keys, and texts of words alone such as
    "finished", are left as they are."""
    secrets = _secrets()  # once: the environment is slow to read

    def redacted(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: redacted(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [redacted(value) for value in content]
        return _redact(content, secrets) if isinstance(content, str) and not WORDS.fullmatch(content) else content

    return redacted(content)


def find_secret(text: str) -> str | None:
    """A description, without its value, of a secret in `text`; None where there is none."""
    for value, name in _secrets().items():
        if value in text:
            return f"the value of the environment variable {name}"
    return "what looks like a key" if FORM.search(text) else None


class RedactingStream:
    """A text stream that redacts what is written, and leaves nothing in it that steers a terminal. Everything else is
    that of the stream inside."""

    def __init__(self, stream: Any, steers: bool = False):
        self._stream, self._steers = stream, steers

    @property
    def rich_proxied_file(self) -> "RedactingStream":
        """Where rich's consoles write: with their own escapes (`console.PlainConsole` sees to the texts)."""
        return self if self._steers else RedactingStream(self._stream, steers=True)

    def write(self, text: str) -> int:
        text = redact(text) if self._steers else printable(redact(text))
        return cast(int, self._stream.write(encodable(text, getattr(self._stream, "encoding", None))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> dict[str, str]:
    """{value: name} of the environment variables that hold secrets now: programs may set more while they run."""
    named = ((value.strip(), name) for name, value in os.environ.items() if NAME.search(name))
    return {value: name for value, name in named if len(value) >= SHORTEST and _is_secret(value)}


@functools.cache
def _is_secret(value: str) -> bool:
    """Whether a value is no word and no file: GOOGLE_APPLICATION_CREDENTIALS names one."""
    return not WORDS.fullmatch(value) and not (value.startswith(("/", "~", ".")) and Path(value).expanduser().exists())


@functools.cache
def _pieces(value: str) -> frozenset[str]:
    """All stretches of SHORTEST characters of a secret whose fragments are secret, too."""
    if not TOKEN.fullmatch(value) or "://" in value:
        return frozenset()
    return frozenset(value[i : i + SHORTEST] for i in range(len(value) - SHORTEST + 1))


def _redact_fragments(text: str, secret: str) -> str:
    """`text` with *** for the longest stretches that it shares with `secret`, from SHORTEST characters on.

    A word between two separators inside of the secret is left: texts have it for other reasons.
    """
    pieces = _pieces(secret)
    if len(text) < SHORTEST or not pieces:
        return text
    parts, done, start = [], 0, 0
    while start <= len(text) - SHORTEST:
        if text[start : start + SHORTEST] not in pieces:
            start += 1
            continue
        end = start + SHORTEST
        while end < len(text) and text[start : end + 1] in secret:
            end += 1
        if not _is_word_inside(text[start:end], secret):
            parts += [text[done:start], "***"]
            done = end
        start = end
    return "".join([*parts, text[done:]])


def _is_word_inside(fragment: str, secret: str) -> bool:
    word = fragment.strip("_./:,-")
    whole = re.search(rf"[_./:,-]{re.escape(word)}[_./:,-]", secret)
    return bool(whole and WORDS.fullmatch(word))
