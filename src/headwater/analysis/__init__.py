"""Looking inside adapters: heads, similarity, gates, routing."""

from ..methods.base import Heads
from .gates import DEAD_BELOW, GateRecorder, GateStatistics
from .routing import Texts, gate_statistics, head_similarity
from .weights import heads

__all__ = [
    "DEAD_BELOW",
    "GateRecorder",
    "GateStatistics",
    "Heads",
    "Texts",
    "gate_statistics",
    "head_similarity",
    "heads",
]
