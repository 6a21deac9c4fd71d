"""The study, its page and its files: numbers against plain algebra, sentences against numbers, whole files or none."""

from __future__ import annotations

import ast
import copy
import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.errors import InputError
from ntkit.report import pictures
from ntkit.report.demo import AFTER, BEFORE, Demo, DemoResult, run_demo
from ntkit.report.files import as_json, replacing, write_folder
from ntkit.report.inputs import parse_bytes, parse_readout
from ntkit.report.page import Card, Figure, Page, Section, Strip, Table, Tile, render
from ntkit.report.story import summary
from ntkit.report.words import number, percent, signed
from ntkit.uses.convergence import EXPECTED_SLOPE, convergence
from ntkit.uses.digits import digits, small_cnn, train
from ntkit.uses.study import FULL, PSEUDO, TRACE, Effort, Kind, Study, Task, random_signs, study

SMALL = Demo(
    channels=4, epochs=2, train=60, test=40, compared=12, sampled=6, widths=(8, 32), seeds=(0, 1), width_examples=6
)


class Steps:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.parts: list[tuple[int, int]] = []

    def step(self, message: str) -> None:
        self.steps.append(message)

    def part(self, done: int, total: int) -> None:
        self.parts.append((done, total))


class Reader(HTMLParser):
    """Collects the text, the tags and the addresses of a page, and fails where tags do not match."""

    EMPTY = ("meta", "img", "path", "use", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for n, v in attrs if n in {"src", "href", "xlink:href", "srcset", "data"}]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, Steps]:
    folder = tmp_path_factory.mktemp("demo") / "page"
    listener = Steps()
    return run_demo(folder, demo=SMALL, listener=listener), folder, listener


# ---------------------------------------------------------------- the study against plain algebra


def small_task(outputs: int = 3, *, classes: bool = True) -> tuple[Task, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    values = x @ torch.randn(5, outputs, generator=generator, dtype=torch.float64)
    y = values.argmax(1) if classes else values.sin()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, outputs)).double().eval()
    return Task(x[:20], y[:20], x[20:], y[20:], outputs), model


@cache
def small_study() -> tuple[Study, Task, nn.Module]:
    task, model = small_task()
    effort = Effort(compared=8, sampled=8, main=(PSEUDO, TRACE))
    generator = torch.Generator().manual_seed(0)
    return study({"now": model}, task, effort=effort, generator=generator), task, model


def dense(model: nn.Module, kind: Kind, x: torch.Tensor, other: torch.Tensor | None = None) -> np.ndarray:
    return ntkit.empirical_ntk(model, x, other, readout=kind.readout, trace=kind.trace).numpy()


@pytest.mark.parametrize(("kind", "examples"), [(FULL, 8), (PSEUDO, 8), (TRACE, 8), (PSEUDO, 20), (TRACE, 20)])
def test_a_fit_is_kernel_ridge_regression(kind: Kind, examples: int) -> None:
    found, task, model = small_study()
    fit = found.states[0].fit(kind.label, examples)
    x = task.x_train[:examples]
    k, cross = dense(model, kind, x), dense(model, kind, task.x_test, x)
    y = np.eye(3)[task.y_train[:examples].numpy()] - 1 / 3
    ridge = fit.relative_ridge * np.trace(k) / len(k)
    columns = y.reshape(len(k), -1)

    def predicted(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        square = k[np.ix_(kept, kept)] + ridge * np.eye(len(kept))
        return (rows[:, kept] @ np.linalg.solve(square, columns[kept])).reshape(-1, 3)

    everything = np.arange(len(k))
    test = (predicted(cross, everything).argmax(1) == task.y_test.numpy()).mean()
    assert fit.test_score == pytest.approx(test)
    assert fit.rows == len(k)
    block = len(k) // examples
    left_out = [
        predicted(k[n * block : (n + 1) * block], np.delete(everything, range(n * block, (n + 1) * block)))
        for n in range(examples)
    ]
    assert fit.loo_error == pytest.approx(((y - np.concatenate(left_out)) ** 2).sum(1).mean(), rel=1e-6)


def test_distance_is_the_frobenius_error_of_the_kronecker_product() -> None:
    found, task, model = small_study()
    x = task.x_train[:8]
    full = dense(model, FULL, x)
    for kind in (PSEUDO, TRACE):
        stand_in = np.kron(dense(model, kind, x), np.eye(3))
        expected = np.linalg.norm(full - stand_in) / np.linalg.norm(full)
        assert found.states[0].kernel(kind.label).error == pytest.approx(expected, rel=1e-9)


def test_the_trace_kernel_is_the_floor() -> None:
    state = small_study()[0].states[0]
    assert all(
        state.kernel("trace").error <= facts.error + 1e-12 for facts in state.kernels if facts.label != FULL.label
    )


def test_the_ridge_check_is_the_test_error() -> None:
    found, task, model = small_study()
    check = found.states[0].ridge_check
    assert (check.label, check.examples) == ("pNTK", 20)
    k, cross = dense(model, PSEUDO, task.x_train), dense(model, PSEUDO, task.x_test, task.x_train)
    y, truth = (np.eye(3)[t.numpy()] - 1 / 3 for t in (task.y_train, task.y_test))
    for place in (12, 20, 30):
        ridge = check.relative[place] * np.trace(k) / len(k)
        predicted = cross @ np.linalg.solve(k + ridge * np.eye(20), y)
        assert check.test[place] == pytest.approx(((predicted - truth) ** 2).sum(1).mean(), rel=1e-6)
    assert check.regret >= 1


def test_layers_share_the_whole_trace_and_similarity_is_centred_cosine() -> None:
    state = small_study()[0].states[0]
    assert sum(state.layers.values()) == pytest.approx(1)
    assert list(state.layers) == ["0", "2"]
    assert state.similarity is not None
    assert torch.allclose(state.similarity.cosines.diagonal(), torch.ones(8, dtype=torch.float64))
    assert float(state.similarity.cosines.abs().max()) <= 1 + 1e-12
    assert state.similarity.classes.tolist() == sorted(state.similarity.classes.tolist())


def test_evidence_names_the_largest_terms() -> None:
    found, task, model = small_study()
    fit = found.states[0].fit("pNTK", 20)
    k, cross = dense(model, PSEUDO, task.x_train), dense(model, PSEUDO, task.x_test, task.x_train)
    y = np.eye(3)[task.y_train.numpy()] - 1 / 3
    weights = np.linalg.solve(k + fit.relative_ridge * np.trace(k) / 20 * np.eye(20), y)
    for evidence in found.states[0].evidence:
        alike, votes = cross[evidence.test] - cross.mean(0), weights[:, evidence.predicted]
        terms = np.sort(np.where((alike > 0) & (votes > 0), alike * votes, 0))[::-1][:5]
        np.testing.assert_allclose(evidence.terms, terms[terms > 0], rtol=1e-6)
        np.testing.assert_array_equal(evidence.classes, task.y_train[list(evidence.train)])


def test_drift_between_equal_states_is_nothing() -> None:
    task, model = small_task()
    found = study(
        {"a": model, "b": copy.deepcopy(model)}, task, effort=Effort(compared=6, sampled=4), generator=torch.Generator()
    )
    for moved in found.movements:
        assert moved.drift.relative_change == pytest.approx(0, abs=1e-12)
        assert moved.cka == pytest.approx(1)


def test_one_output_has_no_cheaper_kernel() -> None:
    task, model = small_task(1, classes=False)
    found = study({"now": model}, task, effort=Effort(compared=6), generator=torch.Generator())
    assert [facts.label for facts in found.states[0].kernels] == [FULL.label]
    assert found.score_name == "R²"
    assert found.states[0].similarity is None
    assert found.states[0].fit(FULL.label, 20).test_score <= 1


def test_all_examples_may_be_compared() -> None:
    task, model = small_task()
    found = study({"now": model}, task, effort=Effort(compared=99, sampled=4), generator=torch.Generator())
    assert found.compared == 20
    assert [(fit.label, fit.examples) for fit in found.states[0].fits].count(("pNTK", 20)) == 1


def test_a_long_ridge_search_uses_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkit.uses.study.examine.RIDGE_ROWS", 9)
    task, model = small_task()
    found = study({"now": model}, task, effort=Effort(compared=6, sampled=4), generator=torch.Generator())
    assert found.states[0].fit("pNTK", 20).ridge_from == 9
    assert found.states[0].fit(FULL.label, 6).ridge_from == 3
    assert found.states[0].ridge_check.examples == 9


def test_a_dear_full_kernel_is_computed_for_fewer_examples() -> None:
    task, model = small_task()
    effort = Effort(compared=16, sampled=4, full_flops=1e4)
    found = study({"now": model}, task, effort=effort, generator=torch.Generator())
    assert found.compared == 8
    assert found.compared_test == 10
    longer = Task(task.x_train, task.y_train, task.x_test.repeat(15, 1), task.y_test.repeat(15), 3)
    found = study({"now": model}, longer, effort=effort, generator=torch.Generator())
    assert found.compared_test == 100
    assert found.states[0].fit(FULL.label, 8).test_examples == 100
    assert found.states[0].fit("pNTK", 20).test_examples == 150


def test_a_study_needs_states_and_examples() -> None:
    task, model = small_task()
    with pytest.raises(InputError, match="got none"):
        study({}, task, generator=torch.Generator())
    short = Task(task.x_train[:1], task.y_train[:1], task.x_test, task.y_test, 3)
    with pytest.raises(InputError, match="two examples at least: got compared=1"):
        study({"now": model}, task, effort=Effort(compared=1), generator=torch.Generator())
    with pytest.raises(InputError, match="1 training, 10 test"):
        study({"now": model}, short, generator=torch.Generator())


# ---------------------------------------------------------------- anchors of papers.md, section 11


def test_the_error_of_the_pntk_falls_with_width() -> None:
    x = digits(torch.Generator().manual_seed(0)).x_train[:16]
    found = convergence(x)
    low, high = EXPECTED_SLOPE
    assert low <= found.sum_slope.value <= high
    assert low <= found.trace_slope.value <= high
    assert found.as_expected
    assert found.largest_slope.value < -0.3
    assert len(found.points) == 12


def test_the_sum_of_logits_degrades_under_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    data = digits(generator)
    task = Task(data.x_train[:600], data.y_train[:600], data.x_test[:50], data.y_test[:50], 10)
    fresh = small_cnn(generator, channels=16)
    trained = copy.deepcopy(fresh)
    losses = train(trained, task.x_train, task.y_train, generator=generator, epochs=15)
    assert losses[-1] < losses[0] / 4
    assert not trained.training
    head, start = trained.get_submodule("head"), fresh.get_submodule("head")
    change = (head.get_parameter("weight") - start.get_parameter("weight")).detach()
    assert float(change.sum(0).abs().max()) < 1e-4 * float(change.abs().sum(0).max())  # the conserved direction
    effort = Effort(compared=20, sampled=12, reduced=(PSEUDO, TRACE, random_signs(8, generator)))
    before, after = study({"a": fresh, "b": trained}, task, effort=effort, generator=generator).states
    sizes = [state.kernel("pNTK").mean_diagonal / state.kernel("trace").mean_diagonal for state in (before, after)]
    assert sizes[1] < 0.7 * sizes[0]
    assert after.kernel("pNTK").error > before.kernel("pNTK").error + 0.1
    assert after.kernel("8 random signs").error < after.kernel("pNTK").error


def test_a_slope_needs_two_widths() -> None:
    with pytest.raises(InputError, match="two widths"):
        convergence(torch.zeros(3, 4), widths=(8,))


# ---------------------------------------------------------------- the page


def test_the_demo_says_what_it_does(shown: tuple[DemoResult, Path, Steps]) -> None:
    result, folder, listener = shown
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "results.json"]
    assert any("training a small network" in step for step in listener.steps)
    assert any(step.startswith(BEFORE) for step in listener.steps)
    assert any(step.startswith(AFTER) for step in listener.steps)
    assert all(0 <= done <= total for done, total in listener.parts)
    assert result.study.compared == 12


def test_the_page_is_whole_and_alone(shown: tuple[DemoResult, Path, Steps]) -> None:
    text = (shown[1] / "index.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.tags.count("svg") >= 9
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text
    assert "nan" not in page.text.lower().split()


def test_every_sentence_takes_its_numbers_from_the_results(shown: tuple[DemoResult, Path, Steps]) -> None:
    result, folder, _ = shown
    text = Reader((folder / "index.html").read_text(encoding="utf-8")).text
    for state in result.study.states:
        assert percent(state.test_score) in text
        for facts in state.kernels:
            if facts.fidelity is not None:
                assert f"{100 * facts.fidelity.error:.1f}±{100 * facts.fidelity.standard_error:.1f}%" in text
            assert number(facts.spectrum.condition_number) in text
    assert signed(result.convergence.sum_slope.value) in text
    whole = result.study.movements[0].cka
    assert whole is not None
    assert percent(whole, 0) in text


def test_the_results_are_plain_json(shown: tuple[DemoResult, Path, Steps]) -> None:
    result, folder, _ = shown
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found["demo"]["channels"] == SMALL.channels
    assert found["made"]["torch"] == torch.__version__
    assert found["study"]["states"][1]["test_score"] == pytest.approx(result.study.states[1].test_score)
    assert len(found["study"]["states"][0]["kernels"][0]["spectrum"]["eigenvalues"]) == 120
    assert len(found["convergence"]["points"]) == 4


def test_the_demo_is_the_same_every_time(shown: tuple[DemoResult, Path, Steps], tmp_path: Path) -> None:
    again = run_demo(tmp_path / "page", demo=SMALL)
    assert again.losses == shown[0].losses
    first, second = (r.study.states[1].kernel("pNTK").fidelity for r in (shown[0], again))
    assert first == second


def test_the_summary_has_a_row_for_each_kernel(shown: tuple[DemoResult, Path, Steps]) -> None:
    table = summary(shown[0].study)
    assert len(table.rows) == 2 * (2 + 5)
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_text_is_escaped() -> None:
    nasty = "<script>alert('x')</script> & more"
    page = Page(
        title=nasty,
        lead=nasty,
        cards=(Card(nasty, nasty),),
        findings=(nasty,),
        sections=(
            Section(
                nasty,
                (nasty,),
                (Figure("<svg></svg>", nasty),),
                (Table(nasty, (nasty,), ((nasty,),)),),
                (Strip(Tile("data:,", nasty), True, (Tile("data:,", nasty),)),),
                (nasty,),
            ),
        ),
        footer=nasty,
    )
    found = Reader(render(page))
    assert "script" not in found.tags
    assert found.text.count("alert('x')") == 16


def test_thumbnails_are_for_images_alone() -> None:
    for shape in ((8, 8), (1, 8, 8), (3, 9, 7)):
        address = pictures.thumbnail(torch.rand(shape))
        assert address is not None
        assert address.startswith("data:image/png;base64,")
    assert pictures.thumbnail(torch.zeros(1, 8, 8)) is not None
    for shape in ((8,), (2, 8, 8), (3, 2, 2), (1, 1, 8, 8)):
        assert pictures.thumbnail(torch.rand(shape)) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.1234, "0.123"),
        (12.34, "12.3"),
        (1234.4, "1,234"),
        (1.2e6, "1.2·10⁶"),
        (3.4e-5, "3.4·10⁻⁵"),
        (math.inf, "∞"),
        (math.nan, "not defined"),
    ],
)
def test_numbers_in_words(value: float, text: str) -> None:
    assert number(value) == text


# ---------------------------------------------------------------- files and options


def test_json_has_no_infinities() -> None:
    assert json.loads(as_json({"a": math.inf, "b": [math.nan, 1.5], "c": torch.tensor([1, 2])})) == {
        "a": None,
        "b": [None, 1.5],
        "c": [1, 2],
    }


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_folder(tmp_path / "new", {"a": "fine", "b": "\ud800"}, force=False)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "x/new", {"a": "fine"}, force=False)
    assert (tmp_path / "x/new/a").read_text() == "fine"
    with pytest.raises(InputError, match="exists"):
        write_folder(tmp_path / "x/new", {"a": "other"}, force=False)
    assert (tmp_path / "x/new/a").read_text() == "fine"


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("2.5 GB", 25 * 10**8), ("1GiB", 2**30), ("1000", 1000), ("3k", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "logits:3", "single:", "single:x", "single:-1", "random:1.5", "Sum"])
def test_read_outs_that_mean_nothing(text: str) -> None:
    with pytest.raises(InputError, match="unknown read-out"):
        parse_readout(text)


@pytest.mark.parametrize("folder", ["src", "examples", "benchmarks"])
def test_every_legend_is_told_its_place(folder: str) -> None:
    """matplotlib warns of a place that is left to it and takes a second to find, as on a busy machine."""
    told, files = [], sorted((Path(__file__).parents[1] / folder).rglob("*.py"))
    for path in files:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "legend":
                assert "loc" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
                told.append(call)
    assert told
