"""Layers and functions whose comparison is reported."""

import copy

import torch

import moetk
from moetk.routers import MixtralRouter

T, H, E, K, I = 12, 16, 6, 2, 8


def layer(*, renormalise=True, seed=0):
    torch.manual_seed(seed)
    router = MixtralRouter(H, E, K, renormalise=renormalise)
    built = moetk.MoELayer(router, moetk.ExpertBank(H, E, I))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4)
    return built


def hidden(*shape, seed=1):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed))


def swapped(good):
    """Gate and up rows in the wrong order."""
    bad = copy.deepcopy(good)
    with torch.no_grad():
        weight = bad.experts.gate_up_proj
        weight.copy_(weight.roll(I, 1))
    return bad


def stages(x_TH):
    """A stage function: what a router of another framework might show."""
    weight_EH = torch.linspace(-1, 1, E * H, dtype=x_TH.dtype).view(E, H).cos()
    logits_TE = x_TH @ weight_EH.T
    scores_TE = logits_TE.softmax(-1)
    weights_TK, indices_TK = scores_TE.topk(K)
    return {"logits": logits_TE, "scores": scores_TE, "indices": indices_TK, "weights": weights_TK}


def one_wrong(x_TH):
    """One score of the tokens whose first number is above 1.5."""
    found = stages(x_TH)
    scores_TE = found["scores"].clone()
    scores_TE[:, 4] += 1e-3 * (x_TH[:, 0] > 1.5)
    return {**found, "scores": scores_TE}
