"""Forms that a sketch of gradients could take: error and work of each, at D = 4,096, one thread.

    NTKIT_DATA=... python -m benchmarks.scale.sketch_forms

The library's own sketch, by forming rows and with leading directions, by which it forms none; products of two small
random projections, U^T G V, which never form a gradient; TensorSketch, Fourier transforms of counts of both sides of
every position; and a dense Gaussian map. All are of the pNTK. Parameters of at most D entries are kept as they are by
all of them (but for the dense map), so that only the large ones differ. The error is that of the sketched kernel of
some examples to their exact one, in the Frobenius norm, over random maps.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkit
from benchmarks.scale.data import cifar10_lossless
from benchmarks.scale.record import record
from benchmarks.workloads import WORKLOADS
from ntkit.tangent.derivatives import Derivatives
from ntkit.tangent.factors import Convolution, Factor, Outer
from ntkit.tangent.leading import Leading
from ntkit.tangent.sketch import Sketch

SIZE = 4096
# How many projections of the cotangents' side, and so many of the inputs' side that their product is D.
SPLITS = ((16, 256), (32, 128), (64, 64), (128, 32))
# Examples and random maps; fewer maps of TensorSketch, which takes longest. Dense maps cost nothing.
EXAMPLES = {"W2": 32, "W3": 12}
MAPS, SLOW_MAPS, DENSE_MAPS = {"W2": 60, "W3": 24}, {"W2": 20, "W3": 10}, 200
# Directions that the sketch keeps, and the examples, others than the compared ones, that they are of.
RANK, LOOKED_AT = 8, 16
# Training on the first images of CIFAR-10.
TRAINED_ON, STEPS, BATCH = 3200, 100, 64

Form = Callable[[Outer, torch.Generator], Tensor]


def gaussian(height: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(height, width, generator=generator) / math.sqrt(width)


def signs(height: int, width: int, generator: torch.Generator) -> Tensor:
    return (torch.randint(2, (height, width), generator=generator) * 2.0 - 1.0) / math.sqrt(width)


def split_of(first: int, outputs: int, inputs: int, size: int = SIZE) -> tuple[int, int]:
    """Projections of each side: a side is kept whole where it is no longer, and what it leaves goes to the other."""
    first = min(first, outputs)
    second = min(size // first, inputs)
    return first, second


def product(first: int, draw: Callable[[int, int, torch.Generator], Tensor] = gaussian, size: int = SIZE) -> Form:
    """U^T (sum_t g_t a_t^T) V as sum_t (U^T g_t) (V^T a_t)^T."""

    def form(factor: Outer, generator: torch.Generator) -> Tensor:
        g, a = sides(factor)
        counts = split_of(first, g.shape[2], a.shape[2], size)
        left, right = (
            side if side.shape[2] <= count else side @ draw(side.shape[2], count, generator)
            for side, count in zip((g, a), counts, strict=True)
        )
        found = (left.mT @ right).flatten(1)
        return F.pad(found, (0, size - found.shape[1]))

    return form


def tensor_sketch(size: int = SIZE) -> Form:
    """Entry (o, i) goes to bucket h(o) + h(i) with sign s(o) s(i), by Fourier transforms of every position's sides."""

    def form(factor: Outer, generator: torch.Generator) -> Tensor:
        g, a = sides(factor)
        drawn = [drawn_counts(side.shape[2], size, generator) for side in (g, a)]
        found = []
        for example in range(len(g)):
            waves = []
            for side, (bucket, sign) in zip((g, a), drawn, strict=True):
                counted = side.new_zeros(side.shape[1], size)
                waves.append(torch.fft.rfft(counted.index_add_(1, bucket, side[example] * sign)))
            found.append(torch.fft.irfft((waves[0] * waves[1]).sum(0), n=size))
        return torch.stack(found)

    return form


def drawn_counts(length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Buckets and signs of one side."""
    return torch.randint(size, (length,), generator=generator), signs(length, 1, generator)[:, 0]


def sides(factor: Outer) -> tuple[Tensor, Tensor]:
    """Cotangents (n, t, o) and inputs (n, t, i) of every position, for one scalar and one group."""
    return factor.cotangents[:, 0, 0], factor.inputs[:, 0]


def outer(factor: Factor) -> Outer:
    """Inputs and cotangents of every position, convolutions unfolded."""
    found = factor.outer() if isinstance(factor, Convolution) else factor
    assert isinstance(found, Outer)
    return found


def cut(found: Derivatives, size: int = SIZE) -> tuple[Derivatives, Derivatives]:
    """The parameters that every form keeps as they are, and the large ones."""
    small = {part: factor for part, factor in found.factors.items() if math.prod(factor.shape) <= size}
    large = {part: factor for part, factor in found.factors.items() if part not in small}
    return Derivatives(found.outputs, small), Derivatives(found.outputs, large)


def features(form: Form, found: Derivatives, maps: int, size: int = SIZE) -> list[Tensor]:
    """Features (n, D) of several random maps; a part is unfolded once for all of them."""
    small, large = cut(found, size)
    made = [Sketch(size, seed).of(small)[:, 0] for seed in range(maps)]
    for number, factor in enumerate(large.factors.values()):
        unfolded = outer(factor)
        for seed, total in enumerate(made):
            total += form(unfolded, torch.Generator().manual_seed(1000 * seed + number))
    return made


def errors(made: list[Tensor], exact: Tensor) -> dict[str, Any]:
    """Root mean square of the relative error over maps, with the standard error of that."""
    squares = torch.stack([(phi.double() @ phi.double().T - exact).square().sum() for phi in made])
    squares /= exact.square().sum()
    root = float(squares.mean().sqrt())
    return {
        "error": root,
        "standard_error": float(squares.std()) / math.sqrt(len(made)) / (2 * root),
        "maps": len(made),
    }


def dense(exact: Tensor, maps: int, size: int = SIZE) -> list[Tensor]:
    """Features of a dense Gaussian map, which depend on the gradients through their inner products alone."""
    values, vectors = torch.linalg.eigh(exact)
    root = vectors * values.clamp_min(0).sqrt()
    return [
        root @ gaussian(len(exact), size, torch.Generator().manual_seed(seed)).to(exact.dtype) for seed in range(maps)
    ]


def expected_dense(exact: Tensor, size: int = SIZE) -> float:
    """The same by its formula."""
    diagonal = exact.diagonal()
    return float(((torch.outer(diagonal, diagonal) + exact.square()).sum() / size).sqrt() / exact.norm())


def leading_share(found: Derivatives) -> float:
    """How much of the large gradients' squared length their largest singular values have: 1 if they are of rank one."""
    leading = total = 0.0
    for factor in cut(found)[1].factors.values():
        for example in range(factor.examples):
            matrix = factor.narrow(example, example + 1).rows().flatten(0, 2).flatten(1).double()
            values = torch.linalg.eigvalsh(matrix @ matrix.T)
            leading, total = leading + float(values[-1]), total + float(values.sum())
    return leading / total


def mflop(found: Derivatives) -> dict[str, float]:
    """Counted work for the large parameters of one example, in MFLOP; a Fourier transform as 5/2 D log2 D."""
    transform = 2.5 * SIZE * math.log2(SIZE)
    works = [outer(factor.narrow(0, 1)).work for factor in cut(found)[1].factors.values()]
    counted = {
        "ours": sum(2 * (w.positions + 1) * w.row_size for w in works),
        # two transforms of a position, and half as many complex products as there are numbers
        "TensorSketch": sum(w.positions * (2 * (w.inputs + w.outputs) + 2 * transform + 4 * SIZE) for w in works),
    }
    counted["ours, leading directions"] = sum(
        2 * w.positions * (w.outputs * p + w.inputs * q + p * q)
        for w in works
        for p, q in [split_of(math.isqrt(SIZE), w.outputs, w.inputs)]
    )
    for first, second in SPLITS:
        total = 0
        for w in works:
            p, q = split_of(first, w.outputs, w.inputs)
            projecting = (p < w.outputs) * w.outputs * p + (q < w.inputs) * w.inputs * q
            total += 2 * w.positions * (projecting + p * q)
        counted[f"product {first} x {second}"] = total
    return {name: value / 1e6 for name, value in counted.items()}


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of one thread, the better of two."""
    taken = []
    for _ in range(2):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def compare(name: str, what: str, model: nn.Module, x: Tensor, others: Tensor) -> dict[str, Any]:
    """All forms on one network and its examples; leading directions are those of others."""
    tangent = ntkit.linearize(model.eval(), readout=ntkit.SumOfLogits())
    with torch.no_grad():
        found = tangent.derivatives(tangent.examples(x))
        exact = found.gram(found).double()
        _, large = cut(found)
        maps, work = MAPS[name], mflop(found)
        leading = Leading.of(tangent, others, rank=RANK, examples=LOOKED_AT, generator=torch.Generator().manual_seed(0))

        def said(form: Form, count: int) -> dict[str, Any]:
            milliseconds = cpu_seconds(
                lambda: [form(outer(factor), torch.Generator()) for factor in large.factors.values()]
            )
            return {**errors(features(form, found, count), exact), "cpu_ms_an_example": 1e3 * milliseconds / len(x)}

        forms = {
            "ours": {
                **errors([Sketch(SIZE, seed).of(found)[:, 0] for seed in range(maps)], exact),
                "cpu_ms_an_example": 1e3 * cpu_seconds(lambda: Sketch(SIZE, 0).of(large)) / len(x),
            },
            "ours, leading directions": {
                **errors([Sketch(SIZE, seed, leading=leading).of(found)[:, 0] for seed in range(maps)], exact),
                "cpu_ms_an_example": 1e3 * cpu_seconds(sketching(leading, large)) / len(x),
            },
            "TensorSketch": said(tensor_sketch(), SLOW_MAPS[name]),
            **{f"product {first} x {second}": said(product(first), maps) for first, second in SPLITS},
            "product 64 x 64 of signs": said(product(64, signs), maps),
        }
        for kind, facts in forms.items():
            facts["mflop_an_example"] = work[kind.removesuffix(" of signs")]
        forms["dense Gaussian"] = errors(dense(exact, DENSE_MAPS), exact)
        return {
            "network": name, "what": what, "examples": len(x), "parameters": tangent.count,
            "share_of_the_largest_singular_value": leading_share(found),
            "error_dense_gaussian_expected": expected_dense(exact), "forms": forms,
        }  # fmt: skip


def sketching(leading: Leading, found: Derivatives) -> Callable[[], object]:
    """The library's sketch of a batch, with the projections drawn beforehand, once for all batches."""
    sketch = Sketch(SIZE, 0, leading=leading)
    sketch.of(found)
    return lambda: sketch.of(found)


def train(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """A short training by cross-entropy; the share of the last batches' images that were right."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-3)
    generator, right = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        outputs = model(x[batch])
        F.cross_entropy(outputs, y[batch]).backward()
        optimizer.step()
        right.append(float((outputs.argmax(1) == y[batch]).double().mean()))
    model.eval()
    return sum(right[-10:]) / 10


def random_images(name: str) -> tuple[Tensor, Tensor]:
    """Those that are compared, and others."""
    few = EXAMPLES[name]
    images = WORKLOADS[name].data(few + LOOKED_AT)
    return images[:few], images[few:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    data = cifar10_lossless(TRAINED_ON)
    model, images = WORKLOADS["W2"].model(), data.x_test[: EXAMPLES["W2"] + LOOKED_AT].clone().split(EXAMPLES["W2"])
    cases = [compare("W2", "random images, as built", model, *random_images("W2"))]
    cases.append(compare("W2", "CIFAR-10, as built", model, *images))
    accuracy = train(model, data.x_train, data.y_train)
    cases.append(compare("W2", f"CIFAR-10, after {STEPS} steps", model, *images))
    cases.append(compare("W3", "random images, as built", WORKLOADS["W3"].model(), *random_images("W3")))
    found = {
        "what": f"forms of a sketch of the pNTK's gradients, D = {SIZE:,}: error over random maps, and work",
        "training": {"images": TRAINED_ON, "steps": STEPS, "batch": BATCH, "accuracy_of_the_last_batches": accuracy},
        "cpu_seconds": round(time.process_time() - start, 1),
        "cases": cases,
    }
    print(record("sketch-forms", found).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
