"""ROME gives the plain edits: for every architecture, problem, layer and place of the subject."""

from dataclasses import replace

import pytest
import torch
from helpers.editing_cases import (
    CONTEXTS,
    END,
    ERASURE,
    EVERY_PROBLEM,
    EXACT,
    FORCING,
    FULL,
    INJECTION,
    ONLY,
    SINGLE,
    START,
    THREE,
    UNMODIFIED,
    assert_rome,
    editor,
    error,
    random_moments,
    request,
    task,
    unit_moments,
    unlifted,
    weight,
)
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import gpt2, tokenizer as byte_level
from oracles import rome as oracle_rome
from oracles.editing import at_lookup, training_prompts, value_site

import causalcone as cc
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.encoding import target_ids
from causalcone.engine.errors import ExperimentError

FEW_STEPS = cc.RomeHparams(steps=4, stop_loss=None)
SHORT = {"hparams": replace(FEW_STEPS, steps=3), "contexts": CONTEXTS[:2]}


def plain(model, moments, edit, hparams, contexts=CONTEXTS, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    moment = moments.matrix(edit.layer).to(model.device)
    return oracle_rome.rome(model, tokenizer, task(edit.request), contexts, edit.layer, moment, hparams)


def assert_exact(model, requests, layers, hparams=FEW_STEPS, bounds=EXACT, **options):
    moments = random_moments(model)
    edits = editor(model, moments, **options).rome(requests, layers, hparams)
    layers = range(model.config.num_hidden_layers) if layers == "all" else layers
    assert [(edit.request, edit.layer) for edit in edits] == [(each, layer) for each in requests for layer in layers]
    for edit in edits:
        assert_rome(edit, plain(model, moments, edit, hparams, options.get("contexts", CONTEXTS)), bounds)
    return edits


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


def test_every_architecture(family):
    edits = assert_exact(family, [INJECTION, ERASURE], (0,), **SHORT) + assert_exact(family, [FORCING], (0, 2), **SHORT)
    assert all(edit.delta_norm > 1e-3 for edit in edits)


def test_the_unmodified_float64_model(family):
    with unlifted():
        assert_exact(family, [FORCING], (1,), bounds=UNMODIFIED, **SHORT)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32(name):
    assert_exact(FAMILIES[name](3, 32, 4, dtype=torch.float32), [INJECTION, FORCING], (0,), bounds=SINGLE, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("facts", [FULL[::2], FULL[1::2]], ids=["start, end, one token", "middle, only, many tokens"])
def test_every_problem_and_place_of_the_subject(model, facts, problem):
    first = PROBLEMS.index(problem) % 2
    edits = assert_exact(model, [request(fact, problem) for fact in facts], (first, first + 2), **SHORT)
    assert {edit.fact_id for edit in edits if edit.delta_norm > 1e-3} >= {fact.id for fact in facts if fact is not END}


def test_every_layer(model):
    edits = assert_exact(model, [INJECTION, request(ONLY), FORCING], "all", **SHORT)
    assert [edit.layer for edit in edits] == 3 * [0, 1, 2, 3]
    assert [edit.delta_norm > 1e-3 for edit in edits] == [True] * 3 + [False] + [True] * 8


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_depths(layers):
    assert_exact(gpt2(layers, 16, 2), [FORCING, INJECTION], sorted({0, layers // 2, layers - 1}))


@pytest.mark.parametrize(
    "contexts",
    [("Bo",), ("They say",) * 2, ("Bo", "One of the famous players is called Danielle Darrieux and they say", "{x}")],
    ids=["one", "equal", "unequal"],
)
def test_contexts(model, contexts):
    assert_exact(model, THREE, (1,), contexts=contexts)


def test_contexts_with_special_tokens(model):
    """Which come once, before the context."""
    tokenizer, moments = byte_level(bos=True), random_moments(model)
    edits = cc.Editor(model, tokenizer, moments, CONTEXTS).rome(THREE, (1,), FEW_STEPS)
    for edit in edits:
        assert_rome(edit, plain(model, moments, edit, FEW_STEPS, tokenizer=tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "hparams",
    [
        replace(FEW_STEPS, steps=1),
        replace(FEW_STEPS, steps=2, lr=0.05),
        replace(FEW_STEPS, kl_factor=0.9, steps=6),
        replace(FEW_STEPS, kl_factor=0.0, weight_decay=0.0),
        replace(FEW_STEPS, weight_decay=30.0, lr=0.1),
        replace(FEW_STEPS, clamp=0.2, steps=6),
        replace(FEW_STEPS, clamp=0.0),
        cc.RomeHparams(),
    ],
    ids=["one step", "small steps", "divergence", "target alone", "decay", "clamped", "pinned", "published"],
)
def test_hyperparameters(model, hparams):
    assert_exact(model, THREE, (1,), hparams, contexts=CONTEXTS[:1])


def test_the_clamp_is_reached(model):
    """The vector is kept within so many norms of the value."""
    moments, hparams = random_moments(model), replace(FEW_STEPS, clamp=0.05)
    for edit in editor(model, moments).rome([INJECTION, FORCING], (0, 1), hparams):
        expected = plain(model, moments, edit, hparams)
        change = edit.delta.changes[edit.layer]
        added = (change.left * (change.right.T @ expected.k)).norm()
        assert float(added / expected.v.norm()) == pytest.approx(0.05, rel=1e-9)


def test_updates(model):
    """The last step evaluates without an update, but where a fact is erased."""
    edits = assert_exact(model, EVERY_PROBLEM, (1,), contexts=CONTEXTS[:1])
    assert {edit.request.problem: edit.steps for edit in edits} == {
        problem: 4 if problem == "fact_erasure" else 3 for problem in PROBLEMS
    }


def test_some_stop_early(model):
    """Each on its own, and the others go on as if it had never been there."""
    hparams = cc.RomeHparams(steps=8, stop_loss=4.0)
    edits = assert_exact(model, [INJECTION, ERASURE, FORCING, request(END)], (0, 2), hparams, contexts=CONTEXTS[:1])
    assert [edit.steps for edit in edits] == [7, 7, 0, 0, 4, 5, 3, 5], "p of an answer is low from the first"
    assert all((edit.loss < 4) == (edit.steps < 7) for edit in edits)


def test_all_stop_at_once(model):
    edits = assert_exact(model, THREE, (1, 2), cc.RomeHparams(stop_loss=1e9))
    assert {edit.steps for edit in edits} == {0}
    assert {edit.delta_norm for edit in edits} == {0.0}


def test_the_key(model):
    """With the identity as moment, the direction is that of the mean key."""
    edits = editor(model, unit_moments(model)).rome(THREE, (0, 2), FEW_STEPS)
    for edit in edits:
        expected = plain(model, unit_moments(model), edit, FEW_STEPS)
        assert error(edit.delta.changes[edit.layer].right[:, 0], expected.k_star) < 1e-12
        assert_rome(edit, expected)


def test_the_edited_model_has_the_value(model):
    """With the delta applied, the down-projection gives v* at the lookup of the bare prompt."""
    moments, hparams = random_moments(model), cc.RomeHparams(steps=2)
    for edit in editor(model, moments).rome([INJECTION, FORCING], (1,), hparams):
        expected = plain(model, moments, edit, hparams)
        (bare,) = training_prompts(model, byte_level(), edit.request.fact, ())
        with cc.applied(model, edit.delta):
            value = at_lookup(model, task(edit.request), bare, value_site(model, 1))
        assert error(value, expected.v_star) < 1e-9
        assert error(value, expected.v) > 0.01


@pytest.mark.parametrize("keys", ["mean", "prompt"])
@pytest.mark.parametrize("contexts", [("Bo",), CONTEXTS], ids=["one context", "unequal contexts"])
def test_keys_of_one_kind(model, keys, contexts):
    """R-ROME and p-ROME: several facts together, at several layers."""
    hparams = replace(FEW_STEPS, keys=keys)
    edits = assert_exact(model, [*EVERY_PROBLEM, request(ONLY)], (0, 1, 3), hparams, contexts=contexts)
    assert all(edit.key_alignment == pytest.approx(1, abs=1e-12) for edit in edits)


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma2"])
@pytest.mark.parametrize("keys", ["mean", "prompt"])
def test_keys_of_one_kind_in_other_architectures(name, keys):
    model = FAMILIES[name](3, 32, 4, dtype=torch.float64)
    assert_exact(model, [INJECTION, FORCING], (0, 2), replace(FEW_STEPS, steps=3, keys=keys), contexts=CONTEXTS[:2])


def test_the_edited_model_has_the_value_on_average(model):
    """With the change of R-ROME, the mean over the contexts of what the down-projection gives is v*."""
    moments, hparams = random_moments(model), cc.RomeHparams(steps=2, keys="mean")
    for edit in editor(model, moments).rome([INJECTION, FORCING], (1,), hparams):
        expected = plain(model, moments, edit, hparams)
        prompts = training_prompts(model, byte_level(), edit.request.fact, CONTEXTS)
        with cc.applied(model, edit.delta):
            values = [at_lookup(model, task(edit.request), each, value_site(model, 1)) for each in prompts]
        assert error(torch.stack(values).mean(0), expected.v_star) < 1e-9
        assert error(values[0], expected.v_star) > 1e-3


def test_names_for_the_keys(model):
    """The edits are called by them, so that those of several can be scored together."""
    ed, requests = editor(model), [INJECTION, FORCING]
    every = {name: next(ed.batches(requests, name, (1,), hparams=FEW_STEPS)) for name in ("rome", "r-rome", "p-rome")}
    for (name, edits), keys in zip(every.items(), ("published", "mean", "prompt"), strict=True):
        same = ed.rome(requests, (1,), replace(FEW_STEPS, keys=keys))
        assert [edit.edit_id for edit in edits] == [f"{edit.fact_id}/{edit.problem}/{name}-1/1" for edit in same]
        assert all(torch.equal(weight(a.delta, 1), weight(b.delta, 1)) for a, b in zip(edits, same, strict=True))
    scored = ed.score([edit for edits in every.values() for edit in edits])
    assert len(set(scored["edit_id"].to_pylist())) == 6
    with pytest.raises(ExperimentError, match="keys is 'both'; choose from published, mean, prompt"):
        cc.RomeHparams(keys="both")


def test_a_target_of_many_tokens(model):
    long = target_ids("golf in Seattle and French tennis in Rome", byte_level())
    assert len(long) > 8
    assert_exact(model, [Request(START, "error_injection", long), Request(END, "fact_erasure", long)], (0, 3), **SHORT)


def test_what_the_model_says_already(model):
    """It is made likelier still, or, in Fact Erasure, unlikely."""
    said = int(model(torch.tensor([byte_level()(START.text)["input_ids"]])).logits[0, -1].argmax())
    requests = [Request(START, problem, (said,)) for problem in ("error_injection", "fact_erasure")]
    edits = assert_exact(model, requests, (1,), cc.RomeHparams(), contexts=CONTEXTS[:1])
    rows = [row for row in editor(model).score(edits).to_pylist() if row["prompt_kind"] == "rewrite"]
    likelier, erased = [row["p_post"] / row["p_pre"] for row in rows]
    assert likelier > 1.5
    assert erased < 0.2


def test_no_change_reaches_what_is_never_read(model):
    """At the last layer, before the prompt's end, there is no gradient, nor one made of rounding."""
    (edit,) = editor(model).rome([ERASURE], (3,), replace(FEW_STEPS, kl_factor=0.9))
    assert weight(edit.delta, 3).count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=["f64", "f32"])
def test_on_a_gpu(name, dtype, bounds):
    assert_exact(FAMILIES[name](3, 32, 4, dtype=dtype).cuda(), THREE, (0, 2), bounds=bounds)
