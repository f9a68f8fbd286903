"""An OpenAI-compatible server: requests with different adapters, or different tasks of one adapter, in one batch."""

from .engine import BusyError, ClosedError, Engine, Piece, Ticket
from .routes import PoolRoutes, Route, Routes, RunRoutes
from .sampling import Sampling

__all__ = [
    "BusyError",
    "ClosedError",
    "Engine",
    "Piece",
    "PoolRoutes",
    "Route",
    "Routes",
    "RunRoutes",
    "Sampling",
    "Ticket",
]
