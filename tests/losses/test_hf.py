"""The auxiliary loss of Transformers, bit for bit."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moetk.losses import LoadBalancingLoss, hf_load_balancing
from moetk.routing import TokenChoice
from tests.losses.parts import ANY

pytestmark = pytest.mark.v5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("E", "K", "L", "T"), [(4, 1, 2, 12), (8, 2, 3, 101), (64, 8, 2, 300)])
def test_hf_load_balancing_is_hfs_bit_for_bit(E, K, L, T, dtype):
    g = torch.Generator().manual_seed(E)
    layers = [torch.randn(T, E, generator=g).to(dtype).requires_grad_() for _ in range(L)]
    routings = [TokenChoice(z.topk(K).indices, torch.ones(T, K), E, z) for z in layers]
    mask = torch.rand(T, generator=g) < 0.7
    for padding in (None, mask, mask.long()[None], torch.ones(1, T)):
        want = load_balancing_loss_func(tuple(layers), E, K, padding)
        got = hf_load_balancing(routings, padding)
        assert got.dtype == want.dtype and torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got, layers), torch.autograd.grad(want, layers), strict=True
        ):
            assert torch.equal(a, b)
    want = load_balancing_loss_func(tuple(layers), E, 1)
    assert torch.equal(hf_load_balancing(routings, top_k=1), want)


def test_hf_pools_layers_before_the_product():
    """Two layers collapsed on different experts: pooled 2, their mean 4."""
    layers = [torch.eye(4)[[e] * 6] * 100 for e in (0, 1)]
    routings = [
        TokenChoice(z.topk(1).indices, torch.ones(6, 1), 4, z, z.softmax(-1)) for z in layers
    ]
    assert hf_load_balancing(routings) == 2
    assert sum(LoadBalancingLoss(0.5)(routing, ANY) for routing in routings) == 4
