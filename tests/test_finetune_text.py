"""Fine-tuning of transformers: padded dict inputs with attention masks, output objects, LoRA; a tiny random BERT."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

from ntkit.errors import ModelError, StoreError
from ntkit.uses import finetune

WIDTH, WORDS, TOKENS, C = 8, 30, 7, 3
SGD = partial(torch.optim.SGD, lr=0.2)
PROBING = finetune.Probing(taus=(0, 2), optimizer=SGD, batch_size=None)
FINETUNING = finetune.Finetuning(epochs=2, optimizer=SGD, batch_size=None)
Texts = dict[str, Tensor]


class Mean(nn.Module):
    """The mean of the token features that are not padding, and a head for other classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(tokens)
        return self.head((tokens * real).sum(1) / real.sum(1))


def config(**settings: Any) -> BertConfig:
    return BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, **settings,
    )  # fmt: skip


LORA = LoraConfig(r=2, target_modules=["query", "value"])


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    encoder: Any = BertModel(config(), add_pooling_layer=False)
    if kind == "LoRA":
        encoder = get_peft_model(encoder, LORA)
        moved(encoder)
    return Mean(encoder).double().eval()


def moved(model: nn.Module) -> None:
    """Adapters that are not at zero, where half of them has no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def texts(n: int = 12, seed: int = 0) -> tuple[Texts, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, TOKENS + 1, (n,), generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(1, WORDS, (n, TOKENS), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % C


def wider(x: Texts) -> Texts:
    """More padding, with words in it that no one may look at."""
    more = {"input_ids": 7, "attention_mask": 0}
    return {name: nn.functional.pad(t, (0, 3), value=more[name]) for name, t in x.items()}


def sweep(model: nn.Module, head: finetune.Head | None = None, **settings: Any) -> finetune.Sweep:
    head = finetune.LinearHead("head") if head is None else head
    given = {"train": texts(), "validation": texts(10, 1), "probing": PROBING, "finetuning": FINETUNING, **settings}
    return finetune.probe_then_finetune(model, head, given.pop("train"), given.pop("validation"), **given)


def features(model: Any, x: Texts) -> Tensor:
    """Without the library."""
    with torch.no_grad():
        tokens = model.encoder(**x).last_hidden_state
    return torch.stack([t[m.bool()].mean(0) for t, m in zip(tokens, x["attention_mask"], strict=True)])


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_every_row_is_what_plain_loops_give(kind: str) -> None:
    found = sweep(network(kind))
    (x, y), (x_seen, y_seen) = texts(), texts(10, 1)
    model: Any = copy.deepcopy(found.start.model)
    head, before = torch.optim.SGD(model.head.parameters(), lr=0.2), features(model, x_seen)
    for done in range(3):
        if done in PROBING.taus:
            row, tuned = found.rows[PROBING.taus.index(done)], copy.deepcopy(model)
            energy = (torch.eye(C)[y] - tuned(**x).detach().softmax(1)).norm(dim=1).mean()
            assert row.energy == pytest.approx(float(energy))
            tuning = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.2)
            for _ in range(2):
                tuning.zero_grad()
                nn.functional.cross_entropy(tuned(**x), y).backward()
                tuning.step()
            after, last = features(tuned, x_seen), tuned(**x_seen).detach()
            assert row.change.distance == pytest.approx(float((after - before).norm(dim=1).mean()))
            assert row.change.distance > 1e-3
            assert row.loss == pytest.approx(float(nn.functional.cross_entropy(last, y_seen)))
            assert row.accuracy == float((last.argmax(1) == y_seen).double().mean())
            for mine, theirs in zip(found.network(done).parameters(), tuned.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)
        head.zero_grad()
        nn.functional.cross_entropy(model(**x), y).backward()
        head.step()


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_first_step_is_the_limit_of_one_plain_step(kind: str) -> None:
    """Central differences of one step of gradient descent on the backbone."""
    (x, y), (x_seen, _) = texts(), texts(6, 1)
    split = finetune.LinearHead("head").build(network(kind), x, C)
    before: Any = split.model
    step = finetune.first_step(split, x, y, at=x_seen)
    taking = [p for p in before.encoder.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(before(**x), y), taking)
    after = []
    for rate in (1e-4, -1e-4):
        model = copy.deepcopy(before)
        with torch.no_grad():
            for p, g in zip([p for p in model.encoder.parameters() if p.requires_grad], gradient, strict=True):
                p.sub_(rate * g)
        after.append(features(model, x_seen))
    torch.testing.assert_close(step.velocity, (after[0] - after[1]) / 2e-4, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.features, features(split.model, x_seen))
    assert step.speed > 1e-3


def test_more_padding_changes_nothing() -> None:
    (x, y), (x_seen, y_seen) = texts(), texts(10, 1)
    split = finetune.LinearHead("head").build(network("full"), x, C)
    torch.testing.assert_close(split.features(wider(x)), split.features(x))
    plain = sweep(network("full"))
    padded = sweep(network("full"), train=(wider(x), y), validation=(wider(x_seen), y_seen))
    for mine, theirs in zip(padded.rows, plain.rows, strict=True):
        assert mine.change.distance == pytest.approx(theirs.change.distance)
        assert mine.loss == pytest.approx(theirs.loss)
        assert mine.speed == pytest.approx(theirs.speed)
    unmasked = sweep(network("full"), train=({**x, "attention_mask": torch.ones_like(x["attention_mask"])}, y))
    assert unmasked.rows[0].loss != pytest.approx(plain.rows[0].loss)  # the mask is what does it


class Sentences(Dataset):
    """Items as a tokeniser's data set gives them: one dict for each sentence."""

    def __init__(self, x: Texts) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x["input_ids"])

    def __getitem__(self, index: int) -> Texts:
        return {name: t[index] for name, t in self.x.items()}


def test_a_dataset_of_dicts_is_the_same() -> None:
    (x, y), (x_seen, y_seen) = texts(), texts(10, 1)
    found = sweep(network("full"), train=(Sentences(x), y), validation=(Sentences(x_seen), y_seen))
    assert found.rows == sweep(network("full")).rows


def classifier(labels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(config(num_labels=labels)).double().eval()


def adapted(labels: int = 4) -> Any:
    """As users of peft do it: adapters, and the classifier trained beside them."""
    settings = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model: Any = get_peft_model(classifier(labels), settings)  # pyright: ignore[reportArgumentType]
    moved(model)
    return model.eval()


def of(output: Any) -> Tensor:
    return output.logits


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (classifier, finetune.LinearHead("classifier", select=of)),
        (classifier, finetune.Reinitialised("bert.pooler", finetune.LinearHead("classifier", select=of))),
        (adapted, finetune.LinearHead("base_model.model.classifier", select=of)),
        (partial(adapted, C), finetune.OwnHead("base_model.model.classifier", select=of)),
    ],
    ids=["full", "re-initialised", "LoRA", "LoRA, own head"],
)
def test_networks_that_give_output_objects(model: Any, head: finetune.Head, tmp_path: Path) -> None:
    """The head's loss falls while it is probed, what is frozen stays, and a killed sweep goes on to the same."""
    given = model()
    start = {name: p.detach().clone() for name, p in given.named_parameters() if not p.requires_grad}
    assert bool(start) == (model is not classifier)
    found = sweep(given, head, folder=tmp_path)
    assert found.energies[-1] < found.energies[0]
    assert all(row.change.distance > 1e-5 for row in found.rows)
    tuned = dict(found.network().named_parameters())
    for name, before in start.items():
        if name in tuned:  # the place of a new head has other names
            assert torch.equal(tuned[name], before), name
    (tmp_path / "tau-0002.json").unlink()
    again = sweep(given, head, folder=tmp_path)
    assert again.rows == found.rows
    for mine, theirs in zip(again.network(2).parameters(), found.network(2).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_frozen_weights_are_not_kept_for_every_tau(tmp_path: Path) -> None:
    """The backbone of LoRA is the same for all of them."""
    whole, light = sweep(network("full")), sweep(network("LoRA"), folder=tmp_path)
    in_memory: Any = whole.weights[0]
    assert set(in_memory) == set(whole.start.model.state_dict())
    kept = light.network(0).state_dict()
    stored = load_file(tmp_path / "tau-0000.safetensors")
    assert all("lora_" in name or name.startswith("head.") or "position" in name for name in stored)
    assert any("lora_" in name for name in stored)
    assert stored.keys() < kept.keys()
    for name, t in stored.items():
        assert torch.equal(kept[name], t)


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    x, y = texts()
    sweep(network("LoRA"), folder=tmp_path)
    with pytest.raises(StoreError, match="training examples differ"):
        sweep(
            network("LoRA"), train=({**x, "attention_mask": torch.ones_like(x["attention_mask"])}, y), folder=tmp_path
        )
    other: Any = network("LoRA")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(StoreError, match="parameters differ"):
        sweep(other, folder=tmp_path)


def test_output_objects_without_select_are_refused() -> None:
    with pytest.raises(Exception, match=r"output\.logits"):
        sweep(classifier(), finetune.LinearHead("classifier"))
    with pytest.raises(ModelError, match="no module 'classifier'"):
        sweep(adapted(), finetune.LinearHead("classifier", select=of))


def test_backbones_are_ranked_on_padded_text() -> None:
    x, y = texts(40)
    names = {
        "full": finetune.Candidate(network("full")),
        "LoRA": finetune.Candidate(network("LoRA")),
        "head": finetune.Candidate(network("full"), parameters=()),
    }

    def ranking(x: Texts) -> finetune.Ranking:
        return finetune.rank_backbones(names, x, y, head="head", generator=torch.Generator().manual_seed(0))

    found = {row.name: row for row in ranking(x).rows}
    adapters = sum(p.numel() for n, p in network("LoRA").named_parameters() if "lora_" in n)
    assert found["LoRA"].parameters == adapters + WIDTH + 1
    assert found["head"].parameters == WIDTH + 1
    assert found["full"].parameters == sum(p.numel() for p in BertModel(config(), False).parameters()) + WIDTH + 1
    for row in ranking(wider(x)).rows:
        assert row.predicted == pytest.approx(found[row.name].predicted)
