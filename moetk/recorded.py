"""What was routed where: the values that `moetk.record` fills and `moetk.replay` feeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from moetk.context import RouterContext
from moetk.errors import ReplayError, UnsupportedRoutingError
from moetk.routing import Routing, TokenChoice, detached

FIELDS = ("logits_TE", "scores_TE", "choice_TE", "extras")


class Recording:
    """The routing of every layer, forward by forward.

    >>> with moetk.record(model) as rec:
    ...     model(input_ids=ids)
    >>> rec[0][-1].experts_TK  # decoder layer 0, the last forward

    A forward is recorded whole when it has returned: one that raised leaves nothing. A tied layer
    has as many entries a forward as it was called.

    fields: of ("logits_TE", "scores_TE", "choice_TE", "extras"), what to keep beside ids, weights
    and what was dropped. Everything is detached, on its own device. Raises ReplayError for another
    field.
    """

    def __init__(self, fields: Sequence[str] = ()) -> None:
        unknown = [fields] if isinstance(fields, str) else [f for f in fields if f not in FIELDS]
        if unknown:
            raise ReplayError(f"fields={fields!r}: name them in a tuple, of {', '.join(FIELDS)}.")
        self.fields = frozenset(fields)
        self.forwards: list[dict[int, list[Routing]]] = []

    def append(self, forward: Mapping[int, Sequence[Routing]]) -> None:
        """Add one forward: each layer's routings, in the order of its calls."""
        kept = {
            layer: [detached(routing, self.fields) for routing in calls]
            for layer, calls in forward.items()
        }
        self.forwards.append(kept)

    @property
    def num_forwards(self) -> int:
        return len(self.forwards)

    @property
    def layers(self) -> list[int]:
        return sorted({layer for forward in self.forwards for layer in forward})

    def __getitem__(self, layer: int) -> list[Routing]:
        entries = [routing for forward in self.forwards for routing in forward.get(layer, ())]
        if not entries:
            raise ReplayError(
                f"Layer {layer} was not recorded; recorded layers: {self.layers or 'none'}."
            )
        return entries

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def items(self) -> list[tuple[int, list[Routing]]]:
        return [(layer, self[layer]) for layer in self]


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
