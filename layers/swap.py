"""Give one module another class and take it back, without the library noticing.

The new class keeps the old one's `__name__`, `__module__` and `__qualname__`: transformers' output
recorders, FSDP's wrapping and `_no_split_modules` are keyed on them. Classes are cached, so that
equal layers share compiled code, and rebuilt by name on unpickling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moetk.errors import ReplaceError


@functools.cache
def _extended(original: type, mixins: tuple[type, ...]) -> type:
    def __reduce_ex__(self: Any, protocol: int) -> Any:
        if type(self) is not cls:  # another class on top, which is not ours to rebuild
            return original.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        return _rebuild, (original, mixins), self.__getstate__()

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_moetk_original": original,
    }
    cls = type(original.__name__, (*mixins, original), namespace)
    return cls


def _rebuild(original: type, mixins: tuple[type, ...]) -> Any:
    cls: Any = _extended(original, mixins)
    return cls.__new__(cls)


def extend(module: nn.Module, *mixins: type) -> None:
    """Put `mixins` in front of the module's class, in place.

    accelerate keeps a module's forward on the instance; it is re-pointed. Raises ReplaceError where
    another library did so and left no way to the class's own forward.
    """
    original: Any = type(module)
    if all(mixin in original.__mro__ for mixin in mixins):
        return  # there already, below a class that another library put on top
    cls = _extended(original, mixins)
    _drop_left_forward(module)
    _check_instance_forward(module)
    with _repointed(module):
        module.__class__ = cls


def withdraw(module: nn.Module) -> bool:
    """Give the module its own class back. False when another class (FSDP2) was put on top since."""
    original = vars(type(module)).get("_moetk_original")
    if original is None:
        return False
    _drop_left_forward(module)
    with _repointed(module):
        module.__class__ = original
    return True


def is_extended(module: nn.Module) -> bool:
    return hasattr(type(module), "_moetk_original")


def own_class(module: nn.Module) -> type:
    """The class as transformers wrote it: below moetk's and FSDP2's."""
    for cls in type(module).__mro__:
        ours = "_moetk_original" in vars(cls) or cls.__name__.startswith("FSDP")
        if cls.__module__.startswith("transformers.") and not ours:
            return cls
    return type(module)


def _drop_left_forward(module: nn.Module) -> None:
    """accelerate, removing its hook, leaves the class's own forward on the instance."""
    left = getattr(vars(module).get("forward"), "__func__", None)
    if left is type(module).forward:
        del vars(module)["forward"]


def _check_instance_forward(module: nn.Module) -> None:
    own = "_old_forward" if "_old_forward" in vars(module) else "forward"
    if own in vars(module) and not _is_class_forward(vars(module)[own], module):
        raise ReplaceError(
            f"{type(module).__name__} has a forward of its own on the instance (expert parallelism "
            "of transformers, or a patch): a new class would never be called. Replace before it is "
            "set, or use moetk.register() and experts_implementation='moetk'."
        )


def _is_class_forward(forward: Any, module: nn.Module) -> bool:
    """Whether it is that of the module's class, or was before somebody patched the class."""
    function: Any = getattr(forward, "__func__", None)
    if function is type(module).forward:
        return True
    # By where it was written: functools.wraps puts another's name on a user's.
    home: str = getattr(function, "__globals__", {}).get("__name__", "")
    return home.startswith("transformers.") and bool(function.__name__ == "forward")


@contextmanager
def _repointed(module: nn.Module) -> Iterator[None]:
    """What accelerate's hook calls is the forward of the new class, where it was the old one's."""
    old_forward = vars(module).get("_old_forward")
    follows = old_forward is not None and _is_class_forward(old_forward, module)
    yield
    if follows:
        bound: Callable[..., Any] = type(module).forward.__get__(module)
        vars(module)["_old_forward"] = bound
