"""Traces of implementations, compared stage by stage and judged against fp64.

`moetk.compare` and `moetk.trace` are the way in; here is what else a caller may want. Names are
loaded when first touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["ModelReport", "Report", "Trace", "compare_models", "load_trace", "save_trace"]

_MODULE_OF = {
    "ModelReport": "moetk.equivalence.model_report",
    "Report": "moetk.equivalence.report",
    "Trace": "moetk.equivalence.trace",
    "compare_models": "moetk.equivalence.models",
    "load_trace": "moetk.equivalence.stored",
    "save_trace": "moetk.equivalence.stored",
}

if TYPE_CHECKING:
    from moetk.equivalence.model_report import ModelReport
    from moetk.equivalence.models import compare_models
    from moetk.equivalence.report import Report
    from moetk.equivalence.stored import load_trace, save_trace
    from moetk.equivalence.trace import Trace
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'moetk.equivalence' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
