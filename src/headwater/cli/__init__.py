"""The command line. Heavy imports stand inside the commands, so that help and mistakes in arguments answer at once."""

from headwater.cli.app import app
from headwater.cli.entry import main

__all__ = ["app", "main"]
