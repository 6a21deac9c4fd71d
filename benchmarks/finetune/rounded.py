"""A copy of a folder of pre-trained weights, rounded to float16: half the size, to be taken to another machine.

    python -m benchmarks.finetune.rounded FROM TO

Takes the weights, the configuration and the tokeniser along, and nothing else. A pooler is left out: nothing here uses
one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def rounded(source: Path, target: Path) -> int:
    """Write the copy, and give the size of its weights in bytes."""
    target.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    weights = {name: t for name, t in load_file(source / "model.safetensors").items() if "pooler." not in name}
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    return (target / "model.safetensors").stat().st_size


if __name__ == "__main__":
    size = rounded(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{size / 1e6:.1f} MB")
