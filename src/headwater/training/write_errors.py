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
from ..files import NotWritten, open_to_readers, why_not_written
from ..report import FIGURES, PAGE
from .folder import STATE, is_whole, last_checkpoint

FULL = os.strerror(errno.ENOSPC)
ALMOST_NONE = 1 << 20  # bytes; a file that does not fit may leave a little room behind


@contextlib.contextmanager
def whole_or_gone(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written. Its state, written last, says that it is whole: one that is there from before goes
    first, and what could not be written whole is taken away."""
    (checkpoint / STATE).unlink(missing_ok=True)
    try:
        yield
        open_to_readers(checkpoint)
    except BaseException as error:
        # torch does not tell why it cannot write; when the rest is taken away it is too late to find out.
        full = isinstance(error, RuntimeError) and shutil.disk_usage(checkpoint.parent).free < ALMOST_NONE
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, FULL) from error
        raise


@contextlib.contextmanager
def explained_writes(output: Path, go_on: str | None = None) -> Iterator[None]:
    """Turns errors of writing a run folder into one that says why, and what of the run is good.

    Args:
        go_on: how to go on once there is room, for commands whose runs have no checkpoints in `output` itself.

    Raises:
        HeadwaterError: in their place.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, NotWritten) as error:
        reason = why_not_written(error, output)
        if reason is None:
            raise
        how = "make room" if FULL in reason else "put that right"
        what = f"the run folder {output} cannot be written: {reason}"
        if isinstance(error, NotWritten) and _is_of_report(Path(error.problems[0].where)):
            what = f"the run in {output} is whole but for its report, which cannot be written: {reason}"
            fix = f"{how}, then write it: headwater report {output}"
        elif go_on:
            fix = f"{how}, then {go_on}"
        elif last := last_checkpoint(output):
            resume = "training.resume_from_checkpoint: true"
            fix = f"the last whole checkpoint is {last}: {how}, then go on from it ({resume})"
        else:
            fix = f"no checkpoint was written before: {how}, then start the run again"
        raise HeadwaterError(Problem(what, "output_dir", fix)) from error


def _is_of_report(path: Path) -> bool:
    """Whether a file of a run's folder belongs to its report, which is written when all else is there."""
    return path.name in (PAGE, FIGURES) or path.parent.name == FIGURES
