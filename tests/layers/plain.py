"""A transformers block written out by hand, choice by choice: the twin of every side.

Letters: T tokens, E experts, K choices a token, H hidden, J up width, I expert width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetk.equivalence.sides.block import experts_of, gate_of


class Plain(nn.Module):
    """x_TH, given -> every stage. Parameters carry the common names and layouts."""

    def __init__(self, family: str, block: nn.Module, token_ids_T: Tensor) -> None:
        super().__init__()
        block = copy.deepcopy(block)
        gate: Any = gate_of(block)
        experts: Any = experts_of(block)
        self.family, self.gate_settings, self.token_ids_T = family, vars(gate), token_ids_T
        self.buffers_of_gate = dict(gate.named_buffers())
        self.limit = getattr(experts, "limit", None)
        self.alpha = getattr(experts, "alpha", None)
        self.router = nn.Module()
        for name, parameter in gate.named_parameters():
            self.router.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        if family == "gpt_oss":
            up, down = up.transpose(1, 2), down.transpose(1, 2)
            up = torch.cat([up[:, ::2], up[:, 1::2]], 1)
            bias = experts.gate_up_proj_bias.detach()
            self.up_bias = nn.Parameter(torch.cat([bias[:, ::2], bias[:, 1::2]], 1))
            self.down_bias = nn.Parameter(experts.down_proj_bias.detach().clone())
        self.up_weight, self.down_weight = nn.Parameter(up.clone()), nn.Parameter(down.clone())
        for name in ("shared_experts", "shared_expert", "shared_expert_gate"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, x_TH: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stages = self.choose(x_TH, given)
        ids_TK = given.get("indices", stages["indices"])
        weights_TK = given.get("weights", stages["weights"])
        stages["counts"] = torch.bincount(ids_TK.flatten(), minlength=len(self.up_weight))
        stages["dispatched"] = torch.ones_like(ids_TK, dtype=torch.bool)
        up = torch.einsum("th,tkjh->tkj", x_TH, self.up_weight[ids_TK])
        hidden = up + self.up_bias[ids_TK] if hasattr(self, "up_bias") else up
        gate, linear = hidden.chunk(2, -1)
        if self.limit is not None:
            gate, linear = gate.clamp(max=self.limit), linear.clamp(-self.limit, self.limit)
        if self.alpha is not None:
            activation = (linear + 1) * gate * torch.sigmoid(self.alpha * gate)
        else:
            activation = F.silu(gate) * linear
        output = torch.einsum("tki,tkhi->tkh", activation, self.down_weight[ids_TK])
        if hasattr(self, "down_bias"):
            output = output + self.down_bias[ids_TK]
        combined = (output * weights_TK[..., None].to(output.dtype)).sum(1)
        stages |= {"up": up, "activation": activation, "expert_output": output}
        stages["combined"] = combined
        if hasattr(self, "shared_experts"):
            stages["output"] = combined + self.shared_experts(x_TH)
        elif hasattr(self, "shared_expert"):
            share_T1 = torch.sigmoid(self.shared_expert_gate(x_TH))
            stages["output"] = combined + share_T1 * self.shared_expert(x_TH)
        return stages

    def choose(self, x_TH: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        settings, top_k = self.gate_settings, self.gate_settings["top_k"]
        logits = F.linear(x_TH, self.router.weight, getattr(self.router, "bias", None))
        stages = {"logits": logits}
        if self.family in ("granitemoe", "gpt_oss"):
            own = logits.topk(top_k).indices
            weights = logits.gather(1, given.get("indices", own)).softmax(-1)
            return {**stages, "choice": logits, "indices": own, "weights": weights}
        scale = 1.0
        if self.family.startswith("deepseek"):
            scale = settings["routed_scaling_factor"]
        if self.family == "deepseek_v3":
            scores = logits.sigmoid()
        elif self.family == "deepseek_v4":
            scores = F.softplus(logits).sqrt()
        else:
            scores = logits.softmax(-1)
        bias = self.buffers_of_gate.get("e_score_correction_bias")
        table = self.buffers_of_gate.get("tid2eid")
        if table is None:
            choice = scores if bias is None else scores + bias.to(scores.dtype)
            if self.family == "deepseek_v3":
                choice = self.within_groups(choice)
            own = choice.topk(top_k).indices
            stages["choice"] = choice
        else:
            own = table[self.token_ids_T]
        weights = scores.gather(1, given.get("indices", own))
        if self.family not in ("olmoe",) or settings["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        return {**stages, "scores": scores, "indices": own, "weights": weights * scale}

    def within_groups(self, choice_TE: Tensor) -> Tensor:
        groups, top = self.gate_settings["num_group"], self.gate_settings["topk_group"]
        worth_TG = choice_TE.unflatten(1, (groups, -1)).topk(2, -1).values.sum(-1)
        best_TG = worth_TG.topk(top).indices
        keep_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, True)
        keep_TE = keep_TG.repeat_interleave(choice_TE.shape[1] // groups, 1)
        return choice_TE.masked_fill(~keep_TE, -torch.inf)
