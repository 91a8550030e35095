"""MEMIT gives the plain edits: alone and several in one model, for every architecture, problem and window of layers."""

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
    SINGLE,
    START,
    THREE,
    UNMODIFIED,
    assert_loss,
    assert_memit,
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
from oracles import memit as oracle_memit
from oracles.editing import at_lookup, training_prompts
from oracles.model import sites

import causalcone as cc
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.encoding import target_ids

FEW_STEPS = cc.MemitHparams(steps=4, stop_loss=None, covariance_weight=5.0)
SHORT = {"hparams": replace(FEW_STEPS, steps=3), "contexts": CONTEXTS[:2]}


def plain(model, moments, requests, layers, hparams, contexts=CONTEXTS):
    matrices = {layer: moments.matrix(layer).to(model.device) for layer in layers}
    return oracle_memit.memit(model, byte_level(), list(map(task, requests)), contexts, layers, matrices, hparams)


def assert_exact(model, requests, layers, window=5, hparams=FEW_STEPS, bounds=EXACT, contexts=CONTEXTS):
    """Every edit, against the plain one of the layers that it says; returns the edits."""
    moments = random_moments(model)
    edits = editor(model, moments, contexts).memit(requests, layers, window, hparams)
    for edit in edits:
        expected = plain(model, moments, [edit.request], edit.delta.layers, hparams, contexts)
        (optimum,) = expected.optima
        assert (edit.status, edit.steps) == ("done", optimum.updates)
        assert_loss(edit, optimum.loss, bounds)
        assert_memit(edit.delta, expected, moments, hparams.covariance_weight, bounds)
    return edits


def assert_joint(model, requests, layers, hparams=FEW_STEPS, bounds=EXACT, contexts=CONTEXTS):
    """The vector of every request and the change of every layer."""
    moments = random_moments(model)
    joint = editor(model, moments, contexts).memit_joint(requests, layers, hparams)
    expected = plain(model, moments, requests, tuple(layers), hparams, contexts)
    assert joint.requests == tuple(requests)
    assert joint.window.layers == tuple(layers)
    for found, optimum in zip(joint.found, expected.optima, strict=True):
        assert (found.reason, found.steps) == (None, optimum.updates)
        assert found.loss == pytest.approx(optimum.loss, rel=bounds.loss)
        assert error(found.base, optimum.start) < bounds.weights
        assert error(found.delta, optimum.delta, bounds.nothing * float(optimum.start.norm())) < bounds.weights
    assert_memit(joint.delta, expected, moments, hparams.covariance_weight, bounds)
    return joint


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


def test_every_architecture(family):
    edits = assert_exact(family, THREE, (0,), 3, **SHORT)
    assert [edit.delta.layers for edit in edits] == [(0, 1)] * 3
    assert edits[2].delta_norm > 0.1


def test_together_in_every_architecture(family):
    joint = assert_joint(family, [FORCING, ERASURE], (1, 2), **SHORT)
    assert joint.delta.norm > 0.1


def test_the_unmodified_float64_model(family):
    with unlifted():
        assert_joint(family, [FORCING], (0, 1), bounds=UNMODIFIED, **SHORT)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32(name):
    model = FAMILIES[name](3, 32, 4, dtype=torch.float32)
    assert_exact(model, [FORCING, ERASURE], (0,), 3, bounds=SINGLE, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("facts", [FULL[::2], FULL[1::2]], ids=["start, end, one token", "middle, only, many tokens"])
def test_every_problem_and_place_of_the_subject(model, facts, problem):
    edits = assert_exact(model, [request(fact, problem) for fact in facts], ((1, 2),), **SHORT)
    assert {edit.fact_id for edit in edits if edit.delta_norm > 1e-3} >= {fact.id for fact in facts if fact is not END}


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_windows(model, window):
    """They are clipped at both ends; an even one has more layers before its centre."""
    edits = assert_exact(model, [request(END)], "all", window, **SHORT)
    expected = {
        1: [(0,), (1,), (2,), (3,)],
        2: [(0,), (0, 1), (1, 2), (2, 3)],
        3: [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)],
        5: [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3)],
        9: [(0, 1, 2, 3)] * 4,
    }
    assert [edit.delta.layers for edit in edits] == expected[window]
    assert [(edit.layer, edit.window) for edit in edits] == [(layer, window) for layer in range(4)]
    assert all(edit.delta_norm > 1e-3 for edit in edits)


def test_lists_of_layers(model):
    """With gaps, beside a window: layers between them are passed as they are."""
    edits = assert_exact(model, [INJECTION, FORCING], ((1, 3), (0, 2), (2,), (0, 1, 3), 1), 3, **SHORT)
    named = [((1, 3), 3, 2), ((0, 2), 2, 2), ((2,), 2, 1), ((0, 1, 3), 1, 3), ((0, 1, 2), 1, 3)]
    assert [(edit.delta.layers, edit.layer, edit.window) for edit in edits] == 2 * named


@pytest.mark.parametrize("layers", [(0,), (3,), (0, 1, 2, 3), (1, 3)], ids=str)
def test_together(model, layers):
    assert_joint(model, EVERY_PROBLEM, layers, **SHORT)


def test_more_facts_than_directions(tokenizer):
    """As many keys as the down-projection is wide."""
    model = gpt2(2, 8, 2)
    facts = [replace(START, id=str(i), prompt=f"{'so ' * (i % 8)}{{}} {'is ' * (i // 8)}of") for i in range(36)]
    hparams = replace(FEW_STEPS, steps=2)
    joint = assert_joint(model, [request(fact) for fact in facts], (0,), hparams, contexts=CONTEXTS[:1])
    change = joint.delta.changes[0]
    assert change.right.shape == (32, 36)


def test_one_together_is_one_alone(model):
    ed = editor(model)
    for each in (INJECTION, FORCING):
        (alone,), joint = ed.memit([each], ((1, 2),), hparams=FEW_STEPS), ed.memit_joint([each], (1, 2), FEW_STEPS)
        for layer in (1, 2):
            assert error(weight(joint.delta, layer), weight(alone.delta, layer)) < 1e-12


def test_the_order_of_requests_is_none_of_the_change(model):
    ed = editor(model)
    forth, back = (ed.memit_joint(each, (0, 1), FEW_STEPS) for each in (EVERY_PROBLEM, EVERY_PROBLEM[::-1]))
    for layer in (0, 1):
        assert error(weight(back.delta, layer), weight(forth.delta, layer)) < 1e-10


@pytest.mark.parametrize("contexts", [("Bo",), ("They say",) * 2, CONTEXTS], ids=["one", "equal", "unequal"])
def test_contexts(model, contexts):
    """The bare prompt's key weighs as much as those of all contexts together."""
    assert_exact(model, THREE, (1,), 3, contexts=contexts)


@pytest.mark.parametrize(
    "hparams",
    [
        replace(FEW_STEPS, steps=1),
        replace(FEW_STEPS, clamp=0.05),
        replace(FEW_STEPS, kl_factor=0.9, weight_decay=0.0),
        replace(FEW_STEPS, covariance_weight=0.01),
        cc.MemitHparams(steps=5, stop_loss=None),
    ],
    ids=["one step", "clamped", "divergence", "light moments", "published"],
)
def test_hyperparameters(model, hparams):
    assert_exact(model, THREE, (1,), 3, hparams, contexts=CONTEXTS[:1])


def test_moments_hold_a_change_back(model):
    """The lighter they weigh, the nearer the window's output comes to what was asked for."""
    moments, (bare,) = random_moments(model), training_prompts(model, byte_level(), START, ())
    shares = []
    for light in (1e-9, 1e3):
        hparams = replace(FEW_STEPS, covariance_weight=light)
        joint = editor(model, moments, ("Bo",)).memit_joint([INJECTION], (2,), hparams)
        (found,) = joint.found
        before = at_lookup(model, task(INJECTION), bare, sites(model)[2]["hidden"])
        with cc.applied(model, joint.delta):
            after = at_lookup(model, task(INJECTION), bare, sites(model)[2]["hidden"])
        shares.append(float((after - before) @ found.delta / found.delta.norm().square()))
    assert shares[0] > 0.5
    assert abs(shares[1]) < 0.2


def test_some_stop_early(model):
    """Each on its own, and the others go on as if it had never been there."""
    hparams = replace(FEW_STEPS, steps=8, stop_loss=5.5)
    edits = assert_exact(model, [INJECTION, ERASURE, FORCING, request(END)], ((1,), (2,)), 1, hparams)
    assert len({edit.steps for edit in edits}) > 3
    assert {edit.steps for edit in edits if edit.request is ERASURE} == {0}
    assert all((edit.loss < 5.5) == (edit.steps < 7) for edit in edits)


def test_updates(model):
    """The last step evaluates without an update, in Fact Erasure too."""
    edits = assert_exact(model, EVERY_PROBLEM, (1,), 1, contexts=CONTEXTS[:1])
    assert [edit.steps for edit in edits] == [3] * 5


def test_the_keys(model):
    """With identities as moments, a change is made of the key that the layer has with the layers before it changed."""
    moments = unit_moments(model)
    for edit in editor(model, moments).memit([INJECTION, FORCING], ((0, 1, 3),), hparams=FEW_STEPS):
        expected = plain(model, moments, [edit.request], (0, 1, 3), FEW_STEPS)
        for layer, change in edit.delta.changes.items():
            key = expected.keys[layer]
            assert error(5 * change.right, key) < 1e-12
            floor = 1e-5 * float(expected.optima[0].start.norm())
            assert error(change.left * (1 + key.square().sum() / 5), expected.residuals[layer], floor) < 1e-9


def test_a_target_of_many_tokens(model):
    long = target_ids("golf in Seattle and French tennis in Rome", byte_level())
    requests = [Request(START, "error_injection", long), Request(END, "fact_forcing", long, sigma=0.2)]
    assert_exact(model, requests, (1, 3), 3, **SHORT)


def test_a_request_without_a_vector_is_left_out(model):
    """The change is that of the others alone."""
    broken = request(START, "fact_forcing", sigma=1e200)
    joint = editor(model).memit_joint([FORCING, broken, ERASURE], (0, 1), FEW_STEPS)
    assert [found.reason is None for found in joint.found] == [True, False, True]
    assert "nan" in joint.found[1].reason
    others = editor(model).memit_joint([FORCING, ERASURE], (0, 1), FEW_STEPS)
    for layer in (0, 1):
        assert error(weight(joint.delta, layer), weight(others.delta, layer)) < 1e-12
    assert editor(model).memit_joint([broken], (0, 1), FEW_STEPS).delta is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=["f64", "f32"])
def test_on_a_gpu(name, dtype, bounds):
    model = FAMILIES[name](3, 32, 4, dtype=dtype).cuda()
    assert_exact(model, THREE, (0, 1, (0, 2)), 3, bounds=bounds)
    assert_joint(model, THREE, (0, 1), bounds=bounds)


def test_joint_edits_share_the_change_of_their_window(model):
    """Window by window; the edits are told from those of requests by themselves."""
    ed = editor(model)
    edits = ed.memit(EVERY_PROBLEM, (0, 2), window=2, hparams=FEW_STEPS, joint=True)
    assert [(edit.request, edit.layer) for edit in edits] == [(each, at) for at in (0, 2) for each in EVERY_PROBLEM]
    assert {(edit.method, edit.window, edit.status) for edit in edits} == {("memit_joint", 2, "done")}
    for at, layers in ((0, (0,)), (2, (1, 2))):
        expected = ed.memit_joint(EVERY_PROBLEM, layers, FEW_STEPS)
        (delta,) = {id(edit.delta): edit.delta for edit in edits if edit.layer == at}.values()
        assert delta.layers == layers
        for layer in layers:
            assert error(weight(delta, layer), weight(expected.delta, layer)) < 1e-12
    alone = ed.memit(EVERY_PROBLEM, (0, 2), window=2, hparams=FEW_STEPS)
    assert len({edit.edit_id for edit in [*edits, *alone]}) == 4 * len(EVERY_PROBLEM)
    probes = ed.score(edits)
    assert probes.num_rows == ed.score(alone).num_rows
    assert ed.memit([], (0,), joint=True) == []
