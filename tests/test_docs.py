"""README, docs and examples: what they show runs, what they link to is there, and no public name is forgotten."""

from __future__ import annotations

import importlib.util
import linecache
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from typer.testing import CliRunner

import ntkit
from ntkit.cli import app
from ntkit.tangent.rules import all as _all_rules  # noqa: F401  (so that the table is full before it is copied)
from ntkit.tangent.rules.registry import RULES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These two need something that is not in the repository: a data set, and the page that `make demo` writes.
NEEDS_MORE = {"fashion_mnist.py", "demo_picture.py"}
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name not in NEEDS_MORE]
LARGEST_PICTURE = 150_000

# zarr 3 needs Python 3.11: with an older one, blocks that write to disk are left out.
HAS_ZARR = importlib.util.find_spec("zarr") is not None

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.name


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; rules, modules, search path, random state and picture settings are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(RULES)
    modules = set(sys.modules)
    try:
        with torch.random.fork_rng(devices=[]), mpl.rc_context(), warnings.catch_warnings():
            # transformers 5 warns of a name of its own that peft uses
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        RULES.clear()
        RULES.update(before)
        for new in {m for m in sys.modules if m.startswith("_ntkit_factory_")} - modules:
            del sys.modules[new]


def run_python(source: str, page: Path, line: int, namespace: dict[str, object]) -> None:
    """Execute a block so that a traceback shows the page and its line."""
    padded = "\n" * line + source
    linecache.cache[str(page)] = (len(padded), None, padded.splitlines(keepends=True), str(page))
    exec(compile(padded, str(page), "exec", dont_inherit=True), namespace)


def run_shell(source: str) -> None:
    """Run the `ntkit` commands of a block, in this process."""
    for command in source.splitlines():
        program, *arguments = command.split()
        assert program == "ntkit", command
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_blocks_of_a_page_run_in_order(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "page"}
    torch.manual_seed(0)
    for block in FENCED.finditer(text):
        language, source = block.groups()
        if ".zarr" in source and not HAS_ZARR:
            continue
        if language == "python":
            run_python(source, page, text[: block.start(2)].count("\n"), namespace)
        elif language == "sh":
            run_shell(source)
        else:
            pytest.fail(f"{page.name} has a block of {language!r}: nobody checks it")


@pytest.mark.parametrize("script", EXAMPLES, ids=name)
def test_an_example_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = script.read_text(encoding="utf-8")
    for extra in ("transformers", "peft"):
        if f"from {extra} import" in source:
            pytest.importorskip(extra)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    for written in tmp_path.iterdir():
        assert (ROOT / "docs" / "pictures" / written.name).is_file(), f"{written.name} belongs in docs/pictures"


@pytest.mark.parametrize("script", EXAMPLES, ids=name)
def test_an_example_is_short(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


def anchors(page: Path) -> set[str]:
    """Headings as the names that GitHub gives them."""
    headings = HEADING.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_and_picture_is_shown_somewhere() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text(encoding="utf-8"))
    }
    pictures = [path for path in (ROOT / "docs" / "pictures").iterdir() if path.is_file()]
    for path in [*PAGES[1:], *pictures]:
        assert path.resolve() in linked, f"nothing links to {path.name}"
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name


@pytest.mark.parametrize("public", sorted(set(ntkit.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_docs(public: str) -> None:
    assert any(re.search(rf"\b{public}\b", page.read_text(encoding="utf-8")) for page in PAGES)
