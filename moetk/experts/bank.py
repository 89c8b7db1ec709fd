"""E feed-forward networks with the names and layouts of transformers.

Letters: E experts, H hidden, I expert width, J = 2I for gated activations, else I, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetk.errors import MoeShapeError, UnsupportedRoutingError
from moetk.experts.backends import check_backend_name, pick_backend
from moetk.experts.spec import BankSpec, BankWeights
from moetk.routing import Routing, TokenChoice


def bank_forward(
    spec: BankSpec,
    weights: BankWeights,
    x_TH: Tensor,
    routing: Routing,
    backend: str = "auto",
    *,
    where: object = "the bank",
) -> Tensor:
    """Each row through its experts, weighted and summed over its choices: (T, H) -> (T, H).

    A pure function of its arguments. x_TH: any floating dtype; the products run in the weights'
    dtype, the weighted sum in the wider of it and the routing weights', the result has x_TH's.
    Choices with id -1 and dropped ones add nothing.

    Raises BackendError where `backend` cannot run here, MoeShapeError on shapes that disagree,
    UnsupportedRoutingError for special experts under anything but a TokenChoice.
    """
    if x_TH.ndim != 2 or x_TH.shape[1] != spec.hidden_size:
        raise MoeShapeError(
            f"{where}: x_TH is {tuple(x_TH.shape)}, expected (T, H={spec.hidden_size})."
        )
    spec.check(weights)
    if spec.special and not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(
            f"{where}: special experts {spec.special} take tokens that choose them; this routing "
            f"is a {type(routing).__name__}."
        )
    num_rows = routing.experts_TK.numel() if isinstance(routing, TokenChoice) else len(x_TH)
    chosen = pick_backend(backend, weights.dtype, x_TH.device, num_rows, where, spec, type(routing))
    y_TH = chosen.run(spec, weights, x_TH, routing)
    return _add_special(spec, x_TH, y_TH, routing) if spec.special else y_TH


def _add_special(spec: BankSpec, x_TH: Tensor, y_TH: Tensor, routing: Routing) -> Tensor:
    """The copy experts' share: each adds the token itself, times its weight."""
    if not isinstance(routing, TokenChoice) or "copy" not in spec.special:
        return y_TH
    copies = [spec.num_experts + n for n, kind in enumerate(spec.special) if kind == "copy"]
    is_copy_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
    for expert in copies:
        is_copy_TK = is_copy_TK | (routing.experts_TK == expert)
    if routing.kept_TK is not None:
        is_copy_TK = is_copy_TK & routing.kept_TK
    dtype = torch.promote_types(routing.weights_TK.dtype, x_TH.dtype)
    share_T1 = routing.weights_TK.masked_fill(~is_copy_TK, 0).sum(-1, keepdim=True, dtype=dtype)
    return (y_TH + share_T1 * x_TH).to(y_TH.dtype)


class ExpertBank(nn.Module):
    """E gated feed-forward networks, one routing in, one sum out.

    >>> bank = ExpertBank(hidden_size=64, num_experts=8, intermediate_size=128)
    >>> bank(x_TH, routing).shape == x_TH.shape
    True

    gate_up_proj (E, J, H), down_proj (E, H, I), and with bias=True gate_up_proj_bias (E, J),
    down_proj_bias (E, H): the names, and for the default spec the layouts, of transformers.
    Initialised as torch initialises a Linear of the same fan-in.
    spec: replaces the default SwiGLU spec of the three sizes (activation, layout, special experts).
    backend: "auto", "reference", "grouped", "fused" or "te".
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        intermediate_size: int,
        *,
        spec: BankSpec | None = None,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = BankSpec(num_experts, hidden_size, intermediate_size)
        self.spec = (
            sizes
            if spec is None
            else replace(
                spec,
                num_experts=num_experts,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
            )
        )
        check_backend_name(backend)
        self.backend = backend
        E, H, I, J = num_experts, hidden_size, intermediate_size, self.spec.up_width
        transposed = self.spec.transposed
        self.gate_up_proj = nn.Parameter(torch.empty((E, H, J) if transposed else (E, J, H)))
        self.down_proj = nn.Parameter(torch.empty((E, I, H) if transposed else (E, H, I)))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, J)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(E, H)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bounds = (self.spec.hidden_size**-0.5, self.spec.intermediate_size**-0.5)
        for weight, bias, bound in (
            (self.gate_up_proj, self.gate_up_proj_bias, bounds[0]),
            (self.down_proj, self.down_proj_bias, bounds[1]),
        ):
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)

    @property
    def num_experts(self) -> int:
        """Ids this bank answers: real experts and special ones."""
        return self.spec.num_ids

    def weights(self) -> BankWeights:
        return BankWeights(
            self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias
        )

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return bank_forward(self.spec, self.weights(), x_TH, routing, self.backend)

    def extra_repr(self) -> str:
        s = self.spec
        return f"H={s.hidden_size}, E={s.num_experts}, I={s.intermediate_size}, {self.backend}"
