"""`headwater inspect`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from headwater.cli.adapters import adapter_fields, attach_to_shape, locate
from headwater.cli.console import out_console, table
from headwater.report.modules import arrange, layers_of

if TYPE_CHECKING:
    from headwater.methods import Heads


def run(source: str, *, as_json: bool) -> None:
    """Print what an adapter is made of.

    Raises:
        HeadwaterError: there is no adapter, or it does not fit its base model.
    """
    found = locate(source)
    model = attach_to_shape(found)

    from headwater.analysis import heads
    from headwater.analysis.routing import head_similarity

    fields = adapter_fields(found.adapter)
    held = heads(model)
    similarity = head_similarity(model)
    report: dict[str, Any] = {
        "adapter": str(found.adapter),
        "method": str(fields["peft_type"]).lower(),
        "base_model": found.base_model,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "layers": [_layer(name, layer, similarity.get(name)) for name, layer in held.items()],
        "config": {key: value for key, value in fields.items() if value not in (None, {}, [])},
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    _print(report)


def _layer(name: str, layer: Heads, similarity: list[list[float]] | None) -> dict[str, Any]:
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


def _print(report: dict[str, Any]) -> None:
    console = out_console()
    layers = report["layers"]
    ranks = Counter(layer["r"] for layer in layers) or Counter({report["config"].get("r"): 1})
    rows = [
        ["method", report["method"]],
        ["base model", report["base_model"]],
        ["parameters", f"{report['parameters']:,}"],
        ["rank", ", ".join(f"{r} ({n} layers)" if len(ranks) > 1 else str(r) for r, n in sorted(ranks.items()))],
        ["heads", ", ".join(str(n) for n in sorted({layer["heads"] for layer in layers})) or None],
        ["adapted layers", len(layers) or None],
    ]
    console.print(table(["adapter", report["adapter"]], rows))
    means = {layer["name"]: layer["head_similarity"] and layer["head_similarity"]["mean"] for layer in layers}
    if not any(mean is not None for mean in means.values()):
        return
    kinds = arrange(means)
    lines = []
    for number in layers_of(kinds):
        cells = [means.get(by_layer.get(number, "")) for by_layer in kinds.values()]
        lines.append([number, *(None if mean is None else f"{mean:+.3f}" for mean in cells)])
    console.print(
        "How alike the heads are: mean cosine between up-projections; 1 is equal, 0 unrelated", soft_wrap=True
    )
    console.print(table(["layer", *kinds], lines))
