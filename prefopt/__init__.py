"""prefopt: compare ways of aligning a language model with preferences, one number at a time."""

from prefopt.errors import UserError

__all__ = ["UserError"]
__version__ = "0.1.0"
