"""`headwater inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headwater.cli.adapters import adapter_fields, attach_to_shape, locate
from headwater.cli.console import out_console, table
from headwater.cli.inspect_gates import GatesOnText, read_gates
from headwater.report.modules import arrange, layers_of

if TYPE_CHECKING:
    from rich.console import Console

    from headwater.methods import Heads

_FEW_HEADS = 8
"""Up to so many heads are shown one by one."""


def run(source: str, *, text: str | None, rows: int, as_json: bool) -> None:
    """Print what an adapter is made of and, on text, what its gates do.

    Raises:
        HeadwaterError: there is no adapter, it does not fit its base model, or there is no such text.
    """
    found = locate(source)
    model = attach_to_shape(found)

    from headwater.analysis import DEAD_BELOW, heads
    from headwater.analysis.gates import shows_gates
    from headwater.analysis.routing import head_similarity

    fields = adapter_fields(found.adapter)
    held, similarity, gated = heads(model), head_similarity(model), shows_gates(model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    has_text = text is not None or (found.config is not None and rows > 0)
    gates = read_gates(found, text, rows) if gated and has_text else None
    names = dict.fromkeys([*held, *(gates.together if gates else ())])
    layers = [_layer(name, held.get(name), similarity.get(name)) for name in names]
    for layer in layers:
        layer["gates"] = gates.of_layer(layer["name"]) if gates else None
    report: dict[str, Any] = {
        "adapter": str(found.adapter),
        "method": str(fields["peft_type"]).lower(),
        "base_model": found.base_model,
        "parameters": parameters,
        "gated": gated,
        "gates": {"tokens": gates.tokens, "texts": gates.texts, "dead_below": DEAD_BELOW} if gates else None,
        "layers": layers,
        "config": {key: value for key, value in fields.items() if value not in (None, {}, [])},
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = out_console()
    _print_whole(console, report)
    _print_layers(console, layers)
    if gates is not None and len(gates.by_task) > 1:
        _print_tasks(console, gates)
    if gated and not has_text:
        fix = "--rows 4" if found.config is not None else "a run folder, or --text FILE with a text per line"
        console.print(f"Load, entropy and dead experts show on text only: give {fix}.", soft_wrap=True, highlight=False)


def _layer(name: str, layer: Heads | None, similarity: list[list[float]] | None) -> dict[str, Any]:
    if layer is None:  # gates without heads to compare
        return {"name": name, "head_similarity": None}
    heads, d_out, r = layer.B.shape
    pairs = [similarity[i][j] for i in range(heads) for j in range(i)] if similarity else []
    return {
        "name": name,
        "in_features": layer.A.shape[1],
        "out_features": d_out,
        "r": r,
        "heads": heads,
        "scaling": layer.scaling,
        "routed": layer.router is not None,
        "head_similarity": {"mean": sum(pairs) / len(pairs), "min": min(pairs), "max": max(pairs)} if pairs else None,
    }


def _print_whole(console: Console, report: dict[str, Any]) -> None:
    layers = report["layers"]
    held = [layer for layer in layers if "r" in layer]
    ranks = Counter(layer["r"] for layer in held) or Counter({report["config"].get("r"): 1})
    rows = [
        ["method", report["method"]],
        ["base model", report["base_model"]],
        ["parameters", f"{report['parameters']:,}"],
        ["rank", ", ".join(f"{r} ({n} layers)" if len(ranks) > 1 else str(r) for r, n in sorted(ranks.items()))],
        ["heads", ", ".join(str(n) for n in sorted({layer["heads"] for layer in held})) or None],
        ["adapted layers", len(layers) or None],
    ]
    gates = [layer["gates"] for layer in layers if layer["gates"]]
    if gates:
        texts, dead = report["gates"]["texts"], [len(g["dead_experts"]) for g in gates]
        of = f"{sum(texts.values())} texts of {len(texts)} tasks" if len(texts) > 1 else f"{sum(texts.values())} texts"
        share = f"load below {report['gates']['dead_below']:.0%} of an equal one"
        where = f", in {sum(map(bool, dead))} of {len(dead)} layers" if any(dead) else ""
        rows += [
            ["gates seen on", f"{report['gates']['tokens']:,} tokens, {of}"],
            ["gate entropy", f"{_mean(g['gate_entropy'] for g in gates):.3f}"],
            ["load entropy", f"{_mean(g['load_entropy'] for g in gates):.3f}"],
            ["dead experts", f"{sum(dead)} of {sum(len(g['load']) for g in gates)}{where} ({share})"],
        ]
    console.print(table(["adapter", report["adapter"]], rows))


def _print_layers(console: Console, layers: list[dict[str, Any]]) -> None:
    by_name = {
        layer["name"]: layer for layer in layers if layer["head_similarity"] is not None or layer["gates"] is not None
    }
    gated = any(layer["gates"] for layer in by_name.values())
    if not by_name:
        return
    lines = []
    kinds = arrange(by_name)
    for number in layers_of(kinds):
        for kind, places in kinds.items():
            layer = by_name.get(places.get(number, ""))
            if layer is None:
                continue
            alike = layer["head_similarity"] and f"{layer['head_similarity']['mean']:+.3f}"
            lines.append([number, kind, alike, *(_gate_cells(layer["gates"]) if gated else ())])
    explained = ["heads alike: mean cosine between up-projections; 1 is equal, 0 unrelated."]
    columns = ["layer", "projection", "heads alike"]
    if gated:
        columns += ["load, %", "gate entropy", "load entropy", "dead"]
        explained += [
            "load: mean gate of each head; with top-k gates, the share of tokens that use it.",
            "gate entropy: of each token's gate; load entropy: of how load spreads over heads; 1 is equal, 0 one head.",
        ]
    console.print("\n".join(explained), soft_wrap=True, highlight=False)
    console.print(table(columns, lines))


def _gate_cells(gates: dict[str, Any] | None) -> list[str | None]:
    if gates is None:
        return [None] * 4
    dead = [str(n + 1) for n in gates["dead_experts"]]
    return [
        _loads(gates["load"]),
        f"{gates['gate_entropy']:.3f}",
        f"{gates['load_entropy']:.3f}",
        ", ".join(dead) if len(dead) <= _FEW_HEADS else f"{len(dead)} of {len(gates['load'])}",
    ]


def _loads(load: list[float]) -> str:
    if len(load) <= _FEW_HEADS:
        return "  ".join(f"{100 * share:.0f}" for share in load)
    return f"{100 * min(load):.0f} to {100 * max(load):.0f}"


def _print_tasks(console: Console, gates: GatesOnText) -> None:
    """Each task's load, averaged over the layers with the most heads; of many heads only those that it uses most."""
    counts = [len(layer.load) for layer in gates.together.values()]
    count = max(counts)
    few = count <= _FEW_HEADS
    which = "layers" if min(counts) == count else f"the {counts.count(count)} layers with {count} heads"
    lines: list[list[object]] = []
    for task, layers in gates.by_task.items():
        loads = [layer.load for layer in layers.values() if len(layer.load) == count]
        if not loads:
            continue
        mean = [_mean(load[n].item() for load in loads) for n in range(count)]
        best = sorted(range(count), key=lambda n: -mean[n])[:5]
        most = ", ".join(f"{n + 1} ({mean[n]:.0%})" for n in best)
        lines.append([task, *([f"{100 * share:.1f}" for share in mean] if few else [most])])
    title = f"Load by task in %, averaged over {which}" + ("" if few else ": the heads that it uses most")
    columns = [f"head {n + 1}" for n in range(count)] if few else [f"of {count} heads"]
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table(["task", *columns], lines))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
