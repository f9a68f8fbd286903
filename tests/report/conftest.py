"""Two reports that several test files look at, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import write_nasty_run, write_run

from headwater.report import write_report


@pytest.fixture(scope="session")
def typical_page(tmp_path_factory) -> Path:
    """The report of a run as it should be."""
    return write_report(write_run(tmp_path_factory.mktemp("typical") / "run", steps=60, layers=4))


@pytest.fixture(scope="session")
def nasty_page(tmp_path_factory) -> Path:
    """The report of a run with hostile names and broken numbers."""
    return write_report(write_nasty_run(tmp_path_factory.mktemp("nasty") / "run"))
