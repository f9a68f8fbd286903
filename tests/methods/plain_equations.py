"""The papers' equations read plainly: loops over tokens and heads, one step a line, nothing of headwater imported.

Shapes: x `(tokens, d_in)`, W `(d_out, d_in)`, b `(d_out,)`, A `(r, d_in)`, B `(N, d_out, r)`, R `(N, d_in)`. Dropout
masks hold 0 or 1 / (1 - p). Everything is float64 and differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_gate(R: Tensor, x_t: Tensor) -> list[Tensor]:
    """One token's gate: `exp(R_n x) / sum_m exp(R_m x)`."""
    e = [torch.exp((R[n] * x_t).sum()) for n in range(R.shape[0])]
    return [e_n / sum(e) for e_n in e]


def rlora(x, W, b, A, B, R, s, *, rank_masks, A0=None, B0=None) -> Tensor:
    """`y = W x + b + s sum_n g_n B_n (D_n * A x) - s B0 A0 x`; rank_masks `(tokens, N, r)`."""
    rows = []
    for t in range(x.shape[0]):
        y = W @ x[t] + b
        u = A @ x[t]
        g = softmax_gate(R, x[t])
        for n in range(B.shape[0]):
            y = y + s * g[n] * (B[n] @ (rank_masks[t, n] * u))
        if A0 is not None:
            y = y - s * (B0 @ (A0 @ x[t]))
        rows.append(y)
    return torch.stack(rows)


def hydralora(x, W, b, A, B, R, s, *, input_masks) -> Tensor:
    """`y = W x + b + s sum_n g_n B_n A (D_n * x)`; input_masks `(tokens, N, d_in)`; the gate sees x undropped."""
    rows = []
    for t in range(x.shape[0]):
        y = W @ x[t] + b
        g = softmax_gate(R, x[t])
        for n in range(B.shape[0]):
            y = y + s * g[n] * (B[n] @ (A @ (input_masks[t, n] * x[t])))
        rows.append(y)
    return torch.stack(rows)


def mlora(x, W, b, A, B, s, *, rank_masks, mean: bool, A0=None, B0=None) -> Tensor:
    """`y = W x + b + s agg_n(B_n (D_n * A x)) - s B0 A0 x`, agg a mean or a sum; B0 is the aggregated start."""
    rows = []
    for t in range(x.shape[0]):
        u = A @ x[t]
        heads = [B[n] @ (rank_masks[t, n] * u) for n in range(B.shape[0])]
        together = sum(heads) / len(heads) if mean else sum(heads)
        y = W @ x[t] + b + s * together
        if A0 is not None:
            y = y - s * (B0 @ (A0 @ x[t]))
        rows.append(y)
    return torch.stack(rows)
