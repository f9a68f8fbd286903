"""Which implementation of an operation runs: `reference`, `autograd` or `triton`."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..errors import HeadwaterError, Problem

_TRITON_IS_HERE = importlib.util.find_spec("triton") is not None  # no cached function: compilers trace through this
IMPLEMENTATIONS = ("reference", "autograd", "triton")


def implementation(device: torch.device) -> str:
    """The name of the implementation that runs on a device; `HEADWATER_OPS` forces one.

    Raises:
        HeadwaterError: if `HEADWATER_OPS` names none, or one that cannot run here.
    """
    forced = os.environ.get("HEADWATER_OPS", "")
    if forced and forced not in IMPLEMENTATIONS:
        raise HeadwaterError(
            Problem(f"{forced!r} is no implementation", "HEADWATER_OPS", f"use one of {', '.join(IMPLEMENTATIONS)}")
        )
    if forced == "triton" and not triton_is_here():
        raise HeadwaterError(
            Problem("triton is not installed", "HEADWATER_OPS", "pip install 'headwater[triton]', or leave it unset")
        )
    return forced or ("triton" if device.type == "cuda" and triton_is_here() else "autograd")


def triton_is_here() -> bool:
    return _TRITON_IS_HERE
