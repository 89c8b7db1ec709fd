"""Carries what one forward of a model knows to the layers that run in it.

A hook on the base model opens a `ModelForward` and its end closes it. The decoder layer's
`__call__` takes it from the carrier and passes it on as a keyword, so that activation
checkpointing (which stores keywords) gives a recomputed layer the forward it belonged to, however
many forwards came between. A ContextVar is None in a recompute; a last-seen value is wrong after
two forwards before one backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.errors import AuxScaleError, ReplayError
from moetk.recorded import Recording
from moetk.routing import Routing

VISIT = "_moetk_visit"


class LossGradient:
    """How large a gradient reached the model's own loss. Apart from `ModelForward`: a node of the
    graph that held that would hold, through the routings there, the graph itself."""

    def __init__(self, share: Tensor | float, device: torch.device) -> None:
        self.share = share
        self.scale = torch.full((), float("nan"), device=device)
        self.arrived = False


class ModelForward:
    """What the layers of one forward share. Never a pytree: FSDP2 would rebuild and cast it."""

    def __init__(self) -> None:
        self.token_ids: Tensor | None = None
        self.positions: Tensor | None = None
        self.token_mask: Tensor | None = None
        self.label_mask: Tensor | None = None
        self.batch_shape: tuple[int, int] | None = None
        self.seed: int | None = None
        self.loss: LossGradient | None = None
        self.recordings: tuple[Recording, ...] = ()
        self.recorded: dict[int, list[Routing]] = {}
        self.replay: Mapping[int, Sequence[Routing]] | None = None
        self.replay_weights = "recompute"
        self.previous: dict[int, Routing] = {}
        self.calls: dict[int, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelForward:
        return self


class Visit:
    """One call of one layer within a forward; `call` counts the calls of a tied layer.

    sealed: the call is a checkpointed region of a compiled graph, from which nothing may be
    written outside: it leaves neither its context nor its routing behind.
    """

    def __init__(self, forward: ModelForward, call: int, sealed: bool = False) -> None:
        self.forward, self.call, self.sealed = forward, call, sealed
        self.ctx: RouterContext | None = None  # the router's; its experts read the same

    def __deepcopy__(self, memo: dict[int, Any]) -> Visit:
        return self

    def replayed(self, layer: int) -> Routing | None:
        """What is replayed in this call of decoder layer `layer`; None = nothing is."""
        if self.forward.replay is None:
            return None
        calls = self.forward.replay[layer]
        if self.call >= len(calls):
            raise ReplayError(
                f"The recording holds {len(calls)} calls of layer {layer} in this forward, and "
                f"this is call {self.call + 1}: replay on the model that was recorded."
            )
        return calls[self.call]

    def context(self, layer: int, where: object, previous: Routing | None = None) -> RouterContext:
        """The router's view of this visit of decoder layer `layer`."""
        forward, replay = self.forward, self.replayed(layer)
        # A compiled layer would be compiled anew for every seed it looks at, and draws no noise.
        seed = None
        if not torch.compiler.is_compiling() and forward.seed is not None:
            seed = mix(forward.seed, layer, self.call)
        return RouterContext(
            token_ids=forward.token_ids,
            positions=forward.positions,
            token_mask=forward.token_mask,
            label_mask=forward.label_mask,
            batch_shape=forward.batch_shape,
            previous=previous,
            replay=None if replay is None else getattr(replay, "experts_TK", None),
            seed=seed,
            where=where,
        )


class Carrier:
    """Shared by a model's hooks and its replaced layers. One per replaced model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.count = 0
        self.now: ModelForward | None = None
        self.pending: ModelForward | None = None
        self.wants_loss = False
        self.wants_labels = False
        self.keeps_previous = False
        self.refuse_hf_aux: str | None = None
        self.recordings: tuple[Recording, ...] = ()
        self.player: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # What is open belongs to a running call, not to a copy of the model.
        return {**self.__dict__, "now": None, "pending": None, "recordings": (), "player": None}


def mix(*parts: int) -> int:
    """One 63-bit seed of several integers, by splitmix64's finaliser (Steele et al., 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class OpenModel:
    """Pre-hook of the model that computes the loss: sees the labels."""

    def __init__(self, carrier: Carrier, signature: inspect.Signature) -> None:
        self.carrier, self.names = carrier, _positional(signature)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = ModelForward()
        self.carrier.pending = forward
        reason = self.carrier.refuse_hf_aux
        if reason is not None and _asks_for_aux(module, kwargs):
            raise AuxScaleError(reason)
        labels = _argument(self.names, args, kwargs, "labels")
        shifted = kwargs.get("shift_labels")
        if not self.carrier.wants_labels or (labels is None and shifted is None):
            return
        mask_BS = _carries_label(module, labels, shifted)
        if mask_BS is not None:
            forward.label_mask = mask_BS.reshape(-1)
        if not self.carrier.wants_loss:
            return
        items = kwargs.get("num_items_in_batch")
        share: Tensor | float = 1.0
        if items is not None and mask_BS is not None:
            share = mask_BS.sum() / items
        forward.loss = LossGradient(share, (labels if shifted is None else shifted).device)


class CloseModel:
    """Its counterpart after the forward: reads, in backward, the gradient that reaches the loss."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        forward, self.carrier.pending = self.carrier.pending, None
        if forward is None or forward.loss is None or output is None:
            return None
        if isinstance(output, tuple):
            if not _is_loss(output[0]):
                return None
            return (_ProbeLoss.apply(output[0], forward.loss.scale, forward.loss), *output[1:])
        loss = getattr(output, "loss", None)
        if _is_loss(loss):
            output.loss = _ProbeLoss.apply(loss, forward.loss.scale, forward.loss)
        return None


class OpenBase:
    """Pre-hook of the base model: binds ids, mask and positions, read by name or by position."""

    def __init__(self, carrier: Carrier, signature: inspect.Signature) -> None:
        self.carrier, self.names = carrier, _positional(signature)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        carrier = self.carrier
        forward = carrier.pending if carrier.pending is not None else ModelForward()
        ids = _argument(self.names, args, kwargs, "input_ids")
        embeds = _argument(self.names, args, kwargs, "inputs_embeds")
        source = ids if ids is not None else embeds
        if source is not None:
            forward.batch_shape = (source.shape[0], source.shape[1])
        if ids is not None:
            forward.token_ids = ids.reshape(-1)
        positions = _argument(self.names, args, kwargs, "position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 2 and forward.batch_shape:
            forward.positions = positions.expand(forward.batch_shape).reshape(-1)
        mask = _argument(self.names, args, kwargs, "attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and source is not None:
            # With a cache the mask covers the past too; this call's tokens are its end.
            forward.token_mask = mask[:, -source.shape[1] :].reshape(-1).bool()
        if not torch.compiler.is_compiling():
            # A number that changes every step would recompile every step.
            forward.seed = mix(carrier.seed, carrier.count)
            carrier.count += 1
        forward.recordings = carrier.recordings
        if carrier.player is not None:
            forward.replay, forward.replay_weights = carrier.player.next()
        carrier.now = forward


class CloseBase:
    """Its counterpart: a forward that returned is recorded whole, one that raised is not."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward, self.carrier.now = self.carrier.now, None
        if forward is not None and output is not None:
            for recording in forward.recordings:
                recording.append(forward.recorded)


class _ProbeLoss(torch.autograd.Function):
    """Identity on the loss; its backward notes how large a gradient arrived."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor, arrival: LossGradient) -> Tensor:
        ctx.scale, ctx.arrival = scale, arrival
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.scale.copy_(grad.detach().float() * ctx.arrival.share)
        if not torch.compiler.is_compiling():  # no side effect on Python objects in a graph
            ctx.arrival.arrived = True
        return grad, None, None


def _carries_label(module: nn.Module, labels: Any, shifted: Any) -> Tensor | None:
    """(B, S) bool: the tokens whose output a label judges; None = labels are not for tokens."""
    if isinstance(shifted, Tensor):
        return shifted != -100
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    if "CausalLM" in type(module).__name__:
        # Position s predicts label s + 1; the last position predicts nothing.
        return nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    return labels != -100


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad


def _positional(signature: inspect.Signature) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in signature.parameters.values() if p.kind in kinds)


def _argument(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Any:
    if name in kwargs:
        return kwargs[name]
    if name in names and names.index(name) < len(args):
        return args[names.index(name)]
    return None


def _asks_for_aux(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_router_logits")
    if asked is None:
        config = getattr(module, "config", None)
        asked = getattr(config, "output_router_logits", False)
    return bool(asked)
