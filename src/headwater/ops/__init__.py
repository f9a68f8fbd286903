"""The gated low-rank update, written once for all methods. Knows tensors only."""

from .dispatch import implementation
from .dropout import draw_seed, drop
from .fused import Adapter, Tensors, adapted_linear, is_plain, read_plainly
from .heads import gated_heads
from .losses import attach_loss
from .lowrank import add_update, project, spread_heads

__all__ = [
    "Adapter",
    "Tensors",
    "adapted_linear",
    "add_update",
    "attach_loss",
    "draw_seed",
    "drop",
    "gated_heads",
    "implementation",
    "is_plain",
    "project",
    "read_plainly",
    "spread_heads",
]
