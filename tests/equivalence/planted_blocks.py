"""Defects in blocks of Transformers models, as they have been in ports and in wrongly converted
checkpoints. The right part is the stock block."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from moetk.layers.find import find_blocks
from tests.equivalence.planted import Planted
from tests.equivalence.steps import with_parameters
from tests.layers.stock import stock
from tests.tiny import H

BOTH = (torch.float32, torch.bfloat16)


def inputs():
    return torch.randn(2, 8, H, generator=torch.Generator().manual_seed(5))


def _block(family):
    found = next(iter(find_blocks(stock(family, torch.float32))))
    return copy.deepcopy(found.block)


def _instead(module, **methods):
    """The module with methods of its class replaced, and the class still called the same."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def _wrong(family, part, **methods):
    def build():
        block = _block(family)
        _instead(block.get_submodule(part), **methods)
        return block

    return build


def _planted(name, family, wrong, stage, cause, dtypes=(torch.float32,)):
    return Planted(name, lambda: _block(family), wrong, stage, (cause,), inputs, dtypes=dtypes)


def _grouped(gate, choice_TE, outside):
    groups_TGM = choice_TE.view(len(choice_TE), gate.num_group, -1)
    best_TG = groups_TGM.topk(2, -1).values.sum(-1).topk(gate.topk_group).indices
    mask_TG = torch.zeros_like(groups_TGM[..., 0]).scatter(1, best_TG, 1).bool()
    return groups_TGM.masked_fill(~mask_TG[..., None], outside).flatten(1)


def _v3_gate(outside=-torch.inf, weighs_by="scores"):
    def forward(self, hidden_states):
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        logits_TE = F.linear(x_TH.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid()
        biased_TE = scores_TE + self.e_score_correction_bias
        ids_TK = _grouped(self, biased_TE, outside).topk(self.top_k, sorted=False).indices
        weights_TK = (scores_TE if weighs_by == "scores" else biased_TE).gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK * self.routed_scaling_factor, ids_TK

    return forward


def _not_normalised():
    block = _block("qwen3_moe")
    block.gate.norm_topk_prob = False
    return block


def _swapped():
    return with_parameters(
        _block("mixtral"), **{"experts.gate_up_proj": lambda w: torch.cat(w.chunk(2, 1)[::-1], 1)}
    )


def _in_halves(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def _routed_alone(self, hidden_states):
    _, weights_TK, ids_TK = self.gate(hidden_states)
    x_TH = hidden_states.view(-1, hidden_states.shape[-1])
    return self.experts(x_TH, ids_TK, weights_TK).view(hidden_states.shape)


BLOCKS = (
    _planted("norm_topk_prob left out of the config", "qwen3_moe", _not_normalised, "weights",
             "renormalisation missing", BOTH),
    _planted("DeepSeek-V3's first gate in Transformers", "deepseek_v3",
             _wrong("deepseek_v3", "gate", forward=_v3_gate(outside=0.0)), "choice",
             "group mask multiplies by 0", BOTH),
    _planted("weights gathered from biased scores", "deepseek_v3",
             _wrong("deepseek_v3", "gate", forward=_v3_gate(weighs_by="choice")), "weights",
             "choice bias in the weights", BOTH),
    _planted("w1 and w3 in the wrong order", "mixtral", _swapped, "up", "gate and up swapped",
             BOTH),
    _planted("gpt-oss with Mixtral's split", "gpt_oss",
             _wrong("gpt_oss", "experts", _apply_gate=_in_halves), "activation",
             "interleaved read as concatenated"),
    _planted("shared experts left out", "deepseek_v3",
             _wrong("deepseek_v3", "", forward=_routed_alone), "output",
             "shared experts missing"),
)  # fmt: skip
