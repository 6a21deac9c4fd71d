"""The command line: `ntkit demo`, `ntkit report`, `ntkit kernel`, `ntkit plan`, `ntkit paths`, `ntkit active` and more.

What is heavy (torch, matplotlib) is imported inside the commands, so that `ntkit --help` answers at once.
"""

# The arguments of a command are its options: there are as many as users need.
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntkit.cli import active, condense, finetuning, svm, twosample
from ntkit.cli.options import (
    READOUT_HELP,
    ArrayDataArgument,
    ColsOption,
    DeviceOption,
    FactoryArgument,
    ForceOption,
    MemoryOption,
    RowsOption,
    SeedOption,
    TraceOption,
    TypeOption,
    WeightsOption,
)
from ntkit.cli.terminal import Terminal, in_plain_words, needs_report, print_table, say
from ntkit.errors import InputError

if TYPE_CHECKING:
    from ntkit.kernel.empirical import TangentKernel

app = typer.Typer(
    help="The tangent kernel of a PyTorch network: exact, fast, and what it says about the network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(active.app, name="active")
app.command()(finetuning.probe)
app.command()(finetuning.rank_backbones)
app.command()(condense.condense)
app.command()(svm.svm)
app.command()(twosample.twosample)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """The tangent kernel of a PyTorch network: exact, fast, and what it says about the network."""
    if version:
        import ntkit

        typer.echo(ntkit.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for index.html and results.json.")] = Path("report"),
    force: ForceOption = False,
) -> None:
    """Train a small network on handwritten digits and show what its kernels say (under 3 minutes on 2 cores)."""
    with in_plain_words(), needs_report():
        from ntkit.report.demo import run_demo
        from ntkit.report.story import summary

        with Terminal() as terminal:
            result = run_demo(out, force=force, listener=terminal)
        print_table(summary(result.study))
        slope = result.convergence.sum_slope
        say(f"pNTK against the full kernel: error ~ width^({slope.value:.2f} ± {slope.standard_error:.2f})")
        say(f"{out / 'index.html'} and results.json written after {result.seconds:.0f} s")


@app.command()
def report(
    factory: FactoryArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.npz",
            help="x_train, y_train, x_test, y_test (or x and y, cut at random). x: floating point or token numbers. "
            "y: class numbers (integers), or floating point targets.",
            show_default=False,
        ),
    ],
    weights: WeightsOption = None,
    readout: Annotated[str, typer.Option(metavar="READOUT", help=READOUT_HELP + " For the regression on all.")] = "sum",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for index.html and results.json.")] = Path(
        "ntkit-report"
    ),
    force: ForceOption = False,
    train: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 10_000,
    test: Annotated[int, typer.Option(help="Test examples at most, drawn at random.")] = 2_000,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of test examples where the file holds x and y alone. Default: 0.2.", show_default=False
        ),
    ] = None,
    compared: Annotated[int, typer.Option(help="Most examples of which the full kernel is computed.", min=2)] = 160,
    seed: SeedOption = 0,
    dtype: TypeOption = "float32",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Working space for a kernel, beside the matrix.")] = "1GB",
) -> None:
    """Study the kernels of your own network on your own data, as built and with trained weights; writes a page."""
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)  # before torch is imported
        from ntkit.report.inputs import Cut, load_factory, parse_bytes, parse_dtype, parse_readout
        from ntkit.report.own import Own, run_report
        from ntkit.report.story import summary

        own = Own(
            factory=load_factory(factory),
            data=data,
            weights=weights,
            kind=parse_readout(readout, seed=seed),
            cut=Cut(train, test, test_share, seed),
            compared=compared,
            dtype=parse_dtype(dtype),
            memory=parse_bytes(memory),
        )
        with Terminal() as terminal:
            result = run_report(out, own, force=force, listener=terminal)
        print_table(summary(result.study))
        say(f"{out / 'index.html'} and results.json written after {result.seconds:.0f} s")


@app.command()
def paths(
    factory: FactoryArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.npz",
            help="x_train, y_train, x_test, y_test (or x and y, cut at random); y: class numbers.",
            show_default=False,
        ),
    ],
    weights: WeightsOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for index.html, results.json and paths.npz.")] = Path(
        "paths"
    ),
    force: ForceOption = False,
    steps: Annotated[int, typer.Option(help="Batches to train for.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Examples of a batch.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of SGD with momentum 0.9, or of Adam.")] = 0.05,
    adam: Annotated[bool, typer.Option("--adam", help="Train with Adam instead of SGD.")] = False,
    probes: Annotated[int, typer.Option(help="Training examples that are watched, at most.", min=2)] = 1000,
    train: Annotated[int, typer.Option(help="Training examples at most, drawn at random.")] = 10_000,
    test: Annotated[int, typer.Option(help="Test examples at most, drawn at random.")] = 2_000,
    seed: SeedOption = 0,
) -> None:
    """Train your own network and watch how it learns: paths, easy to hard, doubtful labels, the kernel in motion.

    A killed command goes on where it stopped when it is given again.
    """
    with in_plain_words(), needs_report():
        from ntkit.report.files import check_folder

        check_folder(out, force=force)
        import torch

        from ntkit.report.inputs import Cut, load_factory
        from ntkit.report.learning import Learning, run_paths

        own = Learning(
            factory=load_factory(factory), data=data, weights=weights, cut=Cut(train, test, None, seed), steps=steps,
            batch_size=batch, learning_rate=learning_rate, adam=adam, probes=probes, dtype=torch.float32,
        )  # fmt: skip
        with Terminal() as terminal:
            result = run_paths(out, own, force=force, listener=terminal)
        say(f"test accuracy {100 * float(result.test[-1]):.1f}%")
        say(f"{out / 'index.html'} written after {result.seconds:.0f} s")


@app.command()
def kernel(
    factory: FactoryArgument,
    data: ArrayDataArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="K.npy|K.zarr",
            help="K.npy: computed in memory, for numpy.load. K.zarr: computed tile by tile on disk, past memory; the "
            "same command goes on where a killed run has stopped.",
            show_default=False,
        ),
    ],
    weights: WeightsOption = None,
    readout: Annotated[str, typer.Option(metavar="READOUT", help=READOUT_HELP)] = "logits",
    trace: TraceOption = False,
    rows: RowsOption = None,
    cols: ColsOption = None,
    force: ForceOption = False,
    seed: SeedOption = 0,
    dtype: TypeOption = "float32",
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    workers: Annotated[
        int | None,
        typer.Option(help="K.zarr: so many processes, with --memory for all together.", show_default=False, min=1),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="K.zarr: on the workers of this Dask scheduler (tcp://host:8786), or on a cluster started here "
            "(local, with --workers).",
            show_default=False,
        ),
    ] = None,
    disk_type: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="K.zarr: float16, float32 or float64. Default: --dtype.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what it would take and what else could be done, from speeds measured on a few examples; writes "
            "nothing.",
        ),
    ] = False,
) -> None:
    """Compute a kernel matrix and save it; rows are example-major (row n*K + k is scalar k of example n)."""
    with in_plain_words():
        from ntkit.report.disk import Disk, free_bytes

        disk = Disk.parse(out, workers=workers, dask=dask, dtype=disk_type, force=force, dry_run=dry_run)
        terminal = Terminal()
        found = _kernel(factory, data, weights, readout, trace, rows, cols, seed, dtype, device, memory, terminal)
        start = time.perf_counter()
        if dry_run:
            said = None if disk is None else disk.forecast(found)
            typer.echo(str(said or found.plan()))
            if found.symmetric:
                from ntkit.solve.outlook import outlook
                from ntkit.solve.pace import measure_pace

                crowd = 1 if said is None else said.workers
                # workers elsewhere have processors of their own
                pace = None if dask in {None, "local"} else measure_pace(found, size=4096)
                typer.echo()
                typer.echo(str(outlook(found, disk=free_bytes(out), workers=crowd, pace=pace)))
            return
        with terminal:
            terminal.step("computing the kernel")
            if disk is None:
                _save_array(out, found)
            else:
                disk.save(found, terminal.part)
        stored = dtype if disk_type is None else disk_type
        say(f"{out}: {found.shape[0]:,} x {found.shape[1]:,} {stored}, {time.perf_counter() - start:.1f} s")


def _save_array(out: Path, found: TangentKernel) -> None:
    import numpy as np

    from ntkit.report.files import replacing

    matrix = found.dense().cpu().numpy()
    with replacing(out) as file:
        np.save(file, matrix)


@app.command()
def plan(
    factory: FactoryArgument,
    data: ArrayDataArgument,
    weights: WeightsOption = None,
    readout: Annotated[str, typer.Option(metavar="READOUT", help=READOUT_HELP)] = "logits",
    trace: TraceOption = False,
    rows: RowsOption = None,
    cols: ColsOption = None,
    seed: SeedOption = 0,
    dtype: TypeOption = "float32",
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    examples: Annotated[
        int | None,
        typer.Option(help="Plan for so many examples like those of the file.", show_default=False, min=1),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that everything together may take. Default: three quarters of this machine's.",
            show_default=False,
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk that may be used. Default: any.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share this machine.", min=1)] = 1,
    size: Annotated[int, typer.Option("--features", metavar="D", help="Sketched features.", min=1)] = 4096,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="What a solve with a preconditioner is taken to need, and seven times as many without. Default: 200.",
            show_default=False,
            min=1,
        ),
    ] = None,
    times: Annotated[bool, typer.Option(help="Measure speeds on a few examples, and say how long it takes.")] = True,
) -> None:
    """Say what a kernel, a regression with it and its spectrum would take: time, memory, disk, how and why.

    Every way is listed, in memory, on disk, by products alone and by features, which of them fit, and which to take.
    Speeds are measured on a few examples (--no-times leaves that out); nothing large is computed.
    """
    with in_plain_words():
        measured = times and cols in {None, rows}
        limits = _limits(ram, disk, workers, iterations, measured=measured)
        found = _kernel(factory, data, weights, readout, trace, rows, cols, seed, dtype, device, memory, None)
        typer.echo(str(found.plan(examples)))
        if measured:
            from ntkit.solve.outlook import outlook

            typer.echo()
            typer.echo(str(outlook(found, examples=examples, size=size, **limits)))


def _limits(
    ram: str | None, disk: str | None, workers: int, iterations: int | None, *, measured: bool
) -> dict[str, Any]:
    """What a machine offers, for `outlook`.

    Raises:
        InputError: if nobody would look at it.
    """
    from ntkit.report.inputs import parse_bytes

    if not measured and (workers != 1 or any(given is not None for given in (ram, disk, iterations))):
        raise InputError(
            "--ram, --disk, --workers and --iterations belong to the times, which are measured for the kernel of the "
            "rows with themselves: leave --cols and --no-times out"
        )
    memory, room = (None if size is None else parse_bytes(size) for size in (ram, disk))
    assumed = {} if iterations is None else {"iterations": iterations}
    return {"memory": memory, "disk": room, "workers": workers, **assumed}


def _kernel(
    factory: str,
    data: Path,
    weights: Path | None,
    readout: str,
    trace: bool,
    rows: str | None,
    cols: str | None,
    seed: int,
    dtype: str,
    device: str,
    memory: str | None,
    terminal: Terminal | None,
) -> TangentKernel:
    from ntkit.kernel.empirical import TangentKernel
    from ntkit.report.inputs import (
        count_outputs,
        load_examples,
        load_factory,
        load_weights,
        parse_bytes,
        parse_device,
        parse_dtype,
        parse_readout,
    )
    from ntkit.tangent.linearize import linearize

    kind, precision, place = parse_readout(readout, seed=seed), parse_dtype(dtype), parse_device(device)
    budget = None if memory is None else parse_bytes(memory)
    model = load_factory(factory).build(seed=seed, dtype=precision)
    if weights is not None:
        load_weights(model, weights)
    x = load_examples(data, rows, precision)
    other = None if cols is None or cols == rows else load_examples(data, cols, precision)
    count_outputs(model, x)
    return TangentKernel(
        linearize(model.to(place), readout=kind.readout),
        x,
        other,
        trace=trace or kind.trace,
        memory=budget,
        progress=None if terminal is None else terminal.part,
    )
