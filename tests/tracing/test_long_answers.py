"""Tracing and zeroing of answers of up to 200 tokens, whose probability is too small for a number, agree with the
oracle's logarithms."""

import functools
import warnings

import numpy as np
import polars as pl
from helpers.compare import assert_same
from helpers.models import gpt2, tokenizer
from hypothesis import example, given, settings, strategies as st
from oracles import tracing as oracle

import causalcone as cc
from causalcone.analysis import restore_effects, zeroing_effects

STATES = (("hidden", 1), ("mlp", 2))


@functools.cache
def model():
    return gpt2(2, 16, 2, positions=224)


def fact_of(tokens):
    """One that has an answer of so many tokens: letters and the spaces before them."""
    words = " ".join("qz"[number % 2] for number in range((tokens + 1) // 2))
    return cc.Fact("0", "In {} they", "Rome", words, joiner="none" if tokens % 2 else "space")


def frame(rows):
    return pl.DataFrame(rows, infer_schema_length=None)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 200), samples=st.integers(1, 3), seed=st.integers(0, 9))
@example(tokens=1, samples=2, seed=0)
@example(tokens=200, samples=2, seed=0)
def test_effects_of_answers_of_any_length(tokens, samples, seed):
    fact, options = fact_of(tokens), {"states": STATES, "samples": samples, "sigma": 2.0, "seed": seed}
    tracer = cc.Tracer(model(), tokenizer())
    table, rows = tracer.trace([fact], **options), oracle.trace(model(), tokenizer(), [fact], **options)
    assert_same(table, rows)
    assert set(table["answer_tokens"].to_pylist()) == {tokens}
    key = ["kind", "window", "layer", "token"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        effects = restore_effects(table).sort(key)
    expected = frame(rows).sort(key).with_columns(high=pl.max("logp_patched").over("kind", "window"))
    high, clean, low, value = (expected[f].to_numpy() for f in ("high", "logp_clean", "logp_corrupted", "logp_patched"))
    high = np.maximum(high, clean)
    top = np.maximum(high, low)
    d, low, value = np.exp(high - top), np.exp(low - top), np.exp(value - top)
    # a difference of nearly equal numbers has the precision of these, not of itself
    within = 1e-9 * (d + low) / abs(d - low) * 2
    assert effects["fraction_restored"].is_finite().all()
    assert (abs(effects["relative_effect"].to_numpy() - (value - low) / abs(d - low)) <= within).all()
    mean = restore_effects(table, answer_score="mean")
    np.testing.assert_allclose(mean["p_clean"], np.exp(effects["logp_clean"].to_numpy() / tokens), rtol=1e-12)
    zeroed = zeroing_effects(tracer.zero([fact]))
    expected = [-np.expm1(row["logp_patched"] - row["logp_clean"]) for row in oracle.zero(model(), tokenizer(), [fact])]
    np.testing.assert_allclose(zeroed["effect"], np.clip(expected, 0, 1), atol=1e-9)


def test_an_answer_of_150_tokens_underflows_and_has_effects():
    fact = fact_of(150)
    table = cc.Tracer(model(), tokenizer()).trace([fact], states=STATES, samples=2, sigma=2.0)
    assert table["answer_tokens"][0].as_py() == 150
    assert set(table["p_patched"].to_pylist()) == {0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        effects = restore_effects(table)
    assert 0.9 < effects["fraction_restored"].max() <= 1
    assert effects["relative_effect"].is_finite().all()
