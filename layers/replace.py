"""`replace_moe`: a router of one's own in a stock transformers model, in place and reversible."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetk.dispatch import Dispatcher, Local
from moetk.errors import (
    BackendError,
    ReplaceError,
    RouterConfigError,
    UnsupportedModelError,
)
from moetk.experts.backends import check_backend_name
from moetk.layers.attach import Attachment, Controller, Loss, Reduce, Steered, name_of, step_all
from moetk.layers.carrier import Carrier, CloseBase, CloseModel, OpenBase, OpenModel
from moetk.layers.factory import (
    Factory,
    Router,
    build,
    label_of,
    refuse_distributed,
    refuse_shared,
)
from moetk.layers.find import (
    Found,
    expects_experts,
    find_blocks,
    layer_index,
    root_of,
    specs_of,
)
from moetk.layers.graphs import Parts, put_in, take_out
from moetk.layers.saving import SavingShell, mark
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
from moetk.layers.swap import extend, own_class, withdraw
from moetk.routers import MixtralRouter

REPLACEMENT = "_moetk_replacement"


class Replacement:
    """What `replace_moe` did, and the way back. Sites are in the order of the layers."""

    def __init__(
        self,
        model: Any,
        carrier: Carrier,
        sites: Sequence[Site],
        found: Sequence[Found],
        routers: Sequence[Router | None],
        graphs: int,
    ) -> None:
        self.model, self.carrier, self.sites = model, carrier, tuple(sites)
        self._found, self._routers, self._graphs = found, routers, graphs
        self._hooks: list[Any] = []
        self.label = label_of(routers)

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

    def install(self) -> None:
        """Put the parts in again after `restore`; all of them, or none where one cannot be.

        Raises ReplaceError while another Replacement holds the model.
        """
        holder = vars(self.model).get(REPLACEMENT)
        if holder is self:
            return
        if holder is not None:
            raise ReplaceError(
                f"{type(self.model).__name__} is held by another Replacement: restore that first."
            )
        try:
            for found, site, made in zip(self._found, self.sites, self._routers, strict=True):
                _install(found, site, made)
            if self._graphs:
                parts = [Parts(one.block, one.gate, one.experts) for one in self._found]
                put_in(list(zip(parts, self.sites, strict=True)), self._graphs)
            if self.sites:
                _hook(self, self.model)
                vars(self.model)[REPLACEMENT] = self
                if self.label:
                    self.model.config.moetk = mark(self.model, self.label)
                if self.label or self.steered:
                    extend(self.model, SavingShell)
        except Exception:
            self._withdraw()
            raise

    def restore(self) -> None:
        """Give the model its own classes back, bit for bit, and drop custom routers.

        Where FSDP2 has put its class on top, ours stays below it and lets the stock code through.
        Does nothing once the model was restored, or replaced anew.
        """
        if vars(self.model).get(REPLACEMENT) is self:
            self._withdraw()

    def _withdraw(self) -> None:
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
            take_out(found.block)
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
    add_to_grad: bool = False,
    graphs: int = 0,
) -> Replacement:
    """Put moetk's parts into every mixture-of-experts layer of a transformers model, in place.

    router: called with each layer's BlockSpec; returns the layer's router, any callable
        `(x_TH, ctx) -> Routing`, or None to leave that layer's own. None = all keep their own.
        A module's parameters move to the gate's device and dtype, and are saved at
        `<gate>.moetk.<name>`; the stock gate stays, frozen.
    losses, controllers: attached to every layer; they act in training, through backward.
    backend: "auto", "stock" (transformers' own experts), "reference", "grouped", "fused" or "te"
        (Transformer Engine).
    dispatcher: moves rows to experts and back; None = Local().
    aux_scale: the gradient that attached losses enter with, for losses computed outside the model
        (a float, or a callable evaluated in backward); None = read off `out.loss`.
    check: look at routing values on every call: None = on the CPU, True = always, False = never.
    seed: of the routers' noise; None = torch's initial seed.
    add_to_grad: with backend "fused" or "te", backward adds the experts' gradients into .grad
        itself when there is one (gradient accumulation), which saves a copy of them and a pass over
        it (with one rounding, or as torch with two, whichever is faster at these sizes); then use
        loss.backward(), not torch.autograd.grad. A CUDA graph goes on adding to the
        gradients it was recorded with: keep them, by zero_grad(set_to_none=False). BackendError
        where others wait for gradients.
    graphs: blocks called with at most so many tokens, of a size that came before, are replayed from
        CUDA graphs, the third time that it comes, where nothing else within a block runs as Python
        (hooks, a router of one's own, losses in training, ...) and, in training, the experts'
        gradients are added to (add_to_grad, and they are there) or not wanted. Each size keeps what
        its backward needs. 0 = none. `explain` says what is replayed.

    Replacing a second time starts from the stock model again. Nothing changes when it raises:
    UnsupportedModelError for a mixture-of-experts model without a row in moetk.layers.families,
    ReplaceError where another library holds a module's forward, BackendError, RouterConfigError.
    """
    root = root_of(model)
    if backend != "stock":
        check_backend_name(backend)
    if add_to_grad and backend not in ("fused", "te"):
        raise BackendError(f'add_to_grad=True needs backend="fused" or "te", not "{backend}".')
    if graphs < 0:
        raise BackendError(f"graphs={graphs} is no number of tokens: 0 (none) or more.")
    found = list(find_blocks(root))
    if not found and (router or losses or controllers or expects_experts(root)):
        raise UnsupportedModelError(
            f"{type(root).__name__} has no mixture-of-experts block that moetk knows: there is "
            'nothing to replace. Load it with backend="stock" to use it as it is.'
        )
    earlier = vars(root).get(REPLACEMENT)
    if isinstance(earlier, Replacement):
        earlier.restore()
    try:
        carrier = Carrier(torch.initial_seed() if seed is None else seed)
        carrier.wants_loss = bool(losses) and aux_scale is None
        routers = [build(router, spec) for spec in specs_of(found, root)]
        refuse_shared(routers)
        carrier.wants_labels = bool(router or losses or controllers)
        carrier.keeps_previous = any(getattr(made, "reads_previous", False) for made in routers)
        if any(list(made.parameters()) for made in routers if isinstance(made, nn.Module)):
            refuse_distributed(model)
        sites = [
            _site(
                n,
                item,
                made,
                carrier,
                losses,
                controllers,
                backend,
                dispatcher,
                aux_scale,
                check,
                add_to_grad,
            )
            for n, (item, made) in enumerate(zip(found, routers, strict=True))
        ]
        carrier.refuse_hf_aux = _refusal(sites, routers)
        replacement = Replacement(root, carrier, sites, found, routers, graphs)
        replacement.install()
    except Exception:
        if isinstance(earlier, Replacement):
            earlier.install()
        raise
    return replacement


def _site(
    index: int,
    item: Found,
    made: Router | None,
    carrier: Carrier,
    losses: Sequence[Loss],
    controllers: Sequence[Controller],
    backend: str,
    dispatcher: Dispatcher | None,
    aux_scale: float | Callable[[], float | Tensor] | None,
    check: bool | None,
    add_to_grad: bool,
) -> Site:
    if backend == "stock" and dispatcher is not None:
        raise BackendError('backend="stock" runs transformers\' own experts: dispatcher=None.')
    return Site(
        name=item.name,
        layer=layer_index(item.layer_name, index),
        index=index,
        top_k=int(item.gate.top_k),  # type: ignore[arg-type]
        gate_name=own_class(item.gate).__name__,
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
        label=None if made is None else name_of(made),
        add_to_grad=add_to_grad,
    )


def _install(item: Found, site: Site, made: Router | None) -> None:
    gate_row, site.active = site.gate_row, True
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
    extend(item.layer, LayerShell)
    vars(item.layer)[PARTS] = (site.carrier, site.layer, item.gate, item.experts)


def _hook(replacement: Replacement, root: nn.Module) -> None:
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


def _hf_shaped(made: Router, site: Site) -> bool:
    """A softmax over all and the best K of it, with the model's own K and no bias in the choice."""
    return (
        isinstance(made, MixtralRouter)
        and type(made).forward is MixtralRouter.forward
        and made.top_k == site.top_k
        and getattr(made, "e_score_correction_bias", None) is None
    )


def _refusal(sites: Sequence[Site], routers: Sequence[Router | None]) -> str | None:
    """Why transformers' pooled loss would not describe these routers, or None where it does."""
    for site, made in zip(sites, routers, strict=True):
        if made is None or not site.gate_row.hf_aux or _hf_shaped(made, site):
            continue
        return (
            f"output_router_logits=True adds transformers' own balancing loss, a softmax and top-k "
            f"of the logits, but {site.label} in {site.name} routes otherwise: the loss would "
            "balance a routing that does not happen. Attach a loss with "
            "replace_moe(..., losses=[...]), and read logits with moetk.record(model, "
            'fields=("logits_TE",)).'
        )
    return None
