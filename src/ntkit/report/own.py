"""The report on a user's own network and data: the same study as the demonstration, without its training."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ntkit.errors import InputError
from ntkit.report.files import as_json, check_folder, write_folder
from ntkit.report.inputs import Cut, Factory, load_data, load_weights, make_task
from ntkit.report.page import render
from ntkit.report.pictures import thumbnail
from ntkit.report.provenance import provenance
from ntkit.report.story import Subject, page
from ntkit.report.words import score
from ntkit.uses.study import FIRST, FULL, PSEUDO, TRACE, Effort, Kind, Listener, Silence, Study, study

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ntkit.uses.study import Task

BUILT, WEIGHTED = "as built", "with the given weights"
# Rows of the largest system that is solved: 16 bytes for each entry of a square of them is 3.2 GB.
LARGEST = 14_000
# Working space for a kernel: with it 10,000 examples stay under 4 GB in all.
WORKING = 10**9


@dataclass(frozen=True)
class Own:
    """What a user wants a report on.

    Attributes:
        factory: makes the network.
        data: `.npz` file.
        weights: file of trained weights; None for the network as it is built, alone.
        kind: the kernel whose regression uses all examples.
        cut: how many examples are used.
        compared: most examples of which the full kernel is computed.
        dtype: of the network and the kernels.
        memory: bytes of working space for computing a kernel, beside the matrix itself.
    """

    factory: Factory
    data: Path
    weights: Path | None = None
    kind: Kind = PSEUDO
    cut: Cut = field(default_factory=Cut)
    compared: int = 160
    dtype: torch.dtype = torch.float32
    memory: int = WORKING


@dataclass(frozen=True)
class OwnResult:
    """What the report found.

    Attributes:
        factory: as the user wrote it.
        data: how the file was used.
        study: the kernels.
        seconds: all of it.
        made: versions and the machine.
    """

    factory: str
    data: str
    study: Study
    seconds: float
    made: dict[str, str] = field(default_factory=provenance)


def run_report(folder: Path, own: Own, *, force: bool = False, listener: Listener | None = None) -> OwnResult:
    """Study a user's network and write index.html and results.json into a folder.

    Args:
        folder: is made; it may exist only with `force`, and then only those two files in it are replaced.
        own: the network and its data.
        force: see above.
        listener: is told what is being done.

    Raises:
        InputError: if anything the user named cannot be used; nothing has been computed then.
        ModelError: if the network has no tangent kernel on the data.

    Cost: for 10,000 training examples and one kernel per pair, 2 GB beside the data, and about 20 seconds of solving
        per
    state beside the kernels themselves.
    """
    listener = listener or Silence()
    check_folder(folder, force=force)
    start = time.perf_counter()
    states: dict[str, nn.Module] = {BUILT: own.factory.build(seed=own.cut.seed, dtype=own.dtype)}
    if own.weights is not None:
        model = own.factory.build(seed=own.cut.seed, dtype=own.dtype)
        load_weights(model, own.weights)
        states[WEIGHTED] = model
    data = load_data(own.data, own.cut, own.dtype)
    task = make_task(states[BUILT], data)
    _check_kind(own.kind, task)
    reduced = [PSEUDO, TRACE, FIRST]
    if own.kind not in (FULL, *reduced):
        reduced.append(own.kind)
    effort = Effort(
        compared=own.compared,
        reduced=tuple(reduced),
        fitted=tuple({kind.label: kind for kind in (PSEUDO, TRACE, own.kind) if kind != FULL}.values()),
        main=(own.kind,),
        memory=own.memory,
    )
    generator = torch.Generator().manual_seed(own.cut.seed)
    found = study(states, task, effort=effort, generator=generator, listener=listener)
    listener.step("writing the page")
    result = OwnResult(own.factory.spec, data.said, found, time.perf_counter() - start)
    text = render(page(_subject(own, result, task), found, task))
    result = replace(result, seconds=time.perf_counter() - start)
    write_folder(folder, {"index.html": text, "results.json": as_json(result)}, force=force)
    return result


def _check_kind(kind: Kind, task: Task) -> None:
    kind.readout.scalars(torch.zeros(1, task.outputs))  # refuses an output that the network does not have
    rows = len(task.x_train) * (task.outputs if kind == FULL else 1)
    if rows > LARGEST:
        what = f"{len(task.x_train):,} examples" + (f" x {task.outputs} outputs" if kind == FULL else "")
        raise InputError(
            f"the regression would have {rows:,} rows ({what}), more than {LARGEST:,}: use fewer examples with --train "
            f"{LARGEST // max(1, rows // len(task.x_train))}" + (", or another --readout" if kind == FULL else "")
        )


def _subject(own: Own, result: OwnResult, task: Task) -> Subject:
    facts = result.study
    last = facts.states[-1]
    image = thumbnail(task.x_train[0]) is not None
    weights = (
        f"; {last.name} ({own.weights.name}) it reaches"
        if own.weights is not None
        else "; as the factory returns it, it reaches"
    )
    outputs = "one output" if facts.outputs == 1 else f"{facts.outputs} outputs"
    return Subject(
        title=f"What the tangent kernel says about {own.factory.name}",
        lead=f"The network of {own.factory.spec} has {facts.parameters:,} parameters and {outputs}"
        f"{weights} a test {facts.score_name} of {score(facts, last.test_score)}. Data: {result.data}.",
        made=(
            f"The network is put into evaluation mode and computed in {str(own.dtype).removeprefix('torch.')}; all "
            f"solves are in float64. The factory was called with torch's generator seeded by {own.cut.seed}; every "
            "other random choice follows from the same seed.",
            f"The full kernel and all comparisons use the first {facts.compared:,} training examples "
            f"({facts.compared * facts.outputs:,} rows); the regression with the {own.kind.label} kernel uses all "
            f"{facts.train_examples:,}.",
            f"Computed in {result.seconds:.0f} seconds by {', '.join(f'{k} {v}' for k, v in result.made.items())}.",
        ),
        thing="image" if image else "example",
    )
