"""What the exact pNTK of large data sets would take on many GPUs, or on many machines like this one.

    NTKIT_DATA=... python -m benchmarks.scale.clusters

Counts the captures and pairs that the tiles of the largest runs would need, and turns them into time by the seconds
that this machine takes for them, and by FLOPs for GPUs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ntkit
from benchmarks.scale.data import cifar10_jpeg
from benchmarks.scale.record import record
from benchmarks.workloads import WORKLOADS
from ntkit.kernel.forecast import Speeds, forecast, measure
from ntkit.kernel.saved import layout_of

# What a GPU is taken to sustain in float32, and its memory: an assumption.
GPU_FLOPS, GPU_MEMORY = 30e12, 64 * 10**9
WORKERS = (8, 64, 512)


def clusters(kernel: ntkit.TangentKernel, name: str, n: int, speeds: Speeds | None) -> dict[str, Any]:
    """What the exact pNTK of n examples like the kernel's would take."""
    plan = kernel.plan(4096)
    flops_capture, flops_pair = kernel.plan(1).flops, sum(route.flops for route in plan.routes)
    layout = layout_of(kernel, "float32", GPU_MEMORY, (n, n))
    gpu = Speeds(flops_capture / GPU_FLOPS, flops_pair / GPU_FLOPS, "gpu")
    found = forecast(layout, 1, gpu, tiles=layout.tiles(), memory=GPU_MEMORY)
    facts: dict[str, Any] = {
        "network": name, "n": n, "tile": layout.edge[0], "tiles": len(layout.tiles()), "disk_tb": layout.nbytes / 1e12,
        "captures": found.captures, "pairs": found.pairs,
        "gflop_a_capture": flops_capture / 1e9, "mflop_a_pair": flops_pair / 1e6,
        "hours_on_gpus": {g: found.seconds / g / 3600 for g in WORKERS},
    }  # fmt: skip
    if speeds is not None:
        here = forecast(layout, 1, speeds, tiles=layout.tiles(), memory=GPU_MEMORY)
        facts["measured_seconds_a_capture"], facts["measured_seconds_a_pair"] = speeds.capture, speeds.pair
        facts["hours_on_machines_like_this"] = {g: here.seconds / g / 3600 for g in WORKERS}
    return facts


def imagenet_resnet() -> nn.Module:
    """ResNet-18 for ImageNet, with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], embedding_size=64, num_labels=1000
    )
    return ResNetForImageClassification(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    x = cifar10_jpeg().x_train[:1024].clone()
    cnn = ntkit.TangentKernel(ntkit.linearize(WORKLOADS["W2"].model(), readout=ntkit.SumOfLogits()), x, memory=10**9)
    speeds = measure(cnn, layout_of(cnn, "float32", 10**9))
    resnet = ntkit.TangentKernel(
        ntkit.linearize(imagenet_resnet(), readout=ntkit.SumOfLogits(select=lambda output: output.logits)),
        torch.randn(4, 3, 224, 224),
    )
    found = {
        "what": "what exact pNTKs of large data sets would take",
        "gpu_assumed": {"flops": GPU_FLOPS, "memory": GPU_MEMORY},
        "clusters": [
            clusters(cnn, "the CNN of W2's size, 32 x 32", 10**6, speeds),
            clusters(resnet, "ResNet-18, 224 x 224", 1_281_167, None),
        ],
    }
    print(record("clusters", found).read_text())


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
