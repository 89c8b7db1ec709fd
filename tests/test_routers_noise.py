"""Noise that the context decides, and that a recompute draws again."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetk.context import RouterContext
from moetk.errors import MissingContextError
from moetk.routers import NoisyTopKRouter, SwitchRouter, jitter, normal_like


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestNoise:
    def test_the_context_alone_decides(self):
        x_TH = normal(0, 4, 3)
        for draw in (normal_like, lambda t, ctx, draw=0: jitter(t, 0.1, ctx, draw)):
            first = draw(x_TH, RouterContext(seed=7))
            torch.randn(3)  # a draw elsewhere changes nothing
            assert torch.equal(first, draw(x_TH, RouterContext(seed=7)))
            others = [
                draw(x_TH, RouterContext(seed=8)),
                draw(x_TH, RouterContext(seed=7 + 2**40)),
                draw(x_TH, RouterContext(seed=7), 1),
            ]
            assert not any(torch.equal(first, other) for other in others)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        normal_like(normal(0, 4, 3), RouterContext(seed=7))
        assert torch.equal(before, torch.get_rng_state())

    def test_jitter_multiplies_within_its_bounds_and_writes_elsewhere(self):
        x_TH = torch.ones(200, 50, dtype=torch.bfloat16)
        noisy_TH = jitter(x_TH, 0.1, RouterContext(seed=0))
        assert noisy_TH.dtype == torch.float32 and (x_TH == 1).all()
        assert 0.9 <= float(noisy_TH.min()) < 0.901 and 1.099 < float(noisy_TH.max()) <= 1.1
        assert float(noisy_TH.mean()) == pytest.approx(1, abs=0.003)

    def test_normal_noise_is_standard_and_in_the_dtype_asked_for(self):
        noise = normal_like(torch.empty(100, 100, dtype=torch.float64), RouterContext(seed=0))
        assert noise.dtype == torch.float64
        assert float(noise.mean()) == pytest.approx(0, abs=0.03)
        assert float(noise.std()) == pytest.approx(1, abs=0.03)

    def test_no_seed_raises(self):
        for draw in (
            lambda t: normal_like(t, RouterContext()),
            lambda t: jitter(t, 0.1, RouterContext()),
        ):
            with pytest.raises(MissingContextError, match=r"needs ctx\.seed, which is None"):
                draw(normal(0, 4, 3))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [NoisyTopKRouter, SwitchRouter])
def test_noise_is_the_same_again_under_checkpointing(method, reentrant):
    def gradients(run) -> list[Tensor]:
        router = method(12, 8, 3).train()
        with torch.no_grad():
            for index, parameter in enumerate(router.parameters()):
                parameter.copy_(normal(index, *parameter.shape))
        x_TH = normal(9, 16, 12).requires_grad_()
        ctx = RouterContext(seed=5, batch_shape=(2, 8))
        weights_TK = run(lambda x: router(x, ctx).weights_TK, x_TH)
        torch.randn(3)  # the global generator moves on before the recompute
        (weights_TK**2).sum().backward()
        return [x_TH.grad, *(p.grad for p in router.parameters())]

    plain = gradients(lambda f, x: f(x))
    again = gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
