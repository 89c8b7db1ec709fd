"""From the names in a sweep's TOML to routers, losses and controllers. Cell processes only: a
user's "module:function" is imported, and so run, here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetk import controllers, losses, routers
from moetk.errors import ConfigError
from moetk.sweep.config import Arm, Part
from moetk.sweep.tables import nearest, value_of

if TYPE_CHECKING:
    from moetk import BlockSpec

STOCK = "stock"
# A base to build on, and one whose choices cannot be counted: it makes none.
NOT_COMPARED = ("LinearRouter", "SoftMoERouter")
# Annotations that a TOML value can be checked against, as both kinds of module spell them.
KINDS = {spelled: kind for kind in (bool, int, float, str) for spelled in (kind, kind.__name__)}

Make = Callable[..., Any]


def router_factory(arm: Arm) -> Callable[[BlockSpec], Any] | None:
    """The arm's router as replace_moe wants it; None leaves the model's own ("stock").

    moetk's routers get (hidden_size, num_experts, top_k, **args), a user's function (spec, **args).
    Raises ConfigError for an unknown name or argument; the factory, for one that does not work.
    """
    part, where = arm.router, f"[[arm]] {arm.name} router"
    if part.name == STOCK and not part.args:
        return None
    if part.is_users:
        users = _users(part, where)
        _takes(users, (object,), part, where)
        return lambda spec: _call(users, (spec,), part, where)
    make = _named(part, _routers(), where)
    _takes(make, (1, 1, 1), part, where)
    return lambda spec: _call(make, (spec.hidden_size, spec.num_experts, spec.top_k), part, where)


def arm_losses(arm: Arm) -> list[Any]:
    """The arm's losses. Raises ConfigError for an unknown name, or an argument that it refuses."""
    return [_made(part, _public(losses), f"[[arm]] {arm.name} losses") for part in arm.losses]


def arm_controllers(arm: Arm) -> list[Any]:
    """The arm's controllers. Raises ConfigError as arm_losses does."""
    where = f"[[arm]] {arm.name} controllers"
    return [_made(part, _public(controllers), where) for part in arm.controllers]


def import_users(arm: Arm) -> None:
    """Import the modules of the user's that the arm names. Raises ConfigError."""
    for part in arm.parts:
        if part.is_users:
            _users(part, f"[[arm]] {arm.name}")


def _made(part: Part, known: dict[str, Make], where: str) -> Any:
    make = _users(part, where) if part.is_users else _named(part, known, where)
    _takes(make, (), part, where)
    return _call(make, (), part, where)


def _routers() -> dict[str, Make]:
    """Classes of moetk.routers and settings of its catalogue, without what they are made of."""
    classes = {
        name: make
        for name, make in _public(routers).items()
        if name.endswith("Router") and name not in NOT_COMPARED
    }
    published = {
        name: make
        for name, make in vars(routers.catalogue).items()
        if inspect.isfunction(make) and make.__module__ == routers.catalogue.__name__
    }
    return {**classes, **published}


def _public(room: Any) -> dict[str, Make]:
    return {name: getattr(room, name) for name in room.__all__ if callable(getattr(room, name))}


def _named(part: Part, known: dict[str, Make], where: str) -> Make:
    if part.name not in known:
        raise ConfigError(f"{where} = {part.name!r}{nearest(part.name, sorted(known))}")
    return known[part.name]


def _users(part: Part, where: str) -> Make:
    module, _, function = part.name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except ImportError as error:
        raise ConfigError(f"{where}: {part.name!r} cannot be imported: {error}.") from error
    except AttributeError:
        raise ConfigError(f"{where}: module {module!r} has no {function!r}.") from None
    if not callable(found):
        raise ConfigError(f"{where}: {part.name!r} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


def _call(make: Make, given: tuple[Any, ...], part: Part, where: str) -> Any:
    """`make` with the part's arguments; what it raises names them, which a TypeError does not."""
    try:
        return make(*given, **part.args)
    except Exception as error:
        args = ", ".join(f"{key}={value!r}" for key, value in part.args.items())
        raise ConfigError(
            f"{where}: {part.name}({args}): {type(error).__name__}: {error}"
        ) from error


def _takes(make: Make, given: tuple[Any, ...], part: Part, where: str) -> None:
    signature = inspect.signature(make)
    try:
        signature.bind(*given, **part.args)
    except TypeError as error:
        raise ConfigError(f"{where}: {part.name}{signature}: {error}.") from None
    for name, value in part.args.items():
        parameter = signature.parameters.get(name)
        if parameter is not None and parameter.annotation in KINDS:
            value_of(KINDS[parameter.annotation], value, f"{where}: {part.name} {name}")
