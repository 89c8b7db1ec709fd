"""One call of a bank, as tensors that any backend in any dtype can be run on.

Letters: T tokens, K choices a token, E experts, H hidden, I expert width, J up width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetk.experts import BankSpec, BankWeights, bank_forward
from moetk.routing import TokenChoice
from tests.banks import token_choice
from tests.gpu.device import DEVICE, normal
from tests.gpu.judged import grown

Run = Callable[[BankSpec, BankWeights, Tensor, TokenChoice], Tensor]
BF16 = torch.bfloat16


def on_kernels(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: TokenChoice) -> Tensor:
    return bank_forward(spec, weights, x_TH, routing, "fused")


@dataclass(frozen=True, eq=False)
class Call:
    """leaves: x, weights_TK, up, down and, where the bank has them, up_bias and down_bias."""

    spec: BankSpec
    leaves: dict[str, Tensor]
    experts_TK: Tensor
    kept_TK: Tensor | None
    dy_TH: Tensor

    def run(
        self, forward: Run, dtype: torch.dtype | None = None, *, trained: str | None = None
    ) -> dict[str, Tensor]:
        """y and every gradient, or the gradient of `trained` alone. dtype: of every leaf, None =
        its own."""
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).requires_grad_(trained in (None, name))
            for name, leaf in self.leaves.items()
        }
        return grown(leaves, {"y": self.forward(forward, leaves)}, [self.dy_TH])

    def forward(self, forward: Run, leaves: dict[str, Tensor]) -> Tensor:
        weights = {n: leaf for n, leaf in leaves.items() if n not in ("x", "weights_TK")}
        routing = TokenChoice(
            self.experts_TK, leaves["weights_TK"], self.spec.num_ids, kept_TK=self.kept_TK
        )
        return forward(self.spec, BankWeights(**weights), leaves["x"], routing)

    def with_leaves(self, **leaves: Tensor) -> Call:
        return replace(self, leaves={**self.leaves, **leaves})


def drawn(
    spec: BankSpec,
    tokens: int,
    k: int,
    *,
    bias: bool = False,
    pattern: str = "random",
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Call:
    """pattern: of `tests.banks.token_choice`. weight_dtype: of the routing weights, None = dtype.

    Weights are scaled so that every product of standard normal rows is standard normal.
    """
    E, H, I, J = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.up_width
    shapes = {"up": (E, J, H), "down": (E, H, I)}
    if spec.transposed:
        shapes = {name: (e, b, a) for name, (e, a, b) in shapes.items()}
    sizes: dict[str, tuple[tuple[int, ...], float]] = {
        "x": ((tokens, H), 1.0),
        "up": (shapes["up"], H**-0.5),
        "down": (shapes["down"], I**-0.5),
    }
    if bias:
        sizes |= {"up_bias": ((E, J), 1.0), "down_bias": ((E, H), 1.0)}
    leaves = {
        name: normal(seed * 10 + n, *shape, dtype=dtype, std=std)
        for n, (name, (shape, std)) in enumerate(sizes.items())
    }
    torch.manual_seed(seed)
    routing = token_choice(tokens, E, k, pattern)
    leaves["weights_TK"] = routing.weights_TK.detach().to(DEVICE, weight_dtype or dtype)
    kept: Any = routing.kept_TK
    return Call(
        spec,
        leaves,
        routing.experts_TK.to(DEVICE),
        None if kept is None else kept.to(DEVICE),
        normal(seed * 10 + 9, tokens, H, dtype=dtype),
    )
