"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the processes that some tests start, to compare bit for bit

import pytest
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from headwater.report import html

# The same examples every time as well, and no failure because this machine is slow.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    """A test that draws without a seed of its own passes always or never."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Outside `tests/report` one figure is saved, and stands for all: to save each would take a tenth of the suite."""
    with pytest.MonkeyPatch.context() as patch:
        if "report" not in item.path.parts:
            patch.setattr(html, "svg_bytes", _svg)
            patch.setattr(html, "png_bytes", _png)
        return (yield)


def _once(save: Callable[[Figure], bytes]) -> Callable[[Figure], bytes]:
    saved: list[bytes] = []

    def save_once(figure: Figure) -> bytes:
        if not saved:
            saved.append(save(figure))
        return saved[0]

    return save_once


_svg, _png = _once(html.svg_bytes), _once(html.png_bytes)


@pytest.fixture
def tiny_llama():
    """The factory `make_tiny_llama`."""
    return make_tiny_llama


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()
