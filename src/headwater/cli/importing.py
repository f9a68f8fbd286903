"""`headwater import`."""

from __future__ import annotations

from pathlib import Path

from headwater.cli.console import out_console, quiet_libraries, show_warning, table


def run(source: str, output: str, *, method: str | None, rslora: bool, base: str | None) -> None:
    """Import an adapter of the authors' code and say what came of it.

    Raises:
        HeadwaterError: the folder is not of a known format, or `output` is there already.
    """
    from headwater.importing import import_adapter

    quiet_libraries()
    done = import_adapter(Path(source), Path(output), method=method, rslora=rslora, base_model=base)
    for note in done.notes:
        show_warning(note)
    if not done.base_model:
        show_warning("The files name no base model; give it with --base, or commands that load the adapter cannot.")
    rows: list[list[object]] = [
        ["method", done.method],
        ["base model", done.base_model or None],
        ["adapted layers", done.layers],
        ["values", f"{done.parameters:,}"],
    ]
    out_console().print(table(["adapter", output], rows))
