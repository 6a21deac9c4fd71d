"""What a user names on the command line, made into objects: a factory of networks, weights, data, a read-out, a size.

Everything wrong with it is an `InputError` that fits on one line, raised before work starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import pickle
import re
import sys
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.errors import InputError
from ntkit.tangent.linearize import linearize
from ntkit.tangent.readout import Logits, RandomLogits, SingleLogit
from ntkit.uses.study import FULL, PSEUDO, TRACE, Kind, Task

if TYPE_CHECKING:
    from collections.abc import Callable

READOUTS = "logits, sum, trace, single:INDEX, random:DRAWS"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_readout(text: str, *, seed: int = 0) -> Kind:
    """A read-out as it is written on the command line.

    Args:
        text: "logits" (the full kernel), "sum" (pNTK), "trace", "single:3" (the logit with index 3) or "random:4" (the
            mean over 4 random-sign combinations).
        seed: of the random signs.

    Raises:
        InputError: if it is none of these.
    """
    name, _, value = text.partition(":")
    plain = {"logits": FULL, "sum": PSEUDO, "trace": TRACE}
    if name in plain and not value:
        return plain[name]
    if name in {"single", "random"} and value.isdecimal():
        if name == "single":
            return Kind(f"logit {int(value)}", SingleLogit(int(value)))
        return Kind(
            f"{int(value)} random signs", RandomLogits(int(value), torch.Generator().manual_seed(seed)), trace=True
        )
    raise InputError(f"unknown read-out {text!r}: expected one of {READOUTS}")


def parse_bytes(text: str) -> int:
    """A size in bytes: "800MB", "2.5 GB", "1000000" (decimal units; KiB and so on are binary).

    Raises:
        InputError: if it is not a positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found or float(found[1]) == 0:
        raise InputError(f"not a size in bytes: {text!r}; write for example 500MB or 2.5GB")
    unit = UNITS[found[2]]
    return int(float(found[1]) * (1024 ** round(np.log10(unit) / 3) if found[3] else unit))


def parse_dtype(text: str) -> torch.dtype:
    """float32 or float64.

    Raises:
        InputError: if it is another type.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    if text not in known:
        raise InputError(f"unknown type {text!r}: expected float32 or float64")
    return known[text]


def parse_device(text: str) -> torch.device:
    """cpu, cuda, or cuda:N.

    Raises:
        InputError: if it is another one, or this machine does not have it.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if found is None:
        raise InputError(f"unknown device {text!r}: expected cpu, cuda or cuda:N")
    if text != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {text} here: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device(text)


# ---------------------------------------------------------------- the network


def require_rate(name: str, value: float) -> None:
    """Refuse what is no learning rate, before any work.

    Raises:
        InputError: if it is not a positive number.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{name}: got {value!r}, expected a positive number")


@dataclass(frozen=True)
class Factory:
    """A user's function that makes a network.

    Attributes:
        spec: as the user wrote it.
        name: of the function.
        make: the function.
    """

    spec: str
    name: str
    make: Callable[[], Any]

    def build(self, *, seed: int, dtype: torch.dtype) -> nn.Module:
        """A network in evaluation mode. torch's global generator is seeded for the call and put back afterwards.

        Raises:
            InputError: if the function fails, or returns something else.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = self.make()
            except Exception as error:
                raise InputError(f"the factory {self.spec} failed: {_told(error)}") from error
        if not isinstance(model, nn.Module):
            raise InputError(f"the factory {self.spec} must return a torch.nn.Module: got {type(model).__name__}")
        return model.to(dtype).eval()


def load_factory(spec: str) -> Factory:
    """The function that `MODULE:FUNCTION` or `path/file.py:FUNCTION` names. The current folder counts as installed.

    Raises:
        InputError: if there is no such module, file or function, or importing it fails.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(f"the factory is written MODULE:FUNCTION or path/file.py:FUNCTION: got {spec!r}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    make = getattr(module, name, None)
    if make is None:
        public = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__
        ]
        raise InputError(f"{place} has no {name!r}: it has {', '.join(public) or 'no functions'}")
    if not callable(make):
        raise InputError(
            f"{spec} is a {type(make).__name__}: a factory is a function without arguments that returns a model"
        )
    return Factory(spec, name, make)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    name = f"_ntkit_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    _search(path.parent.absolute())
    sys.modules[name] = module  # as an import does: dataclasses and pickles of the module look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"importing {path} failed: {_told(error)}") from error
    try:
        import cloudpickle
    except ModuleNotFoundError:
        return module
    cloudpickle.register_pickle_by_value(module)  # other processes, which are sent models of it, cannot import it
    return module


def _from_module(name: str) -> Any:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"there is no module {name!r} here or among the installed ones; for a file write path/file.py:FUNCTION"
            ) from error
        raise InputError(f"importing {name} failed: {_told(error)}") from error
    except Exception as error:
        raise InputError(f"importing {name} failed: {_told(error)}") from error


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _told(error: BaseException) -> str:
    """Type, message and the last place of an error, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model: `.safetensors`, or a state dict saved by `torch.save` (`.pt`, `.pth`).

    Raises:
        InputError: if the file is missing or of another kind, or its names, shapes or kinds of numbers are not the
            model's.
    """
    if not path.is_file():
        raise InputError(f"there is no file of weights {path}")
    given = _read_weights(path)
    expected = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    tied = {expected[name].data_ptr() for name in given if name in expected}
    missing = [name for name, t in expected.items() if name not in given and t.data_ptr() not in tied]
    unexpected = [name for name in given if name not in expected]
    shapes = [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(t.shape)} in the model"
        for name, t in expected.items()
        if name in given and given[name].shape != t.shape
    ]
    types = [
        f"{name} is {given[name].dtype} in the file and {t.dtype} in the model"
        for name, t in expected.items()
        if name in given and given[name].is_floating_point() != t.is_floating_point()
    ]
    problems = [
        f"{label} {_few(names)}"
        for label, names in (
            ("missing in the file:", missing),
            ("unknown to the model:", unexpected),
            ("shapes:", shapes),
            ("types:", types),
        )
        if names
    ]
    if problems:
        raise InputError(f"the weights {path} do not fit the model: {'; '.join(problems)}")
    bad = [name for name, t in given.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise InputError(f"the weights {path} are not finite: {_few(bad)}")
    model.load_state_dict(given, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
    if path.suffix not in {".pt", ".pth"}:
        raise InputError(f"weights are a .safetensors, .pt or .pth file: got {path}")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a plain state dict: save it with torch.save(model.state_dict(), path) or safetensors"
        ) from error
    if isinstance(given, dict) and isinstance(given.get("state_dict"), dict):
        given = given["state_dict"]
    if not isinstance(given, dict) or not given or not all(isinstance(t, Tensor) for t in given.values()):
        raise InputError(
            f"{path} is not a state dict, from names to tensors: save torch.save(model.state_dict(), path)"
        )
    return given


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------- the data


@dataclass(frozen=True)
class Cut:
    """How the examples of a file are used.

    Attributes:
        train: at most so many training examples.
        test: at most so many test examples.
        test_share: share of the examples that become test examples, where the file holds x and y alone.
        seed: of every random choice.
    """

    train: int = 10_000
    test: int = 2_000
    test_share: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Arrays of a file, cut into training and test examples, with the sentence that says how."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    said: str


def load_data(path: Path, cut: Cut, dtype: torch.dtype) -> Data:
    """Training and test examples from an `.npz` file with x_train, y_train, x_test, y_test, or x and y.

    x is a floating point array, or an integer one of token numbers (int32, int64); y holds class numbers (integers) or
    targets (floating point), (N,) or (N, C).

    Raises:
        InputError: if the file or an array in it cannot be used.
    """
    if min(cut.train, cut.test) < 2:
        raise InputError(f"a study needs two training and two test examples: got --train {cut.train} --test {cut.test}")
    with Arrays(path) as arrays:
        data = _cut(arrays, path, cut, dtype)
    if min(len(data.x_train), len(data.x_test)) < 2:
        raise InputError(
            f"a study needs two training and two test examples: {path} gives {len(data.x_train)} and {len(data.x_test)}"
        )
    return data


def _cut(arrays: Arrays, path: Path, cut: Cut, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(cut.seed)
    names = ("x_train", "y_train", "x_test", "y_test")
    if {"x", "y"} <= arrays.names and not set(names) <= arrays.names:
        x, y = arrays.examples("x", dtype), arrays.targets("y", dtype)
        _same_length(x, y, "x", "y")
        return cut_at_random(x, y, cut, f"x and y of {path.name}")
    if not set(names) <= arrays.names:
        raise InputError(
            f"{path} holds the arrays {', '.join(sorted(arrays.names)) or 'none'}: expected x_train, y_train, x_test "
            "and y_test, or x and y"
        )
    if cut.test_share is not None:
        raise InputError(f"{path} has its own test examples, x_test: leave --test-share out")
    x_train, y_train = arrays.examples("x_train", dtype), arrays.targets("y_train", dtype)
    x_test, y_test = arrays.examples("x_test", dtype), arrays.targets("y_test", dtype)
    _same_length(x_train, y_train, "x_train", "y_train")
    _same_length(x_test, y_test, "x_test", "y_test")
    if x_train.shape[1:] != x_test.shape[1:] or y_train.shape[1:] != y_test.shape[1:]:
        raise InputError(
            f"training and test examples differ in shape: x_train {tuple(x_train.shape)}, x_test "
            f"{tuple(x_test.shape)}, y_train {tuple(y_train.shape)}, y_test {tuple(y_test.shape)}"
        )
    if y_train.dtype != y_test.dtype:
        raise InputError(
            "y_train and y_test are of different kinds: class numbers (integers) or targets (floating point)"
        )
    train, said_train = _limited(len(x_train), cut.train, generator)
    test, said_test = _limited(len(x_test), cut.test, generator)
    said = f"{said_train} training and {said_test} test examples of {path.name}"
    return Data(x_train[train], y_train[train], x_test[test], y_test[test], said)


def cut_at_random(x: Tensor, y: Tensor, cut: Cut, named: str) -> Data:
    """Examples that are not cut yet, cut into training and test examples; `named` says whose they are.

    Raises:
        InputError: if the share of test examples is none.
    """
    share = 0.2 if cut.test_share is None else cut.test_share
    if not 0 < share < 1:
        raise InputError(f"the share of test examples lies between 0 and 1: got --test-share {share}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cut.seed))
    last = len(x) - max(1, round(share * len(x)))
    train, test = order[:last][: cut.train], order[last:][: cut.test]
    return Data(x[train], y[train], x[test], y[test], f"{named}, cut at random (seed {cut.seed})")


def load_examples(path: Path, name: str | None, dtype: torch.dtype) -> Tensor:
    """One array of examples: the one of this name, or else x_train, or x.

    Raises:
        InputError: if there is none, or it cannot be used.
    """
    with Arrays(path) as arrays:
        found = name or next((n for n in ("x_train", "x") if n in arrays.names), None)
        if found is None or found not in arrays.names:
            asked = f"no array {name!r}" if name else "neither x_train nor x"
            raise InputError(f"{path} has {asked}: it holds {', '.join(sorted(arrays.names)) or 'none'}")
        return arrays.examples(found, dtype)


def make_task(model: nn.Module, data: Data) -> Task:
    """The task of a model on data, once its outputs are known to fit the targets.

    Raises:
        InputError: if the model cannot take the examples, its outputs do not fit the targets, or there is nothing to
            tell apart: equal examples, one class, constant targets.
    """
    outputs = count_outputs(model, data.x_train)
    y = data.y_train
    if y.is_floating_point():
        if y.shape[1] != outputs:
            raise InputError(f"the model has {outputs} outputs and the targets {y.shape[1]} columns")
    else:
        largest = int(max(y.max(), data.y_test.max()))
        if outputs < 2:
            raise InputError(
                "the model has one output and y holds class numbers: give floating point targets, or 2 outputs"
            )
        if largest >= outputs:
            raise InputError(
                f"y holds the class number {largest}, but the model has {outputs} outputs (0 to {outputs - 1})"
            )
    _check_variety(data)
    return Task(data.x_train, y, data.x_test, data.y_test, outputs)


def _check_variety(data: Data) -> None:
    if bool((data.x_train == data.x_train[:1]).all()):
        raise InputError(
            f"all {len(data.x_train):,} training examples are equal: expected different ones; is x scaled to nothing?"
        )
    if not data.y_train.is_floating_point():
        if bool((data.y_train == data.y_train[0]).all()):
            raise InputError(
                f"all training examples are of class {int(data.y_train[0])}: expected two classes at least. If the "
                "file is sorted by class, give x and y alone, which are cut at random"
            )
        return
    for name, y in (("training", data.y_train), ("test", data.y_test)):
        if bool((y == y[:1]).all()):
            raise InputError(
                f"the targets of all {name} examples are equal ({y[0].tolist()}): expected some that differ, or there "
                "is no R^2 to score by. For class numbers give integers"
            )


def count_outputs(model: nn.Module, x: Tensor) -> int:
    """C, from a trial of the model on two examples.

    Raises:
        InputError: if the model cannot take the examples, or its output is not (N, C).
    """
    try:
        return linearize(model, readout=Logits()).outputs(x[:2]).shape[1]
    except InputError as error:
        if "(N, C)" not in str(error):
            raise
        shape = f"examples of shape {tuple(x.shape[1:])}"
        raise InputError(
            f"on {shape} {error}. On the command line let the factory wrap the model so that it returns (N, C)"
        ) from error


class Arrays:
    """The arrays of an `.npz` file, read one by one."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            InputError: if it is none.
        """
        self._path = path
        if not path.is_file():
            raise InputError(f"there is no file of data {path}")
        try:
            archive = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            archive = None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is not an .npz file: write one with numpy.savez({path.stem!r}, x_train=...)")
        self._archive = archive
        self.names = set(archive.files)

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def _read(self, name: str) -> np.ndarray:
        try:
            found = self._archive[name]
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"the array {name} of {self._path} cannot be read: {error}") from error
        if found.ndim == 0 or len(found) == 0:
            raise InputError(f"the array {name} of {self._path} is empty: it has shape {found.shape}")
        return found

    def examples(self, name: str, dtype: torch.dtype) -> Tensor:
        """Inputs of a network: floating point as `dtype`, or token numbers.

        Raises:
            InputError: if the array is of another type, or not finite.
        """
        found = self._read(name)
        if found.dtype == np.uint8:
            raise InputError(
                f"{name} of {self._path} is uint8, raw pixels: convert it as the network was trained, for example "
                f"{name} = ({name} / 255).astype('float32') with a channel axis, (N, 1, H, W), and save it again"
            )
        if found.dtype in (np.int32, np.int64):  # token numbers stay whole
            return torch.from_numpy(found.astype(np.int64))
        if found.dtype.kind != "f":
            raise InputError(f"{name} of {self._path} has type {found.dtype}: expected floating point, int32 or int64")
        x = torch.from_numpy(np.ascontiguousarray(found, dtype=found.dtype.newbyteorder("="))).to(dtype)
        if not x.isfinite().all():
            raise InputError(f"{name} of {self._path} has entries that are not finite (NaN or infinity)")
        return x

    def labels(self, name: str) -> np.ndarray:
        """Classes, -1 where there is none, (N,).

        Raises:
            InputError: if there is no such array, or it holds something else.
        """
        if name not in self.names:
            raise InputError(f"{self._path} has no array {name!r}: it holds {', '.join(sorted(self.names))}")
        found = self._read(name)
        if found.ndim != 1 or found.dtype.kind not in "iu" or int(found.min()) < -1:
            raise InputError(
                f"{name} of {self._path} is {found.dtype} of shape {found.shape}: expected classes (integers, (N,)), "
                "-1 where there is none"
            )
        return found.astype(np.int64)

    def texts(self, name: str) -> list[str]:
        """Strings, one for each example.

        Raises:
            InputError: if the array holds something else.
        """
        found = self._read(name)
        if found.ndim != 1 or found.dtype.kind not in "US":
            raise InputError(f"{name} of {self._path} is {found.dtype} of shape {found.shape}: expected strings, (N,)")
        return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in found.tolist()]

    def targets(self, name: str, dtype: torch.dtype) -> Tensor:
        """Classes (N,), or floating point targets (N, C).

        Raises:
            InputError: if the array holds something else.
        """
        found = self._read(name)
        if found.ndim == 2 and found.shape[1] == 1 and found.dtype.kind in "iu":
            found = found[:, 0]
        if found.dtype.kind in "iu" and found.ndim == 1:
            y = torch.from_numpy(found.astype(np.int64))
            if int(y.min()) < 0:
                raise InputError(f"{name} of {self._path} has negative class numbers: expected 0, 1, ...")
            return y
        if found.dtype.kind == "f" and found.ndim in (1, 2):
            y = torch.from_numpy(found.astype(np.float64)).to(dtype)
            if not y.isfinite().all():
                raise InputError(f"{name} of {self._path} has entries that are not finite (NaN or infinity)")
            return y if y.ndim == 2 else y[:, None]
        raise InputError(
            f"{name} of {self._path} is {found.dtype} of shape {found.shape}: expected class numbers (integers, (N,); "
            "one-hot rows become them by argmax(1)) or floating point targets, (N,) or (N, C)"
        )


def _limited(size: int, most: int, generator: torch.Generator) -> tuple[Tensor | slice, str]:
    if size <= most:
        return slice(None), f"all {size:,}"
    return torch.randperm(size, generator=generator)[:most], f"{most:,} of the {size:,}"


def _same_length(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    if len(x) != len(y):
        raise InputError(f"{x_name} has {len(x)} examples and {y_name} {len(y)}: expected as many")
