"""The demonstration: a small network learns digits in seconds, and its kernels are studied before and after.

Everything it takes is bundled with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ntkit.report.files import as_json, check_folder, write_folder
from ntkit.report.page import render
from ntkit.report.provenance import provenance
from ntkit.report.story import Subject, page
from ntkit.report.words import percent
from ntkit.uses.convergence import Convergence, convergence
from ntkit.uses.digits import CLASSES, digits, small_cnn, train
from ntkit.uses.study import FIRST, PSEUDO, TRACE, Effort, Listener, Silence, Study, Task, random_signs, study

if TYPE_CHECKING:
    from pathlib import Path

BEFORE, AFTER = "at initialisation", "after training"


@dataclass(frozen=True)
class Demo:
    """The sizes of the demonstration.

    Attributes:
        channels: of the first two convolutions; the third has twice as many.
        epochs: of training.
        learning_rate: of training, at its start.
        batch: images per training step.
        train: training images, of 1,297.
        test: test images, of 500.
        compared: images of which the full kernel is computed.
        sampled: images on which fidelity is measured.
        widths: of the perceptrons whose kernels are compared.
        seeds: networks of each width.
        width_examples: images in that comparison.
        seed: of everything else.
    """

    channels: int = 24
    epochs: int = 30
    learning_rate: float = 0.05
    batch: int = 32
    train: int = 1297
    test: int = 500
    compared: int = 160
    sampled: int = 32
    widths: tuple[int, ...] = (64, 128, 256, 512)
    seeds: tuple[int, ...] = (0, 1, 2)
    width_examples: int = 24
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        demo: its sizes.
        study: the kernels before and after training.
        convergence: of the pNTK with width.
        losses: mean training loss of each epoch.
        seconds: all of it.
        made: versions and the machine.
    """

    demo: Demo
    study: Study
    convergence: Convergence
    losses: tuple[float, ...]
    seconds: float
    made: dict[str, str] = field(default_factory=provenance)


def run_demo(
    folder: Path, *, force: bool = False, demo: Demo | None = None, listener: Listener | None = None
) -> DemoResult:
    """Run the demonstration and write index.html and results.json into a folder.

    Args:
        folder: is made; it may exist only with `force`, and then only those two files in it are replaced.
        force: see above.
        demo: other sizes than the usual ones.
        listener: is told what is being done.

    Raises:
        InputError: if the folder cannot be used; nothing has been computed then.

    Cost: under three minutes on two cores, under 2 GB.
    """
    demo, listener = demo or Demo(), listener or Silence()
    check_folder(folder, force=force)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(demo.seed)
    data = digits(generator)
    task = Task(
        data.x_train[: demo.train],
        data.y_train[: demo.train],
        data.x_test[: demo.test],
        data.y_test[: demo.test],
        CLASSES,
    )
    fresh = small_cnn(generator, channels=demo.channels)
    listener.step(f"training a small network on {len(task.x_train):,} digits")
    trained = copy.deepcopy(fresh)
    losses = train(
        trained,
        task.x_train,
        task.y_train,
        generator=generator,
        epochs=demo.epochs,
        learning_rate=demo.learning_rate,
        batch=demo.batch,
        tell=listener.part,
    )
    signs = random_signs(4, generator)
    effort = Effort(
        compared=demo.compared,
        sampled=demo.sampled,
        reduced=(PSEUDO, TRACE, FIRST, signs),
        fitted=(PSEUDO, TRACE, FIRST),
        main=(PSEUDO, TRACE),
    )
    found = study({BEFORE: fresh, AFTER: trained}, task, effort=effort, generator=generator, listener=listener)
    listener.step("full kernel and pNTK of wider and wider networks")
    wider = convergence(
        task.x_train[: demo.width_examples], outputs=CLASSES, widths=demo.widths, seeds=demo.seeds, tell=listener.part
    )
    listener.step("writing the page")
    result = DemoResult(demo, found, wider, tuple(losses), time.perf_counter() - start)
    text = render(page(_subject(result), found, task, wider))
    result = replace(result, seconds=time.perf_counter() - start)
    write_folder(folder, {"index.html": text, "results.json": as_json(result)}, force=force)
    return result


def _subject(result: DemoResult) -> Subject:
    demo, facts = result.demo, result.study
    last = facts.states[-1]
    return Subject(
        title="What the tangent kernel says about a small network that reads digits",
        lead=f"A convolutional network with {facts.parameters:,} parameters learns to read handwritten digits (8 x 8 "
        f"pixels, {facts.train_examples:,} for training, {facts.test_examples:,} for the test) and gets "
        f"{percent(last.test_score)} of the test images right. Its tangent kernel is computed exactly before and "
        "after, and compared with its cheap stand-ins.",
        made=(
            "Data: the 1,797 digits that come with scikit-learn, pixels in [0, 1], cut at random. Network: three "
            f"convolutions ({demo.channels}, {demo.channels} and {2 * demo.channels} channels, ReLU, average "
            "pooling) and a linear layer, He initialisation, no normalization. Training: cross-entropy, SGD with "
            f"momentum 0.9, learning rate {demo.learning_rate} falling to zero, batches of {demo.batch}, "
            f"{demo.epochs} epochs, no weight decay; the loss fell from {result.losses[0]:.2f} to "
            f"{result.losses[-1]:.3f}.",
            f"The full kernel and all comparisons use the first {facts.compared:,} training images "
            f"({facts.compared * facts.outputs:,} rows), the distances {demo.sampled} random images of all, the "
            f"regressions on all images the {facts.train_examples:,} x {facts.train_examples:,} kernels. Kernels are "
            f"computed in float32, all solves are in float64. Every random choice follows from seed {demo.seed}.",
            f"Computed in {result.seconds:.0f} seconds by {', '.join(f'{k} {v}' for k, v in result.made.items())}.",
        ),
        thing="image",
        cross_entropy=True,
    )
