"""Each row of the table of limits, proven: unmodified stock models fail so, and say so."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.layers.limits import LIMITS, Limit, able, compiled, compiled_balancing_loss
from tests.layers.stock import stock


def marks(row: Limit, family: str) -> tuple[pytest.MarkDecorator, ...]:
    """Compiling takes seconds: of one row's families the first is tried at once."""
    return (pytest.mark.slow,) if row.attempt is compiled and family != row.families[0] else ()


ROWS = [
    pytest.param(row, family, id=f"{row.attempt.__name__}-{family}", marks=marks(row, family))
    for row in LIMITS
    if row.where()
    for family in row.families
]
ATTEMPTS = dict.fromkeys(row.attempt for row in LIMITS)
# Compiling takes seconds a family; test_compile.py does it for the families that are able.
CHEAP = [attempt for attempt in ATTEMPTS if attempt not in (compiled, compiled_balancing_loss)]


@pytest.mark.parametrize(("row", "family"), ROWS)
def test_stock_fails(row: Limit, family: str) -> None:
    with pytest.raises(Exception) as caught:
        row.attempt(stock(family))
    assert re.search(row.says, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("attempt", "family"),
    [
        pytest.param(attempt, family, id=f"{attempt.__name__}-{family}")
        for attempt in CHEAP
        for family in able(attempt)
    ],
)
def test_stock_manages_what_no_row_denies(attempt: Callable[[Any], None], family: str) -> None:
    attempt(stock(family))
