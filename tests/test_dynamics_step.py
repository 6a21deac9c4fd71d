"""One step taken apart: against autograd and torch's own optimisers, with errors of second order as theory says."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.solve.losses import CrossEntropy, Loss, SquareLoss
from ntkit.tangent.linearize import linearize
from ntkit.uses.dynamics import Step, one_step
from ntkit.uses.dynamics.optimizers import displacement
from tests import oracles


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double().eval()


def data(seed: int = 1, n: int = 4, m: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, seen = (torch.randn(k, 5, generator=generator, dtype=torch.float64) for k in (n, m))
    return x, torch.randint(3, (n,), generator=generator), seen


def soft(y: Tensor) -> Tensor:
    return 0.8 * nn.functional.one_hot(y, 3).double() + 0.2 / 3


targets = pytest.mark.parametrize("target", [lambda y: y, soft], ids=["classes", "soft"])
losses = pytest.mark.parametrize("loss", [CrossEntropy(), SquareLoss()], ids=["cross-entropy", "square"])


@losses
@targets
@pytest.mark.parametrize("mean", [True, False])
def test_errors_are_of_second_order(loss: Loss, target, mean: bool) -> None:
    """A tenth of the learning rate leaves a hundredth of the error, in every form."""
    x, y, seen = data()
    found = [one_step(network(), (x, target(y)), seen, rate, loss=loss, mean=mean) for rate in (0.1, 0.01, 0.001)]
    for one, next_one in itertools.pairwise(found):
        for form in ("logits", "in_probability", "in_log_probability"):
            errors = [getattr(s, form) for s in (one, next_one)]
            if errors[0] is None:
                assert isinstance(loss, SquareLoss)
                continue
            ratio = float((errors[1].actual - errors[1].predicted).abs().max()) / float(
                (errors[0].actual - errors[0].predicted).abs().max()
            )
            assert 0.008 < ratio < 0.02, form
    assert found[-1].logits.gap < 0.01


@losses
@targets
def test_factors_by_autograd(loss: Loss, target) -> None:
    """K of a double loop, G of autograd at the logits, and their product with A is what is predicted."""
    model, (x, y, seen) = network(), data()
    step = one_step(model, (x, target(y)), seen, 0.02, loss=loss, matrices=True)
    z = model(x).detach().requires_grad_()
    loss.value(z, target(y)).backward()
    torch.testing.assert_close(step.G, z.grad)
    assert step.K is not None
    torch.testing.assert_close(step.K, oracles.entk(model, seen, x, lambda z: z, list(model.parameters())))
    predicted = -0.02 * (step.K @ step.G.reshape(-1)).view(3, 3)
    torch.testing.assert_close(step.logits.predicted, predicted)
    torch.testing.assert_close(step.in_probability.predicted, (step.A @ predicted[..., None])[..., 0])
    twin = copy.deepcopy(model)
    loss.value(twin(x), target(y)).backward()
    torch.optim.SGD(twin.parameters(), lr=0.02).step()
    torch.testing.assert_close(step.logits.actual, twin(seen).detach() - step.outputs)


def test_what_the_softmax_lets_through() -> None:
    """A is positive semidefinite, has zero row sums and the trace 1 - ||q||^2, and log q moves by (I - 1 q^T)."""
    x, y, seen = data()
    step = one_step(network(), (x, y), seen, 0.01)
    assert float(torch.linalg.eigvalsh(step.A).min()) > -1e-12
    torch.testing.assert_close(step.A.sum(-1), torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    trace = step.A.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(trace, 1 - step.probabilities.square().sum(1))
    assert step.in_log_probability is not None
    torch.testing.assert_close(step.in_probability.predicted, step.probabilities * step.in_log_probability.predicted)


@pytest.mark.parametrize(
    ("label", "itself", "other", "risen", "falling"),
    [(5, 0.00206, 0, 0.3834, 17), (19, None, 0, 0.3690, 17), (0, 0.0283, 1, 0.3322, 12)],
)
def test_squeezing(label: int, itself: float | None, other: int, risen: float, falling: int) -> None:
    """A step away from a label of a linear softmax over 20 classes, lr ||x||^2 = 3: the mass goes to the likeliest."""
    model = nn.Linear(1, 20, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.linspace(0, -6, 20).double()[:, None])
    x = torch.ones(1, 1).double()
    step = one_step(model, (x, torch.tensor([label])), x, 3.0, weights=torch.tensor([-1.0]))
    before, after = step.probabilities[0], (step.probabilities + step.in_probability.actual)[0]
    assert float(before[0]) == pytest.approx(0.2713, abs=5e-5)
    if itself is not None:
        assert float(after[label]) == pytest.approx(itself, rel=5e-3)
    assert float(after[other]) == pytest.approx(risen, abs=5e-5)
    assert int((after < before).sum()) - 1 == falling
    torch.testing.assert_close(step.logits.predicted, step.logits.actual)  # linear: exact however long the step


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def trained(name: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, (x, y, _) = network(), data(7)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@optimizers
@pytest.mark.parametrize("steps", [0, 3])
def test_optimizers_of_torch(name: str, steps: int) -> None:
    """The step that is taken is the one torch takes next; nothing changes before it does."""
    model, optimizer = trained(name, steps)
    x, y, seen = data()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    step = one_step(model, (x, y), seen, optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert str(optimizer.state_dict()) == str(state)
    before = model(seen).detach()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(step.logits.actual, model(seen).detach() - before)


@optimizers
@pytest.mark.parametrize("steps", [0, 3])
def test_own_part_and_past(name: str, steps: int) -> None:
    """The update is -scale g and a rest that this gradient has no part in (for Adam, at the same second moments)."""
    model, optimizer = trained(name, steps)
    selection = linearize(model).selection
    g = torch.randn(selection.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = displacement(model, selection, g, optimizer)
    if isinstance(optimizer, torch.optim.SGD):
        other = displacement(model, selection, 2 * g, optimizer)
        torch.testing.assert_close(other.total - found.total, -found.scale * g)
        return
    group = optimizer.param_groups[0]
    rest = found.total + found.scale * g
    decayed = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) * group["weight_decay"]
    if type(optimizer) is torch.optim.AdamW:  # apart from the moments
        rest = rest + group["lr"] * decayed
        decayed = torch.zeros_like(decayed)
    moments = [optimizer.state[p].get("exp_avg") for p in model.parameters()]
    past = torch.zeros_like(g) if moments[0] is None else torch.cat([m.reshape(-1) for m in moments])
    beta = group["betas"][0]
    torch.testing.assert_close(rest, -found.scale * (beta / (1 - beta) * past + decayed))


@optimizers
def test_kernel_of_an_optimizer(name: str) -> None:
    """-lr K G and the past are all of the prediction."""
    model, optimizer = trained(name, 3)
    x, y, seen = data()
    step = one_step(model, (x, y), seen, optimizer, matrices=True)
    assert step.K is not None
    own = -step.learning_rate * (step.K @ step.G.reshape(-1)).view(3, 3)
    torch.testing.assert_close(step.logits.predicted, own + step.past)


def language_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def test_sequences() -> None:
    """Per token: targets shifted by one, prompts left out by -100; G by autograd, errors of second order."""
    model = language_model()
    generator = torch.Generator().manual_seed(0)
    tokens, seen = (torch.randint(11, (k, 6), generator=generator) for k in (2, 3))
    y = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    y[:, :2] = -100

    def step(rate: float, weights: Tensor | None = None) -> Step:
        return one_step(
            model, ({"input_ids": tokens}, y), {"input_ids": seen}, rate,
            select=lambda output: output.logits, weights=weights,
        )  # fmt: skip

    one, small = step(0.01), step(0.001)
    z = model(input_ids=tokens).logits.detach().requires_grad_()
    nn.functional.cross_entropy(z.reshape(-1, 11), y.reshape(-1), ignore_index=-100).backward()
    torch.testing.assert_close(one.G, z.grad)
    assert one.A.shape == (3, 6, 11, 11)
    assert one.in_log_probability is not None
    assert small.in_log_probability is not None
    errors = [float((c.actual - c.predicted).abs().max()) for c in (one.in_log_probability, small.in_log_probability)]
    assert 0.005 < errors[1] / errors[0] < 0.02
    down = step(0.01, weights=torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(down.G[0], one.G[0])
    torch.testing.assert_close(down.G[1], -one.G[1])


def test_where_a_rejected_answer_sends_the_probability() -> None:
    """A step away from answers of three words, by a trained network, at six prompts.

    Every rejected word falls. The likeliest one takes most of what is set free, at each prompt, and rises at most
    places, where most of the others fall as well; not at all of them, since the words of one answer move each other.
    """
    model = language_model().train()
    generator = torch.Generator().manual_seed(0)
    successors = (2 * torch.randn(11, 11, generator=generator)).softmax(1)

    def sentences(count: int) -> Tensor:
        found = [torch.randint(11, (count,), generator=generator)]
        for _ in range(5):
            found.append(torch.multinomial(successors[found[-1]], 1, generator=generator)[:, 0])
        return torch.stack(found, 1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        tokens = sentences(32)
        optimizer.zero_grad()
        z = model(input_ids=tokens).logits
        nn.functional.cross_entropy(z[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1)).backward()
        optimizer.step()
    model.eval()
    rows, risen, fallen = torch.arange(3), [], []
    for _ in range(6):
        tokens = sentences(1)
        for place in (3, 4, 5):  # the answer that would have been second at every place
            tokens[0, place] = model(input_ids=tokens).logits[0, place - 1].argsort(descending=True)[1]
        y = torch.full((1, 6), -100)
        rejected = y[0, 2:5] = tokens[0, 3:]
        step = one_step(
            model, ({"input_ids": tokens}, y), {"input_ids": tokens}, 0.03,
            weights=torch.tensor([-1.0]), select=lambda output: output.logits,
        )  # fmt: skip
        before, change = step.probabilities[0, 2:5], step.in_probability.actual[0, 2:5]
        likeliest = before.argmax(1)
        assert bool((change[rows, rejected] < 0).all())
        assert float(change[rows, likeliest].sum()) > -0.5 * float(change[rows, rejected].sum())
        risen += (change[rows, likeliest] > 0).tolist()
        others = torch.ones_like(change).index_put((rows, rejected), torch.zeros(3).double())
        others[rows, likeliest] = 0
        fallen += (((change < 0) * others).sum(1) > others.sum(1) / 2).tolist()
    assert sum(risen) >= 13
    assert sum(fallen) >= 12


def test_bad_input() -> None:
    model, (x, y, seen) = network(), data()
    with pytest.raises(InputError, match="sum to 1"):
        one_step(model, (x, soft(y) * 2), seen, 0.1)
    with pytest.raises(InputError, match="classes of shape"):
        one_step(model, (x, y[:2]), seen, 0.1)
    with pytest.raises(InputError, match="shape of the logits"):
        one_step(model, (x, soft(y)[:2]), seen, 0.1)
    with pytest.raises(InputError, match="no target"):
        one_step(model, (x, torch.full_like(y, -100)), seen, 0.1)
    with pytest.raises(InputError, match="weights have the shape"):
        one_step(model, (x, y), seen, 0.1, weights=torch.ones(2))
    with pytest.raises(InputError, match="positive number"):
        one_step(model, (x, y), seen, 0.0)
    first, *others = model.parameters()
    still = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.01}])
    assert float(one_step(model, (x, y), seen, still).logits.gap) < 0.1
    with pytest.raises(InputError, match="first group of parameters, which is 0"):
        one_step(model, (x, y), seen, still, matrices=True)
    with pytest.raises(InputError, match="not taken apart"):
        one_step(model, (x, y), seen, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(InputError, match="not the model's"):
        one_step(model, (x, y), seen, torch.optim.SGD(network().parameters(), lr=0.1))
    for update, observe in (((x[:, :3], y), seen), ((x, y), seen[:, :3])):
        with pytest.raises(InputError, match=r"shape \(1, 3\), expected such as it is trained on"):
            one_step(model, update, observe, 0.1)
    with pytest.raises(InputError, match=r"output\.logits"):
        one_step(Odd().eval(), (x, y), seen, 0.1)
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        one_step(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double().train(), (x, y), seen, 0.1)

    with pytest.raises(InputError, match="a tensor of classes or of soft targets: got list"):
        one_step(model, (x, y.tolist()), seen, 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="weights are finite"):
        one_step(model, (x, y), seen, 0.1, weights=torch.tensor([1.0, math.nan] + [1.0] * (len(y) - 2)))
    single = nn.Linear(5, 1).double()
    with pytest.raises(InputError, match="two classes or more"):
        one_step(single, (x, torch.ones(len(x), 1).double()), seen, 0.1)
    assert float(one_step(single, (x, torch.ones(len(x), 1).double()), seen, 0.1, loss=SquareLoss()).G.norm()) > 0


def test_a_class_of_bytes_is_a_class() -> None:
    """-100 says that there is no target; wrapped to a byte it would be class 156."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 200).double(), torch.randn(3, 5).double()
    y = torch.tensor([156, 3, 156])
    found, expected = one_step(model, (x, y.to(torch.uint8)), x, 0.1), one_step(model, (x, y), x, 0.1)
    torch.testing.assert_close(found.G, expected.G, rtol=0, atol=0)
    assert float(expected.G[0].norm()) > 0


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}
