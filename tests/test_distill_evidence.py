"""The evidence for distillation: networks side by side go where each goes alone, and the page claims what was found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.distill import noise, results, storage, toy
from benchmarks.distill.stack import stacked
from benchmarks.distill.training import Job, Recipe, train
from ntkit.uses import distill

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (partial(noise.perceptron, 5, 7), (5,)),
    "convolutions": (noise.convolutions, (1, 8, 8)),
}


def seeded(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_side_by_side_say_and_learn_what_each_does_alone(name: str) -> None:
    network, shape = NETWORKS[name]
    together, alone = ([seeded(network, seed) for seed in (1, 2, 3)] for _ in range(2))
    stack, generator = stacked(together), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 6, *shape, generator=generator), torch.randint(10, (2, 3, 6), generator=generator)
    optimizers = [torch.optim.SGD(weights, 0.1, 0.9) for weights in (stack.weights, *(m.parameters() for m in alone))]
    for inputs, labels in zip(x, y, strict=True):
        z = stack.forward(inputs)
        single = [model.train()(part) for model, part in zip(alone, inputs, strict=True)]
        torch.testing.assert_close(z, torch.stack(single), atol=1e-5, rtol=1e-4)
        losses = [nn.functional.cross_entropy(a, b, reduction="sum") for a, b in zip(single, labels, strict=True)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum") + sum(losses)).backward()
        for optimizer in optimizers:
            optimizer.step()
    stack.write(together)
    for one, other in zip(together, alone, strict=True):
        for key, value in one.state_dict().items():
            if value.ndim:  # a count of batches is not used
                torch.testing.assert_close(value, other.state_dict()[key], atol=1e-5, rtol=1e-4)


def test_the_training_loop_is_the_plain_one() -> None:
    """Weights, order, filter before the step, cosine and the factor, of two networks at once."""
    recipe = Recipe(partial(noise.perceptron, 5, 7), 0.1, 3, 4, decay=1e-2, cosine=True, factor=2.0)
    x, y = torch.randn(10, 5, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    targets = distill.Smoothed(y, 10, 0.8)
    tables = [distill.EMATargets(10, 10), distill.EMATargets(10, 10)]
    jobs = [Job(x, targets, (x, y), 4 + k, 7 + k, {"table": table}) for k, table in enumerate(tables)]
    for k, found in enumerate(train(recipe, jobs)):
        model, table, order = seeded(recipe.network, 4 + k), distill.EMATargets(10, 10), torch.Generator()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2)
        schedule, order = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9), order.manual_seed(7 + k)
        for _ in range(3):
            for numbers in torch.randperm(10, generator=order).split(4):
                z = model(x[numbers])
                table.update(numbers, z)
                optimizer.zero_grad()
                (2 * nn.functional.cross_entropy(z, targets.targets(numbers))).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(tables[k].table(), table.table())
        torch.testing.assert_close(list(found.model.parameters()), list(model.parameters()), atol=1e-5, rtol=1e-4)


def test_moved_images_are_shifts_by_one_pixel_at_most() -> None:
    x = torch.rand(60, 1, 4, 3, generator=torch.Generator().manual_seed(0)) + 1
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    shifts = {(a, b): padded[:, :, a : a + 4, b : b + 3] for a in range(3) for b in range(3)}
    seen = set()
    for k, image in enumerate(noise.moved(x, torch.Generator().manual_seed(1))):
        fits = [shift for shift, whole in shifts.items() if torch.equal(whole[k], image)]
        assert len(fits) == 1
        seen.update(fits)
    assert seen == set(shifts)


def test_labels_are_drawn_anew_from_all_classes() -> None:
    y = torch.zeros(10_000, dtype=torch.long)
    found = noise.noisy(y, 0.4, torch.Generator().manual_seed(0))
    assert float((found != 0).double().mean()) == pytest.approx(0.36, abs=0.01)  # 0.4 (1 - 1/10)
    assert torch.equal(noise.noisy(y, 0.0, torch.Generator()), y)


def test_the_toy_is_the_published_one() -> None:
    data = toy.drawn(3)
    assert [tuple(part.shape) for part in data.x] == [(5000, 30), (5000, 30), (90_000, 30)]
    x, y, p = data.x[2].double(), data.y[2], data.p[2]
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    assert float((means - means.round()).abs().max()) < 0.1
    assert set(means.round().flatten().tolist()) <= {-1.0, 0.0, 1.0}
    assert float((x - means[y]).square().mean()) == pytest.approx(6, rel=0.01)
    density = torch.distributions.Normal(means.round()[:, None], 6**0.5).log_prob(x[:100]).sum(2).T  # Bayes' rule
    torch.testing.assert_close(p[:100], density.softmax(1).float(), atol=1e-5, rtol=1e-4)
    assert (toy.LONG.rate, toy.LONG.epochs, toy.LONG.batch_size, toy.LONG.decay) == (5e-4, 100, 32, 0.0)
    assert [tuple(w.shape) for w in toy.network().parameters()][::2] == [(128, 30), (128, 128), (3, 128)]


# ---------------------------------------------------------------- what the page claims


def record(name: str) -> dict[str, Any]:
    found = results.read_record(name)
    assert found is not None
    return found


def test_near_targets_are_better_in_the_record() -> None:
    assert len(record("toy-mixed")["accuracy"]) >= 40
    assert results.mixed_ranks()["accuracy"][0] <= -0.85


def test_early_stopped_targets_are_better_than_labels_in_the_record() -> None:
    found = record("toy-named")
    assert found["seeds"] == list(range(10))
    accuracy = {name: np.array(facts["accuracy"]) for name, facts in found["named"].items()}
    gain = accuracy["ESKD"] - accuracy["OHT"]
    assert gain.mean() > 4 * gain.std(ddof=1) / len(gain) ** 0.5
    assert (gain > 0).sum() >= 9
    assert (accuracy["GT"] > accuracy["ESKD"]).all()
    assert (np.array(found["bayes"]) > accuracy["GT"]).all()
    assert (np.array(found["named"]["ESKD"]["ece"]) < found["named"]["OHT"]["ece"]).all()
    retraced = accuracy["ESKD, teacher's start"] - accuracy["OHT"]
    assert abs(retraced.mean()) < 0.001 < gain.mean()


@pytest.mark.parametrize("task", list(noise.TASKS))
def test_label_noise_was_measured_in_full(task: str) -> None:
    found = record(results.file_name(task))
    assert found["shares"] == [0.0, 0.2, 0.4, 0.5]
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert tuple(found["methods"]) == noise.TASKS[task].methods


@pytest.mark.parametrize("key", ["accuracy", "accuracy_last"])
def test_the_published_order_is_there_on_fashion_mnist(key: str) -> None:
    methods = record("noise-fashion")["methods"]
    for k in (2, 3):  # noise of 40 and 50 %
        filtered, early, late = (np.array(methods[name][k][key]) for name in ("Filter-KD", "ESKD", "KD"))
        assert filtered.mean() > early.mean() + 0.01 > late.mean() + 0.01
        assert (filtered > early).all()
    gaps = [np.mean(np.subtract(methods["Filter-KD"][k][key], methods["ESKD"][k][key])) for k in range(4)]
    assert min(gaps[2:]) > max(gaps[:2])


def test_without_noise_the_filter_calibrates_networks_that_are_too_sure() -> None:
    methods = record("noise-fashion-too-sure")["methods"]
    for other in ("one-hot", "KD", "ESKD"):
        filtered, theirs = methods["Filter-KD"][0], methods[other][0]  # of no noise
        for key in ("ece", "ece_last"):
            assert (np.array(filtered[key]) < 0.75 * np.array(theirs[key])).all()
        assert (np.array(filtered["accuracy_last"]) > theirs["accuracy_last"]).all()


def test_with_more_to_validate_the_order_is_there_on_digits_too() -> None:
    methods = record("noise-digits-more-to-validate")["methods"]
    last = {name: [float(np.mean(at["accuracy_last"])) for at in found] for name, found in methods.items()}
    assert last["Filter-KD"][2] > last["ESKD"][2] + 0.015  # noise of 40 %
    assert last["Filter-KD"][3] == pytest.approx(last["ESKD"][3], abs=0.005)  # and of 50 %
    assert last["ESKD"][3] > last["KD"][3] + 0.01 > last["one-hot"][3] + 0.05


def test_when_the_filter_helps_is_what_the_page_says() -> None:
    """Past its memory and at a high rate, more often than not above ESKD; before that, and at a low rate, below."""
    runs = results.memory_runs()
    near = ("digits", "fashion", "digits, more to validate")
    helped = [gain for task in near for gain in runs[task][True]]
    early = [gain for parts in runs.values() for gain in parts[False]]
    slow = runs["digits, slow perceptron"][True]
    assert len(helped) >= 30
    assert min(helped) > 0
    for worse in (early, slow):
        assert len(worse) >= 15
        assert np.mean(worse) < 0 < np.mean(helped)
        assert np.mean(np.array(worse) < 0) > 0.6


def test_storage_was_measured() -> None:
    found = record("storage")
    assert (found["examples"], found["classes"]) == (storage.N, storage.C) == (1_280_000, 1000)
    sizes = {name: facts["table_mb"] for name, facts in found["tables"].items()}
    assert sizes["the top 20 in float16"] * 50 == pytest.approx(sizes["all in float32"], rel=0.01)
