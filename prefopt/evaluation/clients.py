"""alpaca-eval as a library: without its messages, and with API clients that follow no redirect."""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

CLIENTS = {"openai": "OpenAI", "anthropic": "Anthropic"}  # a vendor's package: the class of its client


@contextmanager
def alpaca_eval() -> Iterator[Any]:
    """The package `alpaca_eval`, for use inside the `with` block.

    Its log messages and warnings are dropped: the callers check what can go wrong. A client of OpenAI or Anthropic
    that is made inside the block follows no redirect, so prompts and answers reach the configured host only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import alpaca_eval as package  # sets the level of the root logger, so the level is read after it

        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.CRITICAL)

        # alpaca-eval makes its clients itself and has no option for redirects. So the class that it looks up is
        # replaced by a function that makes the same client around an HTTP client without redirects.
        modules = {name: import_module(name) for name in CLIENTS if importlib.util.find_spec(name)}
        originals = {name: getattr(module, CLIENTS[name]) for name, module in modules.items()}
        for name, module in modules.items():
            make_http = functools.partial(module.DefaultHttpxClient, follow_redirects=False)
            setattr(module, CLIENTS[name], functools.partial(_make_client, originals[name], make_http))
        try:
            yield package
        finally:
            root.setLevel(level)
            for name, module in modules.items():
                setattr(module, CLIENTS[name], originals[name])


def _make_client(make: Any, make_http: Any, **settings: Any) -> Any:
    return make(http_client=make_http(), **settings)
