"""moetk: mixture-of-experts parts that compose. Names are loaded when first touched (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetk._version import __version__ as __version__

__all__ = [
    "AutoModelForCausalLM",
    "BlockSpec",
    "ExpertBank",
    "ExpertChoice",
    "LinearRouter",
    "MoELayer",
    "MoetkError",
    "Replacement",
    "RouterContext",
    "Routing",
    "SoftChoice",
    "TokenChoice",
    "compare",
    "controllers",
    "dispatch",
    "losses",
    "metrics",
    "record",
    "register",
    "replace_moe",
    "replay",
    "routers",
    "speed_up",
    "trace",
]

_ROOMS = {"controllers", "dispatch", "losses", "metrics", "routers"}
_UNLISTED = {"parallel"}  # for those who run on several ranks: found by name, not by `import *`
_MODULE_OF = {
    "AutoModelForCausalLM": "moetk.auto",
    "BlockSpec": "moetk.layers.find",
    "ExpertBank": "moetk.experts",
    "ExpertChoice": "moetk.routing",
    "LinearRouter": "moetk.routers",
    "MoELayer": "moetk.layers.moe",
    "MoetkError": "moetk.errors",
    "Replacement": "moetk.layers.replacement",
    "RouterContext": "moetk.context",
    "Routing": "moetk.routing",
    "SoftChoice": "moetk.routing",
    "TokenChoice": "moetk.routing",
    "compare": "moetk.equivalence.comparison",
    "record": "moetk.layers.recording",
    "register": "moetk.layers.register",
    "replace_moe": "moetk.layers.replace",
    "replay": "moetk.layers.recording",
    "speed_up": "moetk.layers.step",
    "trace": "moetk.equivalence.tracing",
}

if TYPE_CHECKING:  # what editors and mypy read; a test holds it equal to the tables
    from moetk import controllers, dispatch, losses, metrics, routers
    from moetk import parallel as parallel
    from moetk.auto import AutoModelForCausalLM
    from moetk.context import RouterContext
    from moetk.equivalence.comparison import compare
    from moetk.equivalence.tracing import trace
    from moetk.errors import MoetkError
    from moetk.experts import ExpertBank
    from moetk.layers.find import BlockSpec
    from moetk.layers.moe import MoELayer
    from moetk.layers.recording import record, replay
    from moetk.layers.register import register
    from moetk.layers.replace import replace_moe
    from moetk.layers.replacement import Replacement
    from moetk.layers.step import speed_up
    from moetk.routers import LinearRouter
    from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
else:  # hidden from type checkers, so that they still flag a name that is not there

    def __getattr__(name: str) -> Any:
        if name in _ROOMS | _UNLISTED:
            return import_module(f"moetk.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'moetk' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # the next touch is an ordinary lookup
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
