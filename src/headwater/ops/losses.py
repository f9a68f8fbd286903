"""Auxiliary losses that reach the optimiser without a trainer's help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


class _Following(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: Callable[[], Tensor | float]) -> Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        factor = ctx.gradient()  # the loss may be on another device than the layer
        return grad * (factor.to(grad.device) if isinstance(factor, Tensor) else factor), None


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """Returns y unchanged; when gradients flow back through it, `loss` receives the gradient 1.

    The effect is that of adding `loss` (a scalar, already weighted) to the training loss, whichever trainer computes
    that, and it survives both kinds of gradient checkpointing.
    """
    return _AttachLoss.apply(y, loss)


def following(loss: Tensor, gradient: Callable[[], Tensor | float]) -> Tensor:
    """Returns the loss; its gradient is multiplied by what `gradient` gives in backward.

    So an attached loss takes part in what is done to the training loss after the forward: a division by the number of
    accumulated batches, or the factor that keeps gradients of half precision from vanishing.
    """
    return _Following.apply(loss, gradient)
