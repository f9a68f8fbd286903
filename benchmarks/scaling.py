"""How the cost of one adapted linear layer grows with heads N, rank r, tasks T and tokens.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json --plot docs/images/scaling

The floor is the frozen linear's forward and the gradient of its input, measured in the same rounds; the plot draws it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import layers, measure
from .layers import FLOOR, LOOP, Shape

PEFT_SAME_RANK = "PEFT LoRA, rank r"
PEFT_TOTAL_RANK = "PEFT LoRA, rank N r"
OURS = "R-LoRA"
MTL = "MTL-LoRA"
LOOP_LIMIT = 8  # heads; beyond, the loop takes minutes and the picture is clear

BASE = Shape(896, 4864, 2048)
SMOKE = Shape(32, 48, 16, r=2, N=2, rows=2)


def models_at(shape: Shape) -> dict[str, nn.Module]:
    linear = layers.frozen_linear(shape)
    models: dict[str, nn.Module] = {
        FLOOR: layers.Layer(linear),
        PEFT_SAME_RANK: layers.peft_lora(linear, shape.r, shape.dropout),
        PEFT_TOTAL_RANK: layers.peft_lora(linear, shape.N * shape.r, shape.dropout),
        OURS: layers.ours(linear, shape),
    }
    if shape.N <= LOOP_LIMIT:
        models[LOOP] = layers.PublicLoop(linear, shape.r, shape.N, shape.dropout)
    return models


def tasks_at(shape: Shape, num_tasks: int) -> dict[str, nn.Module]:
    linear = layers.frozen_linear(shape)
    return {FLOOR: layers.Layer(linear), MTL: layers.ours(linear, shape, "mtl_lora", num_tasks=num_tasks)}


def sweep(
    axis: str, values: Sequence[int], at: Callable[[int], tuple[Shape, dict[str, nn.Module]]], *, rounds: int, seed: int
) -> dict[str, Any]:
    """Every value of one axis in the same rounds, so that its points can be compared with each other."""
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    for value in values:
        shape, models = at(value)
        x, dy = shape.inputs()
        steps |= {(name, value): layers.step(model, x, dy) for name, model in models.items()}
    seconds = measure.interleave(
        {f"{name}|{value}": run for (name, value), run in steps.items()}, rounds=rounds, seed=seed
    )
    found: dict[str, dict[str, Any]] = {}
    for name, value in steps:
        own, floor = seconds[f"{name}|{value}"], seconds[f"{FLOOR}|{value}"]
        ratio = measure.spread([t / f for t, f in zip(own, floor, strict=True)])
        found.setdefault(name, {})[str(value)] = {**ratio, "seconds": measure.spread(own)}
    return {"axis": axis, "values": list(values), "variants": found}


def sweeps(base: Shape, *, smoke: bool, rounds: int, seed: int) -> list[dict[str, Any]]:
    def with_(**fields: int) -> tuple[Shape, dict[str, nn.Module]]:
        shape = dataclasses.replace(base, **fields)
        return shape, models_at(shape)

    few = {"rounds": rounds, "seed": seed}
    heads, ranks, tokens = ((1, 4, 16, 32), (4, 16, 64), (128, 512, 2048))
    if smoke:
        heads, ranks, tokens = ((1, 2), (1, 2), (8, 16))
    narrow = base.r if smoke else 4
    return [
        sweep(f"heads N (r={narrow})", heads, lambda N: with_(N=N, r=narrow), **few),
        sweep(f"rank r (N={base.N})", ranks, lambda r: with_(r=r), **few),
        sweep("tasks T of MTL-LoRA", (3, 1000), lambda T: (base, tasks_at(base, T)), **few),
        sweep("tokens", tokens, lambda n: with_(tokens=n), **few),
    ]


def draw(found: Sequence[dict[str, Any]], base: Shape, path: Path) -> None:
    """One panel per axis, as `path.png` and `path.svg`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    from headwater.report.theme import colour, style

    colours = {OURS: "accent", MTL: "task-2", PEFT_SAME_RANK: "task-0", PEFT_TOTAL_RANK: "task-5", LOOP: "task-1"}
    lines: dict[str, Any] = {}
    with style():
        figure, axes = plt.subplots(1, len(found), figsize=(13, 4.2), layout="constrained", sharey=True)
        for ax, one in zip(axes, found, strict=True):
            ax.axhline(1.0, color=colour("ink"), linewidth=1.2, linestyle=(0, (4, 3)))
            for name, points in one["variants"].items():
                if name == FLOOR:
                    continue
                at = [int(value) for value in points]
                low, high = ([point[key] for point in points.values()] for key in ("min", "max"))
                medians = [point["median"] for point in points.values()]
                shade = colour(colours[name])
                ax.fill_between(at, low, high, color=shade, alpha=0.15, linewidth=0)
                (lines[name],) = ax.plot(at, medians, marker="o", markersize=4, color=shade)
            ax.set_xscale("log")
            ax.set_xticks(one["values"], [f"{value:,}" for value in one["values"]])
            ax.set_yscale("log")
            ax.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set_ylim(bottom=0.86)
            ax.grid(axis="y")
            ax.set_xlabel(one["axis"])
        axes[0].annotate("frozen layer (floor)", (0.03, 1.0), (0, -12), xycoords=("axes fraction", "data"),
                         textcoords="offset points", fontsize=9.5, color=colour("muted"))  # fmt: skip
        axes[0].set_ylabel("time / frozen layer")
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
        figure.suptitle(f"Forward + backward of one adapted linear layer, {base.title} where not varied", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=5)
    parser.add_argument("--plot", type=Path, default=None, help="draw to this path, .png and .svg")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny size, to see that it runs; the numbers mean nothing"
    )
    options = parser.parse_args(argv)
    measure.prepare(options)
    base = SMOKE if options.smoke else BASE
    found = sweeps(base, smoke=options.smoke, rounds=options.rounds, seed=options.seed)
    for one in found:
        rows = [
            [name, *(measure.show_ratio(points[str(v)]) if str(v) in points else "" for v in one["values"])]
            for name, points in one["variants"].items()
        ]
        title = f"{one['axis']}, {base.d_in} -> {base.d_out}; time / floor, median (min-max)"
        measure.print_table(title, ["", *(f"{v:,}" for v in one["values"])], rows)
    results = {"environment": measure.environment(options), "base": vars(base), "sweeps": found}
    measure.write(options.json, results)
    if options.plot is not None:
        draw(found, base, options.plot)
    return results


if __name__ == "__main__":
    main()
