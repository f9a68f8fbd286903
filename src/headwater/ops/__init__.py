"""The gated low-rank update, written once for all methods. Knows tensors only."""

from .adapter import Adapter, GatedHeads, Tensors, read_exactly, read_plainly
from .dispatch import implementation
from .dropout import draw_seed, draw_seeds, drop
from .few_tokens import Update, factor_updates, mixed_update, routed_updates
from .fused import adapted_linear, is_plain, is_watched, without_autocast
from .heads import gated_heads
from .losses import attach_loss, following
from .lowrank import FEW, add_update, project, spread_heads, widened
from .stacks import Stacks, are_own, whole

__all__ = [
    "FEW",
    "Adapter",
    "GatedHeads",
    "Stacks",
    "Tensors",
    "Update",
    "adapted_linear",
    "add_update",
    "are_own",
    "attach_loss",
    "draw_seed",
    "draw_seeds",
    "drop",
    "factor_updates",
    "following",
    "gated_heads",
    "implementation",
    "is_plain",
    "is_watched",
    "mixed_update",
    "project",
    "read_exactly",
    "read_plainly",
    "routed_updates",
    "spread_heads",
    "whole",
    "widened",
    "without_autocast",
]
