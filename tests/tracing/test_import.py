"""Importing the package does nothing, and loads what it needs only where it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import causalcone as cc


def run(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", ["causalcone", "causalcone.analysis", "causalcone.engine.errors"])
def test_torch_is_not_imported(module):
    loaded = run(f"import {module}, sys; print(*sys.modules)")
    assert module in loaded
    assert not {"torch", "transformers", "tokenizers"} & set(loaded)


def test_facts_can_be_made_without_torch():
    loaded = run("import causalcone as cc, sys; cc.Fact('0', '{} is', 'Bo', 'x'); print(*sys.modules)")
    assert "torch" not in loaded


def test_the_public_names_are_there():
    for name in cc.__all__:
        assert name in dir(cc)
    for name in ("Fact", "State", "Tracer", "TracePlan", "SkippedFacts", "CausalconeError"):
        assert getattr(cc, name).__name__ == name


def test_type_checkers_see_the_same_names():
    """What editors and type checkers are told is what is imported on first use."""
    tree = ast.parse(Path(cc.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname: node.module for node in imports for alias in node.names}
    assert sorted(typed) == cc.__all__
    for name, module in typed.items():
        assert getattr(cc, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(cc, "no_such_thing")


@pytest.mark.slow
def test_importing_the_engine_touches_nothing_global():
    code = (
        "import random, warnings, numpy, torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item(),\n"
        "            torch.get_float32_matmul_precision(), torch.is_grad_enabled(), str(numpy.random.get_state()),\n"
        "            random.getstate(), numpy.geterr(), list(warnings.filters))\n"
        "before = state()\n"
        "import causalcone; causalcone.Tracer\n"
        "print(state()[:-1] == before[:-1])\n"
    )
    assert run(code) == ["True"]
