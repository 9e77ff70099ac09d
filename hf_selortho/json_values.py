"""Values that a JSON file of somebody else may hold."""

from __future__ import annotations

import sys
from typing import Any


def is_finite_number(value: Any) -> bool:
    """Whether it is a number that a float can hold: no NaN, no infinity, no whole number of hundreds of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
