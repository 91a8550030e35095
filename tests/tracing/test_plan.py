"""A plan counts what a run then does."""

import itertools

import pytest
import torch
from helpers.budgets import smallest_budget
from helpers.models import FACTS, gpt2, tokenizer as make_tokenizer
from oracles import tracing as oracle
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import causalcone as cc

OPTIONS = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3)), "samples": 3, "sigma": 0.5}
PROJECTIONS = {"mm", "addmm", "linear"}
ATTENTION = {"bmm", "baddbmm"}


def of_fused_attention(query, key, value, *args, **kwargs):
    """FLOPs of the two products of an operation that torch's counter does not know, by shapes (B, H, m or K, d)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_fused_attention}


def counted(function):
    """FLOPs (projections, attention products) that a call executes."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        function()
    by_operation = {
        str(operation).removeprefix("aten."): n for operation, n in counter.get_flop_counts().get("Global", {}).items()
    }
    attention = sum(n for name, n in by_operation.items() if name in ATTENTION or "scaled_dot_product" in name)
    return sum(n for name, n in by_operation.items() if name in PROJECTIONS), attention


def peak_bytes(function):
    """The most bytes of tensors that a call holds at once, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.fixture(scope="module")
def tracer(model, tokenizer):
    """A tracer past its first use, in which it compares itself with the model's own forward."""
    tracer = cc.Tracer(model, tokenizer)
    tracer.trace(FACTS[:1], **OPTIONS)
    return tracer


@pytest.mark.parametrize("target", ["label", "argmax"])
@pytest.mark.parametrize("tokens", ["all", "subject_last"])
@pytest.mark.parametrize(
    "states",
    [(("hidden", 1),), (("mlp", 1),), (("attn", 10),), OPTIONS["states"], (("mlp", 1), ("mlp", 3), ("mlp", 5))],
)
def test_flops_are_those_executed(tracer, states, tokens, target):
    options = {**OPTIONS, "states": states, "tokens": tokens, "target": target}
    plan = tracer.plan(FACTS, **options)
    projections, attention = counted(lambda: tracer.trace(FACTS, **options))
    assert plan.flops == projections
    assert plan.attention_flops == attention


def test_flops_of_a_study_in_many_passes(model, tokenizer, tracer):
    facts = FACTS[1:4]
    budget = int(1.2 * smallest_budget(model, tokenizer, facts, **OPTIONS))
    split = cc.Tracer(model, tokenizer, memory=budget)
    split.trace(facts[:1], **OPTIONS)
    plan = split.plan(facts, **OPTIONS)
    projections, attention = counted(lambda: split.trace(facts, **OPTIONS))
    assert plan.passes > 2 * len(facts)
    assert plan.flops > tracer.plan(facts, **OPTIONS).flops
    assert (plan.flops, plan.attention_flops) == (projections, attention)


def test_naive_flops_are_those_of_the_naive_way(model, tokenizer, tracer):
    """Of clean and corrupted sequences, one pass of the whole model for every state, layer and prompt token, and one
    with nothing restored."""
    expected = 0
    for fact in FACTS:
        case = oracle.encode(model, tokenizer, fact, "label")
        noise = oracle.draw(model, case, OPTIONS["samples"], seed=1)
        projections, _ = counted(lambda case=case, noise=noise: oracle.probabilities(model, case, noise))
        expected += projections * (1 + sum(1 for _ in oracle.restorations(model, case, OPTIONS["states"], "all")))
    assert tracer.plan(FACTS, **OPTIONS).naive_flops == expected


def test_the_cone_saves_most_of_the_work():
    """On a deep model with prompts of ordinary shape, a study takes a fraction of the naive way's FLOPs."""
    model = gpt2(12, 16, 2, dtype=torch.float32)
    plan = cc.Tracer(model, make_tokenizer()).plan(FACTS[1:2], samples=10)
    assert plan.naive_flops > 5 * plan.flops


def test_planning_computes_nothing(tracer):
    assert counted(lambda: tracer.plan(FACTS, **OPTIONS)) == (0, 0)


def test_plans_grow_with_the_study(tracer):
    def plan(facts=FACTS, **options):
        return tracer.plan(facts, **{**OPTIONS, **options})

    for smaller, larger in [
        (plan(FACTS[:2]), plan()),
        (plan(samples=1), plan()),
        (plan(states=(("mlp", 2),)), plan()),
        (plan(tokens="last"), plan()),
    ]:
        assert 0 < smaller.flops < larger.flops
        assert 0 < smaller.attention_flops < larger.attention_flops
        assert 0 < smaller.rows < larger.rows
        assert 0 < smaller.peak_bytes <= larger.peak_bytes
    assert plan().passes >= 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 1.1, 2.0])
def test_predicted_peaks_stay_within_the_budget(model, tokenizer, share):
    budget = int(share * smallest_budget(model, tokenizer, FACTS, **OPTIONS))
    assert 0 < cc.Tracer(model, tokenizer, memory=budget).plan(FACTS, **OPTIONS).peak_bytes <= budget


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pass_takes_the_memory_predicted(model, tokenizer, dtype):
    """Never more, or budgets would not hold; not far less, where the rows outweigh what every pass needs."""
    budget = 20 * smallest_budget(model, tokenizer, FACTS, **OPTIONS)
    options = {**OPTIONS, "samples": 60}
    tracer = cc.Tracer(model, tokenizer, dtype=dtype, memory=budget)
    tracer.trace(FACTS[:1], **options)
    predicted = tracer.plan(FACTS, **options).peak_bytes
    assert predicted > budget / 2
    assert 0.4 * predicted < peak_bytes(lambda: tracer.trace(FACTS, **options)) <= predicted


def test_a_window_asked_for_twice_is_computed_once(tracer):
    """Windows of several sizes that all cover the whole model are the same runs."""
    whole = tracer.plan(FACTS, **{**OPTIONS, "states": (("mlp", 9),)})
    twice = tracer.plan(FACTS, **{**OPTIONS, "states": (("mlp", 9), ("mlp", 20))})
    assert twice.flops == whole.flops
    assert twice.naive_flops > 1.9 * whole.naive_flops
