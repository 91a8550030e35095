"""The naive ways that benchmarks are measured against."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import FACTS, gpt2
from oracles import tracing as oracle
from oracles.gradients import integrated_gradients

from causalcone import Noise

STATES = (("hidden", 1), ("mlp", 2))
WAYS = pytest.mark.parametrize("together", [None, 5])
TRACING = {
    "restored": {},
    "severed": {"states": (("hidden", 1),), "sever": "both"},
    "severed where it is restored": {"states": (("mlp", 2),), "sever": "mlp"},
    "joint": {"joint": True},
    "heads": {"states": (("head.1", 1), ("head.0", 2))},
    "uniform": {"noise": Noise("uniform")},
}


@pytest.fixture(scope="module")
def model():
    return gpt2(layers=2)


@pytest.fixture(scope="module")
def naive():
    spec = importlib.util.spec_from_file_location("naive", Path(__file__).parents[2] / "bench" / "naive.py")
    sys.modules["naive"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_key(rows, column="p_patched"):
    return {
        (row["fact_id"], row["kind"], row.get("window", 1), row["layer"], row["token"]): row[column] for row in rows
    }


def values(run):
    return {(fact, each.kind, each.window, each.layer, each.token): p for (fact, each), p in run.p_patched.items()}


def assert_the_same(run, expected):
    assert values(run) == pytest.approx(expected, rel=0, abs=1e-9)
    assert run.restorations == len(expected)
    assert run.projected_seconds == pytest.approx(run.seconds)


@WAYS
@pytest.mark.parametrize("options", TRACING.values(), ids=TRACING)
def test_tracing_measures_every_restoration(naive, model, tokenizer, options, together):
    options = {"states": STATES, "samples": 2, **options}
    run = naive.timed(naive.tracing(model, tokenizer, FACTS[:1], **options, together=together))
    assert_the_same(run, by_key(oracle.trace(model, tokenizer, FACTS[:1], **options)))


@WAYS
def test_zeroing_measures_every_window_and_the_clean_run(naive, model, tokenizer, together):
    run = naive.timed(naive.zeroing(model, tokenizer, FACTS[:1], STATES, together=together))
    rows = oracle.zero(model, tokenizer, FACTS[:1], STATES)
    clean = {(row["fact_id"], "clean", 0, 0, None): row["p_clean"] for row in rows}
    assert_the_same(run, by_key(rows) | clean)


@WAYS
def test_gradients_measure_every_state(naive, model, tokenizer, together):
    kinds = ("hidden", "mlp")
    run = naive.timed(naive.gradients(model, tokenizer, FACTS[:1], kinds, 5, together=together))
    assert_the_same(run, by_key(integrated_gradients(model, tokenizer, FACTS[:1], kinds, 5), "norm"))


@pytest.mark.parametrize("together", [None, 5])
def test_a_run_cut_short_projects_the_rest(naive, model, tokenizer, together):
    run = naive.timed(naive.tracing(model, tokenizer, FACTS[:3], STATES, samples=2, together=together), seconds=0.0)
    assert len(run.p_patched) <= (together or 1)
    tokens = sum(task.tokens for task in run.work)
    assert run.projected_seconds == pytest.approx(run.seconds / run.tokens * tokens)
    assert run.projected_seconds > run.seconds


def test_the_fastest_size_is_searched(naive, monkeypatch):
    """Overhead of a pass, and a little more for each value of large ones."""

    def work(size):
        return [naive.Task(range(min(size, 100 - first)), lambda: None) for first in range(0, 100, size)]

    tried = []

    def seconds(task):
        tried.append(len(task.keys))
        return 1.0 + len(task.keys) * (0.1 if len(task.keys) <= 8 else 1.0)

    monkeypatch.setattr(naive, "_seconds", seconds)
    assert naive.fastest(work, longest=100.0) == 8
    assert sorted(set(tried)) == [1, 2, 4, 8, 16, 32]
    assert naive.fastest(work, longest=2.5) == 4, "a batch that may take longer is not tried"


def test_the_search_ends_where_memory_does(naive, monkeypatch):
    def seconds(task):
        if len(task.keys) > 4:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(naive, "_seconds", seconds)
    assert naive.fastest(lambda size: [naive.Task(range(size), lambda: None)] * 3) == 4


def test_a_batch_is_of_one_fact_and_computes_the_logits_that_are_looked_at(naive, model, tokenizer):
    work = naive.tracing(model, tokenizer, FACTS[:3], STATES, samples=2, together=7)
    assert all(len({fact for fact, _ in task.keys}) == 1 for task in work)
    assert max(len(task.keys) for task in work) == 7
    assert all(task.sequences == 2 * len(task.keys) for task in work)
    assert all(task.logits < task.tokens for task in work)
