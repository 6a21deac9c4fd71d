"""`python -m ntkit.cli`."""

from ntkit.cli.main import app

app()
