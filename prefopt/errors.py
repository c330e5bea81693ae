"""Errors that the user can correct, and the one that the user has asked for."""


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what to do next.

    Programs print the message without a traceback and exit with code 2.
    """


class MissingAssetError(UserError):
    """A model or a data set is not on this machine, or cannot be fetched to it."""


class OutOfMemory(UserError):
    """There was too little memory. The message says what was being done, and what to change."""


class UnsafePathError(UserError):
    """A data set would make the program read a file from outside of its folder."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""
