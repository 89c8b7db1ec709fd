"""Who computes a layer: transformers' own block, moetk's backends, peers. Same weights for all."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moetk.bench.peers import PEERS
from moetk.bench.shapes import LayerShape
from moetk.errors import ConfigError
from moetk.experts import backends

STOCK = "v5"
MANY = 2**20  # tokens, more than any case has


@dataclass(frozen=True)
class Contender:
    """`build` makes the layer, (1, T, H) to (1, T, H), with a copy of the given model's weights:
    a transformers model whose only decoder layer holds the block. operands: the format that its
    products read, where that is narrower than the weights' dtype; its errors are judged by it.
    allocates: whether a step takes its memory while it runs, as in `Launch`. warm_up: steps that it
    takes until it runs as it goes on to."""

    name: str
    build: Callable[[Any], nn.Module]
    operands: torch.dtype | None = None
    allocates: bool = True
    warm_up: int = 0


def stock_model(shape: LayerShape, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A transformers model around one Qwen3MoeSparseMoeBlock of this shape, all else tiny.

    Weights are normal with a deviation of 0.02. The block and its router (softmax, best K,
    rescaled) serve every shape, so that rows differ by their sizes alone.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in block_of(model).parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.train()


def block_of(model: Any) -> Any:
    """The mixture-of-experts block of a `stock_model`."""
    return model.model.layers[0].mlp


def stock(implementation: str | None = None) -> Contender:
    """The block as transformers runs it, with its default experts or a named implementation."""

    def build(model: Any) -> nn.Module:
        twin = copy.deepcopy(model)
        if implementation is not None:
            twin.set_experts_implementation(implementation)
        return block_of(twin)  # type: ignore[no-any-return]

    return Contender(STOCK if implementation is None else f"{STOCK}-{implementation}", build)


def ours(backend: str, add_to_grad: bool = False) -> Contender:
    """The block after `moetk.replace_moe(model, backend=..., add_to_grad=..., graphs=0)`."""

    def build(model: Any) -> nn.Module:
        from moetk.layers.replace import replace_moe

        twin = copy.deepcopy(model)
        replace_moe(twin, backend=backend, add_to_grad=add_to_grad, graphs=0)
        return block_of(twin)  # type: ignore[no-any-return]

    return Contender(f"moetk-{backend}{'-adds' if add_to_grad else ''}", build)


def replaying(backend: str) -> Contender:
    """The block after `moetk.replace_moe(model, backend=..., add_to_grad=True, graphs=...)`: from
    the fourth step on replayed, as its first has no gradients to add to."""

    def build(model: Any) -> nn.Module:
        from moetk.layers.replace import replace_moe

        twin = copy.deepcopy(model)
        replace_moe(twin, backend=backend, add_to_grad=True, graphs=MANY)
        return block_of(twin)  # type: ignore[no-any-return]

    return Contender(f"moetk-{backend}-adds-graphs", build, allocates=False, warm_up=3)


def in_fp8(name: str, recipe: str) -> Contender:
    """`ours("te")` within Transformer Engine's autocast, by a recipe of this name. Its forward
    operands are e4m3, which the errors are judged by."""

    def build(model: Any) -> nn.Module:
        block = ours("te").build(model)
        run_in_fp8(block, recipe)
        return block

    return Contender(name, build, torch.float8_e4m3fn)


def run_in_fp8(module: nn.Module, recipe: str) -> None:
    """From now on the module's forward runs within Transformer Engine's autocast, by a recipe of
    this name. By instance: its parameters keep their names."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    forward, made = module.forward, getattr(recipes, recipe)()

    @functools.wraps(forward)  # whose arguments transformers asks for
    def within(*args: Any, **kwargs: Any) -> Any:
        with te.autocast(enabled=True, recipe=made):
            return forward(*args, **kwargs)

    vars(module)["forward"] = within


def graphed(contender: Contender) -> Contender:
    """The contender's layer after torch.cuda.make_graphed_callables: forward and backward are a
    CUDA graph each, replayed wherever Python calls the layer. They are recorded in its first call,
    for those sizes, with gradients that stay where they are (not with --grads fresh). Forward alone
    is the contender's own."""

    def build(model: Any) -> nn.Module:
        layer = contender.build(model)
        plain, parameters = layer.forward, list(layer.parameters())

        def first(x: Tensor) -> Any:
            del vars(layer)["forward"]
            sample = x.detach().clone().requires_grad_()
            grads = [torch.zeros_like(parameter) for parameter in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            with torch.enable_grad():
                # Gradients that backward adds to itself count as unused.
                torch.cuda.make_graphed_callables(layer, (sample,), allow_unused_input=True)
            for grad in grads:
                grad.zero_()  # the runs before the recording
            if x.is_leaf and x.requires_grad and x.grad is None:
                # The graph writes x's gradient where it recorded it. A leaf without one would take
                # that tensor for its own, and add it to itself the next time.
                x.grad = torch.zeros_like(x)
            replay = layer.forward

            def run(x: Tensor) -> Any:
                if not torch.is_grad_enabled():  # the graph would keep what backward needs
                    return plain(x)
                if any(p.grad is not grad for p, grad in zip(parameters, grads, strict=True)):
                    raise ConfigError("a graph adds to the gradients it was recorded with.")
                return replay(x)

            vars(layer)["forward"] = run
            return run(x)

        vars(layer)["forward"] = first
        return layer

    return Contender(f"{contender.name}-graphed", build, contender.operands, allocates=False)


def peer(name: str) -> Contender:
    """Another library's layer, by its name in PEERS."""
    return Contender(name, lambda model: PEERS[name](block_of(model)))


def contenders() -> dict[str, Contender]:
    """Everyone by name, transformers' default first, whether or not they run here."""
    everyone = [
        stock(),
        stock("eager"),
        *(ours(name) for name in ("auto", *(backend.name for backend in backends()))),
        ours("fused", add_to_grad=True),
        ours("te", add_to_grad=True),
        graphed(stock()),
        graphed(ours("fused", add_to_grad=True)),
        replaying("fused"),
        in_fp8("moetk-te-fp8", "Float8CurrentScaling"),
        in_fp8("moetk-te-fp8-block", "Float8BlockScaling"),
        *(peer(name) for name in PEERS),
    ]
    return {contender.name: contender for contender in everyone}


def contenders_here(device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """transformers' default, every backend of moetk's that runs on the device in this dtype, and
    the peers that are installed. The loop over experts is left out: it is there to be right."""
    names = [backend.name for backend in backends() if backend.why_not(dtype, device) is None]
    found = [ours(name) for name in names if name != "reference"]
    if device.type == "cuda":
        found += [peer(name) for name, kind in PEERS.items() if find_spec(kind.package)]
    return [stock(), *found]


def contenders_named(names: str) -> list[Contender]:
    """Of "v5,moetk-auto,liger". Raises ConfigError for an unknown one."""
    known = contenders()
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ConfigError(f"contender {unknown[0]!r} is not one of {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names.split(","))]
