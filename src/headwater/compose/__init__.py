"""Adapter pools: many LoRA adapters of one base model, kept in a folder and combined as requests need them."""

from .adapter import Adapter, LowRank
from .mixed import Mixture, PooledModel
from .pool import AdapterPool, Entry

__all__ = ["Adapter", "AdapterPool", "Entry", "LowRank", "Mixture", "PooledModel"]
