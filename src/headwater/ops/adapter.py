"""What one branch does to one layer in one call, as data: its tensors, its rank space, and dropout on what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation
from .dropout import drop, keep_mask, masked, pack, unpack
from .lowrank import project, widened

if TYPE_CHECKING:
    from .stacks import Stacks

MANY = 1 << 24  # entries of x from which on a copy in float32 takes longer than a dozen launches
BLOCK = 1 << 18  # entries of x whose dropout mask is made at a time on a CPU, so that it stays in cache


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


@dataclass(slots=True)  # frozen ones take several times as long to make, and each layer makes one in each forward
class GatedHeads:
    """A rank space that is `heads.gated_heads` and nothing else, so that `by_hand` knows its derivative.

    `up` is the heads' `(N r, d_out)` and, with a start, `(r, d_out)`; the down-projections are A, the router and the
    start's A.

    Args:
        r, num_heads: r and N.
        dtype: that of the branch's tensors, and so of their gradients.
        routed: the gates are a softmax of a router's logits, per token; else all gates are `gate`.
        start: a frozen start, of rank r, is taken out: its ranks are written with a minus.
        gate: every head's gate where they are fixed.
        dropout, seed: of the heads' masks (`dropout.keep_mask`, as `gated_heads` draws them); seed None without.
        show: called with the gates `(tokens, N)` in forward.
    """

    r: int
    num_heads: int
    dtype: torch.dtype
    routed: bool
    start: bool
    gate: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None
    show: Callable[[Tensor], None] | None = None


@dataclass(slots=True)
class Adapter:
    """What one branch does to one layer in one call.

    Args:
        tensors: gives the branch's tensors. Where `mix` runs it is asked once for each direction, so that those which
            are computed need not be kept; in backward it gets the `others` of forward.
        mix: `mix(ranks, x, others)` -> h `(tokens, m)` and losses to be added to the training loss; `ranks` holds one
            `(tokens, k_i)` for each down-projection, at least float32. `others` is None in forward; in backward it is
            what stands for the `others` of `tensors`, and nothing may be counted or shown a second time. It must draw
            nothing from a global generator.
        scale: s.
        dropout, seed: of the input dropout; seed None without.
        masks: independent dropout masks on x; above 1 the ranks behind them are one tensor, mask by mask.
        heads: says the same as `mix` where that is plain gated heads; they are then computed by hand.
        unmixed: `mix` gives the ranks as they are, side by side; it is not called then.
        at_rest: what `tensors` gives, between forwards; None where they are not whole then.
        stacks: where the forward's stacked weights are, if all layers' were made together.
    """

    tensors: Callable[..., Tensors]
    mix: Callable[[tuple[Tensor, ...], Tensor, Sequence[Tensor] | None], tuple[Tensor, Sequence[Tensor]]]
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None
    masks: int = 1
    heads: GatedHeads | None = None
    unmixed: bool = False
    at_rest: Callable[[], Tensors | None] = lambda: None
    stacks: Stacks | None = None

    def ranks(self, u: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
        """The parts of u, all ranks side by side, for `mix`, scaled for the input dropout."""
        u = widened(u)
        behind, straight = ([w.shape[0] for w in weights] for weights in (tensors.dropped, tensors.clean))
        if self.seed is None:
            return torch.split(u, behind + straight, dim=-1)
        first, *rest = torch.split(u, [u.shape[1] - sum(straight), *straight], dim=-1)
        first = first * (1 / (1 - self.dropout))  # here, not on x, which may be of half precision
        return (*torch.split(first, behind if self.masks == 1 else [first.shape[1]], dim=-1), *rest)

    def draw(self, place: slice, d_in: int) -> Tensor:
        """Rows of the masks on x, bool; the n-th mask begins at row `n * tokens`."""
        assert self.seed is not None
        return keep_mask(self.seed, place.stop - place.start, d_in, self.dropout, first_row=place.start)

    def read_dropped(self, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(mask * x) down^T`, mask by mask side by side, `(tokens, masks k)`; and the masks' bits."""
        d_in = x.shape[1]
        if implementation(x.device) == "triton":
            from .triton_dropout import read

            assert self.seed is not None
            return read(x, down, self.seed, self.dropout, self.masks)[0], None
        packs = x.device.type == "cpu" and d_in % 8 == 0  # elsewhere they are drawn again
        u: list[list[Tensor]] = [[] for _ in range(self.masks)]
        bits: list[list[Tensor]] = [[] for _ in range(self.masks)]
        for n, rows, place in self._blocks(x):
            kept = self.draw(place, d_in)
            if packs:
                bits[n].append(pack(kept))
            u[n].append(masked(_rows(x, rows), kept) @ down.T)
        ranks = [_joined(parts) for parts in u]
        return _joined(ranks, 1), _joined([part for parts in bits for part in parts]) if packs else None

    def add_dropped(self, dx: Tensor | None, x: Tensor, du: Tensor, down: Tensor, bits: Tensor | None) -> Tensor:
        """Adds to dx what comes back through `read_dropped`, in place; returns the gradient of `down`."""
        if implementation(x.device) == "triton":
            from .triton_dropout import add_back

            assert self.seed is not None
            return add_back(dx, du, x, down, self.seed, self.dropout, self.masks)[0]
        k, total = down.shape[0], None
        for n, rows, place in self._blocks(x):
            kept = self.draw(place, x.shape[1]).to(x.dtype) if bits is None else unpack(_rows(bits, place), x.dtype)
            part = _rows(du[:, n * k : (n + 1) * k], rows)
            if dx is not None:
                _rows(dx, rows).addcmul_(part @ down, kept)
            found = part.T @ kept.mul_(_rows(x, rows))
            total = found if total is None else widened(total).add_(found)
        assert total is not None
        return total

    def _blocks(self, x: Tensor) -> list[tuple[int, slice, slice]]:
        """Masks and blocks of x's rows on a CPU, all rows at once elsewhere: mask, rows of x, rows of the masks."""
        tokens = x.shape[0]
        size = max(1, BLOCK // x.shape[1] if x.device.type == "cpu" else tokens)
        blocks = [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]  # one of none without tokens
        return [(n, b, slice(n * tokens + b.start, n * tokens + b.stop)) for b in blocks for n in range(self.masks)]


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def read_plainly(adapter: Adapter, x: Tensor) -> tuple[Tensor, ...]:
    """What `mix` gets, through plain autograd."""
    tensors = adapter.tensors()
    if adapter.seed is None:
        return project(x, tensors.dropped + tensors.clean)
    places = [slice(n * x.shape[0], (n + 1) * x.shape[0]) for n in range(adapter.masks)]
    behind = [u for place in places for u in project(adapter.draw(place, x.shape[1]) * x, tensors.dropped)]
    clean = project(x, tensors.clean) if tensors.clean else ()
    return adapter.ranks(torch.cat([*behind, *clean], dim=-1), tensors)


@torch.no_grad()
def read_exactly(x: Tensor, down: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """`(mask * x) down^T / (1 - p)` in float32, `(tokens, k)`, of an x of half precision; no mask without a seed. Block
    by block, or all of x would be there in float32."""
    by_kernel = x.numel() > MANY and x.element_size() == 2 and implementation(x.device) == "triton"
    if by_kernel and not torch.compiler.is_compiling():
        from .triton_dropout import read_exactly as without_a_copy

        return without_a_copy(x, down, seed, p)
    size = BLOCK if x.device.type == "cpu" else BLOCK << 8
    rows = max(1, x.shape[0] if torch.compiler.is_compiling() else size // x.shape[1])
    blocks = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, max(x.shape[0], 1), rows):
            wide = x[start : start + rows].float()
            wide = wide if seed is None else drop(wide, seed, p, first_row=start)
            blocks.append(F.linear(wide, down.float()))
    return _joined(blocks)
