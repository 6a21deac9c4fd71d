"""`ntkit svm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntkit.cli.options import ForceOption, LabelColumnOption, SeedOption
from ntkit.cli.terminal import Terminal, in_plain_words, needs_report, say


def svm(
    training: Annotated[
        Path,
        typer.Argument(
            metavar="TRAIN.csv|TRAIN.npz",
            help=".csv: a line of numbers and a class for each example; a first line of words names the columns. .npz: "
            "x_train and y_train, or x and y (and x_test, which is predicted).",
            show_default=False,
        ),
    ],
    test: Annotated[
        Path | None,
        typer.Option(
            metavar="TEST.csv|TEST.npz", help="Examples to predict, with or without classes.", show_default=False
        ),
    ] = None,
    label_column: LabelColumnOption = None,
    depths: Annotated[int, typer.Option(help="Layers at most: 1, ..., this are tried.", min=1, max=20)] = 5,
    folds: Annotated[int, typer.Option(help="Of cross-validation.", min=2)] = 5,
    most: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 5000,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the page, results.json and predictions.csv.")
    ] = Path("svm"),
    force: ForceOption = False,
    seed: SeedOption = 0,
) -> None:
    """Classify a small table: a support vector machine on the kernel of an infinitely wide network.

    Depth, fixed layers and C are chosen by cross-validation; a machine with a Gaussian kernel is searched beside it.
    """
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.machines import Small, run_svm, tested, verdict

        own = Small(training, test, label_column, depths, folds, most, seed)
        with Terminal() as terminal:
            found = run_svm(out, own, force=force, listener=terminal)
        say(verdict(found))
        on_test = tested(found)
        if on_test is not None:
            say(on_test)
        written = "index.html and results.json" if found.predictions is None else "index.html, predictions.csv and more"
        say(f"{out}: {written} written")
