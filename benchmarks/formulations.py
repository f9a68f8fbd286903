"""The same update computed in different ways: what pays and what does not.

    python -m benchmarks.formulations --json benchmarks/results/formulations.json

R-LoRA on one linear layer, with the start's compensation inside the heads, forward and backward. All variants compute
`y = W x + sum_n g_n B_n D_n(A x)`; they differ in which tensors exist. The floor is the frozen layer's forward and the
gradient of its input. Then, by itself, the product that every LoRA's backward needs, (d_out x tokens) by (tokens x r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers, measure
from .layers import FLOOR, LOOP, Shape

SHAPES = (Shape(896, 4864, 2048), Shape(4864, 896, 2048))
SMOKE = (Shape(32, 48, 16, r=2, N=2, rows=2),)
RANKS = (4, 8, 10, 11, 12, 16, 24)


class Heads(nn.Module):
    """A and the router stacked, B's heads stacked; a subclass adds the update to y."""

    def __init__(self, base: nn.Linear, shape: Shape):
        super().__init__()
        self.base, self.N, self.p = base, shape.N, shape.dropout
        self.A = nn.Parameter(torch.randn(shape.r, shape.d_in) / shape.d_in**0.5)
        self.router = nn.Parameter(torch.randn(shape.N, shape.d_in) / shape.d_in**0.5)
        self.B = nn.Parameter(torch.randn(shape.N, shape.r, shape.d_out) / shape.d_out**0.5)

    def gated(self, x: Tensor) -> Tensor:
        """`(tokens, N, r)`: masked and gated ranks."""
        read = F.linear(x, torch.cat([self.A, self.router]))
        z, logits = read.split([self.A.shape[0], self.N], dim=-1)
        return F.dropout(torch.softmax(logits, -1).unsqueeze(-1) * z.unsqueeze(1), self.p)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def add(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InPlace(Heads):
    def add(self, x: Tensor) -> Tensor:
        return self.base(x).addmm_(self.gated(x).flatten(1), self.B.flatten(0, 1))


class OutOfPlace(Heads):
    def add(self, x: Tensor) -> Tensor:
        return self.base(x) + self.gated(x).flatten(1) @ self.B.flatten(0, 1)


class BatchedHeads(Heads):
    def add(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.bmm(self.gated(x).transpose(0, 1), self.B).sum(0)


class DroppedInputs(Heads):
    """HydraLoRA's public form: dropout on x, for each head by itself."""

    def add(self, x: Tensor) -> Tensor:
        y, gate = self.base(x), torch.softmax(F.linear(x, self.router), -1)
        for n in range(self.N):
            y = y + gate[:, n : n + 1] * (F.linear(F.dropout(x, self.p), self.A) @ self.B[n])
        return y


def variants(shape: Shape, *, compiled: bool) -> dict[str, nn.Module]:
    linear = layers.frozen_linear(shape)
    loop = layers.PublicLoop(linear, shape.r, shape.N, shape.dropout)
    found: dict[str, nn.Module] = {
        FLOOR: layers.Layer(linear),
        f"PEFT LoRA r={shape.r}": layers.peft_lora(linear, shape.r, shape.dropout),
        LOOP: loop,
        "x dropped for each head": DroppedInputs(linear, shape),
        "heads as one batched matmul": BatchedHeads(linear, shape),
        "heads stacked, added out of place": OutOfPlace(linear, shape),
        "heads stacked, added in place": InPlace(linear, shape),
        "headwater": layers.ours(linear, shape, compensation="center"),
    }
    if compiled:
        found[f"{LOOP}, compiled"] = torch.compile(loop)  # type: ignore[assignment]
        found["heads stacked, added in place, compiled"] = torch.compile(InPlace(linear, shape))  # type: ignore[assignment]
    return found


def run(shape: Shape, options: Any) -> dict[str, Any]:
    models = variants(shape, compiled=options.compile)
    x, dy = shape.inputs()
    steps = {name: layers.step(model, x, dy) for name, model in models.items()}
    ratio = measure.ratios(measure.interleave(steps, rounds=options.rounds, seed=options.seed), FLOOR)
    saved = {name: measure.saved_bytes(lambda m=m: m(x), without=m) / x.nbytes for name, m in models.items()}
    return {**vars(shape), "variants": {name: {"time": ratio[name], "saved": saved[name]} for name in models}}


def narrow_products(options: Any) -> dict[str, Any]:
    """Seconds of `dy^T z`, `(d_out, tokens) x (tokens, r)`, and of `z^T dy`, its transpose, by rank."""
    tokens, d_out = (16, 48) if options.smoke else (2048, 4864)
    dy = torch.randn(tokens, d_out)
    products: dict[str, Callable[[], Any]] = {}
    for r in RANKS:
        z = torch.randn(tokens, r)
        products[f"dy^T z, r={r}"] = lambda z=z: dy.T @ z
        products[f"z^T dy, r={r}"] = lambda z=z: z.T @ dy
    seconds = measure.interleave(products, rounds=options.rounds, seed=options.seed)
    return {name: measure.spread(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=7)
    parser.add_argument("--compile", action="store_true", help="also compiled forms; takes minutes")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny size, to see that it runs; the numbers mean nothing"
    )
    options = parser.parse_args(argv)
    measure.prepare(options)
    found = []
    for shape in SMOKE if options.smoke else SHAPES:
        found.append(run(shape, options))
        rows = [[n, measure.show_ratio(v["time"]), f"{v['saved']:.2f}"] for n, v in found[-1]["variants"].items()]
        title = f"{shape.title}\nfloor: frozen linear, forward + gradient of its input"
        measure.print_table(title, ["", "time / floor, median (min-max)", "saved / bytes of x"], rows)
    narrow = narrow_products(options)
    rows = [[name, f"{value['median'] * 1e3:.2f}"] for name, value in narrow.items()]
    measure.print_table("narrow products", ["", "ms"], rows)
    results = {"environment": measure.environment(options), "shapes": found, "narrow_products": narrow}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()
