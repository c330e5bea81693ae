"""What goes wrong in a way that its user can mend, or has asked for."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do next.

    Programs print it as one message without a traceback and exit with code 2.
    """


class MissingAssetError(UserError):
    """Why a model or a data set cannot be used on this machine without the hub."""


class UnsafePathError(UserError):
    """A data set that would be read from somewhere else than where it is."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""
