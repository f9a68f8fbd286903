"""The methods, one file each. Importing this package imports every method file, and so registers it, also with PEFT."""

import importlib
import pkgutil

from .base import Heads, MethodConfig, NotMergeable
from .registry import Method, make_config, method, methods, register

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("base", "call", "files"):
        importlib.import_module(f"{__name__}.{_module.name}")

importlib.import_module("headwater.tuner")  # tells PEFT of the methods

__all__ = ["Heads", "Method", "MethodConfig", "NotMergeable", "make_config", "method", "methods", "register"]
