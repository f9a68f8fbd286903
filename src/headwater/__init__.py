"""headwater: one adapter, many tasks.

Importing it registers its methods with PEFT, as soon as PEFT itself is imported. Until then, and until a public name is
asked for, it loads nothing: the command line's help and the check of a file need neither torch nor PEFT.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _peft_hook

if TYPE_CHECKING:  # an editor cannot ask the registry; at run time the configs come from there
    from ._public import *  # noqa: F403
    from .methods.cola import ColaConfig as ColaConfig
    from .methods.cond_mixlora import CondMixLoraConfig as CondMixLoraConfig
    from .methods.cora import CoraConfig as CoraConfig
    from .methods.hydralora import HydraLoraConfig as HydraLoraConfig
    from .methods.lori import LoriConfig as LoriConfig
    from .methods.malora import MaLoraConfig as MaLoraConfig
    from .methods.mlora import MLoraConfig as MLoraConfig
    from .methods.moe_lora import MoeLoraConfig as MoeLoraConfig
    from .methods.mtl_lora import MtlLoraConfig as MtlLoraConfig
    from .methods.multilora import MultiLoraConfig as MultiLoraConfig
    from .methods.rlora import RLoraConfig as RLoraConfig
    from .methods.smora import SMoraConfig as SMoraConfig

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
        try:
            return importlib.import_module(f"headwater.{name}")  # headwater.training and the like, as the docs write it
        except ModuleNotFoundError as error:
            if error.name != f"headwater.{name}":  # the part is there, and misses something else
                raise
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__getattr__("__all__"), *globals()})


_peft_hook.install()
