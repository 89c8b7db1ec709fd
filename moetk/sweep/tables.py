"""Reading a table of a TOML file: types, unknown keys, and values out of range, in words.

`where` is how a message begins: "[train] lr". Everything here raises ConfigError.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from moetk.errors import ConfigError

S = TypeVar("S")


def settings_of(cls: type[S], raw: Any, where: str) -> S:
    """A dataclass from a table: known keys, right types, defaults for what is left out."""
    table = table_of(raw, where)
    only_known(table, [f.name for f in fields(cls)], where)  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {key: value_of(hints[key], value, f"{where} {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except TypeError:
        missing = [key for key in hints if key not in values and not hasattr(cls, key)]
        raise ConfigError(f"{where} lacks {', '.join(missing)}.") from None


def value_of(kind: Any, value: Any, where: str) -> Any:
    """`value` as a str, bool, int, float or tuple of ints; TOML's 1 is a fine float, its true no
    int."""
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind is float and type(value) is float and math.isfinite(value):
        return value
    if kind == tuple[int, ...] and isinstance(value, list):
        return tuple(value_of(int, item, where) for item in value)
    words = {
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
    }
    raise ConfigError(
        f"{where} is {value!r}; {words.get(kind, 'a list of whole numbers')} is needed."
    )


def table_of(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}; a table is needed.")
    return raw


def only_known(raw: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in names:
            raise ConfigError(f"{where} has no setting {key!r}{nearest(key, names)}")


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest one, or all where none is near."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}."


def need(holds: bool, where: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{where} = {value!r}; allowed: {allowed}.")


def need_positive(table: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        need(value > 0, f"{table} {name}", value, "more than 0")


def need_one_of(where: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise ConfigError(f"{where} = {value!r}{nearest(value, names)}")


def is_plain_name(name: str) -> bool:
    """Whether it may name a folder and stand in a figure."""
    return 0 < len(name) <= 60 and name[0] != "." and all(c.isalnum() or c in "-_." for c in name)


def need_json(value: Any, where: str) -> None:
    """An argument is what JSON can say: it enters the key of the cell."""
    if isinstance(value, dict):
        for key, inner in value.items():
            need_json(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            need_json(inner, where)
    elif not isinstance(value, (str, int, float)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ConfigError(f"{where} is {value!r}; a string, bool, finite number, list or table.")
