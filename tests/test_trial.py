"""Where the examples are, found from the plain run or from a run of its own."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkit
from ntkit.tangent import trial
from ntkit.tangent.layout import ExampleAxis
from tests.cases import CASES, Case, Net, normal

MERGED = [
    "attention/batch_first", "attention/batch_second", "attention/bias_kv", "encoder/layer", "encoder/stack_padded",
    "shape/flattened_positions", "shape/flattened_time_first", "shape/windows_in_the_batch", "shape/pairs_in_the_batch",
    "exotic/routed_tokens",
]  # fmt: skip


def script(case: Case, monkeypatch: pytest.MonkeyPatch, *, keeps: bool) -> tuple[list, int]:
    """What a trial finds out, and how many runs it makes to see where the examples are."""
    runs = []

    class Counted(trial._Witness):
        def __init__(self, *args: object) -> None:
            runs.append(1)
            super().__init__(*args)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(trial, "_Witness", Counted)
        if not keeps:
            patch.setattr(trial._Log, "_may_be_merged", lambda *_: False)
        tangent = ntkit.linearize(case.build(), readout=ntkit.Logits(select=case.select), parameters=case.parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tangent.anatomy(case.data(3))
    return [(step.name, step.operands, step.outputs) for step in found.script], len(runs)


@pytest.mark.parametrize("name", MERGED)
def test_the_plain_run_says_what_another_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    kept, few = script(case, monkeypatch, keeps=True)
    seen, more = script(case, monkeypatch, keeps=False)
    assert kept == seen
    merged = [axis.after > 1 for _, operands, outputs in kept for axis in (*operands, *outputs) if axis is not None]
    before = [axis.before > 1 for _, operands, outputs in kept for axis in (*operands, *outputs) if axis is not None]
    assert any(merged) or any(before), "no case of it"
    assert more
    # to the third example, which sends it no token, what an expert gives looks as if it were made of parameters alone
    assert bool(few) == (name == "exotic/routed_tokens")


def test_another_axis_is_as_long_as_there_are_examples() -> None:
    """(1, T*N, d) has an axis of length one that is not the examples': the plain run cannot know, another run can."""
    layer, head = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
    case = Case(
        "another axis", lambda: Net(
            lambda m, x: m.head(m.layer(x.reshape(1, -1, 3)).tanh().reshape(x.shape[0], 4, 5).mean(1)),
            layer=layer, head=head,
        ), normal(4, 3),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        found, runs = script(case, patch, keeps=True)
    assert ExampleAxis(1, 1, 4) in found[0][1]
    assert runs == 1
    model, x = case.build(), case.data(4)
    rows = torch.stack([
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(x)[n, k], list(model.parameters()))])
        for n in range(4) for k in range(2)
    ])  # fmt: skip
    assert torch.allclose(ntkit.empirical_ntk(model, x), rows @ rows.T, rtol=1e-10)


def test_weights_made_of_parameters() -> None:
    """The plain run knows them too."""
    torch.manual_seed(0)
    case = Case(
        "derived", lambda: Net(
            lambda m, x: m.head(F.linear(x.reshape(-1, 3), m.w.T * 2).reshape(x.shape[0], 4, 5).tanh().mean(1)),
            w=nn.Parameter(torch.randn(3, 5)), head=nn.Linear(5, 2),
        ).double(), normal(4, 3),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        found, runs = script(case, patch, keeps=True)
    assert any(ExampleAxis(0, 1, 4) in operands for _, operands, _ in found)
    assert runs == 0
