"""A sweep's TOML file as frozen dataclasses, checked in one place.

Every number of a run is here, so that a row in the results says all that was asked for.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moetk.errors import ConfigError
from moetk.sweep.tables import (
    is_plain_name,
    need,
    need_json,
    need_one_of,
    need_positive,
    only_known,
    settings_of,
    table_of,
    value_of,
)

FAMILIES = ("qwen3_moe",)
CORPORA = ("python_stdlib",)
BACKENDS = ("auto", "stock", "reference", "grouped")


@dataclass(frozen=True)
class SweepSettings:
    """[sweep]. seeds: one cell per arm and seed; the same seed gives every arm the same initial
    model and the same batches. steps: optimizer steps. baseline: the arm that others are compared
    with. timeout: seconds a cell may take."""

    name: str
    seeds: tuple[int, ...]
    steps: int
    baseline: str
    timeout: float = 900.0


@dataclass(frozen=True)
class ModelSettings:
    """[model]. A Transformers model of this family with random weights, vocabulary = bytes."""

    family: str = "qwen3_moe"
    hidden_size: int = 64
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    intermediate_size: int = 64
    heads: int = 4
    kv_heads: int = 2


@dataclass(frozen=True)
class DataSettings:
    """[data]. max_bytes: the corpus is cut to whole files of at most this size together.
    held_out: share of the files that is never trained on."""

    kind: str = "python_stdlib"
    max_bytes: int = 4_000_000
    held_out: float = 0.1


@dataclass(frozen=True)
class TrainSettings:
    """[train]. lr rises linearly over `warmup` steps, then falls as a cosine to final_lr x lr.
    eval_every: steps between two held-out losses; eval_batches: batches in each."""

    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    batch_size: int = 8
    sequence_length: int = 128
    threads: int = 1
    eval_every: int = 50
    eval_batches: int = 8


@dataclass(frozen=True)
class Part:
    """A router, loss or controller: a name of moetk's, or a user's "module:function", and its
    arguments."""

    name: str
    args: Mapping[str, Any]

    @property
    def is_users(self) -> bool:
        return ":" in self.name


@dataclass(frozen=True)
class Arm:
    """[[arm]]. lr: this arm's own learning rate, None = [train] lr. backend: as in replace_moe."""

    name: str
    router: Part
    losses: tuple[Part, ...] = ()
    controllers: tuple[Part, ...] = ()
    lr: float | None = None
    backend: str = "auto"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.router, *self.losses, *self.controllers)


@dataclass(frozen=True)
class CellConfig:
    """All that one cell depends on beside its seed: not the other arms, nor how they compare."""

    steps: int
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    arm: Arm

    @property
    def lr(self) -> float:
        return self.train.lr if self.arm.lr is None else self.arm.lr

    def settings(self) -> dict[str, Any]:
        """As plain JSON values: what the cell's key and row hold."""
        return {
            "steps": self.steps,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "train": asdict(self.train),
            "arm": {"name": self.arm.name, **arm_settings(self.arm)},
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> CellConfig:
        """The way back, in the cell's process."""
        arm = settings["arm"]
        return cls(
            steps=settings["steps"],
            model=ModelSettings(**settings["model"]),
            data=DataSettings(**settings["data"]),
            train=TrainSettings(**settings["train"]),
            arm=Arm(
                name=arm["name"],
                router=_part(arm["router"], "router"),
                losses=_parts(arm["losses"], "losses"),
                controllers=_parts(arm["controllers"], "controllers"),
                lr=arm["lr"],
                backend=arm["backend"],
            ),
        )


@dataclass(frozen=True)
class Config:
    """A whole sweep. folder: where the TOML lies, and where its "module:function" names resolve.
    source: the TOML's text; path: as it was given. None of them is part of what was asked for."""

    sweep: SweepSettings
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    arms: tuple[Arm, ...]
    folder: Path
    source: str = ""
    path: Path = Path("sweep.toml")

    def cell(self, arm: Arm) -> CellConfig:
        return CellConfig(self.sweep.steps, self.model, self.data, self.train, arm)

    @property
    def command(self) -> str:
        """What starts this sweep from its source."""
        asked = tomllib.loads(self.source).get("sweep", {}).get("steps", self.sweep.steps)
        limit = "" if asked == self.sweep.steps else f" --limit-steps {self.sweep.steps}"
        return f"moetk sweep {shlex.quote(str(self.path))}{limit}"

    def settings(self) -> dict[str, Any]:
        """As plain JSON values, arms by name."""
        return {
            "sweep": {**asdict(self.sweep), "seeds": list(self.sweep.seeds)},
            "model": asdict(self.model),
            "data": asdict(self.data),
            "train": asdict(self.train),
            "arms": {arm.name: arm_settings(arm) for arm in self.arms},
        }

    def limited(self, steps: int) -> Config:
        """The same sweep with at most this many steps. Raises ConfigError below one."""
        if steps < 1:
            raise ConfigError(f"--limit-steps {steps}; allowed: 1 or more.")
        return replace(self, sweep=replace(self.sweep, steps=min(steps, self.sweep.steps)))


def arm_settings(arm: Arm) -> dict[str, Any]:
    """An arm as plain JSON values, without its name."""
    return {
        "router": {"name": arm.router.name, **arm.router.args},
        "losses": [{"name": part.name, **part.args} for part in arm.losses],
        "controllers": [{"name": part.name, **part.args} for part in arm.controllers],
        "lr": arm.lr,
        "backend": arm.backend,
    }


def load_config(path: Path) -> Config:
    """Read and check a sweep's TOML file. Runs nothing that it names.

    Raises ConfigError naming the table, the key, its value and what is allowed.
    """
    try:
        source = path.read_text(encoding="utf-8")
        raw = tomllib.loads(source)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    return replace(parse_config(raw, path.resolve().parent), source=source, path=path)


def parse_config(raw: Mapping[str, Any], folder: Path) -> Config:
    """Check a sweep's tables. Raises ConfigError as load_config does."""
    only_known(raw, ("sweep", "model", "data", "train", "arm"), "The file")
    arms = raw.get("arm", [])
    if not isinstance(arms, list) or not arms:
        raise ConfigError("The file has no [[arm]]; a sweep compares at least one.")
    config = Config(
        sweep=settings_of(SweepSettings, raw.get("sweep", {}), "[sweep]"),
        model=settings_of(ModelSettings, raw.get("model", {}), "[model]"),
        data=settings_of(DataSettings, raw.get("data", {}), "[data]"),
        train=settings_of(TrainSettings, raw.get("train", {}), "[train]"),
        arms=tuple(_arm(table, index) for index, table in enumerate(arms)),
        folder=folder,
    )
    _check(config)
    return config


def _check(config: Config) -> None:
    """Every rule on a value, in the order of the file."""
    sweep, model, data, train = config.sweep, config.model, config.data, config.train
    need(is_plain_name(sweep.name), "[sweep] name", sweep.name, "letters, digits, '-', '_', '.'")
    seeds = sweep.seeds
    need(len(seeds) > 0, "[sweep] seeds", list(seeds), "at least one")
    need(len(set(seeds)) == len(seeds), "[sweep] seeds", list(seeds), "no seed twice")
    need(min(seeds) >= 0, "[sweep] seeds", list(seeds), "0 or more")
    need_positive("[sweep]", sweep, "steps", "timeout")

    need_one_of("[model] family", model.family, FAMILIES)
    need_positive(
        "[model]", model, "hidden_size", "layers", "experts", "top_k", "intermediate_size"
    )
    need_positive("[model]", model, "heads", "kv_heads")
    need(
        model.top_k <= model.experts, "[model] top_k", model.top_k, f"<= experts = {model.experts}"
    )
    need(
        model.hidden_size % (2 * model.heads) == 0,
        "[model] heads",
        model.heads,
        f"an even share of hidden_size = {model.hidden_size} a head",
    )
    need(
        model.heads % model.kv_heads == 0,
        "[model] kv_heads",
        model.kv_heads,
        f"a divisor of heads = {model.heads}",
    )

    need_one_of("[data] kind", data.kind, CORPORA)
    need_positive("[data]", data, "max_bytes")
    need(0 < data.held_out < 1, "[data] held_out", data.held_out, "between 0 and 1")

    need_positive(
        "[train]", train, "lr", "clip", "batch_size", "threads", "eval_every", "eval_batches"
    )
    need(0 <= train.final_lr <= 1, "[train] final_lr", train.final_lr, "0 to 1, a share of lr")
    need(train.warmup >= 0, "[train] warmup", train.warmup, "0 or more")
    need(train.weight_decay >= 0, "[train] weight_decay", train.weight_decay, "0 or more")
    need(train.sequence_length >= 2, "[train] sequence_length", train.sequence_length, "2 or more")

    names = [arm.name for arm in config.arms]
    for arm in config.arms:
        where = f"[[arm]] {arm.name}"
        need(is_plain_name(arm.name), "[[arm]] name", arm.name, "letters, digits, '-', '_', '.'")
        need(names.count(arm.name) == 1, "[[arm]] name", arm.name, "no name twice")
        need(arm.lr is None or arm.lr > 0, f"{where} lr", arm.lr, "more than 0")
        need_one_of(f"{where} backend", arm.backend, BACKENDS)
    need_one_of("[sweep] baseline", sweep.baseline, names)


def _arm(raw: Any, index: int) -> Arm:
    where = f"[[arm]] number {index + 1}"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}, not a table.")
    if isinstance(raw.get("name"), str):
        where = f"[[arm]] {raw['name']}"
    only_known(raw, ("args", *(f.name for f in fields(Arm))), where)
    for key in ("name", "router"):
        if not isinstance(raw.get(key), str):
            raise ConfigError(f"{where} {key} is {raw.get(key)!r}; a string is needed.")
    lr, args = raw.get("lr"), table_of(raw.get("args", {}), f"{where} args")
    if "name" in args:
        raise ConfigError(f"{where} args has 'name', which is the router's own, in router = ....")
    return Arm(
        name=raw["name"],
        router=_part({"name": raw["router"], **args}, f"{where} router"),
        losses=_parts(raw.get("losses", []), f"{where} losses"),
        controllers=_parts(raw.get("controllers", []), f"{where} controllers"),
        lr=None if lr is None else value_of(float, lr, f"{where} lr"),
        backend=value_of(str, raw.get("backend", "auto"), f"{where} backend"),
    )


def _parts(raw: Any, where: str) -> tuple[Part, ...]:
    if not isinstance(raw, list):
        raise ConfigError(f"{where} is {raw!r}; a list of tables is needed, [{{ name = ... }}].")
    return tuple(_part(table, where) for table in raw)


def _part(raw: Any, where: str) -> Part:
    args = dict(table_of(raw, where))
    name = args.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name is {name!r}; a name of moetk's or 'module:function'.")
    if ":" in name:
        module, _, function = name.partition(":")
        if not all(word.isidentifier() for word in (*module.split("."), function)):
            raise ConfigError(f"{where}: {name!r} is not 'module:function'.")
    for key, value in args.items():
        need_json(value, f"{where} {key}")
    return Part(name, args)
