"""What a forward keeps in memory for its backward, and what a run that is over still holds."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn


def free_memory() -> None:
    """Gives back what models and trainers that are done with hold: their parts refer to each other, and the next one
    wants their memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class SavedBytes:
    """Counts the bytes that forwards inside the `with` block save for backward, each storage once.

    Parameters and buffers of `without`, which are there anyway, do not count. The values are left as they are. What
    activation checkpointing keeps by itself is not seen.
    """

    def __init__(self, without: nn.Module):
        self._own = {t.untyped_storage().data_ptr() for t in (*without.parameters(), *without.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self.total = 0

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage
        return t

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.total = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()
