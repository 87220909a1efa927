"""Errors that are the user's to mend; a script prints them in one line and exits with status 2."""


class UserError(Exception):
    """The user asked for something that cannot be done; the message is one line.

    It says what is wrong. The script adds which option mends it: see `utils.script.run_script`.
    """


def one_line(error: BaseException) -> str:
    """Return the message of an error, without the traceback that a DataLoader's worker adds."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def few(items: list[str], named: int = 3) -> str:
    """Return the first items as text, with the number of the others."""
    more = f" and {len(items) - named} more" if len(items) > named else ""
    return ", ".join(items[:named]) + more
