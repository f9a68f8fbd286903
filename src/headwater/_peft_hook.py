"""Loads headwater when, and only when, something imports PEFT.

`import headwater` asks for that, and after `headwater enable-autoload`, which puts a copy of this file there, every
Python of the environment at its start. So, standard library only, and no import of headwater here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence


def load_headwater() -> None:
    """Import headwater, which registers its methods; whoever imported PEFT is told of a failure but goes on."""
    if "headwater.methods" in sys.modules:  # headwater is what imports PEFT, and registers when it is ready
        return
    if importlib.util.find_spec("headwater") is None:  # uninstalled since
        return
    try:
        importlib.import_module("headwater.tuner")
    except Exception as error:  # another tool's command must not die of ours
        warnings.warn(f"headwater's methods are not available: {type(error).__name__}: {error}", stacklevel=2)


class AfterPeft(importlib.abc.MetaPathFinder):
    """Finds PEFT as the other finders do and adds `load_headwater` to the end of its import.

    Being asked where PEFT is must not load anything: transformers asks that (`find_spec("peft")`) without importing it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                self._load_headwater_after(spec)
                return spec
        return None

    def _load_headwater_after(self, spec: importlib.machinery.ModuleSpec) -> None:
        loader = spec.loader
        run = getattr(loader, "exec_module", None)
        if run is None:
            return

        def exec_module(module: types.ModuleType) -> None:
            del loader.exec_module  # type: ignore[union-attr]  # the instance's; the class keeps its own
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            load_headwater()

        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]


def install() -> None:
    """Wait for PEFT; where it is loaded already, load headwater at once."""
    if "peft" in sys.modules:
        load_headwater()
    elif not any(type(finder).__name__ == AfterPeft.__name__ for finder in sys.meta_path):  # or a copy of this file's
        sys.meta_path.insert(0, AfterPeft())
