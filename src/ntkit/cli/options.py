"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FACTORY_HELP = (
    "MODULE:FUNCTION or path/file.py:FUNCTION; the function takes no argument and returns a torch.nn.Module whose "
    "output is (N, C). It is put into evaluation mode."
)
READOUT_HELP = (
    "Which scalars are differentiated: 'logits' (full kernel), 'sum' (pNTK), 'trace', 'single:3' (one logit, counted "
    "from 0), 'random:4' (mean over 4 random-sign combinations)."
)
MEMORY_HELP = (
    "Working space for computing a kernel, beside the matrix itself: 500MB, 2GB. Default: an eighth of the machine."
)
FactoryArgument = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help=FACTORY_HELP, show_default=False)]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: .safetensors, or a state dict saved by torch.save (.pt, .pth).",
        show_default=False,
    ),
]
TypeOption = Annotated[str, typer.Option(metavar="TYPE", help="float32 or float64, for the network and its kernel.")]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where the network runs: cpu, cuda or cuda:1 (a GPU by number).")
]
MemoryOption = Annotated[str | None, typer.Option(metavar="SIZE", help=MEMORY_HELP, show_default=False)]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every random choice, the factory's included.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
ArrayDataArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATA.npz", help="Arrays of examples: floating point, or token numbers.", show_default=False
    ),
]
RowsOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Array of the rows. Default: x_train, or else x.", show_default=False),
]
ColsOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Array of the columns. Default: the rows again.", show_default=False),
]
TraceOption = Annotated[bool, typer.Option("--trace", help="Average over the scalars of an example: one row for each.")]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=".csv: the column with the classes, by its name or number from 1. Default: the last.",
        show_default=False,
    ),
]
