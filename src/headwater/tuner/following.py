"""Auxiliary losses ride on the layers' own backward; here they learn which share of the step their batch's loss is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..methods.call import State


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model gives back: an output class, a dictionary, a tuple that begins with it, or it alone."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.dim() == 0 else None


def follow(states: tuple[State, ...], loss: Tensor) -> None:
    """Auxiliary losses of a forward take the gradient that `loss` gets as their own."""
    _hook(states, loss, torch.Tensor.detach)


def follow_output(states: tuple[State, ...], output: Any, *, scaled: bool) -> None:
    """The same for the loss that a model gives back, or for what TRL's SFTTrainer makes its loss of instead.

    Args:
        scaled: the model was told of the step's number of tokens, so `loss_scale` knows the batch's share already.
    """
    log_probs = None if scaled else getattr(output, "log_probs", None)
    # TRL's other trainers ask their models for other fields, and weigh tokens by rewards or preferences.
    if log_probs is not None and _has(output, "is_top1", "label_mask") and not _has(output, "mean_logits"):
        _hook(states, log_probs, functools.partial(_share, log_probs.detach(), output.label_mask))
    elif (loss := loss_of(output)) is not None:
        follow(states, loss)


def _has(output: Any, *names: str) -> bool:
    return all(getattr(output, name, None) is not None for name in names)


def _hook(states: tuple[State, ...], followed: Tensor, share: Any) -> None:
    if not states or not followed.requires_grad or torch.compiler.is_compiling():
        return

    def remember(gradient: Tensor) -> None:
        found = share(gradient)
        for state in states:
            state.gradient = found

    handle = followed.register_hook(remember)
    for state in states:
        if state.followed is not None:  # who says what to follow knows better than what the model gave back
            state.followed.remove()
        state.followed = handle


def _share(log_probs: Tensor, learned: Tensor, gradient: Tensor) -> Tensor:
    """One token's share times the number of learned tokens. Of a sum of negative log-probabilities that is each one's
    gradient; dynamic fine-tuning (TRL's `loss_type: dft`) weighs tokens by their probability, which is taken out. Where
    all of them have the same one, as a single token has, the two cannot be told apart, and it stays in."""
    one = -gradient.detach()[learned].float()
    if one.numel() == 0:
        return gradient.new_zeros(())
    by_probability = one / log_probs[learned].float().exp().clamp(min=torch.finfo(torch.float32).tiny)
    low, high = torch.stack((one, by_probability)).aminmax(dim=1)
    return torch.where(high[0] - low[0] <= 1e-3 * high[0], one, by_probability).sum()
