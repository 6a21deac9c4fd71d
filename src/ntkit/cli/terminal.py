"""What the user sees: progress, tables, errors in plain words."""

from __future__ import annotations

import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ntkit.errors import NtkitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ntkit.report import page


class Terminal:
    """Progress for people: one line for each finished step, and a bar for the present one. A `study.Listener`."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None
        self._message = ""
        self._start = 0.0

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def step(self, message: str) -> None:
        """Begin a step; the one before is done."""
        self._finish()
        self._message, self._start = message, time.perf_counter()
        self._task = self._progress.add_task(escape(message), total=None)

    def part(self, done: int, total: int) -> None:
        """Move the bar of the present step."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _finish(self) -> None:
        if self._task is None:
            return
        seconds = time.perf_counter() - self._start
        self._progress.remove_task(self._task)
        self._progress.console.print(f"[dim]{seconds:6.1f} s[/dim]  {escape(self._message)}", highlight=False)
        self._task = None


def print_table(table: page.Table) -> None:
    """A table, groups of rows under a heading."""
    shown = Table(caption=table.caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in table.rows:
        heading = not any(row[1:])
        shown.add_row(*map(escape, row if heading else (f"  {row[0]}", *row[1:])), style="bold" if heading else None)
    Console(highlight=False).print(shown)


def say(message: str) -> None:
    """A line on the standard output."""
    Console(highlight=False, soft_wrap=True).print(escape(message))


@contextmanager
def in_plain_words() -> Iterator[None]:
    """Errors that are the user's to mend become one line and exit code 2; warnings one line each."""
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except (NtkitError, OSError) as error:
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from None
        finally:
            warnings.showwarning = before


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if category.__module__.startswith("ntkit"):
        typer.echo(f"note: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= 700 else text[:700] + " ..."


@contextmanager
def needs_report() -> Iterator[None]:
    """Say what to install where pictures cannot be drawn."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "jinja2"}:
            raise
        typer.echo(f"error: reports need {error.name}: pip install 'ntkit[report]'", err=True)
        raise typer.Exit(2) from None
