"""The documentation holds: its Python blocks run, the site knows every page, and figures use words that it explains."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import ssm_interp
from ssm_interp.flow import summarise
from ssm_interp.flow.result import COLUMNS
from ssm_interp.plots import STATISTICS, circuit, spectrum
from ssm_interp.plots.flow import DEPTH
from ssm_interp.plots.hover import EDGE_COLUMNS
from ssm_interp.plots.panels import APART, LAYER
from ssm_interp.prompts import ROLES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # not below `<!-- not run: why -->`


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


class Examples(doctest.DocTestRunner):
    """Runs the examples of docstrings. Of those that go on from a reader's own model (a name that is not there) the
    rest is left out, and what prints without being shown may print anything."""

    def report_failure(self, out: Any, test: Any, example: Any, got: Any) -> None:
        if example.want:
            super().report_failure(out, test, example, got)

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        if not issubclass(exc_info[0], NameError):
            super().report_unexpected_exception(out, test, example, exc_info)


def test_examples_in_docstrings_that_stand_alone_are_true() -> None:
    said: list[str] = []
    ran = 0
    for module in pkgutil.walk_packages(ssm_interp.__path__, "ssm_interp."):
        if module.name.endswith("__main__"):
            continue
        for example in doctest.DocTestFinder().find(importlib.import_module(module.name)):
            if example.examples:
                ran += Examples(verbose=False).run(example, out=said.append).attempted
    assert not said, "".join(said)
    assert ran > 100


@pytest.mark.filterwarnings("ignore::ssm_interp.prompts.SharedTokenWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_python_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in one namespace; each page from the start."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)


def nav_pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
    return [page for value in values for page in nav_pages(value)]


def test_the_site_names_every_page() -> None:
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(written)


def test_the_reference_has_every_package_and_the_verbs_that_modules_hide() -> None:
    """A verb with the name of its module (`flow.sweep`) is not found under its package, and needs a line of its own."""
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    packages = [folder.parent for folder in (ROOT / "ssm_interp").glob("*/__init__.py")]
    public = {f"ssm_interp.{folder.name}": importlib.import_module(f"ssm_interp.{folder.name}") for folder in packages}
    wanted = {name for name, module in public.items() if getattr(module, "__all__", ()) and name != "ssm_interp.cli"}
    hidden = {
        f"{name}.{verb}.{verb}"
        for name in wanted
        for verb in public[name].__all__
        if (ROOT / name.replace(".", "/") / f"{verb}.py").is_file()
    }
    assert wanted | hidden <= shown


def test_every_word_of_tables_and_figures_is_in_the_glossary() -> None:
    said = " ".join((DOCS / "glossary.md").read_text(encoding="utf-8").split())
    columns = {*COLUMNS, *EDGE_COLUMNS, *circuit.COLUMNS, *spectrum.COLUMNS, *APART, *ROLES}
    columns |= set(summarise(pd.DataFrame([row()])).columns)
    assert [name for name in sorted(columns) if f"`{name}`" not in said] == []
    words = ["stripes", "nothing above 1e-06", "Layer depth in %", *spectrum.LABELS]
    words += ["by first token", "faithfulness", "in its strongest layer", "edge group", "supports", "opposes"]
    assert [word for word in words if word.lower() not in said.lower()] == []
    assert DEPTH.startswith("Layer depth in %") and f"**{LAYER}**" in said
    statistics = {"mean": "relative change", "median": "median", "accuracy": "still answered correctly"}
    statistics |= {"logprob_difference": "log-probability difference", "metric": "metric"}
    assert statistics.keys() == STATISTICS.keys()
    assert [name for name, word in statistics.items() if word not in said.lower()] == []


def row() -> dict[str, object]:
    """A row of a sweep."""
    numbers = {"layer": 0, "window_start": 0, "window_size": 1, "n_edges": 1, "unasked": 0}
    shares = {"p_base": 0.5, "p": 0.5, "relative_change": 0.0, "logprob_difference": 0.0}
    return dict.fromkeys(COLUMNS, "x") | numbers | shares | {"hit": True}


def test_every_name_that_the_text_gives_exists() -> None:
    name = re.compile(
        r"`(?:ssm_interp\.)?(si|features|flow|hooks|jobs|models|plots|prompts|recipes|results|scan)\.([a-zA-Z]\w*)"
    )
    missing = []
    for page in PAGES:
        for floor, member in name.findall(page.read_text(encoding="utf-8")):
            module = importlib.import_module("ssm_interp" if floor == "si" else f"ssm_interp.{floor}")
            if not hasattr(module, member) and member not in FILES:
                missing.append(f"{page.name}: {floor}.{member}")
    assert missing == []


FILES = {"md", "png", "svg", "html", "parquet", "jsonl", "csv", "toml"}
