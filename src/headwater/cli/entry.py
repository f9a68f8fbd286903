"""The program `headwater`: runs a command, and says in a line or two what went wrong where the user can mend it."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence

from headwater.cli.app import app
from headwater.cli.console import show_error, show_warning
from headwater.errors import HeadwaterError, Problem
from headwater.files import OF_WRITING

# torch has an error of its own for GPUs, with its allocator, and none for the rest.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_SMALLER = (
    "make batches smaller (training.per_device_train_batch_size, evaluation.batch_size), rows shorter "
    "(data.max_length), or the model (model.dtype: bfloat16), or set training.gradient_checkpointing: true"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for anything the user can mend, 130 when interrupted.

    Expected errors are shown without a traceback; with HEADWATER_DEBUG=1 they are raised.
    """
    debug = os.environ.get("HEADWATER_DEBUG") == "1"
    # Before torch is loaded: waiting threads that spin make training several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.showwarning = show_warning
    # It recommends a kernel for 4-bit weights on CPUs as PEFT imports it, whatever is run.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="headwater")
        finally:
            if sys.stdout is not None:  # as it is where it was closed
                sys.stdout.flush()
    except HeadwaterError as error:
        if debug:
            raise
        show_error(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        _drop_output()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        found = out_of_memory(error)
        if found is None or debug:
            raise
        show_error(found)
        sys.exit(2)
    except OSError as error:  # most of what writes names its file; this is for the rest
        if error.errno not in OF_WRITING or debug:
            raise
        where = error.filename or "standard output or a temporary file"
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_output()  # or Python would try again as it ends
        show_error(HeadwaterError(Problem(f"this cannot be written: {error.strerror}", where, "make room")))
        sys.exit(2)


def out_of_memory(error: MemoryError | RuntimeError) -> HeadwaterError | None:
    """What to say of an error, or None if it is not that memory ran out."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(text):
        return None
    asked = re.search(r"tried to allocate ([\d.]+) ?([kMGT]i?B|bytes)", text, re.IGNORECASE)
    size = f": {_size(float(asked[1]), asked[2])} more did not fit" if asked else ""
    where = " of the GPU" if "CUDA" in text or "HIP" in text else ""
    return HeadwaterError(Problem(f"out of memory{where}{size}", fix=_SMALLER))


def _size(number: float, unit: str) -> str:
    return f"{number / 2**30:,.1f} GiB" if unit == "bytes" else f"{number:g} {unit}"


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
