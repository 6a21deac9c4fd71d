"""A Hugging Face batch is a dict of tensors: attention masks, a read-out of the output object, the split by layer."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

import ntkit

torch.manual_seed(0)
config = BertConfig(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    num_labels=3,
    initializer_range=0.2,
    pad_token_id=0,
)
model = BertForSequenceClassification(config).eval()

lengths = torch.tensor([5, 9, 12, 12, 7, 10])
mask = (torch.arange(12) < lengths[:, None]).long()
batch = {"input_ids": torch.randint(1, 200, (6, 12)) * mask, "attention_mask": mask}

tangent = ntkit.linearize(model, readout=ntkit.Logits(select=lambda output: output.logits))
kernel = ntkit.TangentKernel(tangent, batch)
full = kernel.dense()
print(f"{tangent.count:,} parameters, kernel {kernel.shape}, smallest eigenvalue {torch.linalg.eigvalsh(full)[0]:.2e}")


def part(name: str) -> str:
    """Embeddings, each layer of the encoder, pooler, classifier."""
    words = name.split(".")
    return " ".join(words[2:4]) if "layer" in words else words[-2] if words[0] != "bert" else words[1]


for name, matrix in kernel.by_parameter(part).items():
    print(f"{name:12} {matrix.trace() / full.trace():6.1%} of the trace")

# Padding is masked: four more columns of it leave the kernel as it was.
wider = {name: torch.nn.functional.pad(values, (0, 4)) for name, values in batch.items()}
difference = ntkit.TangentKernel(tangent, wider).dense() - full
print(f"with more padding: relative difference {difference.norm() / full.norm():.1e}")
assert difference.norm() < 1e-4 * full.norm()
