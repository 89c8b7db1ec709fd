"""`speed_up`: moetk's norms, residuals, rotation and loss in a stock model, reversible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from moetk.errors import ReplaceError, UnsupportedModelError
from moetk.layers.find import root_of
from moetk.layers.step.attention import ROPE
from moetk.layers.step.loss import LOSS
from moetk.layers.step.norm import NORM
from moetk.layers.step.part import ACTIVE, Part
from moetk.layers.step.residual import RESIDUAL
from moetk.layers.step.under import slip_under, take_out
from moetk.layers.swap import own_class

PARTS = (NORM, RESIDUAL, ROPE, LOSS)
STEP = "_moetk_speed_up"


@dataclass(frozen=True, eq=False)
class Place:
    """A module that a part concerns. refusal: why it stays stock, None = the part takes it."""

    part: Part
    module: nn.Module
    refusal: str | None


class Step:
    """What `speed_up` did to a model, and the way back."""

    def __init__(self, model: nn.Module, places: Sequence[Place], off: Sequence[Part]) -> None:
        self.model, self.places, self.off = model, tuple(places), tuple(off)

    def install(self) -> None:
        """Put the parts in again after `restore`; all of them, or none where one cannot be.

        Raises ReplaceError while another Step holds the model.
        """
        holder = vars(self.model).get(STEP)
        if holder is not None and holder is not self:
            raise ReplaceError(
                f"{type(self.model).__name__} is held by another Step: restore that first."
            )
        try:
            for place in self._taken():
                slip_under(place.module, place.part.shell)
                vars(place.module)[ACTIVE] = True
        except Exception:
            self._take_out()
            raise
        vars(self.model)[STEP] = self

    def restore(self) -> None:
        """Give the model its own classes back. Does nothing once it was restored, or sped up anew.

        Where FSDP2 has put its class on top, ours stays below it and lets the stock code through.
        """
        if vars(self.model).get(STEP) is self:
            self._take_out()
            del vars(self.model)[STEP]

    def _taken(self) -> list[Place]:
        return [place for place in self.places if place.refusal is None]

    def _take_out(self) -> None:
        for place in self._taken():
            if vars(place.module).pop(ACTIVE, False):
                take_out(place.module)

    def explain(self) -> str:
        """A table: each part, its modules, how many of them, what runs there now and why."""
        table = Table(title=f"{type(self.model).__name__}: the rest of the step", box=None)
        for column in ("part", "module", "number", "runs"):
            table.add_column(column, overflow="fold")
        for line, number in Counter(map(self._line, self.places)).items():
            table.add_row(*line[:2], str(number), line[2])
        for part in self.off:
            table.add_row(part.name, "-", "-", f"stock: asked for with {part.name}=False")
        out = StringIO()
        Console(file=out, width=110, color_system=None).print(table)
        return out.getvalue()

    def _line(self, place: Place) -> tuple[str, str, str]:
        name = own_class(place.module).__name__
        if place.refusal is not None:
            return place.part.name, name, f"stock: {place.refusal}"
        if ACTIVE not in vars(place.module):
            return place.part.name, name, "stock: restored"
        return place.part.name, name, place.part.runs(place.module)

    def __repr__(self) -> str:
        return self.explain()


def speed_up(
    model: nn.Module,
    *,
    norm: bool = True,
    residual: bool = True,
    rope: bool = True,
    loss: bool = True,
) -> Step:
    """Make the rest of this model's training step faster, in place: all but its expert layers.

    norm: RMSNorms run in one kernel each way.
    residual: with the sum before such a norm, and with the gradient of the residual stream beside
        it, in that same kernel; nothing without norm.
    rope: queries and keys are normed and rotated in one kernel each way.
    loss: in training with labels, loss and gradients are computed by chunks of rows; `out.logits`
        is None there. loss=False keeps them.

    Each acts on the modules whose class it knows and leaves the others stock; `explain` says which,
    and what runs. Parameters, their names and checkpoints stay as they are; other models, and
    transformers' own modules, are never touched. It goes with replace_moe in either order.
    Under torch.compile the loss computes unlabelled rows too.

    Speeding up a second time starts from the stock model again. Nothing changes when it raises:
    UnsupportedModelError where no module of the model is known, ReplaceError where another library
    holds a module's forward.
    """
    root: Any = root_of(model)
    wanted = {NORM: norm, RESIDUAL: residual, ROPE: rope, LOSS: loss}
    places = [
        Place(part, module, part.refusal(module))
        for part in PARTS
        if wanted[part]
        for module in root.modules()
        if part.concerns(module)
    ]
    if any(wanted.values()) and all(place.refusal is not None for place in places):
        raise UnsupportedModelError(
            f"{type(root).__name__}: nothing to speed up. "
            + "; ".join(dict.fromkeys(place.refusal or "" for place in places))
        )
    earlier = vars(root).get(STEP)
    if isinstance(earlier, Step):
        earlier.restore()
    step = Step(root, places, [part for part in PARTS if not wanted[part]])
    try:
        step.install()
    except Exception:
        if isinstance(earlier, Step):
            earlier.install()
        raise
    return step
