"""Every closed form gives the plain edits: alone, in sequences, and with what its hyperparameters promise."""

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from helpers.closed_form_cases import AGAIN, CASES, REQUESTS, SEARCH, alphaedit, assert_plain, parts
from helpers.editing_cases import (
    CONTEXTS,
    ERASURE,
    FORCING,
    FULL,
    INJECTION,
    MIDDLE,
    REVERSAL,
    START,
    editor,
    error,
    random_moments,
    request,
    task,
    weight,
)
from helpers.families import FAMILIES
from helpers.models import tokenizer as byte_level
from hypothesis import given, settings, strategies as st
from oracles import closed_forms
from oracles.editing import about_subject, at_lookup, training_prompts, value_site
from oracles.model import precision, sites
from oracles.rome import optimise

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Dense
from causalcone.engine.edit.methods.closed_forms.alphaedit import AlphaEditHparams
from causalcone.engine.edit.methods.closed_forms.encore import EncoreHparams
from causalcone.engine.edit.methods.least_squares import History, LeastSquares, MomentMetric, RidgeMetric
from causalcone.engine.edit.moments.null_space import NullSpace, ShortMoments
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.errors import ExperimentError

THREE_FAMILIES = ("gpt2", "llama", "gptj")
ONE = CONTEXTS[1:2]


@pytest.fixture(scope="module", params=THREE_FAMILIES)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


# --- the plain edits ---


@pytest.mark.parametrize("method", CASES)
def test_alone(family, method):
    """Requests by themselves, but for the method that edits all together."""
    case, moments, requests = CASES[method], random_moments(family), (INJECTION, FORCING)
    batches = editor(family, moments, ONE).batches(requests, method, case.listed, hparams=case.hparams)
    edits = [edit for batch in batches for edit in batch]
    assert [(edit.method, edit.status, edit.fact_id) for edit in edits] == [
        (method, "done", each.fact.id) for each in requests
    ]
    for edit in edits:
        asked = requests if method == "memit-merge" else (edit.request,)
        (expected,) = case.plain(family, moments, [asked], ONE)
        assert_plain(edit.delta, expected, 1e-8)
        assert edit.loss == pytest.approx(expected.optima[asked.index(edit.request)].loss, rel=1e-9)
        assert edit.steps == expected.optima[asked.index(edit.request)].updates


def assert_sequence(model, case, size, requests=REQUESTS, contexts=ONE, within=1e-8, **options):
    moments = random_moments(model)
    batches = parts(requests, size)
    sequence = case.sequence(editor(model, moments, contexts), requests, size, **options)
    made = list(sequence)
    assert [[edit.request for edit in batch.edits] for batch in made] == list(map(list, batches))
    assert all((edit.method, edit.status) == (case.method, "done") for batch in made for edit in batch.edits)
    plain = case.plain(model, moments, batches, contexts)
    for batch, expected in zip(made, plain, strict=True):
        assert_plain(batch.delta, expected, within)
    return plain


@pytest.mark.parametrize("method", CASES)
def test_in_sequence(family, method):
    """Two batches of two, and one of one."""
    assert_sequence(family, CASES[method], 2)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("method", CASES)
def test_sizes_of_batches(model, method, size):
    assert_sequence(model, CASES[method], size, REQUESTS[: 3 if size == 1 else 5], CONTEXTS)


@pytest.mark.parametrize("method", CASES)
def test_a_history_makes_a_difference(model, method):
    """It is kept where the method does so by default, or is asked for."""
    case = CASES[method]
    kept = list(case.sequence(editor(model), REQUESTS[:3], 1, history=True))[-1]
    left = list(case.sequence(editor(model), REQUESTS[:3], 1, history=False))[-1]
    usual = list(case.sequence(editor(model), REQUESTS[:3], 1))[-1]
    same, other = (kept, left) if case.history else (left, kept)
    for layer in case.layers:
        assert torch.equal(weight(usual.delta, layer), weight(same.delta, layer))
        assert error(weight(usual.delta, layer), weight(other.delta, layer)) > 1e-3


@pytest.mark.parametrize("method", CASES)
def test_float32(method):
    """What Adam makes of rounding is less than probabilities show."""
    model = FAMILIES["gpt2"](3, 32, 4, dtype=torch.float32)
    case, moments = CASES[method], random_moments(model)
    ed = editor(model, moments, ONE)
    sequence = case.sequence(ed, REQUESTS, 2)
    assert len(list(sequence)) == 3
    edits, total = sequence.standing(REQUESTS), written(case.plain(model, moments, parts(REQUESTS, 2), ONE))
    found, expected = ed.score(edits), ed.score([replace(edit, delta=total) for edit in edits])
    pre, post, right = (
        table[of].to_numpy() for table, of in ((found, "p_pre"), (found, "p_post"), (expected, "p_post"))
    )
    np.testing.assert_allclose(post, right, rtol=1e-3, atol=1e-5)
    assert abs(post - pre).max() > 1e-3


def written(batches):
    """What batches of plain edits add together."""
    changes = [cc.Delta({at: Dense(each.weight) for at, each in batch.changes.items()}) for batch in batches]
    return reduce(add, changes)


# --- sequences and their metrics ---

INNER, HIDDEN = 8, 5


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(inner=INNER, seed=0):
    """Of the keys of layer 0, as if of enough tokens."""
    keys = drawn(3 * inner, inner, seed=seed)
    return cc.Moments({0: keys.T @ keys / len(keys)}, {0: 10**6})


PROBLEMS = {
    "moment": LeastSquares(MomentMetric(moments_of(), 3.0)),
    "moment and ridge": LeastSquares(MomentMetric(moments_of(), 3.0, 0.7)),
    "ridged moments": LeastSquares(MomentMetric(moments_of().with_ridge(0.2), 3.0, 0.7)),
    "null space": LeastSquares(RidgeMetric(0.8), projector=NullSpace(moments_of(), "rank", 5)),
}


def dense(name, keys, rest):
    """The change (hidden, inner) of all keys (n, inner), by matrices."""
    C, unit, K = moments_of().matrix(0), torch.eye(INNER, dtype=torch.float64), keys.T
    if name == "null space":
        P = closed_forms.null_space(C, "rank", 5)
        return torch.linalg.solve(P @ K @ K.T + 0.8 * unit, P @ K @ rest).T
    metric = {
        "moment": 3 * C,
        "moment and ridge": 3 * C + 0.7 * unit,
        "ridged moments": 3 * (C + 0.2 * C.diagonal().mean() * unit) + 0.7 * unit,
    }[name]
    return torch.linalg.solve(metric + K @ K.T, K @ rest).T


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_editing_in_sequence_is_editing_at_once(name, sizes, seed):
    """With the keys of all batches preserved, and values that stay as they were asked for; however many there are."""
    keys, values = drawn(sum(sizes), INNER, seed=seed), drawn(sum(sizes), HIDDEN, seed=seed + 1)
    before = drawn(HIDDEN, INNER, seed=seed + 2)
    problem = replace(PROBLEMS[name], history=History())
    now = before
    for of_keys, of_values in zip(keys.split(sizes), values.split(sizes), strict=True):
        left, right = problem.together(0, of_keys, of_values - of_keys @ now.T)
        assert left.shape == (HIDDEN, len(of_keys))
        assert right.shape == (INNER, len(of_keys))
        problem.remember(0, of_keys)
        now = now + left @ right.T
    left, right = PROBLEMS[name].together(0, keys, values - keys @ before.T)
    assert error(now - before, left @ right.T) < 1e-10
    assert error(left @ right.T, dense(name, keys, values - keys @ before.T)) < 1e-10
    assert problem.history.bytes == 8 * INNER * min(INNER, sum(sizes))


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_by_itself_is_one_together(name):
    keys, rest = drawn(4, INNER, seed=1), drawn(4, HIDDEN, seed=2)
    left, right = PROBLEMS[name].each(0, keys, rest)
    for n in range(4):
        assert error(torch.outer(left[n], right[n]), dense(name, keys[n : n + 1], rest[n : n + 1])) < 1e-12


def test_keys_that_cannot_be_told_apart():
    keys = drawn(1, INNER, seed=1).repeat(2, 1)
    with pytest.raises(ExperimentError, match=r"cannot be told apart; give a covariance_weight .* above zero"):
        LeastSquares(MomentMetric(unit(), 1.0), slack=0.0).together(0, keys, drawn(2, HIDDEN, seed=2))


def unit():
    return cc.Moments({0: torch.eye(INNER, dtype=torch.float64)}, {0: 10**6})


# --- what each method promises ---


@pytest.mark.parametrize(("method", "options"), [("emmet", {"slack": 0.0}), ("memit-seq", {"covariance_weight": 0.0})])
def test_every_key_reaches_its_value(model, method, options):
    """Of several facts in one layer, by the smallest such change."""
    case, moments = replace(CASES[method], layers=(1,)).changed(**options), random_moments(model)
    case = replace(case, form=lambda matrices: closed_forms.constrained(matrices, 1.0, 0.0))
    requests = (INJECTION, FORCING, REVERSAL)
    (batch,) = case.sequence(editor(model, moments), requests, 3)
    (expected,) = case.plain(model, moments, [requests], CONTEXTS)
    assert error(weight(batch.delta, 1) @ expected.keys[1], expected.residuals[1]) < 1e-9
    assert_plain(batch.delta, expected, 1e-8)


def test_one_key_of_emmet_reaches_its_value(model):
    case, moments = CASES["emmet"], random_moments(model)
    (edit,) = next(editor(model, moments).batches([INJECTION], "emmet", [1], hparams=case.hparams))
    (expected,) = case.plain(model, moments, [[INJECTION]], CONTEXTS)
    assert error(weight(edit.delta, 1) @ expected.keys[1], expected.residuals[1]) < 1e-9


@pytest.mark.parametrize(("rule", "value"), [("eigenvalue", 0.9), ("rank", 50), ("share", 0.2)])
def test_null_spaces(model, rule, value):
    """Keys outside keep what they give, after every batch; the plain edits have the same directions."""
    case, moments = alphaedit(rule, value), random_moments(model)
    ed = editor(model, moments)
    sequence = case.sequence(ed, REQUESTS[:4], 2)
    batches = list(sequence)
    for batch, expected in zip(batches, case.plain(model, moments, parts(REQUESTS[:4], 2), CONTEXTS), strict=True):
        assert_plain(batch.delta, expected, 1e-8)
    for layer in case.layers:
        P = closed_forms.null_space(moments.matrix(layer), rule, value)
        assert sequence.notes() == {
            "null_space_rank": {str(each): ranked(moments, each, rule, value) for each in (0, 1)}
        }
        keys = drawn(20, len(P), seed=layer)
        change = sequence.delta.changes[layer]
        moved = change.product(keys).norm(dim=1)
        assert change.product(keys - keys @ P).norm() < 1e-6 * moved.min()
        assert moved.min() > 1e-4


def ranked(moments, layer, rule, value):
    return round(float(closed_forms.null_space(moments.matrix(layer), rule, value).trace()))


@pytest.mark.parametrize(
    ("rule", "value", "found", "mend"),
    [
        ("eigenvalue", 1e-6, "no direction", "larger"),
        ("eigenvalue", 1e6, "every one of the 128 directions", "smaller"),
        ("rank", 0, "no direction", "larger"),
        ("rank", 128, "every one of the 128 directions", "smaller"),
        ("rank", 500, "every one of the 128 directions", "smaller"),
        ("share", 1e-9, "no direction", "larger"),
        ("share", 1.0, "every one of the 128 directions", "smaller"),
    ],
)
def test_null_spaces_of_nothing_and_of_everything(model, rule, value, found, mend):
    hparams = AlphaEditHparams(null_space=value, null_space_by=rule)
    match = rf"null_space .* by {rule} takes {found} of layer 0's keys.*eigenvalues are .*{mend} null_space, or choose"
    with pytest.raises(ExperimentError, match=match):
        editor(model).sequence([INJECTION], "alphaedit", [(0, 1)], hparams=hparams)
    with pytest.raises(ExperimentError, match=match):
        editor(model).batches([INJECTION], "alphaedit", [(0, 1)], hparams=hparams)


def test_the_whole_trace_is_every_direction():
    """However its sum is rounded."""
    for seed in range(20):
        with pytest.raises(ExperimentError, match="every one of the 40 directions"):
            NullSpace(moments_of(40, seed), "share", 1.0).rank(0)


def test_moments_that_are_too_short_for_a_null_space(model):
    case, matrices = CASES["alphaedit"], random_moments(model).matrices
    short = cc.Moments(matrices, {**dict.fromkeys(matrices, 12_800), 1: 12_799})
    with pytest.warns(ShortMoments, match=r"layer 1 is of 12,799 tokens.*collect 12,800 tokens") as warned:
        case.sequence(editor(model, short), [INJECTION], 1)
    assert len(warned) == 1


def test_a_change_without_ridge(model):
    """Every key's part in the null space reaches the whole residual."""
    moments = random_moments(model)
    case = alphaedit("rank", 60)
    case = replace(case, layers=(1,)).changed(ridge=0.0)
    (batch,) = case.sequence(editor(model, moments), [INJECTION, FORCING], 2)
    (expected,) = replace(case, form=lambda _: lambda layer, K, R, H: 0 * R @ K.T).plain(
        model, moments, [[INJECTION, FORCING]], CONTEXTS
    )
    assert error(weight(batch.delta, 1) @ expected.keys[1], expected.residuals[1]) < 1e-9


def test_a_norm_instead_of_moments(model):
    case, moments = CASES["encore"].changed(covariance_weight=0.0), random_moments(model)
    case = replace(case, form=lambda matrices: closed_forms.regularised(matrices, 0.0, 3.0))
    made = list(case.sequence(editor(model, moments, ONE), REQUESTS[:2], 1))
    for batch, expected in zip(made, case.plain(model, moments, parts(REQUESTS[:2], 1), ONE), strict=True):
        assert_plain(batch.delta, expected, 1e-8)


def test_searches_that_end_early(model):
    """So many steps after the target is the likeliest in every context; what is erased has no such end."""
    case, moments = CASES["encore"].changed(steps=12, clamp=4.0, patience=2), random_moments(model)
    requests = (INJECTION, AGAIN, FORCING, ERASURE, request(MIDDLE))
    batches = editor(model, moments, ONE).batches(requests, "encore", case.listed, hparams=case.hparams)
    edits = [edit for batch in batches for edit in batch]
    for edit in edits:
        (expected,) = case.plain(model, moments, [[edit.request]], ONE)
        assert edit.steps == expected.optima[0].updates
        assert edit.loss == pytest.approx(expected.optima[0].loss, rel=1e-9)
        assert_plain(edit.delta, expected, 1e-8)
    assert 2 <= min(edit.steps for edit in edits) < max(edit.steps for edit in edits) == 11


def test_a_target_that_is_lost_again(model):
    """The search still ends so many steps after it was first the likeliest."""
    case, moments = (
        CASES["encore"].changed(steps=14, clamp=4.0, patience=6, lr=4.0, kl_factor=3.0),
        random_moments(model),
    )
    contexts = CONTEXTS[:1]
    (edit,) = next(editor(model, moments, contexts).batches([FORCING], "encore", case.listed, hparams=case.hparams))
    (expected,) = case.plain(model, moments, [[FORCING]], contexts)
    assert edit.steps == expected.optima[0].updates == 8


def test_what_is_erased_is_searched_to_the_end(model):
    """Though its target is the likeliest in all contexts from the first."""
    prompts = training_prompts(model, byte_level(), START, CONTEXTS[:1])
    (said,) = {int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax()) for prompt in prompts}
    case, moments = CASES["encore"].changed(steps=4, patience=1), random_moments(model)
    for problem, steps in (("fact_erasure", 3), ("error_injection", 1)):
        asked = Request(START, problem, (said,))
        (edit,) = next(
            editor(model, moments, CONTEXTS[:1]).batches([asked], "encore", case.listed, hparams=case.hparams)
        )
        (expected,) = case.plain(model, moments, [[asked]], CONTEXTS[:1])
        assert edit.steps == expected.optima[0].updates == steps
        assert_plain(edit.delta, expected, 1e-8)


def test_requests_of_one_subject_share_a_vector(model):
    """The subject's requests are found together wherever they stand among the others; a problem or noise of their own
    sets them apart."""
    forced = request(AGAIN.fact, "fact_forcing", sigma=0.1)
    requests = (INJECTION, FORCING, AGAIN, forced)
    case, moments = CASES["memit-merge"], random_moments(model)
    (batch,) = case.sequence(editor(model, moments), requests, 4)
    (expected,) = case.plain(model, moments, [requests], CONTEXTS)
    assert_plain(batch.delta, expected, 1e-8)
    assert [change.right.shape[1] for change in batch.delta.changes.values()] == [3, 3]
    first, _, again, apart = (edit.loss for edit in batch.edits)
    assert first == again != apart


def test_r_rome_is_rome_where_all_contexts_have_one_key():
    """Without attention up to the edited layer, a subject within a text has the same key after every context."""
    model = FAMILIES["llama"](3, 32, 4, dtype=torch.float64)
    requests, hparams = [request(FULL[1]), request(FULL[2])], cc.RomeHparams(**SEARCH)

    def made():
        ed = editor(model)
        return {name: next(ed.batches(requests, name, [1], hparams=hparams)) for name in ("rome", "r-rome", "p-rome")}

    def apart(edits, name):
        pairs = zip(edits["rome"], edits[name], strict=True)
        return [error(weight(other.delta, 1), weight(one.delta, 1)) for one, other in pairs]

    attending = made()
    assert min(apart(attending, "r-rome") + apart(attending, "p-rome")) > 1e-3
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.self_attn.o_proj.weight.zero_()
    alike = made()
    assert max(apart(alike, "r-rome") + apart(alike, "p-rome")) < 1e-9
    assert all(edit.delta_norm > 1e-3 for edit in alike["rome"])


# --- the norm anchor ---


def norms_found(model, requests, layer, method, hparams):
    """Of the MLP's output at the lookup with the vector that is found for each request's bare prompt."""
    hidden, mlp = (sites(model)[layer][kind] for kind in ("hidden", "mlp"))
    added_to, read = (value_site(model, layer),) * 2 if method == "rome" else (hidden, mlp)
    with precision(model, lift=True):
        for each in map(task, requests):
            found = optimise(model, byte_level(), each, (), added_to, hparams)
            bare = about_subject(model, byte_level(), each.fact, each.fact.prompt)
            yield float((at_lookup(model, each, bare, read) + found.delta).norm())


ANCHORED = {"rome": cc.RomeHparams(**SEARCH), "memit": cc.MemitHparams(**SEARCH), "encore": EncoreHparams(**SEARCH)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("method", ANCHORED)
def test_the_usual_norm(method, name):
    """The mean over all requests but the largest of six; over one, what it is."""
    model, hparams = FAMILIES[name](3, 32, 4, dtype=torch.float64), ANCHORED[method]
    requests = [request(fact) for fact in FULL]
    norms = list(norms_found(model, requests, 1, method, hparams))
    found = editor(model).norm_anchor(requests, method, 1, hparams)
    assert found == pytest.approx(sum(sorted(norms)[:5]) / 5, rel=1e-8)
    assert editor(model).norm_anchor(requests[:1], method, 1, hparams) == pytest.approx(norms[0], rel=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_norm_that_is_reached(name):
    """By what the down-projection gives at the bare prompt with ROME's change; where it would come to more than twice
    the norm, there is no change."""
    model, hparams = FAMILIES[name](3, 32, 4, dtype=torch.float64), ANCHORED["rome"]
    bare = about_subject(model, byte_level(), INJECTION.fact, INJECTION.fact.prompt)

    def reached(anchor):
        (edit,) = editor(model).rome([INJECTION], [1], replace(hparams, norm_anchor=anchor))
        with precision(model, lift=True), cc.applied(model, edit.delta):
            return edit.delta_norm, float(at_lookup(model, task(INJECTION), bare, value_site(model, 1)).norm())

    _, free = reached(None)
    for share in (3.0, 0.7, 0.51):
        assert reached(share * free)[1] == pytest.approx(share * free, rel=1e-9)
    assert reached(0.49 * free)[0] == 0


@pytest.mark.parametrize("method", ["memit-seq", "alphaedit", "encore", "memit-merge", "emmet"])
def test_anchored_in_sequence(model, method):
    """Of the first batch, a vector is brought to the norm, and others, which would be too long, are none."""
    requests = (INJECTION, FORCING, AGAIN, REVERSAL)
    usual = editor(model).norm_anchor(requests, "memit", CASES[method].layers[-1], ANCHORED["memit"])
    first, _ = assert_sequence(model, CASES[method].changed(norm_anchor=usual / 2), 3, requests)
    assert {bool(optimum.delta.any()) for optimum in first.optima} == {True, False}


def test_norms_of_nothing(model):
    with pytest.raises(ExperimentError, match="finetune searches for no vectors; choose one that does, such as memit"):
        editor(model).norm_anchor([INJECTION], "finetune", 1)
    broken = request(FULL[4], "fact_forcing", sigma=1e200)
    with pytest.raises(ExperimentError, match="no search found a vector"):
        editor(model).norm_anchor([broken], "memit", 1, cc.MemitHparams(**SEARCH))
    usual = editor(model).norm_anchor([INJECTION], "memit", 1, cc.MemitHparams(**SEARCH))
    both = editor(model).norm_anchor([INJECTION, broken], "memit", 1, cc.MemitHparams(**SEARCH))
    assert both == pytest.approx(usual, rel=1e-9), "requests without a vector do not count"
