"""Keys stay in the environment: none goes into a config or a command line, and what is written or said shows ***.

A key is the value of an environment variable whose name says so (OPENAI_API_KEY, HF_TOKEN), or a text of a form that
only keys have.
"""

import json
import os
import re
from typing import Any, cast

NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
FORM = re.compile(r"\b(sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,})")
SHORTEST = 8  # a shorter value may be any word


def redact(text: str) -> str:
    """`text` with *** for every key in it, also as JSON writes it."""
    for value in sorted(_secrets(), key=len, reverse=True):  # one may begin with another
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(form, "***")
    return FORM.sub("***", text)


def find_secret(text: str) -> str | None:
    """What key `text` holds, in words that do not show it; None for none."""
    for value, name in _secrets().items():
        if value in text:
            return f"the value of the environment variable {name}"
    return "what looks like a key" if FORM.search(text) else None


class RedactingStream:
    """A text stream that shows no key."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return cast(int, self._stream.write(redact(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> dict[str, str]:
    return {value: name for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST}
