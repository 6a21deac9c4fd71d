"""Tasks on other processes: the same result, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.errors import InputError, ModelError, WorkerError
from ntkit.kernel.store import Store
from ntkit.kernel.tasks import OnDask, Parcel, Processes, Through, as_workers
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
    import subprocess
    import sys

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


class Dying(Executor):
    """Every worker dies."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        from concurrent.futures.process import BrokenProcessPool

        future: Future = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future


def test_workers_that_always_die_are_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"died 5 times without finishing a task.*out of memory"):
        in_tiles().save(tmp_path / "k", workers=Dying())


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

    import pickle

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
