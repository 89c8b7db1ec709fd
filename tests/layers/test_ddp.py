"""Two gloo ranks under DistributedDataParallel: losses and counts of the whole batch."""

from tests.layers.workers import data_parallel
from tests.parallel.ranks import run_on_ranks


def test_two_ranks() -> None:
    run_on_ranks(data_parallel)
