"""Tasks on other processes: the same result, whoever dies on the way."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, StoreError, WorkerError
from ntkit.kernel import store as on_disk
from ntkit.kernel import tasks
from ntkit.kernel.saved import compute
from ntkit.kernel.store import Store
from ntkit.kernel.tasks import OnDask, Parcel, Processes, Through, _work, as_workers, moved, on_gpu
from ntkit.tangent.sketch import Sketch
from tests.test_saved import InTiles, N, examples, in_tiles, network, truth

pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
distributed = pytest.importorskip("distributed")


class Slow(InTiles):
    """Leaves time to be killed."""

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:
        for tile in super().stripe(rows, columns, memory=memory):
            time.sleep(0.15)
            yield tile


def slow() -> Slow:
    return Slow(ntkit.linearize(network()), examples())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", processes=True
        ) as found,
        distributed.Client(found) as client,
    ):
        yield client


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "threads":
        with ThreadPoolExecutor(2) as executor:
            yield executor
    elif request.param == "dask":
        yield request.getfixturevalue("cluster")
    elif request.param == "dask executor":
        yield request.getfixturevalue("cluster").get_executor()
    else:
        yield request.param


def check(saved: ntkit.SavedKernel) -> None:
    torch.testing.assert_close(saved.dense(), truth("full"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("workers", [1, 2, "threads", "dask", "dask executor"], indirect=True)
def test_workers_give_the_same_matrix(workers: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = network()
    kernel = InTiles(ntkit.linearize(model), examples())
    check(kernel.save(tmp_path / "k", workers=workers, progress=lambda *n: seen.append(n)))
    assert seen[0] == (0, 15)
    assert seen[-1] == (15, 15)
    assert not any(p.is_shared() for p in model.parameters())  # sent as a copy, the model is as it was


def in_background(do: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            do()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    return thread, errors


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def begun(path: Path, tiles: int) -> Callable[[], bool]:
    return lambda: Store.exists(path) and Store.open(path).count_records() >= tiles


def test_two_processes_of_a_pool_are_killed(tmp_path: Path) -> None:
    path, me = tmp_path / "k", psutil.Process()
    before = {child.pid for child in me.children()}

    def spawned() -> list[psutil.Process]:
        """The pool's processes; a helper of multiprocessing that is among the children is no worker."""
        new = [child for child in me.children() if child.pid not in before]
        return [child for child in new if "--multiprocessing-fork" in child.cmdline()]

    thread, errors = in_background(lambda: slow().save(path, workers=2))
    for tiles in (1, 4):
        wait_for(begun(path, tiles))
        wait_for(spawned)
        os.kill(spawned()[0].pid, signal.SIGKILL)
    thread.join()
    assert not errors
    check(ntkit.open_kernel(path))


def test_two_workers_of_a_cluster_are_killed(cluster: Any, tmp_path: Path) -> None:
    path = tmp_path / "k"
    kernel = slow()
    thread, errors = in_background(lambda: kernel.save(path, workers=cluster))
    wait_for(begun(path, 1))
    for worker in list(cluster.cluster.workers.values()):  # both at once: what they were sent is lost with them
        os.kill(worker.pid, signal.SIGKILL)
    thread.join()
    assert not errors
    check(ntkit.open_kernel(path))


def test_a_pool_ends_with_its_parent(tmp_path: Path) -> None:
    root, path = Path(__file__).parents[1], tmp_path / "k"
    script = f"""
import sys
sys.path.insert(0, {str(root)!r})
from tests.test_tasks import slow
if __name__ == "__main__":
    slow().save({str(path)!r}, workers=2)
"""
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py")]) as process:
        wait_for(begun(path, 1))
        children = psutil.Process(process.pid).children()
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    check(in_tiles().save(path))


class Lingering(InTiles):
    """Its processes are in the middle of a tile most of the time: its files are there and not in their places."""

    def stripe(self, rows: slice, columns: Sequence[slice], *, memory: int | None = None) -> Iterator[Tensor]:
        if multiprocessing.parent_process() is not None:
            write = on_disk._write

            def slowly(file: Path, content: Any) -> None:
                write(file, content)
                time.sleep(0.5)

            on_disk._write = slowly
            try:
                yield from super().stripe(rows, columns, memory=memory)
            finally:
                on_disk._write = write
        else:
            yield from super().stripe(rows, columns, memory=memory)


def test_a_run_goes_on_beside_what_the_killed_one_has_left_running(tmp_path: Path) -> None:
    root, path = Path(__file__).parents[1], tmp_path / "k"
    script = f"""
import sys
sys.path.insert(0, {str(root)!r})
from tests.test_tasks import Lingering
from tests.test_saved import examples, network
import ntkit
if __name__ == "__main__":
    Lingering(ntkit.linearize(network()), examples()).save({str(path)!r}, workers=2)
"""
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py")]) as process:
        wait_for(lambda: begun(path, 1)() and list(path.glob("*/**/*.partial")))
        children = psutil.Process(process.pid).children()
        process.kill()
    check(in_tiles().save(path))  # at once, beside the children
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    again = ntkit.open_kernel(path)
    again.verify()
    check(again)


def test_a_worker_of_a_cluster_that_an_earlier_run_has_left_stops(cluster: Any, tmp_path: Path) -> None:
    path = tmp_path / "k"
    in_tiles().save(path)
    (path / "records" / "0-1.json").unlink()
    left = Store.open(path)
    with left.locked():
        copied = pickle.loads(pickle.dumps(left))
    check(in_tiles().save(path))
    (path / "records" / "0-1.json").unlink()
    executor = cluster.get_executor(pure=False)
    future = executor.submit(_work, Parcel.of(in_tiles()), compute, (copied, [(0, 1)]))
    with pytest.raises(StoreError, match="another run has begun to write"):
        future.result()
    check(in_tiles().save(path, workers=cluster, memory=2**50))  # for each no less than before


class Dying(Executor):
    """Every worker dies."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future


def test_workers_that_always_die_are_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"died 5 times without finishing a task.*out of memory"):
        in_tiles().save(tmp_path / "k", workers=Through(Dying(), count=1))


class Breaking(ThreadPoolExecutor):
    """Takes some tasks, and then a worker of it has died."""

    def __init__(self, takes: int) -> None:
        super().__init__(1)
        self.takes = takes

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        self.takes -= 1
        if self.takes < 0:
            raise BrokenProcessPool("killed")
        return super().submit(fn, *args, **kwargs)


@pytest.mark.parametrize("takes", [0, 1])
def test_an_executor_that_takes_no_more_tasks(takes: int, tmp_path: Path) -> None:
    path = tmp_path / "k"
    with Breaking(takes) as executor, pytest.raises(WorkerError, match=r"the Breaking takes no more tasks.*killed"):
        in_tiles().save(path, workers=executor)
    assert bool(Store.open(path).finished()) == bool(takes)  # what it has taken is not in vain
    check(in_tiles().save(path))


def test_a_killed_worker_of_a_users_pool(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        thread, errors = in_background(lambda: slow().save(path, workers=executor))
        wait_for(begun(path, 1))
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
        thread.join()
    assert [type(error) for error in errors] == [WorkerError]
    assert "make a new executor" in str(errors[0])
    assert Store.open(path).finished()
    check(in_tiles().save(path))


class Falling(Processes):
    """A pool of ours; of the first, a worker dies while it is given its tasks."""

    started = 0

    def _start(self, parcel: Parcel) -> tuple[Executor, Any]:
        self.started += 1
        return Breaking(2 if self.started == 1 else 100), parcel


def test_a_worker_that_dies_while_tasks_are_handed_out(tmp_path: Path) -> None:
    crew = Falling(1)
    check(in_tiles().save(tmp_path / "k", workers=crew))
    assert crew.started == 2


@pytest.fixture
def elsewhere(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose workers are in another folder than the process that saves."""
    before, here, there = Path.cwd(), tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    cluster.wait_for_workers(2)
    cluster.run(os.chdir, str(there))
    yield cluster
    cluster.run(os.chdir, str(before))


def test_workers_in_another_folder(elsewhere: Any) -> None:
    check(in_tiles().save("k.zarr", workers=elsewhere))
    made = ntkit.FeatureMap(ntkit.linearize(network()), Sketch(16, 0))
    saved = made.save(examples(), "f.zarr", workers=elsewhere)
    torch.testing.assert_close(saved.features(), made(examples()), rtol=1e-10, atol=1e-10)


def test_a_worker_that_does_not_see_the_folder(elsewhere: Any, tmp_path: Path) -> None:
    Path("k.zarr").mkdir()  # of this name each has one of its own, as on a disk that is not shared
    with pytest.raises(StoreError, match=r"no folder k\.zarr for a worker on .* a disk that all of them share"):
        OnDask(elsewhere).run(count_threads, tmp_path, ["a"], lambda: None, place=Path("k.zarr"))
    assert not (tmp_path / "a").exists()


class Negative(nn.Module):
    """Has no gradient where the input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.weight).sum(1, keepdim=True) + 100.0).sqrt()


@pytest.mark.parametrize("workers", [2, "threads", "dask"], indirect=True)
def test_an_error_of_the_model_comes_back_as_it_is(workers: Any, tmp_path: Path) -> None:
    x = examples()
    x[17] = -1e3
    kernel = InTiles(ntkit.linearize(Negative()), x)
    with pytest.raises(ModelError):
        kernel.save(tmp_path / "k", workers=workers)
    assert not ntkit.kernel.store.Store.open(tmp_path / "k").damaged((0, 0))


def test_a_model_that_cannot_be_sent(tmp_path: Path) -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        InTiles(ntkit.linearize(model), examples()).save(tmp_path / "k", workers=2)


def test_models_of_scripts_and_lambdas_are_sent() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 2)
            self.act = lambda x: x.tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.inner(x))

    kernel = ntkit.TangentKernel(
        ntkit.linearize(Local(), readout=ntkit.Logits(select=lambda out: out[:, :1]), parameters="inner.weight"),
        examples(4).float(), examples(3, 2).float(), trace=True, memory=10**8,
    )  # fmt: skip
    again = pickle.loads(Parcel.of(kernel).content)
    assert torch.equal(again.dense(), kernel.dense())
    assert again.identity() == kernel.identity()
    assert again.memory == kernel.memory
    assert again.tangent.parameter_names == ("inner.weight",)


def test_what_a_user_names_as_workers(cluster: Any) -> None:
    with ThreadPoolExecutor(3) as executor:
        assert isinstance(as_workers(executor), Through)
        assert as_workers(executor).count == 3
    assert isinstance(as_workers(cluster), OnDask)
    assert as_workers(cluster).count == 2
    assert as_workers(None).count == 1
    own = Processes(4)
    assert as_workers(own) is own


def test_memory_is_divided_among_the_workers_of_an_executor_of_dask(cluster: Any, tmp_path: Path) -> None:
    in_tiles().save(tmp_path / "k", workers=cluster.get_executor(), memory=2 * 10**8)
    assert Store.open(tmp_path / "k").facts["memory"] == 10**8


def test_an_executor_that_does_not_tell_how_many_workers_it_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Dying does not tell how many.*Through\(executor, count="):
        in_tiles().save(tmp_path / "k", workers=Dying())
    assert Through(Dying(), count=3).count == 3
    with pytest.raises(InputError, match="a positive one: got 0"):
        Through(Dying(), count=0)


def test_workers_of_a_cluster_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        distributed.LocalCluster(
            n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0", processes=False
        ) as found,
        distributed.Client(found) as client,
    ):
        monkeypatch.setattr(tasks, "PATIENCE", 0.1)
        with pytest.raises(InputError, match=r"no workers after .* client\.wait_for_workers"):
            as_workers(client)
        monkeypatch.undo()
        found.scale(3)
        assert as_workers(client).count == 3
        assert as_workers(client.get_executor()).count == 3


def count_threads(folder: Path, name: str) -> Iterator[None]:
    (folder / name).write_text(str(torch.get_num_threads()))
    yield


@pytest.mark.parametrize("count", [1, 2, 64])
def test_processes_of_a_pool_share_the_cores(count: int, tmp_path: Path) -> None:
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (16,)) as executor:
        as_workers(executor).run(count_threads, tmp_path, ["a"], lambda: None)
        after = executor.submit(torch.get_num_threads).result()
    assert int((tmp_path / "a").read_text()) == min(16, max(1, (os.cpu_count() or 1) // count))
    assert count > 1 or after == 16  # which is the user's, and put back


def test_a_copy_on_a_device_has_the_same_kernel() -> None:
    kernel = in_tiles()
    moved = kernel.to("cpu")
    assert moved.tangent.model is not kernel.tangent.model
    assert torch.equal(moved.dense(), kernel.dense())
    assert len(moved.dense()) == 3 * N


# ---------------------------------------------------------------- on GPUs


class Pretending(InTiles):
    """On a GPU, as it says; where it goes, it notes."""

    where = "cuda:0"

    @property
    def device(self) -> torch.device:
        return torch.device(self.where)

    def to(self, device: torch.device | str) -> Any:
        there = copy.copy(self)
        there.where = str(device)
        return there

    def __reduce__(self) -> tuple[Any, ...]:
        return _pretending_again, (*super().__reduce__(), self.where)


def _pretending_again(make: Callable[..., Pretending], parts: tuple[Any, ...], where: str) -> Pretending:
    made = make(*parts)
    made.where = where
    return made


def pretending() -> Pretending:
    return Pretending(ntkit.linearize(network()), examples())


def test_only_what_is_on_a_gpu_is_moved_to_another() -> None:
    cpu, gpu, x = in_tiles(), pretending(), examples()
    shared = (cpu, gpu, (x, "text", gpu))
    which = on_gpu(shared)
    assert which == (False, True, (False, False, True))
    there = moved(shared, which, "cuda:3")
    assert there[0] is cpu
    assert there[2][0] is x
    assert there[1].where == there[2][2].where == "cuda:3"
    assert gpu.where == "cuda:0"
    assert moved(cpu, on_gpu(cpu), "cuda:3") is cpu


@pytest.mark.parametrize(("make", "expected"), [
    (in_tiles, "cpu"), (pretending, "cuda:1"), (lambda: (pretending(), examples()), "cuda:1"),
])  # fmt: skip
def test_processes_take_one_gpu_after_the_other(
    make: Callable[[], Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(tasks, "_die_with", lambda _: None)
    monkeypatch.setattr(tasks._Unpacked, "value", None)
    monkeypatch.setattr(tasks._Unpacked, "name", "")
    parcel = Processes(8)._pack(make())
    sent = pickle.loads(parcel.content)
    assert str((sent[0] if isinstance(sent, tuple) else sent).device) == "cpu"  # not by way of the parent's GPU
    numbers = multiprocessing.get_context("spawn").SimpleQueue()
    numbers.put(5)
    tasks._settle(parcel, torch.get_num_threads(), os.getppid(), numbers)
    value = tasks._Unpacked.value
    if isinstance(value, tuple):
        assert value[1].device.type == "cpu"
        value = value[0]
    assert str(value.device) == expected


def test_features_and_kernels_made_of_kernels_can_be_moved() -> None:
    made = ntkit.FeatureMap(ntkit.linearize(network()), Sketch(16, 0))
    there = made.to("cpu")
    assert there.device == made.device == torch.device("cpu")
    assert there.tangent.model is not made.tangent.model
    assert torch.equal(there(examples()), made(examples()))
    for kernel in (0.5 * in_tiles(), in_tiles() + in_tiles(), in_tiles(readout=ntkit.SumOfLogits()).centred()):
        assert torch.equal(kernel.to("cpu").dense(), kernel.dense())  # type: ignore[attr-defined]
    left, right = pretending(), pretending()
    total = (2.0 * (left + right)).to("cuda:1")  # type: ignore[attr-defined]
    assert total.device == torch.device("cuda:1")
    assert left.where == "cuda:0"


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def note_device(shared: Any, task: tuple[Path, str]) -> Iterator[None]:
    folder, name = task
    first = shared[0] if isinstance(shared, tuple) else shared
    (folder / name).write_text(str(first.device))
    time.sleep(1)  # so that both processes take one
    yield


@cuda
@pytest.mark.parametrize("kind", ["kernel", "scaled", "features"])
def test_two_processes_on_gpus(kind: str, tmp_path: Path) -> None:
    tangent = ntkit.linearize(network().to("cuda"))
    kernel = InTiles(tangent, examples())
    shared: Any = {
        "kernel": kernel, "scaled": 1.0 * kernel, "features": (ntkit.FeatureMap(tangent, Sketch(16, 0)), examples()),
    }[kind]  # fmt: skip
    Processes(2).run(note_device, shared, [(tmp_path, str(i)) for i in range(4)], lambda: None)
    found = {file.read_text() for file in tmp_path.iterdir()}
    assert found == {f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))}


@cuda
def test_matrices_of_processes_on_gpus(tmp_path: Path) -> None:
    on_gpu = InTiles(ntkit.linearize(network().to("cuda")), examples())
    check(on_gpu.save(tmp_path / "g", workers=2))
    check(in_tiles().save(tmp_path / "g"))  # a device is no part of what a matrix is of
    check(in_tiles().save(tmp_path / "c", workers=2))
    made = ntkit.FeatureMap(ntkit.linearize(network().to("cuda")), Sketch(16, 0))
    saved = made.save(examples(), tmp_path / "f", workers=2)
    torch.testing.assert_close(saved.features(), made(examples()).cpu(), rtol=1e-10, atol=1e-10)


@cuda
def test_a_kernel_on_the_cpu_stays_there(tmp_path: Path) -> None:
    Processes(1).run(note_device, in_tiles(), [(tmp_path, "0")], lambda: None)
    assert (tmp_path / "0").read_text() == "cpu"


def test_workers_that_a_cluster_was_asked_for_have_their_part_of_the_memory() -> None:
    """One of three is there: it is given a third, or the others would be too much when they come."""

    class Client:
        cluster = SimpleNamespace(plan={"a", "b", "c"})

        def scatter(self) -> None: ...

        def get_executor(self) -> None: ...

        def scheduler_info(self, n_workers: int) -> dict[str, dict[str, int]]:
            return {"workers": {"a": 0}}

    assert as_workers(Client()).count == 3  # pyright: ignore[reportArgumentType]
    Client.cluster = SimpleNamespace()  # a scheduler by its address: nobody knows
    assert as_workers(Client()).count == 1  # pyright: ignore[reportArgumentType]
