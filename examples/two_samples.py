"""Do two samples of digits differ, and which images make the difference? Every fifth image of the second is noisy.

Writes two_samples.svg into the folder that is given, or into the current one; prints what other tests say, whether two
measurements depend on each other, and which images are outliers.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from ntkit import RBF, Empirical, SumOfLogits, linearize
from ntkit.uses import twosample

generator = torch.Generator().manual_seed(0)
pixels, _ = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16).float().reshape(-1, 1, 8, 8)
images = images[torch.randperm(len(images), generator=generator)]
x, y = images[:200], images[200:400].clone()
y[::5] += 0.3 * torch.randn(y[::5].shape, generator=generator)
centre, scale = torch.cat([x, y]).mean(), torch.cat([x, y]).std()
x, y = (x - centre) / scale, (y - centre) / scale

network = twosample.random_network((1, 8, 8), generator=generator)  # convolutions and global average pooling
kernel = Empirical(linearize(network, readout=SumOfLogits()))
found = twosample.two_sample_test(x, y, kernel=kernel, permutations=999, generator=generator)
print(found, found.power(), sep="\n")
for test in (
    twosample.witness_test(x, y, witness=twosample.ZeroTime(network), generator=generator),
    twosample.witness_test(x, y, witness=twosample.OnlineTraining(network, 1e-4), generator=generator),
    twosample.two_sample_test(x, y, kernel=kernel, statistic=twosample.Block(20), generator=generator),
    twosample.two_sample_test(x, y, kernel=kernel, statistic=twosample.Linear(), generator=generator),
    twosample.rbf_test(x, y, generator=generator),
    twosample.classifier_test(x, y, generator=generator),
):
    print(test)

typical = found.witness[200:].argsort()[:40]  # of the second sample and not of the first
print(f"{int((typical % 5 == 0).sum())} of the 40 images most typical of the second sample are noisy ones")

outliers = twosample.outlier_test(y, images[400:] / scale - centre / scale, kernel=kernel, generator=generator)
clean = torch.arange(200) % 5 != 0
print(f"{outliers}: {int(outliers.flagged()[~clean].sum())} of 40 noisy, {int(outliers.flagged()[clean].sum())} of 160")

upper, lower = x[..., :4, :], x[..., 4:, :]
print(twosample.independence_test(upper, lower, kernel_x=RBF.median(upper), kernel_y=RBF.median(lower),
                                  generator=generator))  # fmt: skip

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
left.hist(found.null, bins=40, color="grey", label="random labels")
left.axvline(found.threshold(), color="black", linestyle="--", label="threshold, level 0.05")
left.axvline(found.statistic, color="tab:orange", label="the samples as they are")
left.set(title=f"MMD with an NTK: p = {found.pvalue:.3f}", xlabel="statistic", yticks=[], xticks=[0, 0.05, 0.1])
left.legend(loc="best", fontsize=8)
groups = {"first sample": found.witness[:200], "second, clean": found.witness[200:][clean],
          "second, noisy": found.witness[200:][~clean]}  # fmt: skip
middle.hist(list(groups.values()), bins=25, stacked=True, label=list(groups))
middle.set(title="Witness of every image", xlabel="like the first  →", yticks=[])
middle.legend(loc="best", fontsize=8)
grid = torch.cat([torch.cat([y[i, 0] for i in row], 1) for row in typical.reshape(4, 10)])
right.imshow(grid.numpy(), cmap="gray_r")
right.set(title="Most typical of the second sample", xticks=[], yticks=[])
figure.savefig(Path(*sys.argv[1:2]) / "two_samples.svg", metadata={"Date": None})
