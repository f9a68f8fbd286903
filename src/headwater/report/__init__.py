"""The report of a run: one HTML file that needs nothing else, made from the files of a run folder."""

from __future__ import annotations

import os
from pathlib import Path


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `figures/*.svg|png` into a run folder and returns the path of the page.

    Reads `results.json`, `history.jsonl`, `analysis.json` and `config.yaml` of that folder and nothing else; where one
    of them is missing or unreadable, the section that needs it says so. The same files give the same report, byte for
    byte.

    Raises:
        headwater.errors.HeadwaterError: the folder does not exist or holds none of these files.
    """
    # Matplotlib takes a second to import, which who only imports headwater should not pay.
    from headwater.report.html import render
    from headwater.report.run import read_run
    from headwater.report.sections import build_page

    run_dir = Path(run_dir)
    html, files = render(build_page(read_run(run_dir)))
    figures = run_dir / "figures"
    figures.mkdir(exist_ok=True)
    for name, data in files.items():
        _write(figures / name, data)
    page = run_dir / "report.html"
    _write(page, html.encode("utf-8"))
    return page


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


__all__ = ["write_report"]
