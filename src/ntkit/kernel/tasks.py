"""Independent tasks on one process or many: here, on a pool of processes, on any executor, or on a Dask cluster.

A task is a plain function of something large that all tasks share (a kernel: the network and the data) and of something
small that says which part is meant. The large thing is sent once to every process that works, never once for a task
where that can be helped. Workers may die: their tasks are given to others.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, Union

import torch

from ntkit.errors import InputError, StoreError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
# A function of what is shared and of one task, that stops for breath after each piece of it.
Function = Callable[[Any, T], Iterator[None]]
Tick = Callable[[], None]
# Whether something is meant, or of a tuple which of its members.
Which = Union[bool, "tuple[Which, ...]"]

# Seconds between two looks at what the workers have done.
POLL = 0.5
# Rounds in a row in which workers die and no task is finished, after which it is taken for a fault of the tasks.
ROUNDS = 5
# Seconds to wait for the first worker of a Dask cluster, which is asked for and comes later.
PATIENCE = 30.0
# Dask has its workers give memory back to the system at once, as it takes them for idle in between; a task that takes
# and gives it all the time then needs half as long again (measured). These are the bounds that glibc would arrive at.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(64 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}

# What to do about workers that die.
REMEDY = "Most often they are out of memory: give them less (memory=..., --memory) or start fewer"


class Workers(ABC):
    """Where tasks run.

    Attributes:
        count: how many run at the same time.
    """

    count: int

    @abstractmethod
    def run(
        self, function: Function[T], shared: Any, tasks: Sequence[T], tick: Tick, *, place: Path | None = None
    ) -> None:
        """Do all tasks, in any order.

        Args:
            function: of what is shared and of one task.
            shared: what all tasks need.
            tasks: one by one.
            tick: called now and then.
            place: a folder that is there, which every worker has to see.

        Raises:
            StoreError: if a worker does not see the place.
            WorkerError: if workers die again and again.
        """


class Here(Workers):
    """This process, one task after the other."""

    count = 1

    def run(
        self, function: Function[T], shared: Any, tasks: Sequence[T], tick: Tick, *, place: Path | None = None
    ) -> None:
        """Do all tasks."""
        for task in tasks:
            for _ in function(shared, task):
                tick()


class _Elsewhere(Workers):
    """Tasks through an executor, which is asked for again when its workers have died."""

    @property
    def _threads(self) -> int | None:
        """Of torch in a task; None for what the worker was started with."""
        return None

    def _pack(self, shared: Any) -> Parcel:
        """What is shared, ready to be sent."""
        return Parcel.of(shared)

    @abstractmethod
    def _start(self, parcel: Parcel) -> tuple[Executor, Any]:
        """An executor, and what tasks are given in place of the parcel."""

    @abstractmethod
    def _stop(self, executor: Executor, *, now: bool) -> None:
        """Be done with an executor; `now`: whatever it is doing."""

    def run(
        self, function: Function[T], shared: Any, tasks: Sequence[T], tick: Tick, *, place: Path | None = None
    ) -> None:
        """Do all tasks, those of dead workers again."""
        if place is not None:
            function = partial(_seeing, place, function)
        parcel, left, idle = self._pack(shared), list(tasks), 0
        while left:
            lost, cause = self._round(function, parcel, left, tick)
            idle = idle + 1 if len(lost) == len(left) else 0
            left = lost
            if idle == ROUNDS:
                raise WorkerError(
                    f"workers died {idle} times without finishing a task, the last time with "
                    f"{type(cause).__name__}: {cause}. {REMEDY}. What is finished is kept"
                ) from cause

    def _round(
        self, function: Function[T], parcel: Parcel, tasks: Sequence[T], tick: Tick
    ) -> tuple[list[T], BaseException | None]:
        """Every task once; those whose worker died, and of what."""
        executor, handed = self._start(parcel)
        finished = False
        try:
            futures, lost, cause = self._submit(executor, handed, function, tasks)
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                tick()
                for future in done:
                    try:
                        future.result()
                    except Exception as error:
                        if not _is_death(error):
                            raise
                        lost.append(futures[future])
                        cause = error
            finished = True
        finally:
            self._stop(executor, now=not finished)
        return lost, cause

    def _submit(
        self, executor: Executor, handed: Any, function: Function[T], tasks: Sequence[T]
    ) -> tuple[dict[Future[None], T], list[T], BaseException | None]:
        """What the executor takes; the tasks that it does not take, as a worker has died meanwhile, and of what."""
        futures: dict[Future[None], T] = {}
        for number, task in enumerate(tasks):
            try:
                futures[executor.submit(_work, handed, function, task, self._threads)] = task
            except Exception as error:
                if not _is_death(error):
                    raise
                return futures, list(tasks[number:]), error
        return futures, [], None


class Processes(_Elsewhere):
    """A pool of processes on this machine, each with its share of the cores.

    What is on a GPU is given to them one GPU after the other; what is not stays off them.
    """

    def __init__(self, count: int) -> None:
        """Start nothing yet.

        Raises:
            InputError: if `count` is not a positive number.
        """
        self.count = _checked(count)

    def _pack(self, shared: Any) -> Parcel:
        # packed off the GPU, or every process would first unpack it on the parent's
        which = on_gpu(shared)
        return Parcel.of(moved(shared, which, "cpu"), which)

    def _start(self, parcel: Parcel) -> tuple[Executor, Any]:
        context = get_context("spawn")  # a forked child would inherit torch's threads in the middle of what they do
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        pool = ProcessPoolExecutor(self.count, context, _settle, (parcel, _share(self.count), os.getpid(), numbers))
        return pool, None

    def _stop(self, executor: Executor, *, now: bool) -> None:
        if now:
            for process in list((getattr(executor, "_processes", None) or {}).values()):
                process.terminate()
        executor.shutdown(cancel_futures=True)


class Through(_Elsewhere):
    """Any `concurrent.futures.Executor`; what is shared travels with every task, since there is no other way."""

    def __init__(self, executor: Executor, count: int | None = None) -> None:
        """Use an executor, which is not shut down.

        Args:
            executor: of any kind.
            count: how many workers it has, of those that do not tell.

        Raises:
            InputError: if that is not known, or not a positive number.
        """
        self.executor = executor
        self.count = _count_workers(executor) if count is None else _checked(count)

    @property
    def _threads(self) -> int | None:
        # processes that each take all cores wait for each other: two on two cores were six times slower (measured)
        return _share(self.count) if isinstance(self.executor, ProcessPoolExecutor) else None

    def _start(self, parcel: Parcel) -> tuple[Executor, Any]:
        return self.executor, parcel

    def _submit(
        self, executor: Executor, handed: Any, function: Function[T], tasks: Sequence[T]
    ) -> tuple[dict[Future[None], T], list[T], BaseException | None]:
        futures, left, cause = super()._submit(executor, handed, function, tasks)
        if left and not futures:  # another round would be given the same executor
            raise WorkerError(
                f"the {type(executor).__name__} takes no more tasks, since workers of it have died or could not start "
                f"({type(cause).__name__}: {cause}). {REMEDY}. What is finished is kept: make a new executor and save "
                "to the same place again"
            ) from cause
        return futures, left, cause

    def _stop(self, executor: Executor, *, now: bool) -> None:
        pass


class OnDask(_Elsewhere):
    """The workers of a Dask cluster, which have to see the same disk."""

    def __init__(self, client: Client) -> None:
        """Use a client, which is not closed.

        Raises:
            InputError: if its cluster has no workers.
        """
        self.client = client
        self.count = _count_on_dask(client)

    def _start(self, parcel: Parcel) -> tuple[Executor, Any]:
        # sent once to every worker; and again in the next round, since what all its holders lose with them is lost
        handed = self.client.scatter(parcel, broadcast=True, hash=False)
        return self.client.get_executor(pure=False), handed

    def _stop(self, executor: Executor, *, now: bool) -> None:
        executor.shutdown(wait=not now)


def as_workers(workers: int | Executor | Workers | Client | None) -> Workers:
    """What a user may name as workers, as workers.

    Raises:
        InputError: if it is none of them.
    """
    if workers is None:
        return Here()
    if isinstance(workers, Workers):
        return workers
    if isinstance(workers, int):
        return Processes(workers)
    if isinstance(workers, Executor):
        return Through(workers)
    if _is_client(workers):
        return OnDask(workers)
    raise InputError(
        "workers are None (here), a number of processes, a concurrent.futures.Executor or a distributed.Client: got "
        f"{type(workers).__name__}"
    )


def _checked(count: int) -> int:
    if isinstance(count, bool) or count < 1:
        raise InputError(f"the number of workers is a positive one: got {count!r}")
    return count


def _is_client(found: Any) -> TypeGuard[Client]:
    return hasattr(found, "scatter") and hasattr(found, "get_executor")


def _count_workers(executor: Executor) -> int:
    """How many workers an executor has: each is given its part of the memory."""
    known, client = getattr(executor, "_max_workers", None), getattr(executor, "_client", None)
    if known is not None:
        return int(known)
    if _is_client(client):  # Dask's own; where it is held to some of the workers, these get less than they could
        return _count_on_dask(client)
    raise InputError(
        f"memory is divided among workers, and {type(executor).__name__} does not tell how many it has: say so, "
        "workers=ntkit.kernel.tasks.Through(executor, count=...)"
    )


def _count_on_dask(client: Client) -> int:
    """Workers of a cluster, those included that it was asked for and that are still to come: they work as well then."""
    if not _present(client):
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=PATIENCE)
    present = _present(client)
    if not present:
        raise InputError(
            f"the Dask cluster has no workers after {PATIENCE:.0f} seconds: start some, or wait until they are there, "
            "client.wait_for_workers(1)"
        )
    return max(present, len(getattr(client.cluster, "plan", ())))


def _present(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


# ---------------------------------------------------------------- on the other side


@dataclass(frozen=True)
class Parcel:
    """Something large, packed once.

    Attributes:
        content: the bytes.
        name: their SHA-256.
        which: of its members belong on a GPU, each process on its own.
    """

    content: bytes
    name: str
    which: Which = False

    @classmethod
    def of(cls, shared: Any, which: Which = False) -> Parcel:
        """Pack.

        Raises:
            InputError: if it cannot be packed.
        """
        try:
            import cloudpickle as packer  # which takes lambdas and what is defined in a script or notebook as well
        except ModuleNotFoundError:
            packer = pickle
        try:
            content = packer.dumps(shared)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise InputError(
                f"the model or the data cannot be sent to other processes ({type(error).__name__}: {error}): compute "
                "in this one, or define their classes at the top of a module"
            ) from error
        return cls(content, hashlib.sha256(content).hexdigest(), which)


def on_gpu(shared: Any) -> Which:
    """Whether something computes on a GPU and can be moved to another one; of a tuple, which of its members."""
    if isinstance(shared, tuple):
        return tuple(map(on_gpu, shared))
    device = getattr(shared, "device", None)
    return isinstance(device, torch.device) and device.type == "cuda" and hasattr(shared, "to")


def moved(shared: Any, which: Which, device: str) -> Any:
    """What `on_gpu` has found, on another device; all else is left where it is."""
    if isinstance(which, tuple):
        return tuple(moved(item, here, device) for item, here in zip(shared, which, strict=True))
    return shared.to(device) if which else shared


class _Unpacked:
    """What this process has unpacked last: the tasks that come here share it."""

    name: str = ""
    value: Any = None
    # A model is put into another state while it is captured, so that a process does one task at a time.
    lock = threading.Lock()


def _share(count: int) -> int:
    """Threads of each of several processes on this machine."""
    return max(1, (os.cpu_count() or 1) // max(1, count))


def _work(parcel: Parcel | None, function: Function[T], task: T, threads: int | None = None) -> None:
    """One task in this process."""
    with _Unpacked.lock, with_threads(threads):
        if parcel is not None and _Unpacked.name != parcel.name:
            _Unpacked.name, _Unpacked.value = "", None  # two of them might not fit
            _Unpacked.value = pickle.loads(parcel.content)
            _Unpacked.name = parcel.name
        for _ in function(_Unpacked.value, task):
            pass


def _seeing(place: Path, function: Function[T], shared: Any, task: T) -> Iterator[None]:
    """One task, if this process sees where it is to write: that is found out before anything is computed."""
    if not place.is_dir():
        raise StoreError(
            f"there is no folder {place} for a worker on {socket.gethostname()}: workers need a disk that all of them "
            "share, under the same path. Choose a place on one (if it is, somebody has removed the folder)"
        )
    yield from function(shared, task)


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """No more threads than so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settle(parcel: Parcel, threads: int, parent: int, numbers: Any) -> None:
    """Make a new process of a pool ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its children
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    value, number = pickle.loads(parcel.content), numbers.get()
    if torch.cuda.is_available():
        value = moved(value, parcel.which, f"cuda:{number % torch.cuda.device_count()}")
    _Unpacked.name, _Unpacked.value = parcel.name, value


def _die_with(parent: int) -> None:
    """A pool's process would wait for ever for the tasks of a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _is_death(error: BaseException) -> bool:
    """Whether an exception says that a worker has died, or what it was given has been lost with one."""
    if isinstance(error, (BrokenExecutor, CancelledError)):
        return True
    kind = type(error)
    return kind.__module__.startswith("distributed") and kind.__name__ in {"KilledWorker", "FutureCancelledError"}
