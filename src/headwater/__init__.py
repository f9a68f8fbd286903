"""headwater: one adapter, many tasks.

Importing it registers its methods with PEFT, as soon as PEFT itself is imported. Until then, and until a public name is
asked for, it loads nothing: the command line's help and the check of a file need neither torch nor PEFT.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _peft_hook

if TYPE_CHECKING:
    from ._public import *  # noqa: F403

__version__ = "0.1.0"


class _Package(ModuleType):
    """Keeps `headwater.methods` the function; Python would set it to the package of that name when that is loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        taken = name == "methods" and isinstance(value, ModuleType)
        super().__setattr__(name, value.methods if taken else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    from . import _public

    globals().update({public: getattr(_public, public) for public in ("__all__", *_public.__all__)})
    if name not in globals():
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__getattr__("__all__"), *globals()})


_peft_hook.install()
