"""Put a shell directly on a stock class, below what replace_moe put in front of it or will put.

`replace_moe`, restoring, takes the topmost class off a model. A shell of the step lies below and is
not marked as one of its own: it is neither taken off with the other nor in its way, in any order.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from moetk.layers.swap import extend, own_class, withdraw


@functools.cache
def _with_shell(stock: type, shell: type) -> type:
    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (stock, shell), self.__getstate__()

    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_moetk_under": stock,
    }
    return type(stock.__name__, (shell, stock), namespace)


def _rebuild(stock: type, shell: type) -> Any:
    cls: Any = _with_shell(stock, shell)
    return cls.__new__(cls)


def stock_class(module: nn.Module) -> Any:
    """The class that transformers wrote, whether or not a shell is in front of it."""
    own = own_class(module)
    return vars(own).get("_moetk_under", own)


def slip_under(module: nn.Module, shell: type) -> None:
    """Put `shell` in front of the module's stock class, in place.

    Raises ReplaceError, and changes nothing, where another library holds the module's forward.
    """
    if shell in type(module).__mro__:
        return  # there already, below a class that another library put on top
    above = _lift(module)
    try:
        stock: Any = type(module)
        extend(module, shell)  # looks after a forward that accelerate keeps on the instance
        module.__class__ = _with_shell(stock, shell)
    finally:
        _lay(module, above)


def take_out(module: nn.Module) -> None:
    """Its counterpart. Below a class that another library put on top since, the shell stays."""
    above = _lift(module)
    stock = vars(type(module)).get("_moetk_under")
    if stock is not None:
        module.__class__ = stock
        if "_old_forward" in vars(module):
            vars(module)["_old_forward"] = stock.forward.__get__(module)
    _lay(module, above)


def _lift(module: nn.Module) -> list[tuple[type, ...]]:
    """Take replace_moe's classes off the module; the lowest comes first."""
    above: list[tuple[type, ...]] = []
    while "_moetk_original" in vars(type(module)):
        above.insert(0, type(module).__bases__[:-1])
        withdraw(module)
    return above


def _lay(module: nn.Module, above: list[tuple[type, ...]]) -> None:
    for mixins in above:
        extend(module, *mixins)
