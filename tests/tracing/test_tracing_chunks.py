"""However a study is cut into passes, and whatever runs out on the way, its numbers are the same."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.budgets import smallest_budget
from helpers.compare import assert_same
from helpers.models import FACTS, gpt2
from oracles import tracing as oracle
from torch.utils._python_dispatch import TorchDispatchMode

import causalcone as cc
from causalcone.engine.errors import MemoryBudgetError

OPTIONS = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3)), "samples": 4, "sigma": 0.5}
PRODUCTS = {"linear", "mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"}


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return oracle.trace(model, tokenizer, FACTS, **OPTIONS)


class FailingProducts(TorchDispatchMode):
    """Raises ``error`` in place of the matrix products with these numbers, counted from the first inside."""

    def __init__(self, error, numbers):
        super().__init__()
        self.error, self.numbers = error, numbers
        self.products = self.raised = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products += 1
            if self.products in self.numbers:
                self.raised += 1
                raise self.error
        return func(*args, **(kwargs or {}))


def passes(model, tokenizer, facts, budget):
    return cc.Tracer(model, tokenizer, memory=budget).plan(facts, **OPTIONS).passes


def test_facts_one_by_one(model, tokenizer, expected):
    tracer = cc.Tracer(model, tokenizer)
    for fact in FACTS:
        assert_same(tracer.trace([fact], **OPTIONS), [row for row in expected if row["fact_id"] == fact.id])


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 1.1, 2.0, 5.0])
def test_every_budget_gives_the_same_numbers(model, tokenizer, expected, share):
    budget = int(share * smallest_budget(model, tokenizer, FACTS, **OPTIONS))
    table = cc.Tracer(model, tokenizer, memory=budget).trace(FACTS, **OPTIONS)
    assert_same(table, expected)
    assert table["fact_id"].unique().to_pylist() == [fact.id for fact in FACTS]


@pytest.mark.slow
def test_smaller_budgets_take_more_passes(model, tokenizer):
    least = smallest_budget(model, tokenizer, FACTS, **OPTIONS)
    counts = [passes(model, tokenizer, FACTS, int(share * least)) for share in (1.0, 1.1, 2.0, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 5 * len(FACTS), "the smallest budget splits facts into many parts"
    assert len(set(counts)) == 4


def test_a_fact_larger_than_the_budget_is_split(model, tokenizer, expected):
    fact = FACTS[1]
    budget = smallest_budget(model, tokenizer, (fact,), **OPTIONS)
    assert passes(model, tokenizer, [fact], budget) > 1
    batches = list(cc.Tracer(model, tokenizer, memory=budget).stream([fact], **OPTIONS))
    assert len(batches) == 1, "the fact comes whole"
    assert_same(pa.Table.from_batches(batches), [row for row in expected if row["fact_id"] == fact.id])


@pytest.mark.slow
def test_deviations_do_not_depend_on_the_budget(model, tokenizer):
    options = {**OPTIONS, "sigma": "3sd", "samples": 2}
    budget = smallest_budget(model, tokenizer, FACTS[:2], **options)
    table = cc.Tracer(model, tokenizer, memory=budget).trace(FACTS[:2], **options)
    assert_same(table, oracle.trace(model, tokenizer, FACTS[:2], **options))


def test_a_budget_below_the_smallest_part_is_refused(model, tokenizer):
    with pytest.raises(MemoryBudgetError, match="memory"):
        cc.Tracer(model, tokenizer, memory=2000).trace(FACTS, **OPTIONS)


@pytest.mark.parametrize("memory", ["1GiB", "200 MB", 2 * 10**8])
def test_budgets_as_text(model, tokenizer, expected, memory):
    fact = FACTS[0]
    table = cc.Tracer(model, tokenizer, memory=memory).trace([fact], **OPTIONS)
    assert_same(table, [row for row in expected if row["fact_id"] == fact.id])


def allocator_error():
    """What torch's CPU allocator really raises: here for a petabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ERRORS = [
    CUDA_ERROR,
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 8"),
    allocator_error(),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu without memory", "cpu on linux"])
@pytest.mark.parametrize("numbers", [{1}, {17}, {2, 5, 9}, {40, 41, 200}])
def test_running_out_of_memory_loses_nothing(model, tokenizer, expected, error, numbers):
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(FACTS[:1], **OPTIONS)  # the first use also compares with the model's own forward
    with FailingProducts(error, numbers) as failing:
        table = tracer.trace(FACTS, **OPTIONS)
    assert failing.raised == len(numbers)
    assert_same(table, expected)
    assert table["fact_id"].unique().to_pylist() == [fact.id for fact in FACTS]


def test_running_out_of_memory_inside_a_single_fact(model, tokenizer, expected):
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(FACTS[:1], **OPTIONS)
    with FailingProducts(CUDA_ERROR, {3, 6}) as failing:
        table = tracer.trace(FACTS[1:2], **OPTIONS)
    assert failing.raised == 2
    assert_same(table, [row for row in expected if row["fact_id"] == FACTS[1].id])


def test_running_out_for_good_ends_with_an_error(model, tokenizer):
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(FACTS[:1], **OPTIONS)
    with FailingProducts(CUDA_ERROR, range(1, 10**9)), pytest.raises(MemoryBudgetError, match=FACTS[0].id):
        tracer.trace(FACTS, **OPTIONS)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, tokenizer):
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(FACTS[:1], **OPTIONS)
    failing = FailingProducts(RuntimeError("the processor is on fire"), {4})
    with failing, pytest.raises(RuntimeError, match="on fire"):
        tracer.trace(FACTS, **OPTIONS)
    assert failing.raised == 1


def test_prompts_of_unequal_length_share_a_pass(tokenizer):
    """Six prompts of six lengths: one pass, unless memory says otherwise."""
    model = gpt2(2)
    plan = cc.Tracer(model, tokenizer, memory="1GiB").plan(FACTS, **OPTIONS)
    lengths = {len(oracle.encode(model, tokenizer, fact, "label").prompt) for fact in FACTS}
    assert len(lengths) == len(FACTS)
    assert plan.passes == 1


def test_a_long_prompt_with_many_rows(tokenizer):
    """A prompt of some fifty tokens whose subject comes early: many more rows than a short fact has."""
    fact = cc.Fact("long", "{} " + " ".join(["plays the sport of"] * 8), "Ann Lee", "golf")
    model = gpt2(2, 16, 2)
    options = {"states": (("hidden", 1), ("attn", 2)), "samples": 2, "sigma": 0.5}
    rows = oracle.trace(model, tokenizer, [fact], **options)
    assert len({row["token"] for row in rows}) > 30
    assert_same(cc.Tracer(model, tokenizer).trace([fact], **options), rows)
    assert np.std([row["p_patched"] for row in rows]) > 0
