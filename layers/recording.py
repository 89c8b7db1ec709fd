"""`moetk.record` and `moetk.replay`: the routing of a replaced model, out and in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from moetk.errors import ReplayError, UnsupportedRoutingError
from moetk.layers.carrier import Carrier
from moetk.layers.replacement import replacement_of
from moetk.recorded import Recording
from moetk.routing import Routing, TokenChoice


@contextmanager
def record(model: nn.Module, *, fields: tuple[str, ...] = ()) -> Iterator[Recording]:
    """Record the routing of every forward of a replaced model.

    fields: of ("logits_TE", "scores_TE", "choice_TE", "extras"), what to keep beside ids, weights
    and what was dropped. A recompute under activation checkpointing is not recorded again.

    Raises ReplaceError when the model was not replaced.
    """
    carrier = replacement_of(model).carrier
    recording = Recording(fields)
    before = carrier.recordings
    carrier.recordings = (*before, recording)
    try:
        yield recording
    finally:
        carrier.recordings = before


class _Player:
    """Feeds a recording's forwards in their order."""

    def __init__(self, recording: Recording, weights: str) -> None:
        self.recording, self.weights, self.index = recording, weights, 0

    def next(self) -> tuple[dict[int, list[Routing]], str]:
        if self.index >= self.recording.num_forwards:
            raise ReplayError(
                f"The recording holds {self.recording.num_forwards} forwards and this is one more: "
                "replay the batches that were recorded, in their order."
            )
        self.index += 1
        return self.recording.forwards[self.index - 1], self.weights


@contextmanager
def replay(
    model: nn.Module,
    recording: Recording,
    *,
    weights: Literal["recompute", "stored"] = "recompute",
) -> Iterator[None]:
    """Run the model with the choices of `recording`, forward by forward.

    weights: "recompute" takes them from the live router, with its gradient; "stored" takes the
    recorded ones. Capacity, where the router or dispatcher has one, applies after the choice.

    Raises ReplayError when layers or lengths differ, or when a router ignores the replay;
    UnsupportedRoutingError for recordings of anything but TokenChoice.
    """
    if weights not in ("recompute", "stored"):
        raise ReplayError(f'weights={weights!r}; "recompute" or "stored".')
    replacement = replacement_of(model)
    layers = {site.layer for site in replacement.sites}
    if set(recording) != layers:
        raise ReplayError(
            f"The recording holds layers {sorted(recording)}, this model has {sorted(layers)}."
        )
    for layer, entries in recording.items():
        if any(not isinstance(entry, TokenChoice) for entry in entries):
            raise UnsupportedRoutingError(f"Layer {layer}: only a TokenChoice can be replayed.")
    carrier: Carrier = replacement.carrier
    before, carrier.player = carrier.player, _Player(recording, weights)
    try:
        yield
    finally:
        carrier.player = before
