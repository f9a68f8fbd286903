"""`headwater enable-autoload`: let other programs' PEFT know headwater's methods."""

from __future__ import annotations

import os
import site
import sysconfig
from pathlib import Path

from headwater import _peft_hook
from headwater.cli.console import out_console
from headwater.errors import HeadwaterError, Problem
from headwater.files import write_text

MODULE = "_headwater_peft_hook"
PTH = "headwater-autoload.pth"


def run(*, disable: bool) -> None:
    """Write the hook into this environment's site-packages, or take it out."""
    console = out_console()
    if disable:
        removed = [path for folder in _folders() for path in remove(folder)]
        console.print(
            "Removed:" if removed else "Autoload was not enabled.", *map(str, removed), sep="\n", soft_wrap=True
        )
        return
    folder = next((f for f in _folders() if os.access(f, os.W_OK)), None)
    if folder is None:
        fix = "use a virtual environment, or run this as the user who owns it"
        raise HeadwaterError(Problem("this Python's site-packages cannot be written to", str(_folders()[0]), fix))
    console.print("PEFT now knows headwater's methods in every program of this environment. Written:", soft_wrap=True)
    console.print(*map(str, add(folder)), sep="\n", soft_wrap=True)
    console.print("`headwater enable-autoload --disable` takes them out again.", style="dim")


def add(folder: Path) -> list[Path]:
    """Put the hook and the line that runs it at every start into `folder`; returns the two files.

    The `.pth` line goes last, and tolerates a hook that is gone, so that no order of events breaks a Python's start.
    """
    source = Path(_peft_hook.__file__).read_text(encoding="utf-8")
    hook, pth = folder / f"{MODULE}.py", folder / PTH
    write_text(hook, source)
    write_text(pth, f"import importlib.util as u; u.find_spec('{MODULE}') and __import__('{MODULE}').install()\n")
    return [hook, pth]


def remove(folder: Path) -> list[Path]:
    """Take the files out of `folder`; returns those that were there."""
    found = [path for path in (folder / PTH, folder / f"{MODULE}.py") if path.exists()]
    for path in found:
        path.unlink()
    return found


def _folders() -> list[Path]:
    folders = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    return folders
