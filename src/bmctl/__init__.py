"""bmctl: from training to a small, fast, proven artifact."""

__version__ = "0.1.0"
