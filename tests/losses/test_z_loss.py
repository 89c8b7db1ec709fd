"""The z-loss against float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetk.losses import router_z
from tests.rounding import within_rounding


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 8), E=st.integers(1, 6))
def test_z_loss_value_and_gradient(seed, T, E):
    z_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    value = router_z(z_TE)
    truth_TE = z_TE.detach().double()
    lse_T = truth_TE.exp().sum(-1).log()
    # A log near 0 is a difference: of the largest logit and the log of a sum of at most E.
    bar_T = truth_TE.abs().amax(-1) + math.log(E)
    within_rounding(value, lse_T.square().mean(), terms=T + E, size=bar_T.square().mean())
    [grad] = torch.autograd.grad(value, z_TE)
    probs_TE = truth_TE.softmax(-1)
    want_TE, size = 2 * lse_T[:, None] * probs_TE / T, (2 * bar_T[:, None] * probs_TE / T).norm()
    within_rounding(grad, want_TE, terms=E, size=size)
    assert router_z(z_TE.bfloat16()).dtype == torch.float32
