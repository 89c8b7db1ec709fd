"""What runs in each layer of a replaced model, and why."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import nn

from moetk.experts import auto_row, backends, pick_backend
from moetk.layers.find import runs_on
from moetk.layers.graphs import GRAPHS, Graphs
from moetk.layers.shells import CUSTOM, Site

if TYPE_CHECKING:
    from moetk.layers.replacement import Replacement


def explain(replacement: Replacement) -> str:
    """A plain-text table, one line a layer, notes below."""
    model = replacement.model
    table = Table(title=f"{type(model).__name__}: {len(replacement.sites)} layers", box=None)
    for column in ("layer", "router", "experts", "dispatch", "losses", "controllers"):
        table.add_column(column, overflow="fold")
    notes: dict[str, None] = {}
    blind = _uncounted(replacement)
    for site, found in zip(replacement.sites, replacement._found, strict=True):
        backend, why = _backend(site, found.experts)
        notes[why] = None
        graphs: Graphs | None = vars(found.block).get(GRAPHS)
        if graphs is not None and (note := graphs.explain()) is not None:
            notes[note] = None
        table.add_row(
            site.name,
            _router(site, found.gate),
            backend,
            type(site.dispatcher).__name__,
            ", ".join(type(loss).__name__ for loss in site.attachment.losses) or "-",
            ", ".join(type(one.controller).__name__ for one in site.attachment.steered) or "-",
        )
    if blind:
        notes[
            f"not counted, below the first trainable parameter: {', '.join(blind)} (no gradient "
            "reaches their output, so neither losses nor controllers act there)"
        ] = None
    out = StringIO()
    Console(file=out, width=110, color_system=None).print(table)
    return out.getvalue() + "\n".join(f"- {note}" for note in notes)


def _router(site: Site, gate: object) -> str:
    if site.label is None:
        return f"{type(gate).__name__} (composed: {site.gate_row.router.__name__})"
    kind = "custom" if CUSTOM in gate._modules else "custom function"  # type: ignore[attr-defined]
    return f"{site.label} ({kind})"


def _backend(site: Site, experts: nn.Module) -> tuple[str, str]:
    if site.backend == "stock":
        return "stock", 'stock: asked for with backend="stock"; transformers\' own experts run'
    known = {one.name: one for one in backends()}
    if site.backend != "auto":
        about = known[site.backend].about
        return site.backend, f'{site.backend} ({about}): asked for with backend="{site.backend}"'
    device, dtype = runs_on(experts), next(experts.parameters()).dtype
    reasons: dict[str, list[str]] = {}
    for rows in (1, 2**10, 2**20):
        row = auto_row(device.type, dtype, rows, site.spec)
        picked = pick_backend("auto", dtype, device, rows, spec=site.spec)
        why = f"{row.bounds}: {row.measured}"
        if picked.name != row.backend:
            first = known[row.backend]
            refusal = first.why_not(dtype, device, site.spec) or first.why_not_unasked(device)
            why = f"because {row.backend} is not taken: {refusal}"
        if why not in reasons.setdefault(picked.name, []):
            reasons[picked.name].append(why)
    dtype_name = str(dtype).removeprefix("torch.")
    whys = "; ".join(f"{n} ({known[n].about}) {', '.join(why)}" for n, why in reasons.items())
    return f"auto: {'/'.join(reasons)}", f"auto on {device.type}, {dtype_name}: {whys}"


def _uncounted(replacement: Replacement) -> list[str]:
    """Layers whose output no gradient reaches: all parameters up to and in them are frozen."""
    by_module = {id(found.layer): found.name for found in replacement._found}
    blind, trainable = [], False
    for module in replacement.model.modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if id(module) in by_module:
            inside = any(p.requires_grad for p in module.parameters())
            if not trainable and not inside:
                blind.append(by_module[id(module)])
        trainable = trainable or own
    return blind
