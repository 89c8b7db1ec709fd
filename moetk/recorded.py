"""What was routed where: the values that `moetk.record` fills and `moetk.replay` feeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moetk.context import RouterContext
from moetk.errors import ReplayError, UnsupportedRoutingError
from moetk.routing import Routing, TokenChoice, detached


class Recording:
    """The routing of every layer, one entry a forward.

    >>> with moetk.record(model) as rec:
    ...     model(input_ids=ids)
    >>> rec[0][-1].experts_TK  # decoder layer 0, the last forward

    fields: the optional (T, E) fields to keep ("logits_TE", "scores_TE", "choice_TE", "extras");
    ids, weights and what was dropped are always kept. Everything is detached, on its own device.
    """

    def __init__(self, fields: tuple[str, ...] = ()) -> None:
        self.fields = frozenset(fields)
        self._layers: dict[int, list[Routing]] = {}

    def add(self, layer: int, routing: Routing) -> None:
        self._layers.setdefault(layer, []).append(detached(routing, self.fields))

    def __getitem__(self, layer: int) -> list[Routing]:
        if layer not in self._layers:
            raise ReplayError(
                f"Layer {layer} was not recorded; recorded layers: {list(self._layers) or 'none'}."
            )
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._layers))

    def __len__(self) -> int:
        return len(self._layers)

    def items(self) -> list[tuple[int, list[Routing]]]:
        return [(layer, self._layers[layer]) for layer in self]

    @property
    def num_forwards(self) -> int:
        return max((len(entries) for entries in self._layers.values()), default=0)

    def forward(self, index: int) -> dict[int, Routing]:
        """Every layer's routing of one forward, layers in order."""
        return {layer: entries[index] for layer, entries in self.items() if index < len(entries)}


def check_obeyed(routing: Routing, ctx: RouterContext, router: str) -> None:
    """Raise ReplayError where ctx names a choice to take and `router` took another.

    Values are compared outside torch.compile only. Raises UnsupportedRoutingError for a routing
    that no replay can force.
    """
    if ctx.replay is None:
        return
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(f"{router}: only a TokenChoice can be replayed.")
    if torch.compiler.is_compiling():
        return
    same = routing.experts_TK.shape == ctx.replay.shape and torch.equal(
        routing.experts_TK, ctx.replay.to(routing.experts_TK.device)
    )
    if not same:
        raise ReplayError(
            f"{router} did not take the replayed choice: its forward ignores ctx.replay. "
            "Choose with moetk.routers.top_k, or return ctx.replayed(experts_TK)."
        )
