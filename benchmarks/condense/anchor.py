"""The published curve: 100 images that stand for CIFAR-10, with the kernel of one hidden layer of infinite width.

    NTKIT_DATA=... python -m benchmarks.condense.anchor --folder work [--data jpeg lossless augmented] [--seeds 2]

Labels are not learned, pixels are standardised by channel, Adam with a rate of 0.04, class-balanced batches of 5,000
targets, ridge 1e-6 tr(K_ss) / n. Published (authors' notebook, seed 1): test accuracy 0.2426 at the start, 0.4141 at
step 20, 0.4544 at 100, 0.4623 at 200, 0.4674 at 300. A killed run goes on where it stopped.

"jpeg" has all 50,000 targets and 10,000 test images, recompressed. "lossless" has exact pixels of the first 4,000
training images alone: 3,500 targets and 500 test images, so that a batch is all there are. "augmented" is the same with
half of the targets of every batch turned left to right, and all of them moved by up to two pixels. Test images are
watched and choose nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.condense import kernels
from benchmarks.scale.data import Images, cifar10_jpeg, cifar10_lossless
from benchmarks.scale.record import record
from ntkit.uses import condense

NAMES = ("jpeg", "lossless", "augmented")
RECORDS = Path(__file__).parent / "records"
STEPS = (20, 100, 200, 300)
PUBLISHED = {0: 0.2426, 20: 0.4141, 100: 0.4544, 200: 0.4623, 300: 0.4674}
# Of 4,000 exact images the last 500 are the test.
LOSSLESS = 3500


def images(name: str) -> Images:
    return cifar10_jpeg() if name == "jpeg" else cifar10_lossless(LOSSLESS)


def one(data: Images, seed: int, steps: int, folder: Path, *, augmented: bool = False) -> condense.Condensed:
    """One run."""
    generator = torch.Generator().manual_seed(seed)
    train, kernel = (data.x_train, data.y_train), kernels.fc1(data.x_train[0].numel())
    return condense.kernel_inducing_points(
        kernel, condense.random_support(train, 10, generator=generator), train, generator=generator,
        settings=condense.Inducing(
            steps=steps, record=[step for step in STEPS if step <= steps],
            augment=(condense.Flip(), condense.Shift(2)) if augmented else (),
        ),
        held_out=(data.x_test, data.y_test), folder=folder,
        progress=lambda done, total: print(f"\rseed {seed}: {done} of {total}", end="", flush=True),
    )  # fmt: skip


def ceiling(data: Images) -> float:
    """Test accuracy of the same kernel with all targets (4,000 or fewer) as its support."""
    support = condense.Support(data.x_train.double(), condense.centred(data.y_train, 10))
    return condense.fit(kernels.fc1(data.x_train[0].numel()), support).score((data.x_test, data.y_test)).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    for name in options.data:
        data = images(name)
        runs: list[dict[str, Any]] = []
        for seed in range(1, options.seeds + 1):
            found = one(
                data, seed, options.steps, options.folder / f"anchor-{name}-{seed}", augmented=name == "augmented"
            )
            print()
            keys = ("step", "accuracy", "loss", "ridge", "condition")
            # a loss that is not there (before the first step) is no number in JSON
            batch = [None if r.step == 0 else round(r.batch_loss, 6) for r in found.records]
            columns = {key: [float(f"{getattr(r, key):.6g}") for r in found.records] for key in keys}
            runs.append({"seed": seed, **columns, "step": [r.step for r in found.records], "batch_loss": batch})
            facts = {
                "data": data.name, "targets": len(data.x_train), "test": len(data.x_test), "points": 100,
                "kernel": "infinite width, one hidden ReLU layer, weight_std sqrt 2, bias_std 0.1",
                "precision": "float64",
            }  # fmt: skip
            if name == "lossless":
                facts["all_targets_as_support"] = ceiling(data)
            record(f"anchor-{name}", {**facts, "runs": runs}, RECORDS)


if __name__ == "__main__":
    main()
