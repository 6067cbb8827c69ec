"""Arguments of the public functions: anything that is not what it should be is a ValueError of one sentence."""

import operator
from numbers import Real
from typing import Any


def whole(value: Any, name: str, least: int) -> int:
    """An argument as a whole number of at least `least`, whatever kind of integer it is.

    Raises:
        ValueError: it is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
    return number


def share(value: Any, name: str) -> float:
    """An argument as a number from 0 to 1.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; give a number from 0 to 1")
    return float(value)
