"""On a CPU a fact's numbers are the same bit for bit, whatever other facts are in the pass, and in whatever order; and
in bfloat16 however its runs are shared out among passes."""

import numpy as np
import pytest
import torch
from helpers.budgets import smallest_budget
from helpers.compare import assert_table_close
from helpers.families import FAMILIES
from helpers.models import FACTS

import causalcone as cc

STATES = (("hidden", 1), ("mlp", 3), ("attn", 2), ("heads", 1))
METHODS = {
    "restoring": lambda tracer, facts: tracer.trace(facts, STATES, samples=3, sigma=0.4),
    "severed": lambda tracer, facts: tracer.trace(facts, (("hidden", 1),), sever="mlp", samples=3, sigma=0.4),
    "zeroing": lambda tracer, facts: tracer.zero(facts, STATES[1:]),
    "gradients": lambda tracer, facts: tracer.integrated_gradients(facts, steps=3),
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows_of(table, fact):
    """Every row that a table has of a fact, in its order; NaN is written as nan."""
    return repr(table.filter(np.array(table["fact_id"]) == fact.id).to_pylist())


def assert_alone_as_together(run, tracer):
    alone = {fact.id: rows_of(run(tracer, [fact]), fact) for fact in FACTS}
    for companions in (FACTS, FACTS[::-1], FACTS[1:4]):
        together = run(tracer, companions)
        for fact in companions:
            assert rows_of(together, fact) == alone[fact.id]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "gemma2"])
def test_a_fact_does_not_see_its_companions(kind, method, dtype, tokenizer):
    model = FAMILIES[kind](dtype=torch.float32)
    assert_alone_as_together(METHODS[method], cc.Tracer(model, tokenizer, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nor_do_threads(dtype, two_threads, tokenizer):
    model = FAMILIES["llama"](dtype=torch.float32)
    assert_alone_as_together(METHODS["restoring"], cc.Tracer(model, tokenizer, dtype=dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0)])
def test_however_much_memory_there_is(dtype, tolerance, tokenizer):
    """Runs of other passes have other neighbours: float32 attention of one query and of several rounds otherwise."""
    model = FAMILIES["llama"](dtype=torch.float32)
    options = {"states": STATES, "samples": 4, "sigma": 0.5}
    least = smallest_budget(model, tokenizer, FACTS, **options)
    whole = cc.Tracer(model, tokenizer, dtype=dtype).trace(FACTS, **options)
    parts = cc.Tracer(model, tokenizer, dtype=dtype, memory=int(1.5 * least)).trace(FACTS, **options)
    assert_table_close(parts, whole, tolerance)
