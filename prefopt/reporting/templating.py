"""HTML pages from the templates beside this file. Autoescape is on: a value is text unless it is a Markup."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_ENVIRONMENT = Environment(
    loader=PackageLoader("prefopt.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: Any) -> str:
    """The page `template` (a file of templates/) with these values.

    Raises jinja2.UndefinedError for a value that the template reads and that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(**values)
