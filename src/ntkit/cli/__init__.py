"""The command line."""

from ntkit.cli.main import app

__all__ = ["app"]
