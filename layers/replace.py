"""`replace_moe`: a router of one's own in a stock transformers model, in place and reversible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.dispatch import Dispatcher, Local
from moetk.errors import (
    BackendError,
    MoetkError,
    ReplaceError,
    RouterConfigError,
    UnsupportedModelError,
)
from moetk.experts.backends import check_backend_name
from moetk.layers.attach import Attachment, Controller, Loss, Reduce, Steered, step_all
from moetk.layers.carrier import Carrier, CloseBase, CloseModel, OpenBase, OpenModel
from moetk.layers.families import FAMILIES, Family, family_of
from moetk.layers.saving import SavingShell
from moetk.layers.shells import (
    BOUND,
    CUSTOM,
    PARTS,
    SITE,
    ExpertsShell,
    LayerShell,
    RouterShell,
    Site,
)
from moetk.layers.swap import extend, is_extended, own_class, withdraw
from moetk.routers import MixtralRouter
from moetk.routing import Routing

REPLACEMENT = "_moetk_replacement"


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """What a router factory is told about the layer it builds for.

    name: the block's name in the model. layer: index of its decoder layer. moe_index: its place
    among the num_moe_layers mixture-of-experts layers. gate: transformers' router; a factory may
    start from its weights. config: the model's. module: the block.
    """

    name: str
    layer: int
    moe_index: int
    num_moe_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    gate: nn.Module
    config: Any
    module: nn.Module


Router = Callable[[Tensor, RouterContext], Routing]
Factory = Callable[[BlockSpec], Router | None]


@dataclass(frozen=True, eq=False)
class _Found:
    """One block of the model, with wrappers looked through."""

    name: str
    block: nn.Module
    layer_name: str
    layer: nn.Module
    family: Family
    gate: nn.Module
    experts: nn.Module


class Replacement:
    """What `replace_moe` did, and the way back. Sites are in the order of the layers."""

    def __init__(
        self, model: nn.Module, carrier: Carrier, sites: Sequence[Site], found: Sequence[_Found]
    ) -> None:
        self.model, self.carrier, self.sites, self._found = model, carrier, tuple(sites), found
        self._hooks: list[Any] = []
        self.label = ""

    @property
    def steered(self) -> list[Steered]:
        return [one for site in self.sites for one in site.attachment.steered]

    def explain(self) -> str:
        """A table: for each layer which router, backend, dispatcher, losses and controllers run,
        why, and what is not counted."""
        from moetk.layers.explain import explain

        return explain(self)

    def step(self, reduce: Reduce | None = None) -> None:
        """Move the controllers by what backward has committed since the last step.

        reduce: sums a tensor over the ranks; needed on more than one
        (moetk.parallel.sum_over_ranks). Raises TopologyError without it.
        """
        step_all(self.steered, reduce)

    def step_after(self, optimizer: torch.optim.Optimizer, reduce: Reduce | None = None) -> Any:
        """Call `step` after every step of the optimizer. Returns the hook's handle."""
        return optimizer.register_step_post_hook(_StepAfter(self, reduce))

    def trainer_callback(self, reduce: Reduce | None = None) -> Any:
        """A transformers TrainerCallback that steps the controllers after each optimizer step."""
        from moetk.layers.trainer import controller_callback

        return controller_callback(self, reduce)

    def restore(self) -> None:
        """Give the model its own classes back, bit for bit, and drop custom routers.

        Where FSDP2 has put its class on top, ours stays below it and lets the stock code through.
        """
        for handle in self._hooks:
            handle.remove()
        for found, site in zip(self._found, self.sites, strict=True):
            found.gate._modules.pop(CUSTOM, None)
            for name in site.frozen:
                found.gate.get_parameter(name).requires_grad_(True)
            for key in site.settings:
                vars(found.gate).pop(key, None)
            site.active = False
            for module in (found.gate, found.experts):
                if withdraw(module):
                    for name in (SITE, BOUND):
                        vars(module).pop(name, None)
            if withdraw(found.layer):
                vars(found.layer).pop(PARTS, None)
        withdraw(self.model)
        if getattr(self.model.config, "moetk", None) is not None:
            delattr(self.model.config, "moetk")
        vars(self.model).pop(REPLACEMENT, None)

    def state_dict(self) -> dict[str, Any]:
        """Controllers' state by "<block name>.<index>", and the noise counter."""
        state: dict[str, Any] = {"forwards": self.carrier.count, "seed": self.carrier.seed}
        for site in self.sites:
            for index, one in enumerate(site.attachment.steered):
                state[f"{site.name}.{index}"] = one.controller.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly. Raises RouterConfigError when layers or controllers differ."""
        here = set(self.state_dict())
        if here != set(state):
            raise RouterConfigError(
                f"The controller state holds {sorted(set(state) - here) or 'nothing'} that this "
                f"model lacks, and lacks {sorted(here - set(state)) or 'nothing'} that it has."
            )
        self.carrier.count, self.carrier.seed = int(state["forwards"]), int(state["seed"])
        for site in self.sites:
            for index, one in enumerate(site.attachment.steered):
                one.controller.load_state_dict(state[f"{site.name}.{index}"])

    def __repr__(self) -> str:
        return self.explain()


class _StepAfter:
    def __init__(self, replacement: Replacement, reduce: Reduce | None) -> None:
        self.replacement, self.reduce = replacement, reduce

    def __call__(self, *_: Any) -> None:
        self.replacement.step(self.reduce)


def replacement_of(model: nn.Module) -> Replacement:
    """The Replacement of a model, looked up through wrappers (DDP, PEFT, torch.compile).

    Raises ReplaceError when the model was not replaced.
    """
    for module in model.modules():
        found = vars(module).get(REPLACEMENT)
        if isinstance(found, Replacement):
            return found
    raise ReplaceError(
        f"{type(model).__name__} was not replaced: call moetk.replace_moe(model) first, or load it "
        "with moetk.AutoModelForCausalLM."
    )


def replace_moe(
    model: nn.Module,
    router: Factory | None = None,
    *,
    losses: Sequence[Loss] = (),
    controllers: Sequence[Controller] = (),
    backend: str = "auto",
    dispatcher: Dispatcher | None = None,
    aux_scale: float | Callable[[], float | Tensor] | None = None,
    check: bool | None = None,
    seed: int | None = None,
) -> Replacement:
    """Put moetk's parts into every mixture-of-experts layer of a transformers model, in place.

    router: called with each layer's BlockSpec; returns the layer's router, any callable
        `(x_TH, ctx) -> Routing`, or None to leave that layer's own. None = all keep their own.
        A module's parameters move to the gate's device and dtype, and are saved at
        `<gate>.moetk.<name>`; the stock gate stays, frozen.
    losses, controllers: attached to every layer; they act in training, through backward.
    backend: "auto", "stock" (transformers' own experts), "reference" or "grouped".
    dispatcher: moves rows to experts and back; None = Local().
    aux_scale: the gradient that attached losses enter with, for losses computed outside the model
        (a float, or a callable evaluated in backward); None = read off `out.loss`.
    check: look at routing values on every call: None = on the CPU, True = always, False = never.
    seed: of the routers' noise; None = torch's initial seed.

    Replacing a second time starts from the stock model again. Nothing changes when it raises:
    UnsupportedModelError for a mixture-of-experts model without a row in moetk.layers.families,
    ReplaceError where another library holds a module's forward, BackendError, RouterConfigError.
    """
    root = _root(model)
    if backend != "stock":
        check_backend_name(backend)
    earlier = vars(root).get(REPLACEMENT)
    found = list(_find(root, backend))
    if isinstance(earlier, Replacement):
        earlier.restore()
    carrier = Carrier(torch.initial_seed() if seed is None else seed)
    carrier.wants_loss = bool(losses) and aux_scale is None
    routers = [_build(router, spec) for spec in _specs(found, root)]
    label = _label(routers)
    sites = [
        _site(
            index, item, made, carrier, losses, controllers, backend, dispatcher, aux_scale, check
        )
        for index, (item, made) in enumerate(zip(found, routers, strict=True))
    ]
    carrier.refuse_hf_aux = _refusal(sites, routers)
    replacement = Replacement(root, carrier, sites, found)
    replacement.label = label
    try:
        for item, site, made in zip(found, sites, routers, strict=True):
            _install(item, site, made)
        if found:
            _hook(replacement, root)
            vars(root)[REPLACEMENT] = replacement
            if label:
                root.config.moetk = {"router": label, "format": 1}
            if label or controllers:
                extend(root, SavingShell)
    except Exception:
        replacement.restore()
        raise
    return replacement


def _root(model: nn.Module) -> Any:
    """The transformers model below wrappers."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} is not, and does not hold, a transformers model. Compose a "
        "moetk.MoELayer from parts instead."
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Below PEFT's wrappers, which keep the module they wrap as `base_layer`."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def _find(root: nn.Module, backend: str) -> Iterator[_Found]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict(root.named_modules())
    for name, block in modules.items():
        family = family_of(block)
        if family is None:
            _refuse_unknown(name, block)
            continue
        gate = unwrapped(getattr(block, family.router))
        experts = unwrapped(getattr(block, family.experts))
        if own_class(gate).__name__ not in family.gates:
            raise UnsupportedModelError(
                f"{name}: {type(gate).__name__} is not a router moetk knows for "
                f"{family.model_type} ({', '.join(family.gates)})."
            )
        if any(p.is_meta for p in (*gate.parameters(), *experts.parameters())):
            raise ReplaceError(
                f"{name} is on the meta device: replace after the weights are loaded."
            )
        layer_name = name
        while not isinstance(modules[layer_name], GradientCheckpointingLayer):
            if "." not in layer_name:
                raise UnsupportedModelError(f"{name} does not lie in a decoder layer.")
            layer_name = layer_name.rsplit(".", 1)[0]
        yield _Found(name, block, layer_name, modules[layer_name], family, gate, experts)


def _refuse_unknown(name: str, block: nn.Module) -> None:
    cls = own_class(block)
    if not cls.__module__.startswith("transformers.models."):
        return
    experts = block._modules.get("experts")
    if experts is None or not (hasattr(block, "gate") or hasattr(block, "router")):
        return
    known = ", ".join(sorted({family.model_type for family in FAMILIES}))
    raise UnsupportedModelError(
        f"{name}: {cls.__name__} is a mixture-of-experts block without a row in "
        f'moetk.layers.families ({known}). Load the model with backend="stock" to use it as it '
        "is; it was left untouched."
    )


def _specs(found: Sequence[_Found], root: nn.Module) -> Iterator[BlockSpec]:
    for index, item in enumerate(found):
        spec = item.family.spec(item.experts)
        yield BlockSpec(
            name=item.name,
            layer=_layer_index(item.layer_name, index),
            moe_index=index,
            num_moe_layers=len(found),
            hidden_size=spec.hidden_size,
            num_experts=spec.num_experts,
            top_k=int(item.gate.top_k),  # type: ignore[arg-type]
            intermediate_size=spec.intermediate_size,
            gate=item.gate,
            config=root.config,
            module=item.block,
        )


def _layer_index(layer_name: str, default: int) -> int:
    numbers = re.findall(r"\.(\d+)(?=\.|$)", layer_name)
    return int(numbers[-1]) if numbers else default


def _build(factory: Factory | None, spec: BlockSpec) -> Router | None:
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
    if isinstance(router, nn.Module):
        like = next(spec.gate.parameters())
        for parameter in router.parameters():
            parameter.data = parameter.data.to(like.device, like.dtype)
        # Buffers keep their dtype: a bias of e_score_correction_bias's kind freezes in bf16.
        for name, buffer in list(router.named_buffers()):
            owner = router.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(like.device)
        router.train(spec.module.training)
    return router


def _label(routers: Iterable[Router | None]) -> str:
    """The routers' names, for humans and for the check on load; never imported from."""
    names = [_name_of(made) for made in routers if made is not None]
    return ", ".join(dict.fromkeys(names))


def _name_of(made: Router) -> str:
    return getattr(made, "__qualname__", None) or type(made).__qualname__


def _site(
    index: int,
    item: _Found,
    made: Router | None,
    carrier: Carrier,
    losses: Sequence[Loss],
    controllers: Sequence[Controller],
    backend: str,
    dispatcher: Dispatcher | None,
    aux_scale: float | Callable[[], float | Tensor] | None,
    check: bool | None,
) -> Site:
    if backend == "stock" and dispatcher is not None:
        raise BackendError('backend="stock" runs transformers\' own experts: dispatcher=None.')
    return Site(
        name=item.name,
        layer=_layer_index(item.layer_name, index),
        index=index,
        family=item.family,
        gate_row=item.family.gate_row(item.gate),
        order=item.family.order(item.gate),
        spec=item.family.spec(item.experts),
        backend=backend,
        dispatcher=Local() if dispatcher is None else dispatcher,
        attachment=Attachment(
            losses, controllers, item.gate if made is None else made, aux_scale, item.name
        ),
        carrier=carrier,
        check=check,
        function=None if isinstance(made, nn.Module) else made,
        label=None if made is None else _name_of(made),
    )


def _install(item: _Found, site: Site, made: Router | None) -> None:
    gate_row = site.gate_row
    if made is None:
        site.settings = {"tie": "stock", **gate_row.settings(item.gate)}
        vars(item.gate).update(site.settings)
    else:
        site.frozen = tuple(n for n, p in item.gate.named_parameters() if p.requires_grad)
        for name in site.frozen:
            # Unused: it would break DDP, which waits for its gradient.
            item.gate.get_parameter(name).requires_grad_(False)
        if isinstance(made, nn.Module):
            item.gate.add_module(CUSTOM, made)
    mixins = (RouterShell, gate_row.router) if made is None else (RouterShell,)
    extend(item.gate, *mixins)
    extend(item.experts, ExpertsShell)
    vars(item.gate)[SITE] = vars(item.experts)[SITE] = site
    if not is_extended(item.layer):
        extend(item.layer, LayerShell)
        vars(item.layer)[PARTS] = (site.carrier, site.layer, item.gate, item.experts)


def _hook(replacement: Replacement, root: nn.Module) -> None:
    import inspect

    carrier = replacement.carrier
    base: Any = root.base_model
    handles = [
        base.register_forward_pre_hook(
            OpenBase(carrier, inspect.signature(base.forward)), with_kwargs=True
        ),
        base.register_forward_hook(CloseBase(carrier), always_call=True),
    ]
    if base is not root:
        handles += [
            root.register_forward_pre_hook(
                OpenModel(carrier, inspect.signature(root.forward)), with_kwargs=True
            ),
            root.register_forward_hook(CloseModel(carrier), with_kwargs=True, always_call=True),
        ]
    replacement._hooks = handles


def _refusal(sites: Sequence[Site], routers: Sequence[Router | None]) -> str | None:
    """Why transformers' pooled loss would not describe these routers, or None where it does."""
    for site, made in zip(sites, routers, strict=True):
        if made is None or not site.gate_row.hf_aux or isinstance(made, MixtralRouter):
            continue
        return (
            f"output_router_logits=True adds transformers' own balancing loss, a softmax and top-k "
            f"of the logits, but {site.label} in {site.name} routes otherwise: the loss would "
            "balance a routing that does not happen. Attach a loss with "
            "replace_moe(..., losses=[...]), and read logits with moetk.record(model, "
            'fields=("logits_TE",)).'
        )
    return None
