"""What a router may know beside its input: ids, positions, masks, the previous layer's routing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetk.errors import MissingContextError, ReplayError
from moetk.routing import Routing, register_value

_FIXES = {
    "token_ids": "the model was called with inputs_embeds. Call it with input_ids, or call the "
    "layer with RouterContext(token_ids=...).",
    "batch_shape": "the tokens are packed. Call the layer with a (B, S, H) input, or with "
    "RouterContext(batch_shape=(B, S)).",
    "previous": "this is the first mixture-of-experts layer, or the layer was called on its own. "
    "Give the first layer a router that does not read it.",
    "seed": "the layer was called on its own in training mode, or compiled. Call it with "
    "RouterContext(seed=...), a different seed for every call; under torch.compile no noise is "
    "drawn.",
}


@dataclass(frozen=True, eq=False)
class RouterContext:
    """Side inputs of one router call. All per-token fields are flat, (T,), in the order of x_TH.

    token_ids: int64. positions: int64, position in the sequence. sequence_ids: int64, which
    sequence of a packed batch. token_mask: bool, True = a real token, False = padding.
    label_mask: bool, True = this token's next token is a label; attached losses average over these.
    batch_shape: (B, S) with T = B * S, None = packed.
    previous: the previous mixture-of-experts layer's routing, with its graph.
    replay: (T, K) int64, the choice to take instead of one's own.
    seed: for noise; differs for every step, micro-batch and layer, and is the same again when
        activation checkpointing runs the call a second time.
    where: the layer, for messages.
    """

    token_ids: Tensor | None = None
    positions: Tensor | None = None
    sequence_ids: Tensor | None = None
    token_mask: Tensor | None = None
    label_mask: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    previous: Routing | None = None
    replay: Tensor | None = None
    seed: int | None = None
    where: object = ""

    def require(self, name: str, reader: object = None) -> Tensor:
        """The field `name`; raises MissingContextError when the model did not provide it."""
        value = getattr(self, name)
        if value is None:
            who = type(reader).__name__ if reader is not None else "The router"
            place = f" in {self.where}" if self.where else ""
            fix = _FIXES.get(name, f"pass RouterContext({name}=...).")
            raise MissingContextError(f"{who}{place} needs ctx.{name}, which is None: {fix}")
        return value  # type: ignore[no-any-return]

    def replayed(self, experts_TK: Tensor) -> Tensor:
        """`experts_TK`, or the recorded choice where one is replayed. Raises ReplayError on a
        shape that differs."""
        if self.replay is None:
            return experts_TK
        if self.replay.shape[0] != experts_TK.shape[0]:
            place = f" in {self.where}" if self.where else ""
            raise ReplayError(
                f"The replay{place} holds {self.replay.shape[0]} tokens, this call has "
                f"{experts_TK.shape[0]}: replay the batches that were recorded, in their order."
            )
        return self.replay.to(experts_TK.device)


register_value(RouterContext)
