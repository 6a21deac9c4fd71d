"""The kernel of LoRA adapters on a frozen backbone: which parameters take part, and what each of them carries."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
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
)
adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(BertForSequenceClassification(config), adapters).eval()
batch = {"input_ids": torch.randint(200, (12, 16)), "attention_mask": torch.ones(12, 16, dtype=torch.int64)}
logits = ntkit.Logits(select=lambda output: output.logits)

# By default the parameters that require gradients take part: the adapters and the new head, not the backbone.
tangent = ntkit.linearize(model, readout=logits)
total = sum(p.numel() for p in model.parameters())
print(f"{tangent.count:,} of {total:,} parameters take part")
kernel = ntkit.TangentKernel(tangent, batch)
print(f"kernel of adapters and head: {kernel.shape}")


def role(name: str) -> str:
    return next((part for part in ("lora_A", "lora_B") if part in name), "head")


def say(kernel: ntkit.TangentKernel) -> None:
    print({group: f"{m.trace() / kernel.diagonal().sum():.1%}" for group, m in kernel.by_parameter(role).items()})


# B starts at zero, so at first A has no influence on the outputs: its part of the kernel is zero.
say(kernel)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
say(kernel)  # nothing is kept between calls: the kernel is that of the parameters as they are now

# Any other choice: a name pattern, a module, a parameter, a predicate, or several of those.
only = ntkit.empirical_ntk(model, batch, readout=logits, parameters="*lora_*")
backbone = ntkit.empirical_ntk(model, batch, readout=logits, parameters=lambda name, p: "lora_" not in name)
print(f"trace of the adapters' kernel: {only.trace():.3f}, of everything else: {backbone.trace():.3f}")
