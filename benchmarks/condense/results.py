"""From records to the tables and pictures of the page on condensation.

python -m benchmarks.condense.results                                         prints the tables
python -m benchmarks.condense.results --folder work --pictures docs/pictures  draws the pictures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.condense.anchor import PUBLISHED, RECORDS
from benchmarks.condense.fashion import METHODS, STEPS, generator
from ntkit.uses import condense

DATA = {"jpeg": "CIFAR-10 (JPEG q75), 50,000 targets", "lossless": "first 4,000 of CIFAR-10, 3,500 targets"}
DATA |= {"augmented": "the same, flipped and shifted"}
WORDS = {"random": "random images", "k-means": "k-means centres", "LS": "LS: random images, labels solved"}
WORDS |= {"KIP": "KIP: images learned", "KIP, labels": "KIP: images and labels learned"}


def read_record(name: str) -> dict[str, Any] | None:
    """A record, if it is there."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def curve(name: str) -> dict[int, list[float]]:
    """Test accuracies of all seeds, by step."""
    found = read_record(f"anchor-{name}")
    if found is None:
        return {}
    steps = found["runs"][0]["step"]
    return {step: [run["accuracy"][k] for run in found["runs"]] for k, step in enumerate(steps)}


def anchor_table() -> list[str]:
    """The published curve, and ours for each seed."""
    curves = {name: curve(name) for name in DATA}
    rows = ["| step | published | " + " | ".join(DATA.values()) + " |", "|---" * (len(DATA) + 2) + "|"]
    for step, published in PUBLISHED.items():
        cells = [", ".join(f"{value:.4f}" for value in found.get(step, [])) for found in curves.values()]
        rows.append(f"| {step} | {published:.4f} | " + " | ".join(cells) + " |")
    return rows


def of(kernel: str, key: str, per_class: int, method: str) -> list[float]:
    """A number for every seed."""
    found = read_record(f"fashion-{kernel}")
    lines = [] if found is None else found["lines"]
    return [line[key] for line in lines if (line["per_class"], line["method"]) == (per_class, method)]


def fashion_table(kernel: str = "fc") -> list[str]:
    """Test accuracies: means over the seeds, with standard errors where there are two or more."""
    keys = ["accuracy", "other_draw", "network_accuracy"] if kernel == "conv" else ["accuracy", "network_accuracy"]
    heads = {"accuracy": "kernel", "other_draw": "another draw of it", "network_accuracy": "trained network"}
    rows = ["| images per class | points | " + " | ".join(heads[key] for key in keys) + " | seeds |"]
    rows += ["|---" * (len(keys) + 3) + "|"]
    for per_class in STEPS:
        for method in METHODS:
            values = [of(kernel, key, per_class, method) for key in keys]
            if values[0]:
                cells = " | ".join(_mean(found) for found in values)
                rows.append(f"| {per_class} | {WORDS[method]} | {cells} | {len(values[0])} |")
    return rows


def _mean(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def draw(folder: Path, pictures: Path) -> None:
    """condense_cifar.svg (the curve, and one image of each class) and condense_fashion.svg."""
    import matplotlib.pyplot as plt

    from benchmarks.scale.data import fashion_mnist

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", width_ratios=[1, 1.6])
    for name, colour in (("jpeg", "#2f80ed"), ("lossless", "#e07b00"), ("augmented", "#0f9d8a")):
        for k, values in enumerate(np.array(list(curve(name).values())).T):
            label = DATA[name].replace(", ", ",\n") if k == 0 else None
            left.plot(list(curve(name)), values, color=colour, linewidth=1, label=label)
    left.plot(list(PUBLISHED), list(PUBLISHED.values()), "kx", label="published")
    left.set(xlabel="steps of Adam", ylabel="test accuracy", title="100 images for CIFAR-10")
    left.legend(loc="best", fontsize=7)
    steps = sorted((folder / "anchor-jpeg-1").glob("step-*.safetensors"))
    sets = [condense.load_support(path).x.numpy()[::10] for path in (steps[0], steps[-1])]
    _show(
        right,
        sets,
        ["at the start", f"step {int(steps[-1].stem.split('-')[1])}"],
        "One of the ten images of each class",
    )
    figure.savefig(pictures / "condense_cifar.svg", metadata={"Date": None})

    data = fashion_mnist()
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 5.2), layout="constrained", height_ratios=[3, 2])
    learned = condense.load_support(max((folder / "fc" / "images-1-1").glob("step-*.safetensors")))
    start = condense.load_support(min((folder / "fc" / "images-1-1").glob("step-*.safetensors")))
    centres = condense.centre_support((data.x_train, data.y_train), 1, generator=generator(1, 1))
    sets = [support.x.numpy() for support in (start, centres, learned)]
    _show(left, sets, ["random", "k-means", "learned"], "Fashion-MNIST in one image of each class")
    place = np.arange(len(STEPS))
    for k, method in enumerate(METHODS):
        for key, alpha in (("accuracy", 1.0), ("network_accuracy", 0.45)):
            means = [np.mean(of("fc", key, per_class, method) or [np.nan]) for per_class in STEPS]
            shift = (k - 2) * 0.17 + (0.04 if alpha < 1 else -0.04)
            right.bar(
                place + shift, means, 0.08, color=f"C{k}", alpha=alpha, label=WORDS[method] if alpha == 1 else None
            )
    right.set_xticks(place, [f"{per_class} of each class" for per_class in STEPS])
    right.set(ylim=(0.3, 0.95), title="Test accuracy of the kernel, and (pale) of a network trained on the points")
    right.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(pictures / "condense_fashion.svg", metadata={"Date": None})


def _show(axes: Any, sets: list[np.ndarray], names: list[str], title: str) -> None:
    """Rows of images, each stretched to its own range."""
    rows = []
    for images in sets:
        low, high = (np.quantile(images, q, axis=(1, 2, 3), keepdims=True) for q in (0.01, 0.99))
        stretched = np.clip((images - low) / (high - low), 0, 1)
        framed = np.pad(stretched, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=1)
        rows.append(np.concatenate(list(framed.transpose(0, 2, 3, 1)), 1))
    height = rows[0].shape[0]
    axes.imshow(np.concatenate(rows).squeeze(), cmap="gray", interpolation="none")
    axes.set(xticks=[], yticks=[height * (k + 0.5) for k in range(len(names))], yticklabels=names, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if options.pictures:
        draw(options.folder, options.pictures)
    for rows in (anchor_table(), fashion_table(), fashion_table("cntk"), fashion_table("conv")):
        print("\n".join(rows), end="\n\n")


if __name__ == "__main__":
    main()
