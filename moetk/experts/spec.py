"""What a bank is (its spec) and what it holds (its weights); neither knows a module.

Letters: E experts, H hidden, I expert width, J = 2I for gated activations, else I.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moetk.errors import MoeShapeError, RouterConfigError
from moetk.experts.activations import Activation, Gated, Plain

SPECIAL = ("zero", "copy")


@dataclass(frozen=True)
class BankSpec:
    """The function a bank computes, apart from its weights.

    transposed: weights are (E, H, J) and (E, I, H) instead of (E, J, H) and (E, H, I).
    interleaved: gate and up alternate along J instead of lying behind each other.
    special: what the ids E, E+1, ... do: "zero" adds nothing, "copy" adds the token itself
        (LongCat-Flash, MoE++); never materialised.
    scale: where the routing weight multiplies: the expert's "output", or its "input" (Llama 4).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = field(default_factory=Gated)
    transposed: bool = False
    interleaved: bool = False
    special: tuple[str, ...] = ()
    scale: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RouterConfigError(f"BankSpec: {name}={value!r}; need an integer >= 1.")
        unknown = [kind for kind in self.special if kind not in SPECIAL]
        if unknown:
            raise RouterConfigError(f"BankSpec: special={unknown}; each is one of {SPECIAL}.")
        if self.scale not in ("output", "input"):
            raise RouterConfigError(f"BankSpec: scale={self.scale!r}; 'output' or 'input'.")

    @property
    def gated(self) -> bool:
        return not isinstance(self.activation, Plain)

    @property
    def num_ids(self) -> int:
        """Real experts plus special ones."""
        return self.num_experts + len(self.special)

    @property
    def up_width(self) -> int:
        return 2 * self.intermediate_size if self.gated else self.intermediate_size

    def activate(self, hidden: Tensor) -> Tensor:
        """(..., J) -> (..., I)."""
        activation = self.activation
        if isinstance(activation, Plain):
            return activation(hidden)
        if self.interleaved:
            return activation(hidden[..., ::2], hidden[..., 1::2])
        gate, up = hidden.chunk(2, dim=-1)
        return activation(gate, up)

    def check(self, weights: BankWeights) -> None:
        """Raise MoeShapeError unless the weights have this spec's shapes."""
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        up, down = (experts, self.up_width, hidden), (experts, hidden, inner)
        if self.transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        for name, tensor, shape in (
            ("up", weights.up, up),
            ("down", weights.down, down),
            ("up_bias", weights.up_bias, (experts, self.up_width)),
            ("down_bias", weights.down_bias, (experts, hidden)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise MoeShapeError(
                    f"bank weight {name} is {tuple(tensor.shape)}, expected {shape} for "
                    f"E={experts}, H={hidden}, I={inner}, transposed={self.transposed}."
                )


@dataclass(frozen=True, eq=False)
class BankWeights:
    """One call's tensors, in the spec's layout; the biases are (E, J) and (E, H).

    add_to_grad: backward may add the matrices' gradients into their .grad and return none
    (`fused` and `te`; the other backends return them).
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    add_to_grad: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    def as_columns(self, spec: BankSpec) -> tuple[Tensor, Tensor]:
        """Views (E, H, J) and (E, I, H): what a row is multiplied with from the right."""
        if spec.transposed:
            return self.up, self.down
        return self.up.transpose(1, 2), self.down.transpose(1, 2)
