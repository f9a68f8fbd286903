"""Gradient checkpointing runs layers again in backward, long after the state of their forward is closed and perhaps
after further forwards; so each checkpointed call remembers the state it ran under."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .context import Context

_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")  # of transformers' layers, of PyTorch's wrapper


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """Modules that checkpoint what is in them, or may be told to."""
    names = ("gradient_checkpointing", "checkpoint_fn")
    return [m for m in model.modules() if any(hasattr(m, name) for name in names)]


def carry_state(context: Context, modules: Iterable[nn.Module]) -> None:
    """Makes the modules' checkpoints remember the state of the forward they belong to."""
    for module in modules:
        for name in _FUNCTIONS:
            checkpoint = module.__dict__.get(name)
            if checkpoint is not None and not hasattr(checkpoint, "carries_headwater_state"):
                module.__dict__[name] = _Carrying(context, checkpoint)


def leave_checkpoints(model: nn.Module) -> None:
    """Undoes `carry_state`."""
    for module in model.modules():
        for name in _FUNCTIONS:
            checkpoint = module.__dict__.get(name)
            if isinstance(checkpoint, _Carrying):
                module.__dict__[name] = checkpoint.checkpoint


class _Carrying:
    """`checkpoint(function, *args)` where `function`, whenever it runs, runs under the state of the first call."""

    carries_headwater_state = True

    def __init__(self, context: Context, checkpoint: Callable[..., Any]):
        self.context, self.checkpoint = context, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.context.state

        def under_state(*inner: Any, **named: Any) -> Any:
            with self.context.use(state):
                return function(*inner, **named)

        return self.checkpoint(under_state, *args, **kwargs)
