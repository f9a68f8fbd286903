"""One adapted linear layer, forward and backward: time, bytes and FLOPs beside the frozen layer's own.

    python -m benchmarks.adapter_speed --json benchmarks/results/adapter_speed.json
    python -m benchmarks.adapter_speed --heap kept --json benchmarks/results/adapter_speed-kept_heap.json

The floor is the frozen linear's forward and the gradient of its input, which training pays with any adapter below or
above. Every variant runs in this one process, once per round, in shuffled order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import layers, measure
from .layers import FLOOR, LOOP, Shape

ALL_METHODS = (Shape(896, 4864, 2048), Shape(4864, 896, 2048))
R_LORA = (
    Shape(896, 4864, 2048, dropout=0.0),
    Shape(640, 2048, 2048),
    Shape(2048, 640, 2048),
    Shape(896, 4864, 512),
    Shape(896, 4864, 2048, r=16, N=10),
)
SMOKE = (Shape(32, 48, 16, r=2, N=2, rows=2),)


def variants(shape: Shape, *, methods: Sequence[str]) -> dict[str, nn.Module]:
    """Name -> model, all on one frozen linear layer."""
    linear = layers.frozen_linear(shape)
    total = shape.N * shape.r
    return {
        FLOOR: layers.Layer(linear),
        f"PEFT LoRA r={shape.r}": layers.peft_lora(linear, shape.r, shape.dropout),
        f"PEFT LoRA r={total}": layers.peft_lora(linear, total, shape.dropout),
        LOOP: layers.PublicLoop(linear, shape.r, shape.N, shape.dropout),
        **{layers.title_of(name): layers.ours(linear, shape, name) for name in methods},
    }


def run(shape: Shape, *, methods: Sequence[str], rounds: int, seed: int) -> dict[str, Any]:
    models = variants(shape, methods=methods)
    x, dy = shape.inputs()
    steps = {name: layers.step(model, x, dy) for name, model in models.items()}
    seconds = measure.interleave(steps, rounds=rounds, seed=seed)
    ratio = measure.ratios(seconds, FLOOR)
    least = measure.flops(steps[FLOOR])
    return {
        **vars(shape),
        "floor_seconds": measure.spread(seconds[FLOOR]),
        "variants": {
            name: {
                "time": ratio[name],
                "saved": measure.saved_bytes(lambda m=model: m(x), without=model) / x.nbytes,
                "flops": measure.flops(steps[name]) / least,
            }
            for name, model in models.items()
        },
    }


def show(shape: Shape, result: dict[str, Any]) -> None:
    floor = result["floor_seconds"]
    rows = [
        [name, measure.show_ratio(v["time"]), f"{v['flops']:.3f}", f"{v['saved']:.2f}"]
        for name, v in result["variants"].items()
    ]
    title = f"{shape.title}\nfloor: frozen linear, forward + gradient of its input, {floor['median'] * 1e3:.1f} ms"
    measure.print_table(title, ["", "time / floor, median (min-max)", "FLOPs / floor", "saved / bytes of x"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--methods", nargs="*", default=layers.method_names(), help="methods to run, by name")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny size, to see that it runs; the numbers mean nothing"
    )
    options = parser.parse_args(argv)
    measure.prepare(options)
    results = []
    for shape in SMOKE if options.smoke else (*ALL_METHODS, *R_LORA):
        methods = ["rlora"] if shape in R_LORA else options.methods
        result = run(shape, methods=methods, rounds=options.rounds, seed=options.seed)
        show(shape, result)
        results.append(result)
    found = {"environment": measure.environment(options), "shapes": results}
    measure.write(options.json, found)
    return found


if __name__ == "__main__":
    main()
