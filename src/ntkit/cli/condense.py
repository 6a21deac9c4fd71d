"""`ntkit condense`."""

# The arguments of a command are its options: there are as many as users need.
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntkit.cli.options import ForceOption, LabelColumnOption, SeedOption
from ntkit.cli.terminal import Terminal, in_plain_words, needs_report, say

DATA_HELP = (
    ".npz: x_train, y_train, x_test, y_test (or x and y, cut at random); x: floating point, y: class numbers. .csv: a "
    "line of numbers and a class for each example, cut at random; a first line of words names the columns."
)
KERNEL_HELP = (
    "fc:DEPTH (infinite width, so many hidden ReLU layers), rbf, infinite:MODULE:FACTORY (your module at infinite "
    "width) or finite:MODULE:FACTORY (gradient features of your network as it is drawn)."
)


def condense(
    data: Annotated[Path, typer.Argument(metavar="DATA.npz|DATA.csv", help=DATA_HELP, show_default=False)],
    label_column: LabelColumnOption = None,
    per_class: Annotated[int, typer.Option(help="Points of each class.", min=1)] = 10,
    kernel: Annotated[str, typer.Option(metavar="KERNEL", help=KERNEL_HELP)] = "fc:1",
    steps: Annotated[int, typer.Option(help="Of Adam.", min=1)] = 300,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 4e-2,
    batch: Annotated[
        int, typer.Option(help="Targets of a step, as many of every class; all if there are no more.", min=1)
    ] = 5000,
    ridge: Annotated[float, typer.Option(help="In units of the mean diagonal entry of the points' kernel.")] = 1e-6,
    learn_labels: Annotated[
        bool, typer.Option("--learn-labels", help="Move the labels of the points as well.")
    ] = False,
    zca: Annotated[bool, typer.Option("--zca", help="Whiten images. Default: standardise each channel.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Turn half of the target images left to right.")] = False,
    shift: Annotated[int, typer.Option(metavar="PIXELS", help="Move target images by up to so many.", min=0)] = 0,
    validation: Annotated[float, typer.Option(help="Share of the training examples that watch the run.")] = 0.1,
    patience: Annotated[
        int | None,
        typer.Option(
            help="End after so many looks (at 1, 2, 4, 8, ... steps) without a better validation accuracy, and keep "
            "the best points. Default: the last points.",
            show_default=False,
            min=1,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Makes the network that is trained on the points. Default: one hidden layer of 1,024.",
            show_default=False,
        ),
    ] = None,
    network_steps: Annotated[int, typer.Option(help="Of SGD, for that network.", min=1)] = 1000,
    network_rate: Annotated[float, typer.Option(help="Its learning rate.")] = 1e-2,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the page, support.npz, images.svg and results.json.")
    ] = Path("condensed"),
    force: ForceOption = False,
    train: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 10_000,
    test: Annotated[int, typer.Option(help="Test examples at most, drawn at random.")] = 2_000,
    seed: SeedOption = 0,
) -> None:
    """Find few points that stand for a data set, and compare them with random examples and k-means centres.

    A killed command goes on where it stopped when it is given again.
    """
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.condensing import Condensing, run_condense
        from ntkit.report.inputs import Cut, load_factory
        from ntkit.uses.condense import Flip, Inducing, Shift, Training

        own = Condensing(
            data=data, per_class=per_class, kernel=kernel, cut=Cut(train, test, None, seed), validation=validation,
            zca=zca, network=None if network is None else load_factory(network),
            label=label_column, training=Training(network_steps, network_rate),
            settings=Inducing(
                steps, learning_rate, batch, learn_labels, ridge, patience=patience,
                augment=(*((Flip(),) if flip else ()), *((Shift(shift),) if shift else ())),
            ),
        )  # fmt: skip
        with Terminal() as terminal:
            report = run_condense(out, own, force=force, listener=terminal)
        for row in report.rows:
            say(f"{100 * row.kernel.accuracy:5.1f}%  {100 * row.network_accuracy:5.1f}%  {row.name}")
        say(f"test accuracy of the kernel and of a network; {out / 'index.html'} and support.npz written")
