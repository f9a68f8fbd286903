"""The report of a run or of a comparison: one HTML file that needs nothing else, made from the files of its folder."""

from __future__ import annotations

from pathlib import Path

from headwater.files import saying_why, write_bytes

PAGE, FIGURES = "report.html", "figures"


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
    return write_page(*render(build_page(read_run(run_dir))), run_dir)


def write_comparison_report(folder: Path) -> Path:
    """Writes `report.html` and `figures/*.svg|png` into the folder of a comparison and returns the path of the page.

    Reads `comparison.json` and what it finds in the folders of the runs.

    Raises:
        headwater.errors.HeadwaterError: there is no `comparison.json`, or it cannot be read.
    """
    from headwater.report.comparison import read_comparison
    from headwater.report.comparison_sections import build_comparison_page
    from headwater.report.html import render

    folder = Path(folder)
    return write_page(*render(build_comparison_page(read_comparison(folder))), folder)


def write_page(html: str, files: dict[str, bytes], folder: Path) -> Path:
    """Writes what `html.render` gave into a folder, as `report.html` and `figures/*`, and returns the page's path.

    Raises:
        headwater.files.NotWritten: if that cannot be.
    """
    figures = folder / FIGURES
    with saying_why(figures):
        figures.mkdir(exist_ok=True)
    for name, data in files.items():
        write_bytes(figures / name, data)
    page = folder / PAGE
    write_bytes(page, html.encode("utf-8"))
    return page


__all__ = ["write_comparison_report", "write_page", "write_report"]
