"""Two gloo ranks under FSDP2: replaced before or after sharding, one process's stock results."""

from tests.layers.workers import fully_sharded
from tests.parallel.ranks import run_on_ranks


def test_two_ranks() -> None:
    run_on_ranks(fully_sharded)
