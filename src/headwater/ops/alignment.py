"""Distances between the tasks' distributions of A x: the losses of Align-LoRA.

Liu et al., "Align, Don't Divide: Revisiting the LoRA Architecture in Multi-Task Learning", arXiv:2508.05078.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The released code's kernel widths; their sum is the kernel.
BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)


def membership(task: Tensor, valid: Tensor | None, num_tasks: int) -> Tensor:
    """`(num_tasks, tokens)` float32, 1 where a token belongs to a task and is not padding."""
    member = (task.unsqueeze(0) == torch.arange(num_tasks, device=task.device).unsqueeze(1)).float()
    return member if valid is None else member * valid.float()


def symmetric_kl(mean: Tensor, variance: Tensor) -> Tensor:
    """J_ij = (KL(i || j) + KL(j || i)) / 2 between diagonal Gaussians; the logarithms cancel.

    Args:
        mean, variance: `(..., T, r)`.

    Returns:
        `(..., T, T)`, summed over r.
    """
    gap = (mean.unsqueeze(-2) - mean.unsqueeze(-3)) ** 2
    own, other = variance.unsqueeze(-2), variance.unsqueeze(-3)
    return 0.25 * ((own + gap) / other + (other + gap) / own - 2).sum(-1)


def kl_alignment(z: Tensor, member: Tensor) -> Tensor:
    """Symmetric KL between the tasks' Gaussians, each fitted to all of a task's tokens.

    Args:
        z: `(tokens, r)`. member: `(T, tokens)`, from `membership`.

    Returns:
        `(T, T)`. Rows and columns of tasks without tokens are finite and mean nothing.
    """
    present = (member.sum(1) > 0).sum().clamp_min(1)
    count = member.sum(1, keepdim=True).clamp_min(1)
    mean = member @ z / count
    spread = (z.unsqueeze(0) - mean.unsqueeze(1)) ** 2  # (T, tokens, r): squares of z itself would cancel badly
    variance = torch.einsum("tn,tnr->tr", member, spread) / count
    # Absent tasks have variance 0; they do not count, or the floor would depend on how high the batch's ids are.
    floor = 1e-6 + 1e-4 * variance.detach().mean(1).sum() / present
    return symmetric_kl(mean, variance.clamp_min(floor))


def kl_alignment_per_position(z: Tensor, task_of_row: Tensor, num_tasks: int) -> Tensor:
    """As the released code: Gaussians over a task's rows at each position by itself, padding included.

    Args:
        z: `(rows, length, r)`. task_of_row: LongTensor `(rows,)`.

    Returns:
        `(T, T)`, averaged over positions. A task with one row has no variance; leave its entries out.
    """
    member = (task_of_row.unsqueeze(0) == torch.arange(num_tasks, device=z.device).unsqueeze(1)).to(z.dtype)
    count = member.sum(1).view(-1, 1, 1)
    mean = torch.einsum("tb,bsr->tsr", member, z) / count.clamp_min(1)
    spread = torch.einsum("tb,tbsr->tsr", member, (z.unsqueeze(0) - mean.unsqueeze(1)) ** 2)
    variance = spread / (count - 1).clamp_min(1) + 1e-8
    return symmetric_kl(mean.transpose(0, 1), variance.transpose(0, 1)).mean(0)


def thin(member: Tensor, most: int) -> Tensor:
    """Keeps at most `most` tokens of each task, evenly spaced, so that recomputation chooses the same."""
    place, count = member.cumsum(1), member.sum(1, keepdim=True).clamp_min(1)
    share = (most / count).clamp_max(1.0)
    kept = torch.floor(place * share + 1e-4) > torch.floor((place - 1) * share + 1e-4)
    return member * kept


def sample(member: Tensor, most: int = 256) -> tuple[Tensor, Tensor]:
    """At most `most` tokens of each task of `member`, as `mmd_alignment` takes them."""
    member = thin(member, most)
    used = member.sum(0).nonzero().squeeze(1)
    return member[:, used], used


def mmd_alignment(z: Tensor, member: Tensor, used: Tensor) -> Tensor:
    """Squared maximum mean discrepancy, biased estimate, under a sum of Gaussian kernels exp(-|a - b|^2 / (2 sigma)).

    Args:
        z: `(tokens, r)`. used: LongTensor `(k,)`, the tokens that take part. member: `(T, k)`, of these.

    Returns:
        `(T, T)`.
    """
    z = z[used]
    # By differences: |a|^2 + |b|^2 - 2 a b leaves rounding where tokens are alike, as those of equal prompts are, and
    # the narrowest kernel magnifies it.
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
    kernel = torch.stack([torch.exp(-distance / (2 * sigma)) for sigma in BANDWIDTHS]).sum(0)
    weight = member / member.sum(1, keepdim=True).clamp_min(1)
    inner = weight @ kernel @ weight.T
    own = inner.diagonal()
    return own.unsqueeze(0) + own.unsqueeze(1) - 2 * inner


def over_pairs(distances: Tensor, usable: Tensor, *, reduction: str) -> Tensor:
    """Mean or sum of `(T, T)` distances over pairs i < j of usable tasks; 0 when there are fewer than two."""
    pairs = torch.triu(usable.unsqueeze(0) & usable.unsqueeze(1), diagonal=1)
    total = torch.where(pairs, distances, torch.zeros_like(distances)).sum()
    return total / pairs.sum().clamp_min(1) if reduction == "mean" else total
