"""Studies drawn at random agree with the oracle."""

import functools

import pytest
from helpers.budgets import smallest_budget
from helpers.compare import assert_same
from helpers.models import gpt2, tokenizer
from hypothesis import given, settings, strategies as st
from oracles import tracing as oracle

import causalcone as cc

WORDS = ("the", "sport", "of", "plays", "Rome", "is", "Bo", "é", "called", "q", "Space")


@functools.cache
def random_model(layers, heads):
    return gpt2(layers, 16, heads, seed=layers)


def phrases(least, most):
    return st.lists(st.sampled_from(WORDS), min_size=least, max_size=most).map(" ".join)


@st.composite
def facts(draw, name):
    prompt = f"{draw(phrases(0, 3))} {{}} {draw(phrases(0, 3))}".strip()
    return cc.Fact(name, prompt, draw(phrases(1, 3)), draw(phrases(1, 2)))


@st.composite
def variants(draw, severed):
    """What a study may do otherwise: severing, heads, tokens together, other noise, more corrupted tokens."""
    chosen = {
        "joint": draw(st.booleans()),
        "extra_tokens": draw(st.integers(0, 2)),
        "noise": cc.Noise(draw(st.sampled_from(["gaussian", "uniform"])), replace=draw(st.booleans())),
        "compat": draw(st.sampled_from([None, "published"])),
    }
    if severed:
        windows = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2, unique=True))
        chosen |= {"states": tuple(("hidden", window) for window in windows)}
        chosen |= {"sever": draw(st.sampled_from(["mlp", "attn", "both"]))}
    elif draw(st.booleans()):
        chosen |= {"states": (("head.0", draw(st.integers(1, 4))), ("mlp", draw(st.integers(1, 4))))}
    return chosen


@st.composite
def studies(draw):
    """A model, its facts, and the options of a study."""
    options = {
        "states": draw(
            st.lists(
                st.tuples(st.sampled_from(["hidden", "mlp", "attn"]), st.integers(1, 7)),
                min_size=1,
                max_size=2,
                unique=True,
            ).map(tuple)
        ),
        "samples": draw(st.integers(1, 4)),
        "sigma": draw(st.sampled_from([0.05, 0.5, "3sd", "1sd"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "target": draw(st.sampled_from(["label", "argmax"])),
        "tokens": draw(st.sampled_from(["all", "subject_onward", "subject", "subject_last", "last", (0,)])),
    }
    options |= draw(variants(draw(st.booleans())))
    several = [draw(facts(str(i))) for i in range(draw(st.integers(1, 3)))]
    return random_model(draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))), several, options


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(study=studies(), share=st.sampled_from([1.0, 1.05, 1.5, 10.0]))
def test_any_study_under_any_budget_gives_the_oracles_numbers(study, share):
    model, several, options = study
    budget = int(share * smallest_budget(model, tokenizer(), tuple(several), **options))
    table = cc.Tracer(model, tokenizer(), memory=budget).trace(several, **options)
    assert_same(table, oracle.trace(model, tokenizer(), several, **options))
