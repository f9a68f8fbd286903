"""The gated low-rank update, written once for all methods. Knows tensors only."""

from .adapter import Adapter, GatedHeads, Tensors, read_plainly
from .dispatch import implementation
from .dropout import draw_seed, drop
from .few_tokens import Part, Update, few_tokens
from .fused import adapted_linear, is_plain
from .heads import gated_heads
from .losses import attach_loss
from .lowrank import FEW, add_update, project, spread_heads

__all__ = [
    "FEW",
    "Adapter",
    "GatedHeads",
    "Part",
    "Tensors",
    "Update",
    "adapted_linear",
    "add_update",
    "attach_loss",
    "draw_seed",
    "drop",
    "few_tokens",
    "gated_heads",
    "implementation",
    "is_plain",
    "project",
    "read_plainly",
    "spread_heads",
]
