"""Edits and scores drawn at random agree with the plain ones."""

import functools

import pytest
from helpers.editing_cases import (
    EXACT,
    FINETUNE,
    assert_finetuned,
    assert_loss,
    assert_memit,
    assert_rome,
    editor,
    random_moments,
    request,
    task,
    weight,
)
from helpers.families import FAMILIES
from helpers.models import tokenizer as byte_level
from hypothesis import given, settings, strategies as st
from oracles import finetune as oracle_finetune, memit as oracle_memit, rome as oracle_rome, scores as oracle_scores
from oracles.editing import Change

import causalcone as cc
from causalcone.engine.edit.requests.requests import PROBLEMS

WORDS = ("the", "sport", "of", "plays", "Rome", "is", "Bo", "é", "called", "q", "Space")


@functools.cache
def random_model(name, layers, seed):
    return FAMILIES[name](layers, 16, 2, seed=seed)


def phrases(least, most):
    return st.lists(st.sampled_from(WORDS), min_size=least, max_size=most).map(" ".join)


@st.composite
def facts(draw, name):
    prompt = f"{draw(phrases(0, 3))} {{}} {draw(phrases(0, 3))}".strip()
    evaluation = st.lists(phrases(1, 5), max_size=2).map(tuple)
    return cc.Fact(
        name, prompt, draw(phrases(1, 3)), draw(phrases(1, 2)), draw(phrases(1, 3)),
        paraphrase_prompts=draw(evaluation), neighborhood_prompts=draw(evaluation), attribute_prompts=draw(evaluation),
    )  # fmt: skip


@st.composite
def studies(draw):
    """A model, requests of several problems, contexts, and a window."""
    layers = draw(st.integers(1, 3))
    model = random_model(draw(st.sampled_from(["gpt2", "llama"])), layers, draw(st.integers(0, 2)))
    requests = [
        request(draw(facts(str(i))), draw(st.sampled_from(PROBLEMS)), draw(st.sampled_from([0.1, 1.0])))
        for i in range(draw(st.integers(1, 2)))
    ]
    window = sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))
    return model, requests, draw(st.lists(phrases(1, 4), min_size=1, max_size=2)), tuple(window)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn=studies(), clamp=st.sampled_from([0.1, 4.0]), kl_factor=st.sampled_from([0.0, 0.5]))
def test_any_edit_is_the_plain_one(drawn, clamp, kl_factor):
    model, requests, contexts, window = drawn
    moments, tokenizer = random_moments(model), byte_level()
    common = {"steps": 3, "stop_loss": None, "clamp": clamp, "kl_factor": kl_factor}
    rome, memit = cc.RomeHparams(**common), cc.MemitHparams(**common, covariance_weight=3.0)
    ed = editor(model, moments, contexts)
    made_edits = ed.rome(requests, window[-1:], rome)
    for edit in made_edits:
        matrix = moments.matrix(edit.layer)
        assert_rome(edit, oracle_rome.rome(model, tokenizer, task(edit.request), contexts, edit.layer, matrix, rome))
    for edit in ed.memit(requests, (window,), hparams=memit):
        expected = oracle_memit.memit(model, tokenizer, [task(edit.request)], contexts, window, moments.matrices, memit)
        assert_loss(edit, expected.optima[0].loss, EXACT)
        assert_memit(edit.delta, expected, moments, 3.0)
        made_edits.append(edit)
    for edit in ed.finetune(requests, (window,), hparams=FINETUNE):
        assert_finetuned(edit, oracle_finetune.finetune(model, tokenizer, task(edit.request), window, FINETUNE))
        made_edits.append(edit)
    rows = iter(ed.score(made_edits).to_pylist())
    for edit in made_edits:
        changes = {
            layer: Change(weight(edit.delta, layer), getattr(change, "bias", None))
            for layer, change in edit.delta.changes.items()
        }
        for probe in oracle_scores.probe(model, tokenizer, task(edit.request), changes):
            row = next(rows)
            assert (row["prompt_kind"], row["prompt_index"]) == (probe.kind, probe.index)
            for name in ("pre", "post", "pre_other", "post_other"):
                assert row[f"p_{name}"] == pytest.approx(getattr(probe, name).p, rel=1e-7, abs=1e-12)
    assert next(rows, None) is None
