"""Edits that are out of the ordinary are marked, with the reason, and stay in the tables."""

import math

import pytest
import torch
from helpers.editing_cases import (
    CONTEXTS,
    FINETUNE,
    FORCING,
    INJECTION,
    MEMIT,
    METHODS,
    ONE_TOKEN,
    ROME,
    editor,
    random_moments,
    request,
    task,
    unit_moments,
    weight,
)
from helpers.models import gpt2, tokenizer as byte_level
from oracles.editing import at_lookup, down_weight, key_site, training_prompts

import causalcone as cc
from causalcone.engine.edit.methods.edits import LARGEST_NORM, LEAST_ALIGNMENT

FIRST = "the subject ends at the text's first token, where attention sinks are"


@pytest.mark.parametrize("method", METHODS)
def test_the_relative_norm_is_over_the_changed_weights(model, method):
    for edit in METHODS[method](editor(model), [INJECTION, FORCING], (0, 2)):
        changes = [weight(edit.delta, layer).norm() for layer in edit.delta.layers]
        weights = [down_weight(model, layer).double().norm() for layer in edit.delta.layers]
        if method == "finetune":
            changes += [edit.delta.changes[layer].bias.norm() for layer in edit.delta.layers]
            weights += [model.transformer.h[layer].mlp.c_proj.bias.double().norm() for layer in edit.delta.layers]
        assert edit.relative_norm == pytest.approx(math.hypot(*changes) / math.hypot(*weights), rel=1e-9)
        assert (edit.key_alignment is None) == (method != "rome")


def test_edits_that_share_a_change_have_its_norm(model):
    ed, requests = editor(model), [INJECTION, request(ONE_TOKEN)]
    joint = ed.memit_joint(requests, (1, 2), MEMIT).edits()
    batch = ed.memit(requests, ((1, 2),), hparams=MEMIT, joint=True)
    assert [edit.relative_norm for edit in joint] == [edit.relative_norm for edit in batch]
    assert joint[0].relative_norm > 0


def at_start(edit):
    return bool(edit.suspect) and FIRST in edit.suspect


def test_a_subject_that_ends_at_the_first_token_is_suspect(model):
    """But for a token that the tokenizer puts before it; and fine-tuning reads nothing there."""
    first = request(cc.Fact("first", "{} is in", "B", "Rome", target_new="Seattle"))
    assert [at_start(edit) for edit in editor(model).rome([first, INJECTION], (1,), ROME)] == [True, False]
    assert [at_start(edit) for edit in editor(model).memit([first, INJECTION], (1,), 1, MEMIT)] == [True, False]
    assert not at_start(editor(model).finetune([first], (1,), hparams=FINETUNE)[0])
    begun = cc.Editor(model, byte_level(bos=True), random_moments(model), CONTEXTS)
    assert not at_start(begun.rome([first], (1,), ROME)[0])


def test_a_change_larger_than_the_weights_is_suspect():
    """Of a model whose down-projection is small, the same change is large."""
    model = gpt2(3, 32, 4, dtype=torch.float64)
    (usual,) = editor(model, unit_moments(model)).rome([INJECTION], (1,), ROME)
    with torch.no_grad():
        for parameter in model.transformer.h[1].mlp.c_proj.parameters():
            parameter.mul_(1e-3 * usual.relative_norm)
    (large,) = editor(model, unit_moments(model)).finetune([INJECTION], (1,), hparams=FINETUNE)
    assert large.relative_norm > LARGEST_NORM
    assert large.suspect == f"relative_norm above {LARGEST_NORM:g}"
    assert large.status == "done"


def test_a_key_unlike_the_mean_is_suspect(model):
    """With a C whose inverse is small along the bare prompt's key; R-ROME and p-ROME do not divide by that."""
    (bare,) = training_prompts(model, byte_level(), INJECTION.fact, ())
    key = at_lookup(model, task(INJECTION), bare, key_site(model, 1)).double()
    matrix = torch.eye(len(key), dtype=torch.float64) + 49 * torch.outer(key, key) / (key @ key)
    ed = editor(model, cc.Moments({1: matrix}, {1: 10**6}))
    (usual,), (edit,) = (
        editor(model, unit_moments(model)).rome([INJECTION], (1,), ROME),
        ed.rome([INJECTION], (1,), ROME),
    )
    assert edit.key_alignment < LEAST_ALIGNMENT < usual.key_alignment
    assert f"key_alignment below {LEAST_ALIGNMENT:g}" in edit.suspect
    assert usual.suspect is None
    for name in ("r-rome", "p-rome"):
        ((other,),) = ed.batches([INJECTION], name, (1,), hparams=ROME)
        assert other.key_alignment == pytest.approx(1)
        assert not other.suspect or "key_alignment" not in other.suspect


def test_the_table_has_the_reasons(model):
    (row,) = cc.edit_batch(editor(model).finetune([INJECTION], (1,), hparams=FINETUNE)).to_pylist()
    assert row["key_alignment"] is None
    assert row["suspect"] is None
    assert row["relative_norm"] > 0


def test_an_edit_that_failed_is_not_judged(model):
    hparams = cc.RomeHparams(steps=2, lr=1e308)
    (edit,) = editor(model).rome([INJECTION], (1,), hparams)
    assert edit.status == "failed"
    assert (edit.key_alignment, edit.relative_norm, edit.suspect) == (None, None, None)
