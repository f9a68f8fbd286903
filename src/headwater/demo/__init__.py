"""The demo: a real language model and six real tasks out of registry packages, trained and scored on a laptop's CPU."""

from .assets import DemoAssets, Source, prepare
from .run import run_demo

__all__ = ["DemoAssets", "Source", "prepare", "run_demo"]
