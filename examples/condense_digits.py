"""Ten images in the place of 1,297: kernel inducing points on handwritten digits, and what they teach a network.

Writes condense_digits.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ntkit.kernel.infinite import InfiniteWidth
from ntkit.uses import condense
from ntkit.uses.digits import digits

generator = torch.Generator().manual_seed(0)
data = digits(generator)
scale = condense.Standardised.fit(data.x_train)  # by the training images alone
train, test = (scale(data.x_train), data.y_train), (scale(data.x_test), data.y_test)
wide = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 1)
)  # at infinite width its width is no matter
kernel = InfiniteWidth(wide, weight_std=2**0.5, bias_std=0.1)

start = condense.random_support(train, per_class=1, generator=generator)
found = condense.kernel_inducing_points(
    kernel, start, train, generator=generator, held_out=test,
    settings=condense.Inducing(steps=100, batch=500, record=range(0, 100, 10)),
)  # fmt: skip
supports = {
    "random images": start,
    "k-means centres": condense.centre_support(train, per_class=1, generator=generator),
    "random images, labels solved": condense.label_solve(kernel, start, train).support,
    "learned images": found.support,
}


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


bars = {}
for name, support in supports.items():
    score = condense.fit(kernel, support).score(test)
    trained = condense.train_network(
        network, support, test, generator=torch.Generator().manual_seed(1), training=condense.Training(steps=300)
    )
    bars[name] = (score.accuracy, trained.accuracy)
    print(f"{name:30} kernel {score.accuracy:.3f} +- {score.standard_error:.3f}   network {trained.accuracy:.3f}")

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(11, 2.9), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1, 1]}
)
images = [scale.inverse(support.x)[:, 0].numpy() for support in (start, supports["k-means centres"], found.support)]
left.imshow(np.concatenate([np.pad(np.concatenate([*row], 1), ((0, 2), (0, 0))) for row in images]), cmap="gray")
left.set(xticks=[], yticks=[4, 14, 24], yticklabels=["random", "k-means", "learned"], title="One image of each digit")
steps = [record.step for record in found.records]
middle.plot(steps, [record.accuracy for record in found.records], ".-")
middle.set(xlabel="steps", title="Test accuracy of the kernel")
for shift, kind in ((0.2, "kernel"), (-0.2, "network")):
    place = [k + shift for k in range(len(bars))]
    right.barh(place, [pair[kind == "network"] for pair in bars.values()], height=0.35, label=kind)
right.set_yticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars])
right.set(xlim=(0.4, 1), title="Test accuracy")
right.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
figure.savefig(Path(*sys.argv[1:2]) / "condense_digits.svg", metadata={"Date": None})
