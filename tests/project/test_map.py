"""What the documentation says of the code's files, names and headings is so."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [file for folder in ("engine", "kernels", "runners", "analysis") for file in (ROOT / folder).rglob("*.py")]

FILE = re.compile(r"`((?:engine|kernels|runners|analysis|tests|bench|docs|causalcone)/[\w./-]*)`")
REFERENCE = re.compile(r'docs/(\w+\.md),\s+"([^"]+)"')


@cache
def headings(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")}


@cache
def classes():
    """The names of all classes, with the files that define them."""
    found = {}
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(file.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    text, _, _ = page.read_text(encoding="utf-8").partition("\n## Names before\n")
    named = set(FILE.findall(text))
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_headings_that_docstrings_name_are_there():
    lacking = []
    for file in CODE:
        for page, heading in REFERENCE.findall(re.sub(r"\s+#?\s*", " ", file.read_text(encoding="utf-8"))):
            if heading not in headings(page):
                lacking.append(f"{file.relative_to(ROOT)}: {page}, {heading}")
    assert not lacking


def test_words_of_the_glossary_are_in_the_files_it_names():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| .* \| `(\w+)`(?:, `([\w/.]+)`)? \|$", text, re.M)
    assert len(rows) > 20
    for name, file in rows:
        assert name in classes(), name
        assert not file or file in classes()[name], (name, file)


@pytest.mark.parametrize("mark", ["slow", "long"])
def test_tests_that_are_left_out_elsewhere_are_there(mark):
    listed = (ROOT / "tests" / f"{mark}_tests.txt").read_text(encoding="utf-8").splitlines()
    named = (line.removesuffix(" more cases").partition("[")[0] for line in listed if not line.startswith("#"))
    for file, _, name in (each.partition("::") for each in named):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}; take the line out"


def test_one_name_for_one_class():
    """Private classes count as well; a Triton kernel's file may repeat its torch form's."""
    twice = {name: files for name, files in classes().items() if len(files) > 1}
    assert not twice
