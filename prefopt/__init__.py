"""prefopt: compare ways of aligning a language model with preferences, one number at a time."""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do next.

    Programs print it as one message without a traceback and exit with code 2.
    """
