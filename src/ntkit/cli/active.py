"""`ntkit active start|ask|tell|status`: labels bought by a person, between two sessions at the desk."""

# The arguments of a command are its options: there are as many as users need.
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ntkit.cli.options import ArrayDataArgument, FactoryArgument, RowsOption, SeedOption, TypeOption, WeightsOption
from ntkit.cli.terminal import Terminal, in_plain_words, print_table, say
from ntkit.errors import InputError

if TYPE_CHECKING:
    from ntkit.report.session import Session
    from ntkit.uses.active.loop import Asked

app = typer.Typer(
    help="Buy labels where they tell the network most: start a session, ask which points, tell their labels.",
    no_args_is_help=True,
    add_completion=False,
)
SessionArgument = Annotated[
    Path,
    typer.Argument(metavar="SESSION.jsonl", help="The session's journal; everything is in it.", show_default=False),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", metavar="KIND", help="csv, labelstudio or argilla. Default: csv for .csv."),
]
ItemsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.csv",
        help="What people see of a point: an array of strings in the data (texts, addresses of images), or a table "
        "with a line for each point.",
        show_default=False,
    ),
]
CountOption = Annotated[int, typer.Option(help="Points to ask for, if none wait for an answer.", min=1)]


@app.command()
def start(
    session: SessionArgument,
    factory: FactoryArgument,
    data: ArrayDataArgument,
    rows: RowsOption = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Array of labels to begin with, -1 where there is none.", show_default=False),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="CAT,DOG", help="Names of the classes, in order.", show_default=False)
    ] = None,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="How points are chosen: look at the page.")] = (
        "curvature-ivr"
    ),
    loss: Annotated[str, typer.Option(metavar="LOSS", help="cross-entropy or square.")] = "cross-entropy",
    steps: Annotated[int, typer.Option(help="Of Adam, from scratch before every question.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", min=0)] = 1e-3,
    seed: SeedOption = 0,
    dtype: TypeOption = "float32",
    budget: Annotated[int | None, typer.Option(help="Say stop at so many labels.", min=1, show_default=False)] = None,
    plateau: Annotated[
        int | None,
        typer.Option(help="Say stop after so many questions without progress on x_test.", min=1, show_default=False),
    ] = None,
    kappa: Annotated[
        float | None,
        typer.Option(help="Say stop when predictions agree so well from question to question.", show_default=False),
    ] = None,
    items: ItemsOption = None,
) -> None:
    """Begin a session on the pool of a file. The test accuracy is written down where the file has x_test and y_test."""
    with in_plain_words():
        from ntkit.report.session import Session, Settings
        from ntkit.uses.active.journal import Journal

        if Journal(session).events:  # a file without one is what a killed start leaves behind
            raise InputError(f"there is a session {session} already: go on with `ntkit active ask {session}`")

        place, _, function = factory.rpartition(":")
        if place.endswith(".py"):
            factory = f"{Path(place).resolve()}:{function}"  # to be found from another folder tomorrow
        if items is not None and Path(items).is_file():
            items = str(Path(items).resolve())
        settings = Settings(
            factory, str(data.resolve()), rows,
            None if names is None else [name.strip() for name in names.split(",")],
            strategy, loss, steps, batch_size, lr, seed, dtype, budget, plateau, kappa, items,
        )  # fmt: skip
        begun = Session(settings, session, labels=labels)
        known = int((begun.loop.labels >= 0).sum())
        say(f"{session}: {begun.loop.n:,} points, {begun.loop.classes} classes, {known:,} labels")
        say(f"next: ntkit active ask {session} --out questions.csv")


@app.command()
def ask(
    session: SessionArgument,
    count: CountOption = 10,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the questions here, to be filled in.", show_default=False),
    ] = None,
    kind: FormatOption = None,
    weights: WeightsOption = None,
    items: ItemsOption = None,
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another than the session's, this time.", show_default=False),
    ] = None,
) -> None:
    """Which points should be labelled next? Trains the network on the labels so far, or takes your --weights.

    Questions without an answer are asked again, and no others are chosen, until they are answered or skipped.
    """
    with in_plain_words():
        from ntkit.report.session import Session

        found = Session.resume(session, strategy)
        exchange = None if out is None else found.exchange(kind, out)
        shown = None if exchange is None else found.items(items, needed=exchange.needs_items)
        if exchange is not None and out is not None:
            found.require_told(exchange, out)
        size = count if len(found.loop.waiting) else found.within(count)
        if size < count:
            say(f"{size} of {count} points are asked for: the session's budget leaves no more")
        with Terminal() as terminal:
            terminal.step("training and choosing")
            asked = found.ask(size, weights)
        print_table(_questions(found, asked))
        if exchange is not None and out is not None:
            known = bool((found.loop.labels >= 0).any())
            exchange.write(out, asked.numbers, asked.scores, items=shown, guesses=asked.guesses if known else None)
            say(f"{out}: {len(asked.numbers)} questions; next: ntkit active tell {session} {out}")
        for reason in asked.reasons:
            say(f"you may stop: {reason}")


@app.command()
def tell(
    session: SessionArgument,
    answers: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The questions, filled in.", show_default=False)
    ] = None,
    kind: FormatOption = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="NUMBER=CLASS", help="One label; may be repeated.")
    ] = None,
    skip: Annotated[list[int] | None, typer.Option(metavar="NUMBER", help="A point that cannot be labelled.")] = None,
    unlabel: Annotated[list[int] | None, typer.Option(metavar="NUMBER", help="Take a label back.")] = None,
    unasked: Annotated[
        bool, typer.Option("--unasked", help="Answers of the file to points never asked for, too.")
    ] = False,
) -> None:
    """Write labels down, from a file of this session's questions or one by one: all, or none if one is wrong."""
    with in_plain_words():
        from ntkit.report.session import Session

        found = Session.resume(session)
        numbers, classes, skipped = [], [], list(skip or [])
        if answers is not None:
            read = found.answers(found.exchange(kind, answers), answers, unasked=unasked)
            numbers, classes, skipped = read.numbers, read.labels, [*skipped, *read.skipped]
        for text in label or []:
            number, c = found.label(text)
            numbers.append(number)
            classes.append(c)
        if not numbers and not skipped and not unlabel:
            raise InputError(
                "nothing to tell: hand in a file of questions, or say --label NUMBER=CLASS"
                if answers is None
                else f"nothing to tell: {answers} has no answer yet; in a table fill in the column label"
            )
        found.loop.tell(numbers, classes, skipped=skipped, unlabelled=unlabel or [])
        left = len(found.loop.waiting)
        say(f"{len(numbers)} labels, {len(skipped)} skipped, {len(unlabel or [])} taken back; {left} questions wait")


@app.command()
def status(session: SessionArgument) -> None:
    """What has happened so far, and whether to go on."""
    with in_plain_words():
        from ntkit.report.session import Session

        found = Session.resume(session)
        print_table(found.status())
        for reason in found.loop.reasons:
            say(f"you may stop: {reason}")


def _questions(found: Session, asked: Asked):
    from ntkit.report.page import Table

    names = found.settings.names
    rows = tuple(
        (str(number), f"{score:.4g}", str(guess if names is None else names[guess]))
        for number, score, guess in zip(asked.numbers, asked.scores, asked.guesses, strict=True)
    )
    said = f"trained in {asked.seconds_fit:.1f} s, chosen in {asked.seconds_query:.1f} s"
    accuracy = asked.metrics.get("accuracy")
    more = "" if accuracy is None else f"; test accuracy {accuracy:.1%}"
    return Table(said + more, ("point", "score", "the network says"), rows)
