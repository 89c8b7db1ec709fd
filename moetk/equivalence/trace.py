"""One implementation of a mixture-of-experts layer, cut into stages, and what it computed there.

Letters: T tokens, H hidden, E experts, K choices a token, J = 2I up-projection width, I expert
width.

    logits (T, E) > scores (T, E) > choice (T, E) > indices (T, K) > weights (T, K) > counts (E,) >
    dispatched (T, K) > up (T, K, J) > activation (T, K, I) > expert_output (T, K, H) >
    combined (T, H) > output (T, H) > losses (n,)

and the gradients of the same in reverse. `given` hands a side what the reference had at a stage:
the rest is then computed from it, so that a fault shows where it is and not in all that follows
(teacher forcing). Every float stage after the given one is its own function of equal inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moetk.equivalence.chance import same_chance

STAGES = (
    "logits",
    "scores",
    "choice",
    "indices",
    "weights",
    "counts",
    "dispatched",
    "up",
    "activation",
    "expert_output",
    "combined",
    "output",
    "losses",
)
EXACT = frozenset({"indices", "counts", "dispatched"})  # whole numbers: equal or not
GIVEN = ("indices", "weights")  # what teacher forcing hands over
MASKED = -1e9
ROOTS = ("output", "combined", "weights")  # where the gradient enters: the first that there is


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter, and how its gradient is turned into the common layout: (E, J, H) with all gate
    rows before all up rows for `up_weight`, (E, H, I) for `down_weight`, (E, J) for `up_bias`."""

    tensor: Tensor
    common: Callable[[Tensor], Tensor] = lambda gradient: gradient


@dataclass(frozen=True, eq=False)
class Scattered:
    """A stage that exists only in pieces, as the experts' inner values do in a loop over experts.

    place: the pieces (or their gradients) -> the whole in its common shape and layout.
    values: what the pieces are worth, where the graph holds them only with something added (a
        bias), which leaves the gradient as it is; None = the pieces themselves.
    """

    pieces: tuple[Tensor, ...]
    place: Callable[[Sequence[Tensor]], Tensor]
    values: tuple[Tensor, ...] | None = None


@runtime_checkable
class Side(Protocol):
    """One implementation. It is never changed: every run works on a copy, or restores.

    facts: what it says about itself and a diagnosis may read, e.g. "choice_bias" (E,), "groups",
    "top_groups", "top_k", "num_experts", "scale", "limit" (of clamped activations),
    "activation" (a moetk.experts activation), "capacity" (a moetk.dispatch.Capacity); absent
    where unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def leaves(self) -> Mapping[str, Leaf]:
        """Parameters by common names: up_weight, down_weight, up_bias, down_bias, router.NAME, and
        their own names for others. They are the tensors that `run` computes with."""
        ...

    def run(self, x_TH: Tensor, given: Mapping[str, Tensor]) -> Mapping[str, Tensor | Scattered]:
        """Every stage that can be seen, with its graph. A stage that is given is returned as this
        side computed it, where it did, while the given value is what went on from there. "grad
        NAME" are gradients that it computed itself, for the same `cotangent` at the last stage.

        Raises EquivalenceError where a given stage cannot be forced."""
        ...

    def eager(self) -> Side:
        """The plainest implementation of the same function in the same dtypes."""
        ...

    def in_double(self) -> Side:
        """A copy with fp64 parameters, to be run under InDouble. Raises EquivalenceError where
        there is none (a function in another framework, a stored trace)."""
        ...


@dataclass(frozen=True, eq=False)
class Trace:
    """What one side computed: values by stage, gradients by stage ("weights"), by parameter
    ("up_weight") and of the input ("x"). Everything detached."""

    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Names and shapes."""
        held = {**self.values, **{f"grad {name}": grad for name, grad in self.grads.items()}}
        shapes = (f"{name} {tuple(tensor.shape)}" for name, tensor in held.items())
        return f"{type(self).__name__}({', '.join(shapes)})"


def observe(
    side: Side,
    x_TH: Tensor,
    *,
    given: Mapping[str, Tensor] | None = None,
    upstream: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Trace:
    """Run one side forward and backward.

    The gradient that enters at the last stage is drawn from `seed`, in the stage's shape, so that
    two sides of equal shapes get the same. given: stages to take instead of its own.
    upstream: the gradients that a given stage's own computation gets, since the given value is
    where the gradient from behind it ends.
    """
    x_TH = x_TH.detach().clone().requires_grad_()
    forced = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in (given or {}).items()
    }
    with torch.enable_grad(), same_chance(x_TH):
        stages = dict(side.run(x_TH, forced))
        told = {name: stages.pop(name) for name in list(stages) if name.startswith("grad ")}
        leaves = side.leaves()
        roots: list[tuple[Tensor | Scattered, Tensor | None]] = []
        last = next((stages[name] for name in ROOTS if name in stages), None)
        if last is not None:
            roots.append((last, None))
        for name, gradient in (upstream or {}).items():
            # A side that has none of its own shows what it was given.
            if name in stages and name in forced and stages[name] is not forced[name]:
                roots.append((stages[name], gradient))
        grads = _gradients(roots, stages, forced, leaves, x_TH, seed)
        losses = stages.get("losses")
        source = next((stages[n] for n in ("logits", "scores", "weights") if n in stages), x_TH)
        wanted = source if isinstance(source, Tensor) else x_TH
        if isinstance(losses, Tensor) and losses.numel() and wanted.requires_grad:
            grads["losses"] = torch.zeros_like(wanted)
            if losses.requires_grad:
                (found,) = torch.autograd.grad(losses.sum(), [wanted], allow_unused=True)
                grads["losses"] = grads["losses"] if found is None else found
    grads |= {name.removeprefix("grad "): _whole(gradient) for name, gradient in told.items()}
    values = {name: _whole(stage).detach() for name, stage in stages.items()}
    if "choice" in values:  # a masked expert is out of reach, however low the number that says so
        values["choice"] = values["choice"].masked_fill(values["choice"] <= MASKED, -torch.inf)
    return Trace(values, {name: gradient.detach() for name, gradient in grads.items()})


def _whole(stage: Tensor | Scattered) -> Tensor:
    if isinstance(stage, Tensor):
        return stage
    return stage.place(stage.pieces if stage.values is None else stage.values)


def _gradients(
    roots: Sequence[tuple[Tensor | Scattered, Tensor | None]],
    stages: Mapping[str, Tensor | Scattered],
    forced: Mapping[str, Tensor],
    leaves: Mapping[str, Leaf],
    x_TH: Tensor,
    seed: int,
) -> dict[str, Tensor]:
    """d roots / d everything, in one backward."""
    outputs: list[Tensor] = []
    incoming: list[Tensor] = []
    for stage, gradient in roots:
        if isinstance(stage, Tensor) and stage.requires_grad:
            outputs.append(stage)
            incoming.append(
                cotangent(stage, seed) if gradient is None else gradient.to(stage.dtype)
            )
    targets: dict[str, tuple[Tensor, ...]] = {"x": (x_TH,)}
    for name, stage in stages.items():
        # The loss has a gradient of its own; what is a root has the one that was handed in.
        if name == "losses" or any(stage is output for output in outputs[:1]):
            continue
        pieces = stage.pieces if isinstance(stage, Scattered) else (stage,)
        if name in forced:
            pieces = (forced[name],)
        if pieces and all(piece.requires_grad for piece in pieces):
            targets[name] = pieces
    for name, leaf in leaves.items():
        if leaf.tensor.requires_grad:
            targets[name] = (leaf.tensor,)
    if not outputs and set(targets) == {"x"}:
        return {}  # code without a graph, in which no gradient is missing
    flat = [tensor for pieces in targets.values() for tensor in pieces]
    nothing: Sequence[Tensor | None] = [None] * len(flat)
    found = iter(
        torch.autograd.grad(outputs, flat, incoming, allow_unused=True, retain_graph=True)
        if outputs
        else nothing
    )
    grads: dict[str, Tensor] = {}
    for name, pieces in targets.items():
        parts = [
            torch.zeros_like(piece) if gradient is None else gradient
            for piece, gradient in zip(pieces, [next(found) for _ in pieces], strict=True)
        ]
        own = stages.get(name)
        if isinstance(own, Scattered) and name not in forced:
            grads[name] = own.place(parts)
        else:
            grads[name] = leaves[name].common(parts[0]) if name in leaves else parts[0]
    return grads


def cotangent(stage: Tensor, seed: int) -> Tensor:
    """A standard normal gradient in the stage's shape, dtype and device; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(stage.shape, generator=generator, dtype=torch.float64)
    return drawn.to(torch.bfloat16).to(stage.device, stage.dtype)
