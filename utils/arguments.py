"""The parser that all programs share, and the types of its values."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage before it."""

    def __init__(self, description: str | None = None, **kwargs: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, formatter_class=formatter, allow_abbrev=False, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive_int(text: str) -> int:
    return _number(int, text, "a positive whole number", lambda value: value > 0)


def natural_int(text: str) -> int:
    return _number(int, text, "a whole number from 0 on", lambda value: value >= 0)


def seed_int(text: str) -> int:
    expected = "a whole number from 0 to 2**63 - 1"
    return _number(int, text, expected, lambda value: 0 <= value < 2**63)


def positive_float(text: str) -> float:
    return _number(float, text, "a positive number", lambda value: 0 < value < math.inf)


def natural_float(text: str) -> float:
    return _number(float, text, "a number from 0 on", lambda value: 0 <= value < math.inf)


def probability(text: str) -> float:
    return _number(float, text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def finite_float(text: str) -> float:
    return _number(float, text, "a number", math.isfinite)


def file_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _number(kind: type, text: str, expected: str, accepts: Callable[[float], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value
