"""Two statements of one function are never called different: 200 pairs, of which at most 20 are
equal to the bit."""

import pytest

from moetk.equivalence import compare
from tests.equivalence.pairs import draw_pair

PAIRS = 200
BATCH = 10


@pytest.mark.parametrize("first", range(0, PAIRS, BATCH))
def test_a_pair_that_states_the_same_function_shows_no_difference(first: int) -> None:
    for seed in range(first, first + BATCH):
        pair = draw_pair(seed)
        report = compare(pair.a, pair.b, pair.x, ctx=pair.ctx)
        assert report.ok, f"{pair.way}, seed {seed}\n{report}"
