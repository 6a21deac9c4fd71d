"""`ntkit probe` and `ntkit rank-backbones`."""

# The arguments of a command are its options: there are as many as users need.
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntkit.cli.options import FactoryArgument, ForceOption, SeedOption, WeightsOption
from ntkit.cli.terminal import Terminal, in_plain_words, needs_report, say

DATA_HELP = "x_train, y_train, x_test, y_test of the new task (or x and y, cut at random)."
HEAD_HELP = "Name of the module whose place a new head takes, such as fc or classifier."


def probe(
    factory: FactoryArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA.npz", help=DATA_HELP, show_default=False)],
    head: Annotated[str, typer.Option(metavar="NAME", help=HEAD_HELP, show_default=False)],
    weights: WeightsOption = None,
    hidden: Annotated[
        int | None,
        typer.Option(help="Width of a hidden layer in the new head. Default: none.", show_default=False, min=1),
    ] = None,
    reinitialise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A last module below the head that gets fresh weights and is probed with it, such as layer4. May be "
            "given several times, in the order of the network.",
            show_default=False,
        ),
    ] = None,
    taus: Annotated[
        str, typer.Option(metavar="EPOCHS", help="Lengths of probing to fine-tune from.")
    ] = "0,1,2,4,8,16,32",
    epochs: Annotated[int, typer.Option(help="Of each fine-tuning.", min=1)] = 20,
    probing_rate: Annotated[float, typer.Option(help="Learning rate of probing (SGD, momentum 0.9).")] = 1e-2,
    finetuning_rate: Annotated[float, typer.Option(help="Learning rate of fine-tuning.")] = 1e-3,
    smoothing: Annotated[float, typer.Option(help="Of the labels, while probing.")] = 0.0,
    stop: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="End probing where this part of the first energy is left, such as 0.2; longer taus are left out.",
            show_default=False,
        ),
    ] = None,
    frozen_statistics: Annotated[
        bool, typer.Option("--frozen-statistics", help="BatchNorm keeps its running statistics in fine-tuning.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Examples of a batch.", min=1)] = 128,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the page, results.json and weights.")] = Path(
        "probe"
    ),
    force: ForceOption = False,
    train: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 10_000,
    test: Annotated[int, typer.Option(help="Test examples at most, drawn at random.")] = 2_000,
    seed: SeedOption = 0,
) -> None:
    """Find how long to probe a new head before fine-tuning: one probing run, fine-tuned from several of its states.

    A killed command goes on where it stopped when it is given again.
    """
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.finetuning import Sweeping, parse_taus, run_probe
        from ntkit.report.inputs import Cut, load_factory

        own = Sweeping(
            factory=load_factory(factory), data=data, head=head, weights=weights, cut=Cut(train, test, None, seed),
            hidden=hidden, taus=parse_taus(taus), epochs=epochs, probing_rate=probing_rate,
            finetuning_rate=finetuning_rate, smoothing=smoothing, batch_size=batch, stop=stop,
            reinitialised=tuple(reinitialise or ()), frozen_statistics=frozen_statistics,
        )  # fmt: skip
        with Terminal() as terminal:
            found = run_probe(out, own, force=force, listener=terminal)
        say(found.recommendation)
        say(f"{out / 'index.html'}, results.json, best.safetensors and the networks of every tau written")


def rank_backbones(
    data: Annotated[Path, typer.Argument(metavar="DATA.npz", help=DATA_HELP, show_default=False)],
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="MODULE:FACTORY[@WEIGHTS]...",
            help="Networks to choose among, with weights where they have some.",
            show_default=False,
        ),
    ],
    head: Annotated[str, typer.Option(metavar="NAME", help=HEAD_HELP, show_default=False)],
    at: Annotated[
        int | None,
        typer.Option(help="Predict for so many examples. Default: those there are.", show_default=False, min=1),
    ] = None,
    sketch: Annotated[
        int | None,
        typer.Option(metavar="D", help="Sketched kernels with D features. Default: exact.", show_default=False, min=1),
    ] = None,
    seen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK",
            help="One of the networks, as it is named, that was trained on these very labels: it is marked, because "
            "its prediction is too good. May be given several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the page and results.json.")] = Path("backbones"),
    force: ForceOption = False,
    train: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 2_000,
    seed: SeedOption = 0,
) -> None:
    """Predict which backbone does best on a new task, without fine-tuning any: GCV with a random head."""
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.finetuning import Backbones, run_ranking
        from ntkit.report.inputs import Cut

        own = Backbones(networks, data, head, Cut(train, 2_000, None, seed), at, sketch, tuple(seen or ()))
        with Terminal() as terminal:
            found = run_ranking(out, own, force=force, listener=terminal)
        for row in found.rows:
            say(f"{row.extrapolated:8.4f}  {row.name}")
        say(f"predicted squared error with {found.at} examples; {out / 'index.html'} and results.json written")
