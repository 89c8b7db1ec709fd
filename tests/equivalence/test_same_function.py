"""Two statements of one function are never called different: 200 pairs, of which at most 20 are
equal to the bit."""

import pytest

from moetk import compare
from tests.equivalence.pairs import draw_pair

PAIRS, HALF = 200, 100
EQUAL_TO_THE_BIT = 20


@pytest.mark.parametrize("first", range(0, PAIRS, HALF))
def test_a_pair_that_states_the_same_function_shows_no_difference(first: int) -> None:
    bitwise = 0
    for seed in range(first, first + HALF):
        pair = draw_pair(seed)
        report = compare(pair.a, pair.b, pair.x, ctx=pair.ctx)
        assert report.ok, f"{pair.way}, seed {seed}\n{report}"
        bitwise += all(row.equal == 1.0 for row in report.rows)
    assert bitwise <= EQUAL_TO_THE_BIT * HALF // PAIRS
