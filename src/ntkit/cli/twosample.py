"""`ntkit twosample`."""

# The arguments of a command are its options: there are as many as users need.
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntkit.cli.options import ForceOption, SeedOption, WeightsOption
from ntkit.cli.terminal import Terminal, in_plain_words, needs_report, say

SAMPLE_HELP = ".npz with an array of examples, or .csv with a line of numbers for each."


def twosample(
    first: Annotated[Path, typer.Argument(metavar="A.npz|A.csv", help=SAMPLE_HELP, show_default=False)],
    second: Annotated[
        Path, typer.Argument(metavar="B.npz|B.csv", help="The other sample, in the same form.", show_default=False)
    ],
    array: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Array of both .npz files. Default: x_train, or else x.", show_default=False),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="KERNEL",
            help="rbf (median bandwidth), conv or mlp (tangent kernel of a random network), or MODULE:FACTORY for a "
            "network of your own. Default: conv for images, mlp for anything else.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    infinite: Annotated[bool, typer.Option("--infinite", help="The network's infinite-width kernel instead.")] = False,
    statistic: Annotated[
        str,
        typer.Option(
            metavar="STATISTIC",
            help="unbiased (all pairs), block:SIZE, linear; or, in linear time, witness (NTK-MMD: half of each sample "
            "is trained on, exactly to first order), training or training:RATE (the same by one pass of SGD).",
        ),
    ] = "unbiased",
    permutations: Annotated[int, typer.Option(help="Of the labels.", min=1)] = 1000,
    level: Annotated[float, typer.Option(help="How often it may err where nothing differs.")] = 0.05,
    most: Annotated[int, typer.Option(help="Examples of each sample at most, drawn at random.")] = 2000,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the page and results.json.")] = Path("twosample"),
    force: ForceOption = False,
    seed: SeedOption = 0,
) -> None:
    """Test whether two samples come from one distribution, and show which examples make the difference."""
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.twosample import Comparing, parse_kernel, run_twosample

        own = Comparing(
            first, second, array, parse_kernel(kernel), weights, infinite, statistic, permutations, level, most, seed
        )
        with Terminal() as terminal:
            found = run_twosample(out, own, force=force, listener=terminal)
        say(str(found))
        verdict = "the samples differ" if found.rejected(level) else "no difference found"
        say(f"{verdict} at level {level:g}; {found.power(level)} for a difference as large as the one seen")
        say(f"{out / 'index.html'} and results.json written")
