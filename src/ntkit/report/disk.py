"""What the command line says about a kernel on disk, checked before any work is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntkit.errors import InputError
from ntkit.kernel.forecast import Forecast, forecast, measure
from ntkit.kernel.saved import begun, layout_of, unfinished
from ntkit.kernel.store import DTYPES, Store, check_place
from ntkit.kernel.tasks import KEEP_MEMORY, as_workers
from ntkit.report.files import check_file

if TYPE_CHECKING:
    from ntkit.kernel.empirical import TangentKernel


@dataclass(frozen=True)
class Disk:
    """A place on disk, who computes what goes there, and in which type.

    Attributes:
        path: the folder, K.zarr.
        workers: number of processes, or None.
        dask: address of a scheduler, "local", or None.
        dtype: of the entries on disk, or None for the kernel's.
        force: whether another matrix that is there may be replaced.
    """

    path: Path
    workers: int | None
    dask: str | None
    dtype: torch.dtype | None
    force: bool

    @classmethod
    def parse(
        cls, out: Path, *, workers: int | None, dask: str | None, dtype: str | None, force: bool, dry_run: bool
    ) -> Disk | None:
        """The options of a matrix that goes to a .zarr folder; None if it goes to an .npy file.

        Raises:
            InputError: if the options do not go together, or the place cannot be used.
        """
        if out.suffix != ".zarr":
            for name, value in (("--workers", workers), ("--dask", dask), ("--disk-type", dtype)):
                if value is not None:
                    raise InputError(f"{name} is for matrices on disk: call the output something.zarr, got {out}")
            if out.suffix != ".npy":
                raise InputError(f"the output is called something.npy (a file) or something.zarr (a folder): got {out}")
            if not dry_run:
                check_file(out, ".npy", force=force)
            return None
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"unknown type {dtype!r} for --disk-type: expected {', '.join(DTYPES)}")
        if dask is not None and dask != "local" and workers is not None:
            raise InputError("--workers is for processes started here: a running Dask cluster brings its own")
        check_place(out)
        return cls(out, workers, dask, None if dtype is None else getattr(torch, dtype), force)

    def save(self, kernel: TangentKernel, progress: Callable[[int, int], None]) -> None:
        """Compute what is missing.

        Raises:
            StoreError: if a matrix of something else is there and may not be replaced, or another run is writing.
        """
        if self.force and Store.exists(self.path) and not begun(kernel, self.path, self._type(kernel)):
            with Store.open(self.path).locked():  # not under the hands of a run that writes to it
                shutil.rmtree(self.path)
        with self._crew() as crew:
            kernel.save(self.path, dtype=self.dtype, memory=kernel.memory, workers=crew, progress=progress)

    def forecast(self, kernel: TangentKernel) -> Forecast:
        """What is still to do, from speeds measured on a few examples of this kernel on this machine."""
        count = here = self.workers or 1
        if self.dask is not None and self.dask != "local":
            with self._crew() as client:
                count, here = as_workers(client).count, 1  # they have processors of their own
        layout, tiles = layout_of(kernel, self._type(kernel), kernel.memory // count), None
        if Store.exists(self.path):
            store = Store.open(self.path)
            if begun(kernel, self.path, self._type(kernel)):
                layout, tiles = store.layout, unfinished(store)
        tiles = layout.tiles() if tiles is None else tiles
        speeds = measure(kernel, layout, workers=here)
        return forecast(layout, kernel.scalars, speeds, tiles=tiles, memory=kernel.memory, workers=count)

    def _type(self, kernel: TangentKernel) -> str:
        return str(self.dtype or kernel.dtype).removeprefix("torch.")

    @contextmanager
    def _crew(self) -> Iterator[Any]:
        if self.dask is None:
            yield self.workers
            return
        try:
            import dask.config
            from distributed import Client, LocalCluster
        except ModuleNotFoundError as error:
            raise InputError("--dask needs distributed: pip install 'ntkit[scale]'") from error
        if self.dask == "local":
            count = self.workers or 1
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
            with (
                dask.config.set({"distributed.nanny.pre-spawn-environ": {**KEEP_MEMORY, **threads}}),
                LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
                Client(cluster) as client,
            ):
                yield client
            return
        try:
            client = Client(self.dask, timeout=20)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(f"there is no Dask scheduler at {self.dask} ({error})") from error
        with client:
            yield client


def free_bytes(out: Path) -> int:
    """Bytes that are free where an output would go; at least 1.

    Raises:
        InputError: if its folder does not exist.
    """
    try:
        return max(1, shutil.disk_usage(out.absolute().parent).free)
    except OSError as error:
        raise InputError(f"the folder of {out} does not exist: make it") from error
