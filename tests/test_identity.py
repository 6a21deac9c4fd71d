"""What tells one model from another, and nothing that calling it changes."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import StoreError
from ntkit.kernel.tasks import Parcel
from ntkit.tangent.identity import architecture, describe, digest

FACTOR = 2.0
TABLE = {"factor": 1.0}
CALLS = 0
SEEN: dict[int, int] = {}
ACTS = {"tanh": torch.tanh}


def helper(x: Tensor) -> Tensor:
    return deeper(x) * FACTOR


def deeper(x: Tensor) -> Tensor:
    return x + TABLE["factor"]


def other_helper(x: Tensor) -> Tensor:
    return x - 1.0


def times(number: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * number


def doubling(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


class Setting:
    """Neither a module nor a plain value."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.unread = gain

    def apply(self, x: Tensor) -> Tensor:
        return x * self.gain


class Slotted:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.scale = 2.0  # not the module's
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        return gradient * ctx.scale


class Net(nn.Module):
    """Reads everything that it can."""

    shift = 0.5
    passing: Tensor
    kept: Tensor
    bound: Callable[[Tensor], Tensor]
    act: Callable[[Tensor], Tensor]
    options: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.Softplus(beta=1.0), nn.Linear(4, 3))
        self.scale = 1.0
        self.mode = "plain"
        self.shape = (1, 3)
        self.options = {"a": 1, "b": [2, 3]}
        self.act = times(2.0)
        self.bound = functools.partial(torch.mul, other=torch.ones(3))
        self.constant = torch.ones(3)
        self.array = np.ones(3, dtype=np.float32)
        self.setting = Setting(1.0)
        self.slotted = Slotted(1.0)
        self.hidden = [nn.Linear(3, 3)]  # a list that nn.Module does not know
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("kept", torch.ones(3))
        self.unread = 1.0

    def extra(self, x: Tensor, by: float = 1.0) -> Tensor:
        return x + self.shift * by

    def forward(self, x: Tensor) -> Tensor:
        y = self.setting.apply(self.extra(helper(self.inner(x)))) * self.scale * self.slotted.gain
        y = self.hidden[0](self.bound(self.act(y)).reshape(-1, *self.shape[1:]))
        y = self.options["a"] * y + self.constant + torch.from_numpy(self.array) + self.passing + self.kept
        y = ACTS["tanh"](y)
        if self.training and self.mode == "strange":
            return y * 2
        return Doubled.apply(y)  # pyright: ignore


def identity(model: nn.Module, **options: Any) -> dict[str, str]:
    return ntkit.linearize(model, **options).identity()


def attribute(name: str, value: Any) -> Callable[[Net, pytest.MonkeyPatch], Any]:
    return lambda model, _: setattr(model, name, value)


def in_module(name: str, value: Any) -> Callable[[Net, pytest.MonkeyPatch], Any]:
    return lambda _, patch: patch.setattr(sys.modules[__name__], name, value)


def in_class(kind: type, name: str, value: Any) -> Callable[[Net, pytest.MonkeyPatch], Any]:
    return lambda _, patch: patch.setattr(kind, name, value)


def with_default(x: Tensor) -> Callable[..., Tensor]:
    def extra(self: Net, x: Tensor, by: float = 2.0) -> Tensor:
        return x + self.shift * by

    return extra


DIFFERENT: dict[str, tuple[str, Callable[[Net, pytest.MonkeyPatch], Any]]] = {
    "a number": ("architecture", attribute("scale", 3.0)),
    "minus zero": ("architecture", attribute("scale", -0.0)),
    "its type": ("architecture", attribute("scale", 1)),
    "a string": ("architecture", attribute("mode", "strange")),
    "a tuple": ("architecture", attribute("shape", (1, 1, 3))),
    "a function's closure": ("architecture", attribute("act", times(3.0))),
    "a function": ("architecture", attribute("act", other_helper)),
    "torch's function": ("architecture", attribute("act", torch.tanh)),
    "a partial's tensor": ("architecture", attribute("bound", functools.partial(torch.mul, other=torch.zeros(3)))),
    "one bit of a tensor": ("architecture", attribute("constant", torch.tensor([1.0, 1.0, 1.0000001]))),
    "an array": ("architecture", attribute("array", np.zeros(3, dtype=np.float32))),
    "a setting of torch's module": ("architecture", lambda m, _: setattr(m.inner[1], "threshold", 7)),
    "a buffer that is not saved": ("parameters", lambda m, _: m.passing.mul_(2)),
    "a buffer": ("parameters", lambda m, _: m.kept.mul_(2)),
    "a class attribute": ("architecture", in_class(Net, "shift", 0.25)),
    "a method": ("architecture", in_class(Net, "extra", lambda self, x: x - self.shift)),
    "a method's default": ("architecture", in_class(Net, "extra", with_default(torch.ones(1)))),
    "a helper": ("architecture", in_module("helper", other_helper)),
    "a helper's helper": ("architecture", in_module("deeper", other_helper)),
    "a helper's global": ("architecture", in_module("FACTOR", 3.0)),
    "a backward pass": ("architecture", in_class(Doubled, "backward", staticmethod(lambda ctx, g: g * 4))),
    "a hook": ("architecture", lambda m, _: m.inner.register_forward_hook(doubling)),
    "a hook of one layer": ("architecture", lambda m, _: m.inner[0].register_full_backward_hook(lambda *_: None)),
    "an object's method": ("architecture", in_class(Setting, "apply", lambda self, x: x * 0.5)),
    "the order of layers": ("architecture", lambda m, _: setattr(m, "inner", nn.Sequential(*reversed(m.inner)))),
}  # fmt: skip


# What cannot be read off with certainty: entries tell.
TOLD_BY_ENTRIES: dict[str, Callable[[Net, pytest.MonkeyPatch], Any]] = {
    "deep in a dictionary": lambda m, _: m.options.update(a=2),
    "an object's attribute": lambda m, _: setattr(m.setting, "gain", 2.0),
    "an object's slot": lambda m, _: setattr(m.slotted, "gain", 2.0),
    "a hidden module's weight": lambda m, _: m.hidden[0].weight.data.mul_(2),
    "a global dictionary": lambda m, patch: patch.setitem(TABLE, "factor", 2.0),
    "a global table of functions": lambda m, patch: patch.setitem(ACTS, "tanh", torch.sin),
}


@pytest.mark.parametrize("case", TOLD_BY_ENTRIES)
def test_what_an_identity_does_not_see_is_not_mixed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zarr")
    model, x = Net().eval(), torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    kernel = ntkit.TangentKernel(ntkit.linearize(model), x)
    before = kernel.save(tmp_path / "k.zarr").dense()
    TOLD_BY_ENTRIES[case](model, monkeypatch)
    with pytest.raises(StoreError, match="entries between the first examples differ"):
        ntkit.TangentKernel(ntkit.linearize(model), x).save(tmp_path / "k.zarr")
    assert torch.equal(ntkit.open_kernel(tmp_path / "k.zarr").dense(), before)


@pytest.mark.parametrize("case", DIFFERENT)
def test_whatever_a_forward_pass_reads_counts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, change = DIFFERENT[case]
    model = Net().eval()
    before = identity(model)
    change(model, monkeypatch)
    after = identity(model)
    assert part in [name for name in before if before[name] != after[name]]


def test_what_no_forward_pass_reads_does_not_count() -> None:
    model, other = Net().eval(), Net().eval()
    other.setting.unread = 3.0
    other.losses = [0.5, 0.25]  # type: ignore[assignment]
    assert identity(model) == identity(other)


class Writing(nn.Module):
    """Writes wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 3)
        self.last: Tensor | None = None
        self.calls = 0
        self.masks: dict[int, Tensor] = {}
        self.tally: dict[str, int] = {"calls": 0}
        self.log: list[float] = []
        self.setting = Setting(1.0)
        self.register_buffer("table", None, persistent=False)
        self.scale = 2.0

    @functools.cached_property
    def mask(self) -> Tensor:
        return torch.ones(3) * self.scale

    def fill(self, size: int) -> None:
        self.register_buffer("table", torch.ones(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        SEEN[len(x)] = CALLS
        self.fill(len(x))
        self.calls += 1
        self.tally["calls"] += 1
        self.masks[len(x)] = torch.ones(len(x), 1)
        self.log.append(float(len(x)))
        self.setting.unread += 1
        self.last = last = self.inner(x) * self.masks[len(x)] * self.mask
        setattr(self, "named", len(x))  # noqa: B010
        return last * self.scale + 0.0 * self.tally["calls"] + 0.0 * SEEN[len(x)] + 0.0 * self.log[-1]


def test_a_model_that_was_called_is_the_same() -> None:
    model = Writing().eval()
    before = identity(model)
    for size in (1, 3, 7):
        model(torch.ones(size, 5)).sum().backward()
    assert model.calls == 3
    assert identity(model) == before
    model.scale = 3.0
    assert identity(model)["architecture"] != before["architecture"]


def test_hooks_that_keep_what_they_see() -> None:
    seen: dict[str, Tensor] = {}
    count = 0

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal count
        count += 1
        seen["out"] = out

    model = Net().eval()
    model.inner.register_forward_hook(keep)
    before = identity(model)
    model(torch.ones(2, 5))
    assert count == 1
    assert identity(model) == before


def everything() -> dict[str, str]:
    """Called here and in other processes."""
    torch.set_num_threads(1)
    model = Net().eval()
    model.options = {"set": {"a", "b", "c"}, "nested": {(1, frozenset({"x", "y"})): None}}
    select = lambda out: helper(out)  # noqa: E731
    readout = ntkit.Logits(select=select)
    return {**identity(model, readout=readout), "called": architecture(Writing())}


def test_other_processes_find_the_same() -> None:
    here = everything()
    assert here == everything()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(everything).result() == here
    root = Path(__file__).parents[1]
    script = f"""
import sys
sys.path.insert(0, {str(root)!r})
from tests.test_identity import everything
print(everything())
"""
    for seed in ("1", "2"):  # of the order of sets
        found = subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == str(here)


def test_packed_and_copied_models_are_the_same() -> None:
    pytest.importorskip("cloudpickle")
    import pickle

    class Local(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + helper(x[:, :3]) * local

    local = 3.0
    model = Local().eval()
    assert identity(copy.deepcopy(model)) == identity(model)
    for kept in (model, Net().eval()):
        again = pickle.loads(Parcel.of(kept).content)
        assert identity(again) == identity(kept)


def test_a_readout_by_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(out: Tensor) -> Tensor:
        return helper(out)

    before = describe(ntkit.Logits(select=select))
    assert before == describe(ntkit.Logits(select=select))
    assert len(before) < 200
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 5.0)
    changed = describe(ntkit.Logits(select=select))
    monkeypatch.setattr(sys.modules[__name__], "deeper", other_helper)
    assert len({before, changed, describe(ntkit.Logits(select=select))}) == 3
    assert describe(ntkit.Logits()) == "Logits(select=None)"
    weights = [nn.CrossEntropyLoss(weight=torch.tensor([1.0, w]), reduction="none") for w in (1.0, 2.0)]
    assert len({describe(ntkit.Loss(loss)) for loss in weights}) == 2


def test_values_in_words() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (2,), check_invariants=True)
    values: list[Any] = [
        None, True, 1, 1.0, "1", b"1", (1,), [1, 2], {1}, {1: 2}, {1: 3}, range(3), slice(1, 2), shared, np,
        torch.ones(2), torch.ones(2).double(), torch.ones(2, 1), sparse, torch.zeros(2, device="meta"), torch.float32,
        np.ones(2), np.ones(2, dtype=np.float32), np.array([None, 1], dtype=object), np.float64(1.0),
        torch.tanh, nn.functional.gelu, nn.ReLU, nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), times(1.0), times(2),
        functools.partial(other_helper), functools.partial(times, 1), functools.lru_cache(deeper),
        Setting(1.0), Setting(2.0), Setting(1.0).apply, Setting(2.0).apply, Slotted(1.0), Setting,
        SimpleNamespace(a=1), SimpleNamespace(a=2),
        torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 1.00001),
    ]  # fmt: skip
    words = [describe(value) for value in values]
    assert len(set(words)) == len(words)
    assert not any(" at 0x" in word for word in words)
    assert words == [describe(value) for value in values]
    assert describe({"a": 1, "b": 2}) == describe({"b": 2, "a": 1})
    assert describe(torch.ones(2, 2).T) == describe(torch.ones(2, 2))
    assert describe(torch.Generator().manual_seed(1)) == describe(torch.Generator().manual_seed(2))
    assert digest(["a"]) != digest(["b"])


def test_two_modules_are_not_one_in_two_places() -> None:
    layer = nn.Linear(3, 3)
    once, twice = nn.Sequential(layer, layer), nn.Sequential(layer, copy.deepcopy(layer))
    assert architecture(once) != architecture(twice)


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2
    )
    model = transformers.ViTForImageClassification(config).eval()
    before = architecture(model)
    model(torch.ones(1, 3, 4, 4))
    model.config._name_or_path = "/another/folder"
    assert architecture(model) == before
    model.vit.layers[0].mlp.activation_fn = nn.ReLU()
    assert architecture(model) != before


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 1)
            self.losses: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def training_step(self, batch: Any) -> Tensor:
            loss = self(batch[0]).square().mean()
            self.losses.append(float(loss))
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    torch.manual_seed(0)
    model, fresh = Lit(), Lit()
    fresh.load_state_dict(model.state_dict())
    trainer = lightning.Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 5)), batch_size=2)
    trainer.fit(model, data)
    assert len(model.losses) == 2
    assert identity(model.eval()) == identity(fresh.eval())
