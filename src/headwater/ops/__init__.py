"""The gated low-rank update, written once for all methods. Knows tensors only."""

from .dispatch import implementation
from .dropout import draw_seed, drop
from .heads import gated_heads
from .losses import attach_loss
from .lowrank import add_update, project, spread_heads

__all__ = [
    "add_update",
    "attach_loss",
    "draw_seed",
    "drop",
    "gated_heads",
    "implementation",
    "project",
    "spread_heads",
]
