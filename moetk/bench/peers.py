"""Other people's layers with the block's weights, its router and its tokens.

A peer is imported when it is built from the stock block: one that is not installed, or does not
run here, says so in its row. Each takes and returns (1, T, H) and holds a copy of the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """A layer of another library's `package`, built from the stock block."""

    package: str

    def __init__(self, block: Any) -> None:
        super().__init__()


class _Routed(Peer):
    """A copy of the stock router before a peer's experts."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.gate = copy.deepcopy(block.gate)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.flatten(0, -2)
        _, weights_TK, experts_TK = self.gate(x_TH)
        return self.experts(x_TH, experts_TK, weights_TK).view_as(x)

    def experts(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        raise NotImplementedError


class Liger(_Routed):
    """liger-kernel's Triton experts; they keep transformers' layout."""

    package = "liger_kernel"

    def __init__(self, block: Any) -> None:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        super().__init__(block)
        self.function = LigerFusedMoEFunction
        self.up = _copy(block.experts.gate_up_proj)
        self.down = _copy(block.experts.down_proj)

    def experts(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ids_TK = experts_TK.to(torch.int32)
        y_TH: Tensor = self.function.apply(x_TH, self.up, self.down, ids_TK, weights_TK)
        return y_TH


class Scatter(_Routed):
    """ScatterMoE (arXiv 2403.08245); its up-projection has the gate's half last."""

    package = "scattermoe"

    def __init__(self, block: Any) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__(block)
        up, down = block.experts.gate_up_proj, block.experts.down_proj
        num_experts, hidden_size, intermediate_size = down.shape
        with torch.device("meta"):
            self.mlp = GLUMLP(hidden_size, intermediate_size, num_experts, block.gate.top_k)
        self.mlp.experts.weight = nn.Parameter(up.detach().roll(intermediate_size, 1))
        self.mlp.output_experts.weight = _copy(down)

    def experts(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TH: Tensor = self.mlp(x_TH, weights_TK, experts_TK)
        return y_TH


class TransformerEngine(_Routed):
    """Transformer Engine's GroupedLinear between its own permutation kernels, in bf16.

    It takes the rows of each expert as a list on the host, which waits for the GPU.
    """

    package = "transformer_engine"

    def __init__(self, block: Any) -> None:
        import transformer_engine.pytorch as te

        super().__init__(block)
        self.te = te
        up, down = block.experts.gate_up_proj, block.experts.down_proj
        self.num_experts, hidden_size, intermediate_size = down.shape
        settings = {"bias": False, "params_dtype": up.dtype, "device": up.device}
        linear = te.GroupedLinear
        self.up = linear(self.num_experts, hidden_size, 2 * intermediate_size, **settings)
        self.down = linear(self.num_experts, intermediate_size, hidden_size, **settings)
        for layer, weights in ((self.up, up), (self.down, down)):
            for expert, weight in enumerate(weights.detach()):
                getattr(layer, f"weight{expert}").data.copy_(weight)

    def experts(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        rows = torch.bincount(experts_TK.flatten(), minlength=self.num_experts).tolist()
        ids_TK = experts_TK.to(torch.int32)
        x_NH, order = self.te.moe_permute(x_TH, ids_TK, ids_TK.numel(), map_type="index")
        gate_NI, up_NI = self.up(x_NH, rows).chunk(2, dim=-1)
        y_NH = self.down(nn.functional.silu(gate_NI) * up_NI, rows)
        y_TH: Tensor = self.te.moe_unpermute(y_NH, order, weights_TK.float(), map_type="index")
        return y_TH


class Sonic(Peer):
    """SonicMoE (arXiv 2512.14080) with its own fused router, the same function as the block's.

    Gate and up rows alternate in its up-projection. Its layer also computes a Switch loss, which
    none of the others does: it is left out.
    """

    package = "sonicmoe"

    def __init__(self, block: Any) -> None:
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        super().__init__(block)
        up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj
        num_experts, hidden_size, intermediate_size = down.shape
        with torch.device("meta"):
            self.moe = MoE(
                num_experts=num_experts,
                num_experts_per_tok=block.gate.top_k,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                activation_function=ActivationType.SWIGLU,
                add_bias=False,
                std=0.02,
            )
        self.moe.router.weight = _copy(block.gate.weight)
        alternating = up.unflatten(1, (2, intermediate_size)).transpose(1, 2).reshape(up.shape)
        self.moe.c_fc.weight = nn.Parameter(alternating)
        self.moe.c_proj.weight = _copy(down)
        self.moe._compute_switch_loss = _no_loss

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x)[0]
        return y


PEERS: dict[str, type[Peer]] = {
    "sonicmoe": Sonic,
    "scattermoe": Scatter,
    "liger": Liger,
    "te": TransformerEngine,
}


def _no_loss(**_: Any) -> None:
    return None


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())
