"""The package as it is installed: light to import, complete in its names, one version."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest

import ntkit

HEAVY = {"jinja2", "matplotlib", "peft", "rich", "safetensors", "scipy", "sklearn", "transformers", "typer"}
ROOMS = "ntkit.tangent, ntkit.tangent.rules, ntkit.kernel, ntkit.solve, ntkit.uses, ntkit.report"


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def imported_by_torch() -> set[str]:
    return imported_by("import torch")


@pytest.mark.parametrize("statement", ["import ntkit", f"import {ROOMS}"])
def test_importing_loads_nothing_that_torch_does_not(statement: str, imported_by_torch: set[str]) -> None:
    added = imported_by(statement) - imported_by_torch - set(sys.stdlib_module_names)
    assert added <= {"ntkit"}


def test_computing_a_kernel_needs_torch_and_numpy_only(imported_by_torch: set[str]) -> None:
    statement = "import ntkit; ntkit.linearize; ntkit.empirical_ntk; ntkit.Logits; ntkit.DenseKernel"
    assert not (imported_by(statement) - imported_by_torch) & HEAVY


@pytest.mark.parametrize("name", ntkit.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(ntkit, name).__doc__
    assert name in dir(ntkit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ntkit' has no attribute 'nonsense'"):
        _ = ntkit.nonsense


def test_the_installed_version_is_the_version_of_the_source() -> None:
    assert metadata.version("ntkit") == ntkit.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files(ntkit).joinpath("py.typed").is_file()


def test_the_command_loads() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="ntkit")
    assert callable(command.load())
