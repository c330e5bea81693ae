"""Secrets stay in the environment: none goes into a config or a command line, and output shows *** instead.

A secret is the value of an environment variable with a name such as OPENAI_API_KEY or HF_TOKEN, or a text of a form
that only API keys have.
"""

import json
import os
import re
from typing import Any, cast

NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
FORM = re.compile(r"\b(sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,})")
SHORTEST = 8  # characters: a shorter value may be a word that occurs anywhere


def redact(text: str) -> str:
    """`text` with *** for every secret in it, also where JSON has escaped it."""
    for value in sorted(_secrets(), key=len, reverse=True):  # the longer first: it may begin with a shorter one
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(form, "***")
    return FORM.sub("***", text)


def find_secret(text: str) -> str | None:
    """A description, without its value, of a secret in `text`; None where there is none."""
    for value, name in _secrets().items():
        if value in text:
            return f"the value of the environment variable {name}"
    return "what looks like a key" if FORM.search(text) else None


class RedactingStream:
    """A text stream that redacts what is written. Everything else is that of the stream inside."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return cast(int, self._stream.write(redact(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> dict[str, str]:
    """{value: name} of the environment variables that hold secrets now: programs may set more while they run."""
    return {value: name for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST}
