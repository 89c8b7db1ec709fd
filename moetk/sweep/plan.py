"""The cells of a sweep, the key of each, and what changed between two sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moetk.io import canonical, sha256
from moetk.sweep.config import Config


@dataclass(frozen=True)
class World:
    """What a cell's result depends on beside its settings.

    data: {"sha256": ..., and what was read}. code: {"moetk": {file: sha256}, "modules": the same
    for the modules that the TOML's folder gave, "versions": {package: version}}.
    """

    data: Mapping[str, Any]
    code: Mapping[str, Any]

    def differences(self, data: Mapping[str, Any], code: Mapping[str, Any]) -> list[str]:
        """What a process that reads `data` and runs `code` has otherwise, one line each. Fewer of
        the user's modules are no difference: an arm loads its own."""
        known = self.code["modules"]
        shared = {name: known[name] for name in code["modules"] if name in known}
        mine = {"data": self.data, "code": {**self.code, "modules": shared}}
        return changes(mine, {"data": data, "code": code})

    def brief(self) -> dict[str, Any]:
        """The code with moetk's files as one checksum: what a row carries."""
        return {**self.code, "moetk": sha256(canonical(self.code["moetk"]))}


@dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed. key: sha256 over settings, seed, data and code."""

    key: str
    arm: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.arm}/{self.seed}"


def cell_key(settings: Mapping[str, Any], seed: int, world: World) -> str:
    """Equal keys mean an equal `row.result`."""
    return sha256(
        canonical(
            {"config": settings, "seed": seed, "data": world.data["sha256"], "code": world.brief()}
        )
    )


def plan_cells(config: Config, world: World) -> list[Cell]:
    """Every cell, seed by seed, so that all arms can be compared as early as possible."""
    cells = []
    for seed in config.sweep.seeds:
        for arm in config.arms:
            settings = config.cell(arm).settings()
            cells.append(Cell(cell_key(settings, seed, world), arm.name, seed, settings))
    return cells


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two trees of settings, one line each: "train lr 0.003 -> 0.001"."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path, "nothing"), after.get(path, "nothing")
        if was != now:
            lines.append(" ".join(filter(None, (*path, _short(was), "->", _short(now)))))
    return lines


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[tuple[str, str], Any]]:
    """((path, key), value) for every leaf. A list of tables shows its position when it has
    several, so that the usual single one reads as `arms.sign.controllers rate`."""
    items: list[tuple[str, Any]]
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    else:
        items = [(f"[{index}]" if len(tree) > 1 else "", value) for index, value in enumerate(tree)]
    for key, value in items:
        if isinstance(value, Mapping) or _is_tables(value):
            dot = "." if path and key and not key.startswith("[") else ""
            yield from _leaves(value, f"{path}{dot}{key}")
        else:
            yield (path, key), value


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _short(value: Any) -> str:
    text = str(value)
    return text[:9] + "..." if len(text) == 64 else text
