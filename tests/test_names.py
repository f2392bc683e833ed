"""The core keeps to its words, its imports and its size."""
import ast
import re

import pytest

from conftest import ROOT

FILES = ("train", "model", "teachers", "discretize", "losses", "data", "evaluate", "visualize")
CORE = sorted(path.stem for path in ROOT.glob("*.py"))
WORDS = ("draft", "gist", "bids", "anchor", "local_axes", "mirror", "unit_length", "draw_together",
         "lengthen", "RVQ", "residual code")         # of stable.py, or of what there was before it
FORBIDDEN = re.compile(rf"(?<![A-Za-z])({'|'.join(WORDS)})(s|ed)?(?![A-Za-z])", re.I)


def source(name):
    return (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize("name", FILES)
def test_the_core_has_no_word_of_other_recipes(name):
    found = [f"{i}: {line}" for i, line in enumerate(source(name).splitlines(), 1)
             if FORBIDDEN.search(line)]
    assert found == []


def test_the_pattern_finds_what_it_should():
    for line in ("self.draft = 1", "Gists are", "# residual codes", "an RVQ", "local_axes", "bids"):
        assert FORBIDDEN.search(line), line
    for line in ("registers", "logistic", "drafty", "register_buffer"):
        assert not FORBIDDEN.search(line), line


def imports(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_neither_extras_nor_stable(name):
    found = set(imports(name))
    assert "extras" not in found
    assert ("stable" in found) == (name == "checkpoint")        # checkpoint.STUDENTS is the plug


def test_the_core_has_no_import_cycle():
    graph, order = {name: set(imports(name)) & {*CORE} for name in CORE}, []
    while len(order) < len(graph):
        ready = [name for name in graph if name not in order and graph[name] <= {*order}]
        assert ready, f"a cycle among {sorted({*graph} - {*order})}"
        order += ready


def test_the_papers_system_is_1000_lines():
    counts = {name: len(source(name).splitlines())
              for name in ("train", "model", "discretize", "losses")}
    assert sum(counts.values()) <= 1000, counts


@pytest.mark.parametrize("name", CORE)
def test_no_function_is_longer_than_50_lines_and_no_line_than_100_characters(name):
    text = source(name)
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= 50] == []


def test_the_readme_is_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
