"""`replace_moe`: a router of one's own in a stock transformers model, in place and reversible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moetk.dispatch import Dispatcher, Local
from moetk.errors import (
    BackendError,
    UnsupportedModelError,
)
from moetk.experts.backends import check_backend_name
from moetk.layers.attach import Attachment, Controller, Loss, name_of
from moetk.layers.carrier import Carrier
from moetk.layers.factory import (
    Factory,
    Router,
    build,
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
from moetk.layers.replacement import REPLACEMENT, Replacement
from moetk.layers.shells import (
    Site,
)
from moetk.layers.swap import own_class
from moetk.routers import MixtralRouter


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
    graphs: int | None = None,
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
        its backward needs. None = calls of at most 64 tokens without gradients, as in decoding, by
        backend "fused", and 32 recordings a block; 0 = none. `explain` says what is replayed.

    Replacing a second time starts from the stock model again. Nothing changes when it raises:
    UnsupportedModelError for a mixture-of-experts model without a row in moetk.layers.families,
    ReplaceError where another library holds a module's forward, BackendError, RouterConfigError.
    """
    root = root_of(model)
    if backend != "stock":
        check_backend_name(backend)
    if add_to_grad and backend not in ("fused", "te"):
        raise BackendError(f'add_to_grad=True needs backend="fused" or "te", not "{backend}".')
    if graphs is not None and graphs < 0:
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
