"""What cannot be written, said plainly: torch and safetensors have their own errors for a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import HeadwaterError, Problem
from .folder import STATE, is_whole, last_checkpoint

FULL = os.strerror(errno.ENOSPC)
OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""What only writing ends in; such an error need not name a file."""
TEXTS = ("inline_container", "PytorchStreamWriter", "file write failed", "Error while serializing")
"""Of torch's writer of zip files, and of safetensors'."""
ALMOST_NONE = 1 << 20  # bytes; a file that does not fit may leave a little room behind


@contextlib.contextmanager
def whole_or_gone(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written. Its state, written last, says that it is whole: one that is there from before goes
    first, and what could not be written whole is taken away."""
    (checkpoint / STATE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        # torch does not tell why it cannot write; when the rest is taken away it is too late to find out.
        full = isinstance(error, RuntimeError) and shutil.disk_usage(checkpoint.parent).free < ALMOST_NONE
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, FULL) from error
        raise


@contextlib.contextmanager
def explained_writes(output: Path) -> Iterator[None]:
    """Turns errors of writing a run folder into one that says why, and which checkpoint is good.

    Raises:
        HeadwaterError: in their place.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error, output)
        if reason is None:
            raise
        last = last_checkpoint(output)
        how = "make room" if FULL in reason else "put that right"
        fix = (
            f"the last whole checkpoint is {last}: {how}, then go on from it (training.resume_from_checkpoint: true)"
            if last
            else f"no checkpoint was written before: {how}, then start the run again"
        )
        raise HeadwaterError(
            Problem(f"the run folder {output} cannot be written: {reason}", "output_dir", fix)
        ) from error


def _reason(error: BaseException, output: Path) -> str | None:
    """Why `output` could not be written; None if that is not what the error is about."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno is not None:
            file = None if found.filename is None else Path(str(found.filename)).absolute()
            if found.errno in OF_WRITING or (file is not None and file.is_relative_to(output.absolute())):
                return str(found.strerror)
        found = found.__cause__ or found.__context__
    said = str(error).splitlines()
    return said[0] if said and not isinstance(error, OSError) and any(text in said[0] for text in TEXTS) else None
