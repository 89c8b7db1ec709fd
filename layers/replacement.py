"""What `replace_moe` did to a model: the parts that are in, their state, and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moetk.errors import (
    ReplaceError,
    RouterConfigError,
)
from moetk.layers.attach import Reduce, Steered, step_all
from moetk.layers.carrier import Carrier, CloseBase, CloseModel, OpenBase, OpenModel
from moetk.layers.factory import (
    Router,
    label_of,
)
from moetk.layers.find import (
    Found,
)
from moetk.layers.graphs import UNASKED, Parts, asked, put_in, take_out
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
from moetk.layers.swap import extend, withdraw

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
        graphs: int | None,
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
            if self._graphs != 0:
                parts = [Parts(one.block, one.gate, one.experts) for one in self._found]
                calls = UNASKED if self._graphs is None else asked(self._graphs)
                put_in(list(zip(parts, self.sites, strict=True)), calls)
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
