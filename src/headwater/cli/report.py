"""`headwater report`."""

from __future__ import annotations

from pathlib import Path

from headwater.cli.console import out_console


def run(folder: str) -> None:
    """Write the report of a run or a comparison anew, from what its folder holds now.

    Raises:
        HeadwaterError: the folder holds neither.
    """
    from headwater.report import write_comparison_report, write_report

    path = Path(folder)
    write = write_comparison_report if (path / "comparison.json").is_file() else write_report
    out_console().print(f"report: {write(path)}", soft_wrap=True, highlight=False, markup=False)
