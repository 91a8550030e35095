"""However edits are cut into passes, in whatever order they are asked for, and whatever runs out on the way, they and
their scores are the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.editing_cases import (
    CONTEXTS,
    END,
    ERASURE,
    EVERY_PROBLEM,
    FORCING,
    FULL,
    INJECTION,
    REVERSAL,
    editor,
    error,
    random_moments,
    request,
    weight,
)
from helpers.families import FAMILIES
from helpers.models import gpt2
from torch.utils._python_dispatch import TorchDispatchMode

import causalcone as cc
from causalcone.engine.edit.methods.fine_tuning.finetune import Finetune
from causalcone.engine.edit.methods.value_search import ValueOptimizer
from causalcone.engine.edit.scoring.scoring import EditScorer
from causalcone.engine.errors import MemoryBudgetError

ROME = cc.RomeHparams(steps=6, stop_loss=5.0)
MEMIT = cc.MemitHparams(steps=6, stop_loss=5.0, covariance_weight=5.0)
FINETUNE = cc.FinetuneHparams(steps=5, lr=5e-3, norm_constraint=1.2e-2, stop_loss=4.0, noise_samples=3)
METHODS = {
    "rome": lambda ed, requests, layers: ed.rome(requests, layers, ROME),
    "memit": lambda ed, requests, layers: ed.memit(requests, layers, 3, MEMIT),
    "finetune": lambda ed, requests, layers: ed.finetune(requests, layers, 3, FINETUNE),
}
PASSES = {"rome": (ValueOptimizer, "find"), "memit": (ValueOptimizer, "find"), "finetune": (Finetune, "_train")}
LAYERS = (0, 1, 2, 3)
BUDGETS = ("4.5MB", "7MB", "12MB", "25MB")
NOTHING = 1e-5
"""The size of a change below which it is rounding."""
PRODUCTS = {"linear", "mm", "addmm", "bmm", "baddbmm"}


@pytest.fixture(scope="module")
def whole(model, moments):
    """By method, all edits made together."""
    ed = editor(model, moments)
    return {name: make(ed, EVERY_PROBLEM, LAYERS) for name, make in METHODS.items()}


@pytest.fixture
def passes(monkeypatch):
    """By what runs them, how many items each pass had."""
    seen = {}

    def counted(owner, name):
        original = getattr(owner, name)

        def run(self, items):
            seen.setdefault(owner, []).append(len(items))
            return original(self, items)

        monkeypatch.setattr(owner, name, run)

    for owner, name in {*PASSES.values(), (EditScorer, "_together")}:
        counted(owner, name)
    return seen


def assert_same(found, expected):
    """The same edits in the same order, up to rounding."""
    assert [edit.edit_id for edit in found] == [edit.edit_id for edit in expected]
    for one, other in zip(found, expected, strict=True):
        assert_alike(one, other)


def assert_alike(one, other):
    assert (one.edit_id, one.status, one.steps) == (other.edit_id, other.status, other.steps)
    assert one.loss == pytest.approx(other.loss, rel=1e-9)
    assert one.delta.layers == other.delta.layers
    for layer in one.delta.layers:
        assert error(weight(one.delta, layer), weight(other.delta, layer), NOTHING) < 1e-9
        for name in ("left", "right", "bias"):
            own = getattr(one.delta.changes[layer], name, None)
            if own is not None:
                assert error(own, getattr(other.delta.changes[layer], name), NOTHING) < 1e-9


def assert_same_table(found, expected):
    found, expected = found.to_pydict(), expected.to_pydict()
    for name, column in found.items():
        if column and isinstance(column[0], float):
            np.testing.assert_allclose(
                np.array(column, dtype=float), np.array(expected[name], dtype=float), rtol=1e-9, atol=1e-15
            )
        else:
            assert column == expected[name]


# --- budgets ---


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", BUDGETS)
def test_every_budget_gives_the_same_edits(model, moments, whole, passes, method, memory):
    assert_same(METHODS[method](editor(model, moments, memory=memory), EVERY_PROBLEM, LAYERS), whole[method])
    assert memory == BUDGETS[-1] or len(passes[PASSES[method][0]]) > 1


def test_smaller_budgets_take_more_passes(model, moments, passes):
    for method, make in METHODS.items():
        seen = []
        for memory in (BUDGETS[0], BUDGETS[2], "1GB"):
            passes.clear()
            make(editor(model, moments, memory=memory), EVERY_PROBLEM, (0, 1))
            seen.append(len(passes[PASSES[method][0]]))
        assert seen == sorted(seen, reverse=True)
        assert seen[0] > 2
        assert seen[-1] == 1


def test_budgets_that_are_too_small(model, moments, whole):
    """For a single edit, with what it needs."""
    ed = editor(model, moments, memory=1000)
    for make in METHODS.values():
        with pytest.raises(MemoryBudgetError, match="give more memory"):
            make(ed, [INJECTION], (1,))
    with pytest.raises(MemoryBudgetError, match="give more memory"):
        ed.memit_joint([INJECTION], (1,), MEMIT)
    with pytest.raises(MemoryBudgetError, match="give more memory"):
        ed.score(whole["rome"])


@pytest.mark.slow
@pytest.mark.parametrize("memory", BUDGETS)
def test_every_budget_gives_the_same_joint_edit(model, moments, memory):
    parts, together = (
        ed.memit_joint(EVERY_PROBLEM, (0, 1), MEMIT)
        for ed in (editor(model, moments, memory=memory), editor(model, moments))
    )
    for one, other in zip(parts.found, together.found, strict=True):
        assert (one.steps, one.reason) == (other.steps, other.reason)
        assert error(one.delta, other.delta, NOTHING) < 1e-9
    for layer in (0, 1):
        assert error(weight(parts.delta, layer), weight(together.delta, layer)) < 1e-9


@pytest.mark.parametrize("memory", BUDGETS)
def test_every_budget_gives_the_same_scores(model, moments, whole, passes, memory):
    edits = [*whole["rome"], *whole["finetune"]]
    expected = editor(model, moments).evaluate(edits, accuracy=True)
    passes.clear()
    found = editor(model, moments, memory=memory).evaluate(edits, accuracy=True)
    assert memory == BUDGETS[-1] or len(passes[EditScorer]) > 1
    assert_same_table(found.probes, expected.probes)
    assert_same_table(found.metrics, expected.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "gemma3_text"])
def test_budgets_of_other_architectures(passes, name):
    """Norms around the MLP, sliding windows, blocks in parallel."""
    model = FAMILIES[name](3, 32, 4, dtype=torch.float64)
    ample, scarce = (editor(model, random_moments(model), memory=memory) for memory in (None, BUDGETS[0]))
    for make in METHODS.values():
        expected = make(ample, [REVERSAL, FORCING, INJECTION], (0,))
        assert_same(make(scarce, [REVERSAL, FORCING, INJECTION], (0,)), expected)
        tables = [ed.score(expected) for ed in (scarce, ample)]
        assert_same_table(*tables)
    assert sum(map(len, passes.values())) > 4 * len(METHODS) + 1, "one pass each, and more where memory is scarce"


def test_batches_come_as_they_are_made(model, moments, whole):
    """Each before the next is begun."""
    batches = editor(model, moments, memory=BUDGETS[0]).batches(EVERY_PROBLEM, "rome", LAYERS, hparams=ROME)
    first = next(batches)
    assert 0 < len(first) < len(whole["rome"]) - 4
    rest = list(batches)
    assert len(rest) > 0
    assert_same([*first, *(edit for batch in rest for edit in batch)], whole["rome"])


# --- orders ---


@pytest.mark.parametrize("method", METHODS)
def test_one_edit_at_a_time(model, moments, whole, method):
    ed = editor(model, moments)
    for place in (0, 6, 11, 17):
        each = whole[method][place]
        (alone,) = METHODS[method](ed, [each.request], (each.layer,))
        assert_alike(alone, each)
        assert_same_table(ed.score([alone]), ed.score([each]))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_asked_for(model, moments, whole, method):
    """It is the order of what comes, and nothing else."""
    requests, layers = EVERY_PROBLEM[::-1], (2, 0, 3)
    found = METHODS[method](editor(model, moments), requests, layers)
    assert [(edit.request, edit.layer) for edit in found] == [(each, layer) for each in requests for layer in layers]
    by_id = {edit.edit_id: edit for edit in whole[method]}
    for edit in found:
        assert_alike(edit, by_id[edit.edit_id])


def test_scores_in_any_order(model, moments, whole):
    """Of edits of several methods and of requests that do not follow each other."""
    edits = [edit for three in zip(*whole.values(), strict=True) for edit in three][::-1]
    ed = editor(model, moments)
    rows = ed.score(edits).to_pylist()
    assert list(dict.fromkeys(row["edit_id"] for row in rows)) == [edit.edit_id for edit in edits]
    for name, own in whole.items():
        mixed = [row for row in rows if f"/{name}-" in row["edit_id"]]
        place = {edit.edit_id: n for n, edit in enumerate(own)}
        mixed.sort(key=lambda row, place=place: place[row["edit_id"]])
        alone = ed.score(own).to_pylist()
        assert [row["edit_id"] for row in mixed] == [row["edit_id"] for row in alone]
        for column in ("p_pre", "p_post", "p_pre_other", "p_post_other"):
            left, right = ([row[column] for row in rows] for rows in (mixed, alone))
            np.testing.assert_allclose(left, right, rtol=1e-9)


def test_the_same_request_twice(model, moments):
    """Two requests of one fact for two targets, and the same one again."""
    first, second = INJECTION, replace(INJECTION, target=ERASURE.target)
    edits = editor(model, moments).rome([first, second, first], (1,), ROME)
    assert_alike(edits[0], edits[2])
    assert edits[1].delta_norm != pytest.approx(edits[0].delta_norm, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_those_who_stop_early_leave_the_others_alone(model, moments, method):
    """The steps are of many lengths, and each edit's are its own."""
    ed, requests = editor(model, moments), [*EVERY_PROBLEM, request(END), request(FULL[4])]
    together = METHODS[method](ed, requests, (1, 2))
    assert len({edit.steps for edit in together}) > 3
    apart = [edit for each in requests for edit in METHODS[method](ed, [each], (1, 2))]
    assert_same(apart, together)


# --- running out of memory ---


class FailingProducts(TorchDispatchMode):
    """Raises ``error`` in place of the matrix product with a number, counted from the first inside."""

    def __init__(self, error, number):
        super().__init__()
        self.error, self.number = error, number
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products += 1
            if self.products == self.number:
                raise self.error
        return func(*args, **(kwargs or {}))


def failing(monkeypatch, owner, name, error, number=1, times=1):
    """Makes the first ``times`` passes fail at a product; returns how many items each pass had."""
    original, seen = getattr(owner, name), []

    def run(self, items):
        seen.append(len(items))
        if len(seen) > times:
            return original(self, items)
        with FailingProducts(error, number):
            return original(self, items)

    monkeypatch.setattr(owner, name, run)
    return seen


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 8")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("memory_error", "number"),
    [(CUDA_ERROR, 1), (CPU_ERROR, 40), (MemoryError(), 75)],
    ids=["cuda, at once", "cpu, in a step", "python, later"],
)
def test_running_out_of_memory_loses_nothing(model, moments, whole, monkeypatch, memory_error, number, method):
    """Wherever it happens, also in the middle of the steps: the halves begin anew."""
    seen = failing(monkeypatch, *PASSES[method], memory_error, number)
    requests = EVERY_PROBLEM[:3]
    found = METHODS[method](editor(model, moments), requests, (1, 2))
    half = len(found) // 2
    assert seen == [len(found), half, len(found) - half]
    by_id = {edit.edit_id: edit for edit in whole[method]}
    for edit in found:
        assert_alike(edit, by_id[edit.edit_id])


def test_running_out_of_memory_again_and_again(model, moments, whole, monkeypatch):
    """Down to single edits."""
    seen = failing(monkeypatch, *PASSES["rome"], CUDA_ERROR, 5, times=2)
    assert_same(METHODS["rome"](editor(model, moments), [INJECTION], LAYERS), whole["rome"][:4])
    assert seen == [4, 2, 1, 1, 2]


def test_running_out_of_memory_while_scoring(model, moments, whole, monkeypatch):
    expected = editor(model, moments).score(whole["rome"])
    seen = failing(monkeypatch, EditScorer, "_together", CUDA_ERROR, 7, times=2)
    assert_same_table(editor(model, moments).score(whole["rome"]), expected)
    assert seen == [5, 2, 1, 1, 3]


@pytest.mark.parametrize("method", METHODS)
def test_running_out_for_good_ends_with_an_error(model, moments, monkeypatch, method):
    failing(monkeypatch, *PASSES[method], CUDA_ERROR, times=10**9)
    with pytest.raises(MemoryBudgetError, match="memory ran out on a single edit"):
        METHODS[method](editor(model, moments), EVERY_PROBLEM, (1,))


@pytest.mark.parametrize("method", METHODS)
def test_other_errors_are_not_taken_for_a_lack_of_memory(model, moments, monkeypatch, method):
    seen = failing(monkeypatch, *PASSES[method], RuntimeError("the processor is on fire"), 3)
    with pytest.raises(RuntimeError, match="on fire"):
        METHODS[method](editor(model, moments), EVERY_PROBLEM, (1,))
    assert len(seen) == 1


def test_long_prompts_and_short_ones_in_one_pass(passes):
    """Of all lengths, one pass for all."""
    model = gpt2(2)
    facts = [replace(END, id=str(n), prompt=f"{'plays the sport of ' * n}{{}}{' is' * (n % 3)}") for n in range(6)]
    requests = [request(fact) for fact in facts]
    moments = random_moments(model)
    together = editor(model, moments, CONTEXTS[:1]).rome(requests, (0,), ROME)
    assert passes[ValueOptimizer] == [6]
    for edit in together:
        (alone,) = editor(model, moments, CONTEXTS[:1]).rome([edit.request], (0,), ROME)
        assert_alike(alone, edit)
