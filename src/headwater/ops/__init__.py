"""The gated low-rank update, written once for all methods. Knows tensors only."""

from .losses import attach_loss
from .lowrank import add_update, project, spread_heads

__all__ = ["add_update", "attach_loss", "project", "spread_heads"]
