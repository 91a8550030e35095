"""Fixtures and marks that all tests share."""

import sys

import pytest
import torch
from helpers import interpreter  # noqa: F401
from helpers.collected_moments import MANY
from helpers.models import FACTS, gpt2, tokenizer

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it computes


DEMO = ("test_demo_model", "test_demo", "test_readme", "test_embedding", "test_docs", "test_bench_sweep")
"""Files whose tests need the demo model: one process trains it, and the others need not wait for that."""


def pytest_collection_modifyitems(items):
    """The demo model's tests come first and take the longest; a file's tests share their fixtures in one process."""
    for item in items:
        group = "demo" if item.path.stem in DEMO else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: DEMO.index(item.path.stem) if item.path.stem in DEMO else len(DEMO))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", name="tokenizer")
def session_tokenizer():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    """A float64 GPT-2 of four layers that no test may change."""
    return gpt2()


@pytest.fixture(scope="module")
def collected(model, tokenizer):
    """Second moments of all layers of the model, from more tokens than its keys have components."""
    from causalcone.engine.edit.moments.moments import Moments

    return Moments.collect(model, tokenizer, MANY, tokens="all", source="pairs of facts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder and a fact file, as a user has them."""
    from causalcone.runners.facts.files import save_facts

    folder = tmp_path_factory.mktemp("user")
    gpt2(dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_facts(FACTS, folder / "facts.jsonl")
    return folder


@pytest.fixture(scope="module")
def file(folder):
    """The file of a sweep of six facts, with all that it needs beside it."""
    from helpers.sweeps import write_sweep

    return write_sweep(folder)


@pytest.fixture(scope="module")
def study(file, tmp_path_factory):
    """The folder of that sweep, carried out: two layers, three methods."""
    from helpers.sweeps import swept

    out = tmp_path_factory.mktemp("study") / "out"
    assert swept(file, out).status == "complete"
    return out


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``causalcone`` with arguments; returns the exit code and what it printed."""
    from causalcone.runners.commands.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["causalcone", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run
