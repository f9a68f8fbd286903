"""headwater: one adapter, many tasks. Importing it registers its methods with PEFT."""

__version__ = "0.1.0"
