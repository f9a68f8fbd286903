"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import HeadwaterError, Problem


def expanded(path: str, where: str = "") -> Path:
    """A path with the home folder that it may begin with, `~` or `~user`, written out.

    Args:
        where: of the error.

    Raises:
        HeadwaterError: nobody of that name has one.
    """
    found = os.path.expanduser(path)  # pathlib's takes ./~x for ~x
    if found.startswith("~"):
        first = found.replace(os.sep, "/").partition("/")[0]
        raise HeadwaterError(Problem(f"no home folder is known for `{first}`", where, "write the path out"))
    return Path(found)
