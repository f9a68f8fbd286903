"""The three steps of every method: read ranks from x, mix them in rank space, write them to y.

    y = W x + B_cat ( gate * mask * (A_cat x) )

Only the first and the last step touch tensors as wide as the model; everything between is `r` to `N r` numbers a token.
So the number of heads is nearly free, and nothing of width `d_out` is ever made per head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation

FEW = 16  # tokens, as in decoding, for which stacking the weights would cost more than reading x once saves


def project(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Reads several down-projections from one pass over x.

    Args:
        x: `(tokens, d_in)`, any floating dtype.
        weights: matrices `(k_i, d_in)`; stacked, so that x is read once. Cast to x's dtype.

    Returns:
        One `(tokens, k_i)` tensor per weight, at least float32: softmax and gates need the precision, and these tensors
        are small. The matmul itself runs in x's dtype, because casting x would copy the widest tensor there is.
    """
    if x.shape[0] <= FEW:
        return tuple([widened(F.linear(x, cast(w, x.dtype))) for w in weights])
    rows = [w.shape[0] for w in weights]
    fill = implementation(x.device) == "triton" and not torch.compiler.is_compiling()
    u = widened(F.linear(x, stack(weights, x, fill=fill)))
    u = u[:, : sum(rows)] if fill else u
    return (u,) if len(weights) == 1 else torch.split(u, rows, dim=-1)


def stack(weights: Sequence[Tensor], like: Tensor, *, fill: bool = False) -> Tensor:
    """Matrices one below the other, in another tensor's dtype; with `fill`, rows of zeros as in `aligned`."""
    weights = with_rows_of_zeros(weights) if fill else weights
    return cast(weights[0] if len(weights) == 1 else torch.cat(tuple(weights)), like.dtype)


def with_rows_of_zeros(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Matrices to be stacked, and below them the rows of zeros that make it a multiple of 8."""
    missing = -sum([w.shape[0] for w in weights]) % 8
    like = weights[0]
    return (*weights, _zeros(missing, like.shape[1], like.dtype, like.device)) if missing else weights


@functools.cache
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(rows, columns, dtype=dtype, device=device)


def aligned(ranks: Tensor, dim: int = 1) -> Tensor:
    """Ranks filled up with zeros to a multiple of 8 on a GPU: its fast matrix products want rows of 16 bytes, and the
    others take three times as long."""
    missing = -ranks.shape[dim] % 8
    if not missing or implementation(ranks.device) != "triton":
        return ranks
    return F.pad(ranks, (0, missing) if dim == 1 else (0, 0, 0, missing))


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b` without another pass over the result."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without PyTorch's own way to find that there is nothing to do: decoding asks often."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def spread_heads(z: Tensor, gate: Tensor) -> Tensor:
    """Spreads ranks over gated heads: `h_n = gate_n * z`. With dropout and a softmax, `heads.gated_heads`.

    Args:
        z: `(tokens, r)`, shared by all heads, or `(tokens, N, r)`, one block per head.
        gate: `(tokens, N)`, or `(N,)` when it does not depend on the token.

    Returns:
        `(tokens, N r)`, ready for `add_update` with the heads' up-projections side by side.
    """
    if z.dim() == 2:
        z = z.unsqueeze(-2)
    return (gate.unsqueeze(-1) * z).flatten(-2)


def add_update(
    y: Tensor, h: Tensor, up: Tensor | Sequence[Tensor], *, scale: float = 1.0, in_place: bool = False
) -> Tensor:
    """Returns `y + scale * h @ up`.

    Args:
        y: `(tokens, d_out)`, the frozen layer's output.
        h: `(tokens, m)`, gated ranks.
        up: `(m, d_out)`, all heads' up-projections stacked, or several to be stacked; rows are ranks, which keeps the
            backward matmuls fast.
        in_place: add into y's own memory. Allowed only where nobody else reads y, such as the fresh output of a plain
            linear layer; saves one tensor of width `d_out`.
    """
    h, parts = cast(h, y.dtype), (up,) if isinstance(up, Tensor) else up
    if len(parts) > 1 and y.shape[0] <= FEW:
        for columns, part in zip(torch.split(h, [w.shape[0] for w in parts], dim=-1), parts, strict=True):
            y = add_update(y, columns, part, scale=scale, in_place=in_place)
        return y
    stacked = stack(parts, y)
    return y.addmm_(h, stacked, alpha=scale) if in_place else torch.addmm(y, h, stacked, alpha=scale)
