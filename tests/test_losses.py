"""One check of what is passed as a loss: torch's where it means exactly the same, and words for all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.solve.evolve import evolve
from ntkit.solve.losses import CrossEntropy, SquareLoss, as_loss
from ntkit.uses import active, dynamics, finetune


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_torch_and_ours_pull_alike(mean: bool, soft: bool) -> None:
    """A plain `nn.CrossEntropyLoss` has the gradient of the loss that is taken for it."""
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y: Tensor = torch.tensor([0, 1, 2, 1, 0])
    if soft:
        y = 0.7 * nn.functional.one_hot(y, 3) + 0.1
    theirs = nn.CrossEntropyLoss(reduction="mean" if mean else "sum")
    theirs(z, y).backward()
    ours = as_loss(theirs, mean=mean)
    assert z.grad is not None
    torch.testing.assert_close(-ours.misfit(z.detach(), y) / (len(z) if mean else 1), z.grad)
    assert as_loss(ours) is ours
    assert as_loss(None) == CrossEntropy()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "weight="),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing=0.1.*soft targets"),
        (nn.CrossEntropyLoss(ignore_index=0), "ignore_index=0"),
        (nn.CrossEntropyLoss(reduction="sum"), "reduction=sum.*reduction='mean' as here"),
        (nn.MSELoss(), r"no 1/2.*SquareLoss\(\)"),
        (nn.NLLLoss(), "got NLLLoss; expected CrossEntropy"),
        (nn.functional.cross_entropy, "got cross_entropy; expected"),
        (nn.CrossEntropyLoss, r"the class CrossEntropyLoss.*write CrossEntropyLoss\(\)"),
        (SquareLoss, r"write SquareLoss\(\)"),
        ("cross-entropy", "got str; expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_means_something_else_is_refused(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_loss(given)


def test_one_over_half_the_outputs() -> None:
    """What the refusal of `nn.MSELoss` says: 2/C times our learning rate makes the same step."""
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.zeros(5, 3)
    nn.MSELoss()(z, y).backward()
    assert z.grad is not None
    torch.testing.assert_close(2 / 3 * -SquareLoss().misfit(z.detach(), y) / 5, z.grad)


def _one_step(loss: Any) -> Tensor:
    x, y = data()
    return dynamics.one_step(network(), (x, y), x, 0.1, loss=loss).G


def _influence(loss: Any) -> Tensor:
    x, y = data()
    return dynamics.influence([(network(), 0.1)], (x, y), (x[:1], 0), loss=loss).total


def _watch(loss: Any) -> Tensor:
    x, y = data()
    run, look = dynamics.Run(3, 3, loss=loss), dynamics.Look(4, 3)
    seen = dynamics.watch(network(), (x, y), (x, y), generator=torch.Generator().manual_seed(0), run=run, look=look)
    return seen.paths.logits


def _evolve(loss: Any) -> Tensor:
    _, y = data()
    return evolve(torch.eye(6), y, loss, [1.0], prior=torch.zeros(6, 3)).outputs


def _energy(loss: Any) -> Tensor:
    x, y = data()
    split = finetune.Split(network(), ("2",))
    return torch.tensor(finetune.average_initial_energy(split, x, y, loss=loss))


def _direction(loss: Any) -> Tensor:
    x, y = data()
    return finetune.direction(finetune.Split(network(), ("2",)), x, y, loss=loss)


def _foresee(loss: Any) -> Tensor:
    x, y = data()
    split = finetune.Split(network(), ("2",))
    return torch.as_tensor(finetune.foresee(split, x, y, learning_rate=0.1, steps=3, loss=loss).distance)


def _probe(loss: Any) -> Tensor:
    x, y = data()
    sweep = finetune.probe_then_finetune(
        network(), finetune.LinearHead("2"), (x, y), (x, y), loss=loss,
        probing=finetune.Probing(taus=(1,), batch_size=3), finetuning=finetune.Finetuning(epochs=1, batch_size=3),
    )  # fmt: skip
    return torch.tensor(sweep.energies)


def _active(kind: Callable[..., Any]) -> Callable[[Any], Tensor]:
    def chosen(loss: Any) -> Tensor:
        x, y = data()
        labels = y.double()
        labels[3:] = float("nan")
        return torch.as_tensor(kind(loss).query(x, labels, network(), batch_size=2))

    return chosen


def _trained(loss: Any) -> Tensor:
    x, y = data()
    model = active.Training(x, network, loss=loss, steps=2, batch_size=3)(y.numpy())
    return model(x).detach()


DOORS = {
    "one_step": _one_step,
    "influence": _influence,
    "watch": _watch,
    "evolve": _evolve,
    "energy": _energy,
    "direction": _direction,
    "foresee": _foresee,
    "probe_then_finetune": _probe,
    "LookAhead": _active(lambda loss: active.LookAhead(loss=loss)),
    "Entropy": _active(lambda loss: active.Entropy(loss=loss)),
    "by name": _active(lambda loss: active.strategy("badge", loss=loss)),
    "Training": _trained,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_asks(door: str) -> None:
    """Torch's loss leads to what ours does; one that means something else is refused before any work."""
    torch.testing.assert_close(DOORS[door](nn.CrossEntropyLoss()), DOORS[door](CrossEntropy()))
    for wrong in (nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.functional.cross_entropy):
        with pytest.raises(InputError, match="loss: got"):
            DOORS[door](wrong)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_classes_of_any_whole_type(door: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as with those of torch's own type."""
    x, y = data()
    found = []
    for labels in (y % 2, (y % 2).to(kind)):
        monkeypatch.setitem(globals(), "data", lambda labels=labels: (x, labels))
        found.append(DOORS[door](CrossEntropy()))
    torch.testing.assert_close(*found)


def test_sums_are_told_from_means() -> None:
    x, y = data()
    summed = dynamics.one_step(network(), (x, y), x, 0.1, loss=nn.CrossEntropyLoss(reduction="sum"), mean=False)
    torch.testing.assert_close(summed.G, 6 * _one_step(None))
    with pytest.raises(InputError, match="reduction=mean"):
        dynamics.one_step(network(), (x, y), x, 0.1, loss=nn.CrossEntropyLoss(), mean=False)


def test_stopping_rules_ask_too() -> None:
    assert active.MeanUncertainty(loss=nn.CrossEntropyLoss()).loss == CrossEntropy()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="loss: got"):
        active.MeanUncertainty(loss=nn.MSELoss())  # type: ignore[arg-type]
