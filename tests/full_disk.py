"""A disk without room, for tests: a limit on the size of a file, which writers meet as they meet a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_end_after(room: int) -> Iterator[None]:
    """Files of this process end after `room` bytes; what is written past that is EFBIG, "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
