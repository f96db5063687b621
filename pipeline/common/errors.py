"""Errors a user can cause, each with its exit code."""

import errno
import re
import signal

LINE_CHARACTERS = 2_000
"""Longest message; of a longer one the beginning and the end are kept: what is wrong, and what to do."""
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """An error that the user can fix. The message says what was found, what was expected, where, and what to do.

    It is one line of printable characters, whatever the names in it hold.
    """

    exit_code = 2
    on_all_ranks = False
    """Whether every rank of a run raises it, so that one of them may say it for all."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(UserError):
    """A wrong option or argument."""

    exit_code = 2


class DataError(UserError):
    """A data set, checkpoint or model that is missing, damaged or of another kind."""

    exit_code = 65


class UnavailableError(UserError):
    """A device, driver, library or service that the command needs is not here."""

    exit_code = 69


class TryAgainError(UserError):
    """A temporary fault: a full disk, a store that does not answer, a run that another process is training."""

    exit_code = 75


class ConfigConflict(UserError):
    """A configuration that contradicts itself or the run it should continue."""

    exit_code = 78


class Collapsed(UserError):
    """A training run fell apart and was told to end then; everything is saved, and a retry would not help."""

    exit_code = 79


class Stopped(UserError):
    """SIGTERM was received and the work so far is saved."""

    exit_code = 128 + signal.SIGTERM


class Interrupted(Stopped):
    """SIGINT (Ctrl-C) was received and the work so far is saved."""

    exit_code = 128 + signal.SIGINT


def escaped(text: str) -> str:
    """Return `text` with escapes such as `\\x1b` and `\\n` in place of what is not printable."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Return `text` as one line of printable characters, cut in the middle when it is very long.

    So a name that came from a file cannot forge a second line, or write elsewhere on the terminal.
    """
    line = escaped(" ".join(text.split()))
    if len(line) > LINE_CHARACTERS:
        line = f"{line[: LINE_CHARACTERS * 2 // 3]} … {line[-LINE_CHARACTERS // 4 :]}"
    return line


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its colors, or its class where it has none."""
    lines = _STYLE.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ESTALE}


def describe_os_error(error: OSError) -> UserError:
    """Turn an operating-system error into the one line and exit code that tell what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TryAgainError(f"{where}{reason}. Free some space and run the same command again: it resumes")
    if error.errno in _PASSING:
        return TryAgainError(f"{where}{reason}. Run the same command again: it resumes")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UsageError(f"{where}{reason}. Choose a path that this user may use")
    return UsageError(f"{where}{reason}")
