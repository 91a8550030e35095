"""The naive way that benchmarks are measured against."""

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers.models import FACTS
from oracles import tracing as oracle

STATES = (("hidden", 1), ("mlp", 2))


@pytest.fixture(scope="module")
def naive():
    spec = importlib.util.spec_from_file_location("naive", Path(__file__).parents[2] / "bench" / "naive.py")
    sys.modules["naive"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_whole_run_measures_every_restoration(naive, model, tokenizer):
    run = naive.measure(model, tokenizer, FACTS[:1], STATES, samples=2)
    rows = oracle.trace(model, tokenizer, FACTS[:1], STATES, samples=2)
    expected = {
        (row["fact_id"], oracle.Restoration(row["kind"], row["window"], row["layer"], row["token"])): row["p_patched"]
        for row in rows
    }
    assert run.p_patched == expected
    assert run.restorations == len(rows)
    assert run.projected_seconds == pytest.approx(run.seconds)


def test_a_run_cut_short_projects_the_rest(naive, model, tokenizer):
    run = naive.measure(model, tokenizer, FACTS[:3], STATES, samples=2, seconds=0.0)
    assert len(run.p_patched) == 1
    assert run.projected_seconds == pytest.approx(run.seconds * run.restorations)
