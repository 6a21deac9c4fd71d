"""Where a negative preference step sends the probability: the squeezing effect, on a small GPT-2-style network.

A step *away* from an answer (the rejected one of a preference pair) lowers it, as it should; but what it gives up goes
mostly to what the network already held to be likeliest, and almost everything else falls as well (Ren and Sutherland
2025). Needs `transformers`. Writes squeezing.svg into the folder that is given, or into the current one.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ntkit.uses.dynamics import one_step

WORDS, LENGTH, RATE = 24, 8, 0.03
torch.manual_seed(0)
size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, **size)
model = GPT2LMHeadModel(config)

# A language in which every word has a few likely successors; the network learns it a little.
generator = torch.Generator().manual_seed(0)
successors = (2.0 * torch.randn(WORDS, WORDS, generator=generator)).softmax(1)


def sentences(count: int) -> torch.Tensor:
    found = [torch.randint(WORDS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        found.append(torch.multinomial(successors[found[-1]], 1, generator=generator)[:, 0])
    return torch.stack(found, 1)


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    tokens = sentences(64)
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

# A prompt of four words, and a rejected answer that begins with a word which the network would hardly say. Targets are
# the next words; -100 leaves a position out.
tokens = sentences(1)
unlikely = model(input_ids=tokens).logits[0, 3].argsort()[2]
targets = torch.full((1, LENGTH), -100)
targets[0, 3] = unlikely
step = one_step(
    model, ({"input_ids": tokens}, targets), {"input_ids": tokens}, RATE,
    weights=torch.tensor([-1.0]), select=lambda output: output.logits,
)  # fmt: skip
before = step.probabilities[0, 3]
after = before + step.in_probability.actual[0, 3]
likeliest = int(before.argmax())
print(f"the rejected word: {float(before[unlikely]):.4f} -> {float(after[unlikely]):.4f}")
print(f"the likeliest: {float(before[likeliest]):.3f} -> {float(after[likeliest]):.3f}")
print(f"words that fall: {int((after < before).sum())} of {WORDS}")

order = before.argsort(descending=True)
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
axes.bar(range(WORDS), before[order].tolist(), width=0.4, label="before")
axes.bar([k + 0.4 for k in range(WORDS)], after[order].tolist(), width=0.4, label="after a step away from one word")
place = int((order == unlikely).nonzero()[0, 0])
height = float(before.max()) / 2
where = place, float(before[unlikely])
axes.annotate("the rejected word", where, (place - 4, height), arrowprops={"arrowstyle": "->"})
axes.set(yscale="log", xlabel="next words, likeliest first", ylabel="probability")
axes.set_title("Where a step away from a word sends the probability")
axes.legend(loc="best")
figure.savefig(Path(*sys.argv[1:2]) / "squeezing.svg", metadata={"Date": None})
