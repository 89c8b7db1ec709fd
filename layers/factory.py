"""What a router factory returns: checked, and moved to where its layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.errors import MoetkError, ReplaceError, RouterConfigError
from moetk.layers.attach import name_of
from moetk.layers.find import BlockSpec, runs_on
from moetk.routing import Routing

Router = Callable[[Tensor, RouterContext], Routing]
Factory = Callable[[BlockSpec], Router | None]

_WRAPPERS = {"DistributedDataParallel": "DistributedDataParallel", "FSDPModule": "fully_shard"}


def build(factory: Factory | None, spec: BlockSpec) -> Router | None:
    """The layer's router, on its gate's device and in its dtype; None = the layer keeps its own.

    Raises RouterConfigError for what is no router, or is the stock gate itself.
    """
    if factory is None:
        return None
    try:
        router = factory(spec)
    except MoetkError as error:
        error.add_note(f"while building the router of {spec.name}")
        raise
    if router is not None and not callable(router):
        raise RouterConfigError(
            f"router factory returned {type(router).__name__} for {spec.name}; it returns a "
            "callable (x_TH, ctx) -> Routing, or None to keep the stock router."
        )
    if router is spec.gate:
        raise RouterConfigError(
            f"router factory returned the stock gate of {spec.name}; return None to keep it."
        )
    if isinstance(router, nn.Module):
        device, dtype = runs_on(spec.gate), next(spec.gate.parameters()).dtype
        for parameter in router.parameters():
            parameter.data = parameter.data.to(device, dtype)
        # Buffers keep their dtype: a bias of e_score_correction_bias's kind freezes in bf16.
        for name, buffer in list(router.named_buffers()):
            owner = router.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(device)
        router.train(spec.module.training)
    return router


def refuse_shared(routers: Sequence[Router | None]) -> None:
    """Raise RouterConfigError where one module stands in several layers."""
    modules = [made for made in routers if isinstance(made, nn.Module)]
    if len({id(made) for made in modules}) < len(modules):
        raise RouterConfigError(
            "The router factory returned one module for several layers; a checkpoint could not "
            "tell them apart. Return a new router for each layer."
        )


def refuse_distributed(model: nn.Module) -> None:
    """A wrapper that is there already does not know of parameters that come now: each rank would
    train its own."""
    for module in model.modules():
        wrappers = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS]
        if wrappers:
            raise ReplaceError(
                f"{type(module).__name__} is under {_WRAPPERS[wrappers[0]]} already, which would "
                "not see the parameters of a custom router: each rank would train its own. Replace "
                "first, then wrap or shard."
            )


def label_of(routers: Iterable[Router | None]) -> str:
    """The routers' names, for humans and for the check on load; never imported from."""
    names = [name_of(made) for made in routers if made is not None]
    return ", ".join(dict.fromkeys(names))
