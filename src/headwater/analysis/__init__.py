"""Looking inside adapters: heads, similarity, routing."""

from ..methods.base import Heads
from .weights import heads

__all__ = ["Heads", "heads"]
