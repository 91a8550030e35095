"""Plans that are forgotten and made again give the same results."""

import pytest
from helpers.compare import assert_same

import causalcone as cc
from causalcone.engine.run import scheduler as passes

OPTIONS = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": 0.5}


@pytest.fixture(scope="module")
def facts():
    """Facts of many shapes, so that plans come and go."""
    return [
        cc.Fact(f"{before} {after}", "so " * before + "{} plays" + " on" * after, "Ann Lee", "tennis")
        for after in range(6)
        for before in range(4)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 100_000])
def test_a_small_cache_changes_nothing(model, tokenizer, facts, limit):
    expected = cc.Tracer(model, tokenizer).trace(facts, **OPTIONS).to_pylist()
    tracer = cc.Tracer(model, tokenizer)
    tracer.session._plans = passes.PlanCache(limit)
    assert_same(tracer.trace(facts, **OPTIONS), expected)
    assert len(tracer.session._plans.entries) < len(facts)
