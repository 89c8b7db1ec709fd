"""Over ranks: reductions for losses and controllers, and sharding. Loaded when first touched."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["SumOverRanks", "gather_over_ranks", "shard", "sum_over_ranks"]

if TYPE_CHECKING:
    from moetk.parallel.fsdp import shard
    from moetk.parallel.reductions import SumOverRanks, gather_over_ranks, sum_over_ranks
else:
    # `shard` brings Transformers' modelling code with it; a reduction needs torch alone.
    _MODULE_OF = {
        "SumOverRanks": "moetk.parallel.reductions",
        "gather_over_ranks": "moetk.parallel.reductions",
        "shard": "moetk.parallel.fsdp",
        "sum_over_ranks": "moetk.parallel.reductions",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'moetk.parallel' has no attribute {name!r}")
        return getattr(import_module(_MODULE_OF[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
