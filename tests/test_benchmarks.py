"""The benchmark measures what it says: the stated networks, peers that are right, results that survive the file."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu, measure, peers, run, table, workloads
from benchmarks.active import results as bought
from benchmarks.cases import CASES, OURS, PARAMETERS, PEERS
from benchmarks.distill import noise
from benchmarks.distill import results as distilled
from benchmarks.dynamics import constancy, overhead
from benchmarks.finetune import results as tuned
from benchmarks.lines import read as read_lines
from benchmarks.machine import environment, slug
from benchmarks.record import Checksum, Job, Record, Sample
from benchmarks.scale import foretold
from benchmarks.scale import table as large
from benchmarks.workloads import WORKLOADS
from ntkit.kernel.forecast import Speeds
from ntkit.kernel.saved import layout_of
from ntkit.solve.pace import Pace
from tests import oracles

SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "W1": (lambda: workloads.mlp(7, 6, 3), lambda: torch.randn(5, 7)),
    "W2": (lambda: workloads.cnn(2, 3), lambda: torch.randn(5, 3, 8, 8)),
    "W3": (lambda: workloads.ResNet18(2, 3), lambda: torch.randn(5, 3, 8, 8)),
    "W4": (
        lambda: workloads.TransformerClassifier(11, 4, 8, 2, 12, 2, 3),
        lambda: torch.randint(11, (5, 4)),
    ),
}


def small(name: str) -> tuple[nn.Module, Tensor]:
    build, draw = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = build().double().eval(), draw()
    return model, x.double() if x.is_floating_point() else x


# ---------------------------------------------------------------- the workloads


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_workload_is_the_stated_one(name: str) -> None:
    workload = WORKLOADS[name]
    model = workload.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        output = model(workload.data(2))
    assert output.shape == (2, 10)
    assert output.isfinite().all()


def test_parameter_counts_are_those_of_the_published_table() -> None:
    millions = {name: round(count / 1e6, 2) for name, count in PARAMETERS.items()}
    assert millions == {"W1": 5.82, "W2": 0.26, "W3": 11.17, "W4": 3.43}


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_workload_is_the_same_every_time(name: str) -> None:
    workload, state = WORKLOADS[name], torch.get_rng_state()
    first, second = workload.model().state_dict(), workload.model().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(workload.data(70)[:3], workload.data(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_statistics_are_not_trivial() -> None:
    for module in WORKLOADS["W3"].model().modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_mean.abs().max() > 0.05
            assert module.weight.std() > 0.05


# ---------------------------------------------------------------- the peers


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("scalars", [peers.logits, peers.sum_of_logits], ids=["full", "pntk"])
def test_peers_agree_with_the_double_loop(name: str, scalars: peers.Scalars) -> None:
    model, x = small(name)
    before = oracles.snapshot(model)
    truth = oracles.entk(model, x, x, scalars, list(model.parameters()))
    for peer in (peers.tutorial, peers.rows):
        for chunk, block in ((None, None), (2, None), (None, 2), (1, 3)):
            kernel = peer(model, x, scalars, chunk=chunk, block=block)
            assert oracles.relative_error(kernel, truth) < 1e-10, (peer.__name__, chunk, block)
    assert oracles.snapshot(model) == before


# ---------------------------------------------------------------- measuring


def job(**changes: object) -> Job:
    return replace(Job("W2", "pntk", "rows", 2, runs=2, seconds=0.0, threads=torch.get_num_threads()), **changes)


def test_measure_reports_time_memory_and_checksum() -> None:
    sample = measure.measure(job())
    assert sample.error is None
    assert len(sample.seconds) == len(sample.cpu_seconds) == 2
    assert sample.peak_mb is not None
    assert sample.peak_mb > 50
    assert sample.checksum is not None
    assert sample.checksum.shape == [2, 2]
    other = measure.measure(job(contender="tutorial", chunk=1, block=1)).checksum
    assert other is not None
    assert other.distance(sample.checksum) < table.TOLERANCE


def test_a_failing_contender_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> measure.Compute:
        raise ImportError("no module\nof that name")

    monkeypatch.setitem(measure.CONTENDERS, "rows", fail)
    sample = measure.measure(job())
    assert sample.error == "ImportError: no module of that name"
    assert sample.seconds == []


def test_a_process_that_dies_is_a_result(tmp_path: Path) -> None:
    bench = run.Bench(Record({}), tmp_path / "r.json", run.Options(), run.Console(quiet=True))
    sample = bench.spawn(job(workload="W9"))
    assert sample.error is not None
    assert "exit code 2" in sample.error
    assert "W9" in sample.error


def test_job_survives_the_command_line() -> None:
    for given in (job(), job(chunk=3, block=7, device="cuda", kind="full", seconds=0.25)):
        assert measure.parse(given.arguments()) == given


def test_checksum_sees_a_difference() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(40, 40, generator=generator)
    noise = torch.randn(40, 40, generator=generator)
    own = measure.checksum(kernel)
    assert own.distance(own) == 0
    assert 0.003 < measure.checksum(kernel + 0.01 * noise).distance(own) < 0.1
    assert math.isnan(measure.checksum(kernel * math.nan).distance(own))
    # more examples begin with the same ones: compared by the corner
    assert own.distance(measure.checksum(kernel[:20, :20])) == 0


# ---------------------------------------------------------------- the record and the table


def samples() -> list[Sample]:
    case = CASES[0]
    sums = Checksum([256, 256], 2.0, 1.0, [[1.0, 0.5], [0.5, 1.0]], [0.25, -1.5])
    made = []
    for number in range(3):
        slow = 1.0 + number  # the machine slows down: a ratio within a round does not see it
        for name, seconds in ((OURS, 0.02), ("tutorial", 8.0), ("rows", 2.0)):
            each = Job(case.workload, case.kind, name, case.examples)
            seconds_list = [slow * seconds, slow * seconds * 1.5, slow * seconds * 0.5]
            made.append(
                Sample(each, "round", number, seconds_list, seconds_list, 300.0 + number, 50.0, sums, others=0.5)
            )
    return made


def test_record_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    failed = Sample(Job("W4", "full", "rows", 8), error='RuntimeError: "odd" [ text ]', stage="scout")
    record = Record(environment(2, "cpu"), [*samples(), failed])
    record.summary = [table.reduce(CASES[0], record.samples).as_json()]
    record.write(path)
    again = Record.read(path)
    assert again == record
    again.write(path)
    assert Record.read(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


def test_record_replaces_an_attempt() -> None:
    record = Record({}, samples())
    again = replace(record.samples[0], seconds=[9.0])
    record.add(again)
    assert len(record.samples) == 9
    assert record.find(again.job, "round", 0) == again


def test_row_takes_ratios_within_rounds_and_checks_the_bars() -> None:
    row = table.reduce(CASES[0], samples())
    assert row.ratios == pytest.approx({"tutorial": 400, "rows": 100})
    assert row.results[OURS].peak_mb == 302
    assert row.results[OURS].runs == 9
    checks = row.checks()
    assert checks["tutorial"]
    assert not checks["rows"]
    assert checks["peak_mb"]
    assert checks[f"agrees: {OURS}"]
    assert json.loads(json.dumps(row.as_json())) == row.as_json()


@pytest.mark.parametrize(
    ("planned", "kept"), [(150.0, True), (151.0, False), (67.0, True), (66.0, False), (None, None)]
)
def test_memory_is_what_was_planned(planned: float | None, kept: bool | None) -> None:
    grown = [replace(s, growth_mb=100.0, planned_mb=planned if s.job.contender == OURS else None) for s in samples()]
    assert table.reduce(CASES[0], grown).checks().get("planned_mb") is kept


def test_ours_says_what_it_will_take_and_peers_do_not() -> None:
    planned = measure.measure(job(contender=OURS)).planned_mb
    assert planned is not None
    assert planned > 1
    assert measure.measure(job()).planned_mb is None


def test_row_without_ours_and_with_an_error() -> None:
    theirs = [sample for sample in samples() if sample.job.contender != OURS]
    ours = Sample(Job("W1", "pntk", OURS, 256), error="ImportError: not yet")
    row = table.reduce(CASES[0], [*theirs, ours])
    assert row.ratios == {}
    assert row.results[OURS].error == "ImportError: not yet"
    assert not row.checks()[f"runs: {OURS}"]
    console = run.Console(record=True, width=160, file=io.StringIO())
    console.print(table.render([row], "cpu"))
    assert "not yet" in console.export_text()


def test_scouts_choose_the_fastest_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Job] = []

    def spawn(self: run.Bench, job: Job) -> Sample:
        tried.append(job)
        return Sample(job, seconds=[1.0 + abs((job.chunk or 256) - 32) + (0 if job.block == 64 else 1)], peak_mb=1.0)

    monkeypatch.setattr(run.Bench, "spawn", spawn)
    options = run.Options(memory_gb=7.0, patience=0.0)
    bench = run.Bench(Record({}), tmp_path / "r.json", options, run.Console(quiet=True))
    best = bench.scout(CASES[0], bench.job(CASES[0], "rows"))
    # the gradients of 256 examples are 6 GB and fit once
    assert [(job.chunk, job.block) for job in tried] == [(None, None), (32, None), (16, None), (32, 128)]
    assert (best.chunk, best.block) == (32, None)
    tried.clear()
    best = bench.scout(CASES[0], bench.job(CASES[0], "tutorial"))
    # both sides do not fit whole
    assert [(job.chunk, job.block) for job in tried] == [(None, 128), (32, 128), (16, 128), (32, 64)]
    assert (best.chunk, best.block) == (32, 64)
    tried.clear()
    bench.scout(CASES[0], bench.job(CASES[0], "tutorial"))
    assert tried == []


def test_resumed_run_keeps_what_was_measured_and_repeats_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fails = tmp_path / "r.json", True
    tried: list[Job] = []

    def spawn(self: run.Bench, job: Job) -> Sample:
        tried.append(job)
        if job.contender == OURS and fails:
            return Sample(job, error="ImportError: not yet")
        return Sample(job, seconds=[1.0, 2.0], peak_mb=1.0, growth_mb=0.5)

    monkeypatch.setattr(run.Bench, "spawn", spawn)
    command = ["--only", "W4 pntk", "--patience", "0", "--out", str(path)]
    assert run.main(command) == 0
    first = len(tried)
    assert run.main(command) == 2  # nothing is overwritten
    fails = False
    tried.clear()
    assert run.main([*command, "--resume"]) == 0
    assert first > 9
    assert {job.contender for job in tried} == {OURS}
    assert len(tried) == 3
    row = Record.read(path).summary[0]
    assert set(row["ratios"]) == set(PEERS)


def test_interrupted_run_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, left = tmp_path / "r.json", [3]

    def spawn(self: run.Bench, job: Job) -> Sample:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return Sample(job, seconds=[1.0], peak_mb=1.0)

    monkeypatch.setattr(run.Bench, "spawn", spawn)
    assert run.main(["--patience", "0", "--out", str(path)]) == 130
    assert len(Record.read(path).samples) == 3


def test_cases_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [case.name for case in run.chosen(["w2"])] == ["W2 pntk N=128", "W2 full N=32"]
    assert [case.name for case in run.chosen(["W1 pntk N=20,000"])] == ["W1 pntk N=20,000"]
    assert run.chosen(None) == list(CASES)
    assert run.main(["--only", "W7"]) == 2
    assert "W7" in capsys.readouterr().err


def test_results_say_what_machine_and_not_whose() -> None:
    here = environment(2, "cpu")
    assert {"cpu", "cores", "torch", "threads", "date", "python"} <= set(here)
    assert slug(here | {"cpu": "AMD EPYC, avx2", "cores": 2}) == "amd-epyc-2-cores"
    assert slug(here | {"cpu": "AMD EPYC", "cores": 2, "device": "cuda"}) == "amd-epyc-2-cores-cuda"


def test_scheduler_is_a_small_process() -> None:
    # a child's peak memory, as Linux reports it, begins at its parent's
    check = "import sys, benchmarks.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=run.ROOT, check=False).returncode == 0


def test_readme_has_the_newest_results() -> None:
    newest = Record.read(max(run.RESULTS.glob("*-cores.json")))
    rows = [table.reduce(case, newest.samples) for case in CASES]
    assert table.markdown(rows) in (run.ROOT / "README.md").read_text()


def test_the_page_on_active_learning_has_what_was_found() -> None:
    page = (run.ROOT / "docs/active.md").read_text()
    tables = bought.tables()
    assert len(tables) >= 5
    assert all(len(rows) > 2 for rows in tables)
    assert not [line for rows in tables for line in rows if line not in page]


def shown(page: str, rows: list[str]) -> bool:
    """Whether a page has a table, with these rows and no others."""
    text = (run.ROOT / page).read_text()
    assert len(rows) > 2, f"a table of {page} has no row: is its record gone?"
    return "\n\n" + "\n".join(rows) + "\n\n" in text + "\n"


def test_pages_have_what_the_large_runs_found() -> None:
    assert len(large.table()) > len(large.HEAD) + len(large.walls())
    assert shown("README.md", large.table())
    for rows in (large.table(), large.accuracies(), large.projections(), large.forms()):
        assert shown("docs/scale.md", rows)
    for rows in (large.scaling(), large.clusters()):
        assert shown("docs/clusters.md", rows)


@pytest.mark.parametrize("lost", ["solve-pntk-20000", "full-entk-4000", "sketched-fashion", "sketch-forms", "workers"])
def test_a_record_that_is_gone_is_noticed(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are still on the pages."""
    found = large.found
    monkeypatch.setattr(large, "found", lambda name: None if name == lost else found(name))
    with pytest.raises(AssertionError):
        test_pages_have_what_the_large_runs_found()


def test_walls_are_arithmetic() -> None:
    cifar, imagenet = large.walls()
    assert cifar.endswith("| 50,000 | | | 2.0 TB |")
    assert round((50_000 * 10) ** 2 * 8 / 2**40, 1) == 1.8
    assert imagenet.endswith("| 1,281,167 | | | 13.1 million TB |")
    assert round((1_200_000 * 1000) ** 2 * 8 / 1e18, 1) == 11.5
    assert all("estimate" in row for row in large.walls())
    assert not any("estimate" in row for row in large.table()[: -len(large.walls())])


def test_the_planner_tells_the_bytes_of_the_large_runs() -> None:
    """Its times depend on the machine; these do not."""
    pace, few = Pace(Speeds(1e-3, 1e-6, ""), Speeds(1e-3, 1e-6, ""), 1e-3, 1e-3, 1e11, 2), foretold.kernel(examples=4)
    for n in (20_000, 50_000):
        layout, exact = layout_of(few, "float32", foretold.MEMORY, (n, n)), foretold.record(f"exact-pntk-{n}")
        assert (layout.edge[0], layout.count) == (exact["edge"], exact["tiles"])
    pairs = [pair for pair in foretold.pntk(pace, few) if pair.kind == "bytes"]
    assert len(pairs) == 7
    for pair in pairs:
        allowed = (1.0, 1.5) if "at most" in pair.what else (0.97, 1.03)
        assert allowed[0] <= pair.told / pair.taken <= allowed[1], str(pair)


def test_page_has_what_a_gpu_took() -> None:
    page = (run.ROOT / "benchmarks/README.md").read_text()
    record = json.loads((run.RESULTS / "2026-11-27-nvidia-h200.json").read_text())
    lines = gpu.markdown(record)
    assert len(lines) == 18
    for line in lines:
        assert line in page
    assert all(case["largest_difference"] is None or case["largest_difference"] < 1e-3 for case in record["cases"])


def test_table_for_people_marks_what_was_missed() -> None:
    lines = table.markdown([table.reduce(CASES[0], samples())]).splitlines()
    assert lines[0] == "|  | W1 pNTK |"
    assert lines[3] == "| times faster than the tutorial | 400 (240) |"
    assert lines[4] == "| times faster than the hand-written way | 100 (150) \N{BALLOT X} |"
    assert lines[5].endswith("| 302 (400) |")


def test_the_page_on_dynamics_has_what_recording_costs() -> None:
    page = (run.ROOT / "docs/dynamics.md").read_text()
    found = json.loads((overhead.RESULTS / "overhead.json").read_text())
    rows = overhead.table()
    assert len(rows) == 2 + len(overhead.BATCHES)
    assert not [line for line in rows if line not in page]
    disk = found["disk"]
    assert f"Writing takes {disk['write_ms']:.1f} ms, forcing it to the disk {disk['fsync_ms']:.0f} ms" in page
    for line in found["lines"]:  # what the page says in words
        assert (line["overhead"] < 0.1) == (line["batch"] >= 512)
        assert line["overhead"] < 0.7 * line["model_as_it_is"]


def test_the_page_on_dynamics_has_how_kernels_settle_with_width() -> None:
    """Slopes of the recorded networks, on both sides: 1/2 or more by theory, 1 for the leading term of one layer."""
    assert constancy.sentence() in (run.ROOT / "docs/dynamics.md").read_text()
    found = json.loads((constancy.RESULTS / "constancy.json").read_text())
    for name, least, most in (("scaled", -1.1, -0.45), ("usual", -2.1, -1.4)):
        lines = found[name]["lines"]
        assert sorted({line["width"] for line in lines}) == list(constancy.WIDTHS)
        assert len(lines) == len(constancy.WIDTHS) * constancy.SEEDS
        for key in ("drift", "gap"):
            x, y = (torch.tensor([line[k] for line in lines]).double().log() for k in ("width", key))
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
            assert slope == pytest.approx(found[name][f"{key}_slope"], abs=2e-3)
            assert least < slope < most


def test_pages_on_distillation_and_fine_tuning_have_what_was_found() -> None:
    page = (run.ROOT / "docs/distill.md").read_text()
    tables = [distilled.mixed_table(), distilled.named_table(), distilled.memory_table(), distilled.storage_table()]
    tables += [distilled.noise_table(task) for task in noise.TASKS]
    other = (run.ROOT / "docs/finetune.md").read_text()
    tuned_tables = [tuned.trends_table(), tuned.foreseen_table(), tuned.backbones_table(), tuned.ranks_table()]
    tuned_tables += [tuned.probing_table("linear"), tuned.trends_table("minilm")]
    tuned_tables += [tuned.probing_table(variant, "minilm") for variant in ("full", "LoRA")]
    tuned_tables += [tuned.probing_table("linear", "cifar"), tuned.trends_table("cifar")]
    assert tuned.ratios() in other
    for text, found in ((page, tables), (other, tuned_tables)):
        assert all(len(rows) > 2 for rows in found)
        assert not [line for rows in found for line in rows if line not in text]


def test_a_line_that_a_killed_run_left_half_written_is_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert read_lines(file) == []
    file.write_text('{"seed": 0}\n{"seed": 1}\n{"se')
    assert read_lines(file) == [{"seed": 0}, {"seed": 1}]
    with file.open("a") as more:
        more.write('{"seed": 2}\n')
    assert read_lines(file) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
