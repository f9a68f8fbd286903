"""One adapted linear layer as one autograd function: what it saves for backward is x and the ranks read from it.

    u = A_cat x            h = mix(u)            y = W x + s B_cat h

`mix` is a method's rank-space part, any differentiable function of u and of parameters of its own. It runs without
gradients in forward and again, from u, in backward, where its graph is a few numbers a token. So no method writes a
backward, none saves more than another, and everything as wide as the model happens here:

    dh = s dy B_cat^T      dB_cat = s h^T dy      du, its parameters' gradients = mix's backward on (dh, losses' 1)
    dx = dy W, then du A_cat added in place       dA_cat = du^T x

Dropout on x is made from a seed, block by block, so that no dropped copy of x exists in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import keep_mask
from .lowrank import add_update, project, stack

BLOCK = 1 << 17  # entries of x whose dropout mask is made at a time on a CPU, so that it stays in cache


class Tensors(NamedTuple):
    """A branch's tensors, as they are now.

    Args:
        up: the up-projections `(m_i, d_out)`.
        dropped, clean: the down-projections `(k_i, d_in)` behind the input dropout, and those that see x as it is.
        others: parameters that `mix` may use.
    """

    up: tuple[Tensor, ...]
    dropped: tuple[Tensor, ...]
    clean: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def flat(self) -> tuple[Tensor, ...]:
        return (*self.up, *self.dropped, *self.clean, *self.others)


@dataclass(frozen=True)
class Adapter:
    """What one branch does to one layer in one call.

    Args:
        tensors: gives the branch's tensors. Asked once for each direction, so that nothing made of them is kept.
        mix: `mix(ranks, x, again)` -> h `(tokens, m)` and losses to be added to the training loss; `ranks` holds one
            `(tokens, k_i)` for each down-projection, at least float32. `again` is True in backward, where nothing may
            be counted or shown a second time. It must draw nothing from a global generator.
        scale: s.
        dropout, seed: of the input dropout; seed None without.
        masks: independent dropout masks on x; above 1 the ranks behind them are one tensor, mask by mask.
    """

    tensors: Callable[[], Tensors]
    mix: Callable[[tuple[Tensor, ...], Tensor, bool], tuple[Tensor, Sequence[Tensor]]]
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None
    masks: int = 1

    def read(self, x: Tensor, tensors: Tensors) -> Tensor:
        """u, all ranks side by side, in x's dtype: those behind dropout first, mask by mask."""
        dropped, clean = tensors.dropped, tensors.clean
        if self.seed is None or not dropped:
            return x @ stack((*dropped, *clean), x).T
        down = stack(dropped, x)
        k = down.shape[0]
        u = x.new_empty(x.shape[0], self.masks * k + sum(w.shape[0] for w in clean))
        for rows in blocks(x):
            for n in range(self.masks):
                torch.mm(self.kept(x, rows, n) * x[rows], down.T, out=u[rows, n * k : (n + 1) * k])
        if clean:
            torch.mm(x, stack(clean, x).T, out=u[:, self.masks * k :])
        return u

    def ranks(self, u: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
        """u's parts for `mix`, scaled for the input dropout."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        behind, straight = ([w.shape[0] for w in weights] for weights in (tensors.dropped, tensors.clean))
        if self.seed is None:
            return torch.split(u, behind + straight, dim=-1)
        first, *rest = torch.split(u, [u.shape[1] - sum(straight), *straight], dim=-1)
        first = first * (1 / (1 - self.dropout))  # here, not on x, which may be of half precision
        return (*torch.split(first, behind if self.masks == 1 else [first.shape[1]], dim=-1), *rest)

    def kept(self, x: Tensor, rows: slice, mask: int) -> Tensor:
        """Which entries of these rows of x the input dropout keeps."""
        assert self.seed is not None
        first = mask * x.shape[0] + rows.start
        return keep_mask(self.seed, rows.stop - rows.start, x.shape[1], self.dropout, first_row=first)

    def add(self, y: Tensor, u: Tensor, x: Tensor, tensors: Tensors) -> Tensor:
        """Adds the update to y `(tokens, d_out)` in place."""
        h, _ = self.mix(self.ranks(u, tensors), x, False)
        return add_update(y, h, tensors.up, scale=self.scale, in_place=True)


def read_plainly(adapter: Adapter, x: Tensor) -> tuple[Tensor, ...]:
    """What `mix` gets, through plain autograd."""
    tensors = adapter.tensors()
    if adapter.seed is None:
        return project(x, tensors.dropped + tensors.clean)
    whole = slice(0, x.shape[0])
    behind = [u for n in range(adapter.masks) for u in project(adapter.kept(x, whole, n) * x, tensors.dropped)]
    clean = project(x, tensors.clean) if tensors.clean else ()
    return adapter.ranks(torch.cat([*behind, *clean], dim=-1), tensors)


class Backward:
    """The gradients of one adapter's tensors, in two steps: from dy to du, and from du to dx."""

    def __init__(self, adapter: Adapter, dy: Tensor, u: Tensor, x: Tensor, wanted: Sequence[bool]):
        self.adapter, self.x = adapter, x
        self.tensors = tensors = adapter.tensors()
        ups, reads = len(tensors.up), len(tensors.dropped) + len(tensors.clean)
        wanted_up, wanted_others = wanted[:ups], wanted[ups + reads :]
        self.wanted_reads = wanted[ups : ups + reads]
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            h, losses = adapter.mix(adapter.ranks(leaf, tensors), x, True)
        trained = [p for p, want in zip(tensors.others, wanted_others, strict=True) if want]
        dh = (dy @ stack(tensors.up, dy).T).to(h.dtype).mul_(adapter.scale)
        ends = [(h, dh), *((loss, torch.ones_like(loss)) for loss in losses)]
        outputs, grads = zip(*[end for end in ends if end[0].requires_grad], strict=True)
        du, *of_trained = torch.autograd.grad(outputs, [leaf, *trained], grads, allow_unused=True)
        self.du = torch.zeros_like(u) if du is None else du
        given = iter(of_trained)
        self.of_others = [next(given) if want else None for want in wanted_others]
        self.of_up = outer(h.detach() * adapter.scale, dy, tensors.up, wanted_up)

    def add_to_dx(self, dx: Tensor | None) -> None:
        """Adds the update's part to dx `(tokens, d_in)` in place, and finds the down-projections' gradients."""
        adapter, x, du = self.adapter, self.x, self.du
        dropped, clean = self.tensors.dropped, self.tensors.clean
        if adapter.seed is None or not dropped:
            dropped, clean = (), (*dropped, *clean)
        k = sum(w.shape[0] for w in dropped)
        behind, straight = du.split([adapter.masks * k, du.shape[1] - adapter.masks * k], dim=1)
        self.of_reads: list[Tensor | None] = []
        if dropped:
            down = stack(dropped, x)
            d_down = torch.zeros_like(down, dtype=torch.promote_types(x.dtype, torch.float32))
            for rows in blocks(x):
                for n in range(adapter.masks):
                    kept, part = adapter.kept(x, rows, n), behind[rows, n * k : (n + 1) * k]
                    d_down += part.T @ (kept * x[rows])
                    if dx is not None:
                        dx[rows] += (part @ down) * kept
            rows_of = d_down.split([w.shape[0] for w in dropped])
            self.of_reads += [g.to(w.dtype) for g, w in zip(rows_of, dropped, strict=True)]
        if clean:
            if dx is not None:
                dx.addmm_(straight, stack(clean, x))
            self.of_reads += outer(straight, x, clean, self.wanted_reads[len(dropped) :])

    def gradients(self) -> tuple[Tensor | None, ...]:
        """In the order of `Tensors.flat`."""
        return (*self.of_up, *self.of_reads, *self.of_others)


def outer(ranks: Tensor, wide: Tensor, like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """`ranks^T wide`, the rows of each of the matrices in `like` that is wanted; what is not is not computed."""
    columns = ranks.split([w.shape[0] for w in like], dim=1)
    trained = [part for part, want in zip(columns, wanted, strict=True) if want]
    if not trained:
        return [None] * len(like)
    product = (trained[0] if len(trained) == 1 else torch.cat(trained, 1)).to(wide.dtype).T @ wide
    rows = iter(product.split([part.shape[1] for part in trained]))
    return [next(rows).to(w.dtype) if want else None for w, want in zip(like, wanted, strict=True)]


def blocks(x: Tensor) -> list[slice]:
    """x's rows, block by block on a CPU, all at once elsewhere."""
    size = max(1, BLOCK // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(i, min(i + size, x.shape[0])) for i in range(0, x.shape[0], size)]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adapter: Adapter,
        tensors: Tensors,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Tensor,
    ) -> Tensor:
        u = adapter.read(x, tensors)
        y = F.linear(x, weight, bias) if y is None else y.clone()  # type: ignore[arg-type]
        ctx.adapter = adapter
        ctx.save_for_backward(x, u, weight)
        return adapter.add(y, u, x, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight = ctx.saved_tensors
        of_y, of_x, *wanted = ctx.needs_input_grad[2:4] + ctx.needs_input_grad[6:]
        back = Backward(ctx.adapter, dy, u, x, wanted)
        dx = None
        if of_x:
            dx = torch.zeros_like(x) if weight is None else dy @ weight
        back.add_to_dx(dx)
        return None, None, dy if of_y else None, dx, None, None, *back.gradients()


def adapted_linear(adapter: Adapter, base: Tensor | nn.Linear, x: Tensor) -> Tensor:
    """The adapted layer's output, `(tokens, d_out)`.

    Args:
        base: the frozen layer's output `(tokens, d_out)`, or the frozen layer itself where `is_plain(base)`; then no
            second tensor of either width is made for the update.
        x: `(tokens, d_in)`.
    """
    device = x.device.type
    if isinstance(base, Tensor):
        arguments: tuple[Any, ...] = (base, x.to(base.dtype), None, None)
    else:
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        arguments = (None, x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
    tensors = adapter.tensors()
    with torch.autocast(device, enabled=False):  # off in backward, too; ranks keep their float32
        return _AdaptedLinear.apply(adapter, tensors, *arguments, *tensors.flat())


def is_plain(layer: nn.Module) -> bool:
    """True for a frozen `nn.Linear` that nobody watches or replaces, whose forward may be computed elsewhere."""
    if type(layer) is not nn.Linear:
        return False
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )
