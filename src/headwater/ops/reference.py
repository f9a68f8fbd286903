"""The same arithmetic the slow way, straight from the equation: one full-width tensor per head. For tests."""

from __future__ import annotations

from torch import Tensor


def multi_head_update(x: Tensor, A: Tensor, B: Tensor, gate: Tensor, masks: Tensor | None, scaling: float) -> Tensor:
    """`sum_n scaling * gate_n * B_n (mask_n * (A x))`, head by head.

    Args:
        x: `(tokens, d_in)`. A: `(r, d_in)`. B: `(N, d_out, r)`. gate: `(tokens, N)`.
        masks: `(N, tokens, r)`, already divided by the keep probability; None without dropout.

    Returns:
        `(tokens, d_out)`.
    """
    u = x @ A.T
    total = x.new_zeros(x.shape[0], B.shape[1])
    for n in range(B.shape[0]):
        h = u if masks is None else masks[n] * u
        total = total + scaling * gate[:, n : n + 1] * (h @ B[n].T)
    return total
