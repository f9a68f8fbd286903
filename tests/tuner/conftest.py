from __future__ import annotations

import pytest

from .rows import ROWS, Row


@pytest.fixture(params=ROWS, ids=[row.id for row in ROWS])
def row(request) -> Row:
    """Each row of the matrix."""
    return request.param


@pytest.fixture(scope="package", autouse=True)
def task_probe():
    """The test-only method is registered while this folder's tests run, and not seen by other folders' tests."""
    from headwater.methods import registry

    from . import task_probe

    registry._METHODS["taskprobe"] = task_probe.METHOD  # a worker may enter this folder twice, but imports it once
    yield task_probe
    del registry._METHODS["taskprobe"]
