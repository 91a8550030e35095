"""``Editor``: what it leaves alone, what it refuses, which model it sees, and edits drawn at random."""

import copy
import functools
import random
import warnings
from dataclasses import replace

import numpy as np
import oracle_finetune
import oracle_memit
import oracle_requests
import oracle_rome
import oracle_scores
import pytest
import torch
from edited_models import bits, dense, low_rank
from editing_cases import (
    CONTEXTS,
    END,
    ERASURE,
    EVERY_PROBLEM,
    EXACT,
    FORCING,
    FULL,
    INJECTION,
    ONE_TOKEN,
    START,
    THREE,
    assert_finetuned,
    assert_loss,
    assert_memit,
    assert_rome,
    editor,
    error,
    random_moments,
    request,
    task,
    weight,
)
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import gpt2
from models import tokenizer as byte_level
from oracle_editing import Change, down_weight

import causalcone as cc
from causalcone.engine.editing.contexts import Contexts
from causalcone.engine.editing.deltas import Delta
from causalcone.engine.editing.edits import made
from causalcone.engine.editing.request_making import FilteredFacts, generate_texts
from causalcone.engine.editing.requests import PROBLEMS, Request
from causalcone.engine.editing.tables import METRIC_SCHEMA, PROBE_SCHEMA
from causalcone.engine.editing.text_metrics import generation_entropy
from causalcone.engine.errors import ExperimentError, FactError, ModelError

ROME = cc.RomeHparams(steps=4, stop_loss=None)
MEMIT = cc.MemitHparams(steps=4, stop_loss=None, covariance_weight=5.0)
FINETUNE = cc.FinetuneHparams(steps=4, lr=5e-3, norm_constraint=1.2e-2, stop_loss=None, noise_samples=2)
METHODS = {
    "rome": lambda ed, requests, layers=(1,): ed.rome(requests, layers, ROME),
    "memit": lambda ed, requests, layers=(1,): ed.memit(requests, layers, 3, MEMIT),
    "finetune": lambda ed, requests, layers=(1,): ed.finetune(requests, layers, 3, FINETUNE),
}
ANSWERS = {"start": "CALLE call", "end": " hej", "one token": "hehe", "many tokens": "Calle"}
"""What the model says after the prompts of some facts, in whichever case."""
BROKEN = request(replace(ONE_TOKEN, id="broken"), "fact_forcing", sigma=1e200)
"""Noise that no model survives."""


@pytest.fixture(scope="module")
def moments(model):
    return random_moments(model)


@pytest.fixture(scope="module")
def collected(model, tokenizer):
    """Moments that know which model they are of."""
    texts = [f"{fact.text} {fact.target_true} {n}." for n in range(40) for fact in FULL]
    return cc.Moments.collect(model, tokenizer, texts)


# --- what is left alone ---


def state(model):
    """What editing might touch of a model."""
    return {
        "bits": bits(model),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone().numpy().tobytes() for name, p in model.named_parameters()
        },
        "versions": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
    }


def global_state():
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "numpy errors": np.geterr(),
    }


@pytest.fixture
def used_model():
    """A model as its user may hold it: in part training, in part frozen, with gradients."""
    model = gpt2(3).train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    return model


def study(ed, method):
    """Requests, edits and scores, with everything that there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = ed.requests(FULL[2:4], "fact_forcing", filtered=False)
    edits = METHODS[method](ed, requests)
    return edits, ed.evaluate(edits, essence=True, accuracy=True, generation=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_nothing_is_changed(used_model, tokenizer, method, dtype):
    moments = random_moments(used_model)
    before = state(used_model), global_state()
    edits, _ = study(cc.Editor(used_model, tokenizer, moments, dtype=dtype), method)
    assert {edit.status for edit in edits} == {"done"}
    assert state(used_model) == before[0]
    assert global_state() == before[1]


def test_a_joint_edit_changes_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model), global_state()
    ed.memit_joint(THREE, (0, 1), MEMIT)
    assert (state(used_model), global_state()) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_fails_changes_nothing(used_model, monkeypatch, method):
    ed = editor(used_model)
    METHODS[method](ed, [INJECTION])
    before = state(used_model), global_state()

    def failing(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "layer_norm", failing)
    with pytest.raises(ZeroDivisionError):
        METHODS[method](ed, [INJECTION])
    monkeypatch.undo()
    assert (state(used_model), global_state()) == before


def test_abandoned_batches_change_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model), global_state()
    for method in METHODS:
        rest = ed.run(THREE, method, (0, 1))
        next(rest)
        assert (state(used_model), global_state()) == before, "between two edits"
        rest.close()
        assert (state(used_model), global_state()) == before


def test_requests_and_moments_are_left_as_given(model, moments):
    kept = {layer: matrix.clone() for layer, matrix in moments.matrices.items()}
    requests, layers = list(THREE), [0, 2]
    for make in METHODS.values():
        make(editor(model, moments), requests, layers)
    assert (requests, layers) == (list(THREE), [0, 2])
    assert all(matrix.equal(kept[layer]) for layer, matrix in moments.matrices.items())


def test_deltas_are_the_callers_own(model, moments):
    """Whatever is done to one changes neither another nor the model."""
    before, ed = bits(model), editor(model, moments)
    for make in METHODS.values():
        first, second = make(ed, [INJECTION, FORCING])
        kept = {layer: weight(second.delta, layer) for layer in second.delta.layers}
        for change in first.delta.changes.values():
            for part in vars(change).values():
                assert not part.requires_grad
                part.fill_(7.0)
        assert all(weight(second.delta, layer).equal(own) for layer, own in kept.items())
    assert bits(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_callers_mode(model, moments, method, mode):
    """And its results can be used outside of that mode."""
    (expected,) = METHODS[method](editor(model, moments), [INJECTION])
    with mode():
        ed = editor(model, moments)
        (found,) = METHODS[method](ed, [INJECTION])
        ed.score([found])
    assert found.loss == expected.loss
    for layer in expected.delta.layers:
        assert weight(found.delta, layer).equal(weight(expected.delta, layer))
    assert ed.score([found]).equals(editor(model, moments).score([expected]))


# --- the same again ---


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(model, tokenizer, moments, method):
    """On a fresh editor and on a used one."""
    one, other = (cc.Editor(model, tokenizer, moments, sigma=0.3, seed=5) for _ in range(2))
    results = [study(ed, method) for ed in (one, other, one)]
    for edits, scores in results[1:]:
        assert scores.probes.equals(results[0][1].probes)
        assert scores.metrics.equals(results[0][1].metrics)
        for edit, expected in zip(edits, results[0][0], strict=True):
            assert (edit.edit_id, edit.loss, edit.steps) == (expected.edit_id, expected.loss, expected.steps)
            for layer in expected.delta.layers:
                assert weight(edit.delta, layer).equal(weight(expected.delta, layer))


def test_contexts_are_sampled_once(model, tokenizer, moments):
    """With the seed, from the unedited model; each method has its own."""
    ed = cc.Editor(model, tokenizer, moments, seed=1)
    first = ed.contexts
    assert (len(first.rome), len(first.memit)) == (20, 5)
    with cc.applied(model, Delta({1: low_rank(model, 3, size=1.0)})):
        assert ed.contexts is first
    assert cc.Editor(model, tokenizer, seed=1).contexts == first
    assert cc.Editor(model, tokenizer, seed=2).contexts != first
    for method, texts in (("rome", first.rome), ("memit", first.memit)):
        (found,) = METHODS[method](ed, [INJECTION])
        (expected,) = METHODS[method](editor(model, moments, texts), [INJECTION])
        assert found.loss == expected.loss
    own = cc.Editor(model, tokenizer, moments, Contexts(rome=CONTEXTS[:1], memit=CONTEXTS[1:]))
    for method, texts in (("rome", CONTEXTS[:1]), ("memit", CONTEXTS[1:])):
        (found,) = METHODS[method](own, [INJECTION])
        (expected,) = METHODS[method](editor(model, moments, texts), [INJECTION])
        assert found.loss == expected.loss


def test_from_a_folder(folder):
    ed = cc.Editor.from_pretrained(str(folder / "model"), contexts=CONTEXTS, dtype="float64", seed=1)
    single = gpt2(dtype=torch.float32).double()
    (found,), (expected,) = (METHODS["finetune"](each, [INJECTION]) for each in (ed, editor(single)))
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


def test_computing_in_another_dtype(model):
    """A float32 model's edits in float64 are those of the same model in float64."""
    single = gpt2(dtype=torch.float32)
    moments = random_moments(single)
    for make in METHODS.values():
        found = make(editor(single, moments, dtype="float64"), THREE)
        expected = make(editor(copy.deepcopy(single).double(), moments), THREE)
        for one, other in zip(found, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-12)
            for layer in other.delta.layers:
                assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9


def test_half_precision(model):
    """Roughly the same, with changes of weights in float32."""
    moments = random_moments(model)
    for make in METHODS.values():
        exact = make(editor(model, moments), [INJECTION, FORCING], (0,))
        for edit, right in zip(
            make(editor(model, moments, dtype="bfloat16"), [INJECTION, FORCING], (0,)), exact, strict=True
        ):
            assert edit.loss == pytest.approx(right.loss, rel=0.05)
            assert {part.dtype for change in edit.delta.changes.values() for part in vars(change).values()} == {
                torch.float32
            }


# --- which model is seen ---


@pytest.mark.parametrize("method", METHODS)
def test_inside_an_applied_edit(tokenizer, method):
    """The edited model is edited, and scored; outside, the unedited one again."""
    model = gpt2(3)
    moments, delta = random_moments(model), Delta({0: dense(model, size=0.05), 1: low_rank(model, 2, size=1.0)})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in delta.layers:
            down_weight(twin, layer).add_(weight(delta, layer))
        twin.transformer.h[0].mlp.c_proj.bias.add_(delta.changes[0].bias)
    ed = editor(model, moments)
    plain = METHODS[method](ed, THREE)
    with cc.applied(model, delta):
        found = METHODS[method](ed, THREE)
        probes = ed.score(found)
    expected = METHODS[method](editor(twin, moments), THREE)
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
        for layer in other.delta.layers:
            assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9
    for name in ("p_pre", "p_post"):
        np.testing.assert_allclose(probes[name], editor(twin, moments).score(expected)[name], rtol=1e-9)
    assert found[0].loss != pytest.approx(plain[0].loss, rel=1e-3)
    assert [edit.loss for edit in METHODS[method](ed, THREE)] == [edit.loss for edit in plain]


def test_moments_of_an_edited_model(model, collected):
    """The keys of layers behind an edit are others: moments of the unedited model are none of theirs."""
    ed = editor(model, collected)
    with cc.applied(model, Delta({1: low_rank(model, 2)})):
        assert METHODS["rome"](ed, [INJECTION], (1,))[0].status == "done"
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS["rome"](ed, [INJECTION], (2,))
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS["memit"](ed, [INJECTION], (1,))
        assert METHODS["finetune"](ed, [INJECTION], (2,))[0].status == "done"
    assert METHODS["rome"](ed, [INJECTION], (2,))[0].status == "done"


def test_applied_edits_give_the_scores(model, moments):
    """What scoring says of an edit is what the model says with it applied, and what it says without is the same."""
    ed = editor(model, moments)
    for make in METHODS.values():
        edits = make(ed, [INJECTION, FORCING])
        for edit in edits:
            rows = ed.score([edit]).to_pylist()
            with cc.applied(model, edit.delta):
                inside = ed.score([edit]).to_pylist()
            for row, own in zip(rows, inside, strict=True):
                assert own["p_pre"] == pytest.approx(row["p_post"], rel=1e-9)


# --- requests ---


@pytest.mark.parametrize("problem", PROBLEMS)
def test_requests(model, tokenizer, problem):
    """Of the facts that suit the problem, with the targets that it trains towards, at the level of the noise."""
    facts = [replace(fact, target_true=ANSWERS.get(fact.id, fact.target_true)) for fact in FULL[::2]]
    facts[2] = replace(facts[2], target_true="Latin")
    ed = cc.Editor(model, tokenizer, sigma=0.7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ed.requests(facts, problem)
    suited = [fact for fact in facts if oracle_requests.suits(model, tokenizer, fact, problem)]
    assert [each.fact for each in found] == suited
    assert 0 < len(suited) < len(facts) or problem == "fact_erasure"
    assert [type(each.message) for each in caught] == [FilteredFacts]
    for each in found:
        expected = oracle_requests.request(model, tokenizer, each.fact, problem, 0.7)
        assert each.target == expected.target
        assert each.other == oracle_scores.other_target(tokenizer, expected)
        assert each.sigma == (0.7 if problem == "fact_forcing" else None)


def test_an_erased_fact_is_one_that_is_known(model, tokenizer):
    """p of its answer is at least 0.02."""
    known = []
    for fact in FULL[::2]:
        said = oracle_requests.greedy(model, tokenizer(fact.text)["input_ids"], 1)
        word = tokenizer.decode(said)
        if word.strip():
            known.append(replace(fact, id=f"{fact.id} known", target_true=word))
    facts = [replace(END, target_true=" hej"), *known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cc.Editor(model, tokenizer).requests(facts, "fact_erasure")
    assert [each.fact for each in found] == [
        fact for fact in facts if oracle_requests.suits(model, tokenizer, fact, "fact_erasure")
    ]


@pytest.mark.parametrize("problem", ["tracing_reversal", "fact_forcing"])
def test_noise_in_standard_deviations(model, tokenizer, problem):
    """Of the subjects of all facts that are given."""
    level = cc.Tracer(model, tokenizer).noise_level(FULL, "2sd")
    ed = cc.Editor(model, tokenizer, sigma="2sd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ed.requests(FULL, problem, filtered=False, on_error="skip")
        expected = cc.Editor(model, tokenizer, sigma=level).requests(FULL, problem, filtered=False, on_error="skip")
    assert found == expected != []


def test_a_target_that_is_the_answer_already(model, tokenizer):
    fact = replace(START, target_new=START.target_true)
    with pytest.raises(FactError, match="'start': target_new 'tennis' is the same answer as target_true"):
        cc.Editor(model, tokenizer).requests([fact], "error_injection", filtered=False)


# --- run, score, evaluate ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [None, "6MB"])
def test_run_is_edits_and_scores(model, moments, method, memory):
    """Batch by batch."""
    hparams = {"rome": ROME, "memit": MEMIT, "finetune": FINETUNE}[method]
    window = None if method == "rome" else 3
    ed = editor(model, moments, memory=memory)
    ran = list(ed.run(EVERY_PROBLEM, method, (0, 2), window, hparams))
    edits = METHODS[method](ed, EVERY_PROBLEM, (0, 2))
    assert [edit.edit_id for edit, _ in ran] == [edit.edit_id for edit in edits]
    for (edit, _), expected in zip(ran, edits, strict=True):
        assert (edit.loss, edit.steps, edit.status) == (expected.loss, expected.steps, expected.status)
    found = [row for _, rows in ran for row in rows.to_pylist()]
    table = ed.score(edits).to_pylist()
    assert [row["edit_id"] for row in found] == [row["edit_id"] for row in table]
    for name in ("p_pre", "p_post", "p_pre_other", "p_post_other"):
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in table], rtol=1e-9)


def test_no_requests(model, moments):
    ed = editor(model, moments)
    for method, make in METHODS.items():
        assert make(ed, []) == []
        assert list(ed.run([], method, (1,))) == []
        assert list(ed.batches([], method, (1,))) == []
    assert ed.requests([], "fact_erasure") == []
    assert ed.score([]).schema == PROBE_SCHEMA
    scores = ed.evaluate([], essence=True, accuracy=True, generation=True)
    assert (scores.edits, scores.probes.num_rows, scores.metrics.num_rows) == ([], 0, 0)
    assert scores.metrics.schema == METRIC_SCHEMA
    with pytest.raises(ExperimentError, match="no requests"):
        ed.memit_joint([], (1,))


def test_what_edited_models_write(model, moments):
    """Its entropy, in the unedited model and with each edit applied."""
    fact = replace(START, generation_prompts=("Ann Lee was seen", "They like"))
    ed = editor(model, moments, seed=4)
    edits = METHODS["rome"](ed, [request(fact), FORCING])
    rows = ed.evaluate(edits, generation=True).metrics.to_pylist()
    (row,) = (row for row in rows if row["metric"] == "generation_entropy")
    (before,) = generate_texts(ed.session, [edits[0].request], 4)
    with cc.applied(model, edits[0].delta):
        (after,) = generate_texts(ed.session, [edits[0].request], 4)
    assert after != before
    assert row["edit_id"] == edits[0].edit_id
    assert row["pre"] == pytest.approx(generation_entropy(before))
    assert row["post"] == pytest.approx(generation_entropy(after))


# --- what goes wrong ---


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_that_fails_leaves_the_others_alone(model, moments, method):
    """Its reason is said, and theirs are the edits that are made without it."""
    ed = editor(model, moments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = METHODS[method](ed, [INJECTION, BROKEN, ERASURE, FORCING], (0, 1))
    expected = METHODS[method](ed, [INJECTION, ERASURE, FORCING], (0, 1))
    broken = [edit for edit in found if edit.request is BROKEN]
    assert [(edit.status, edit.delta, edit.delta_norm, edit.steps) for edit in broken] == [
        ("failed", None, None, 0)
    ] * 2
    assert all("nan" in edit.reason for edit in broken)
    others = [edit for edit in found if edit.request is not BROKEN]
    for one, other in zip(others, expected, strict=True):
        assert (one.edit_id, one.steps, one.status) == (other.edit_id, other.steps, "done")
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        for layer in other.delta.layers:
            assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9


def test_a_change_that_is_not_finite(model, moments, monkeypatch):
    """Only the edit that it is fails."""
    solve = cc.Moments.solve

    def solved(self, layer, keys, ridge=None):
        right = solve(self, layer, keys, ridge)
        return right * np.nan if layer == 2 else right

    monkeypatch.setattr(cc.Moments, "solve", solved)
    for method in ("rome", "memit"):
        make = METHODS[method]
        done, bad = make(editor(model, moments), [FORCING], (0, 2))
        assert (done.status, bad.status, bad.delta) == ("done", "failed", None)
        assert "not finite" in bad.reason
    monkeypatch.undo()
    for method in ("rome", "memit"):
        (expected,) = METHODS[method](editor(model, moments), [FORCING], (0,))
        assert expected.status == "done"


def test_an_edit_that_breaks_the_model(model, moments):
    """It counts as failed when it is scored, here by what float32 does not hold; the others have their scores."""
    ed = editor(model, moments, dtype="float32")
    (good,) = METHODS["rome"](ed, [FORCING])
    bad = made(INJECTION, "rome", 1, 1, 1, 0.5, Delta({1: low_rank(model, 1, size=1e50)}))
    assert bad.status == "done"
    with np.errstate(all="ignore"):
        scores = ed.evaluate([bad, good], accuracy=True)
    first, second = scores.edits
    assert (first.status, first.delta) == ("failed", None)
    assert "not finite" in first.reason
    assert second.status == "done"
    rows = scores.probes.to_pylist()
    assert all(row["p_post"] is None and row["p_pre"] > 0 for row in rows if row["edit_id"] == bad.edit_id)
    alone = ed.score([good]).to_pylist()
    for row, own in zip((row for row in rows if row["edit_id"] == good.edit_id), alone, strict=True):
        assert row["p_post"] == pytest.approx(own["p_post"], rel=1e-4)


def test_a_model_that_gives_no_probabilities(model):
    """Under noise that it does not survive there is nothing to be compared with."""
    edit = made(BROKEN, "rome", 1, 1, 1, 0.5, Delta({1: low_rank(model)}))
    with pytest.raises(ModelError, match=r"'broken': probabilities of the unedited model are not finite"):
        editor(model).score([edit])


def test_without_moments(model, tokenizer):
    ed = cc.Editor(model, tokenizer, contexts=CONTEXTS)
    for method in ("rome", "memit"):
        with pytest.raises(ExperimentError, match=r"second moments.*Moments.collect"):
            METHODS[method](ed, [INJECTION])
    with pytest.raises(ExperimentError, match="second moments"):
        ed.memit_joint([INJECTION], (1,))
    assert METHODS["finetune"](ed, [INJECTION])[0].status == "done"


def test_moments_of_another_model(model, collected):
    other = gpt2(seed=1)
    for method in ("rome", "memit"):
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS[method](editor(other, collected), [INJECTION])
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS[method](editor(FAMILIES["llama"](), collected), [INJECTION])
        with pytest.raises(ExperimentError, match=r"another model.*the keys of layer"):
            METHODS[method](editor(gpt2(4, 16, 2), random_moments(model)), [INJECTION])


def test_moments_that_lack_a_layer(model, moments):
    few = cc.Moments({1: moments.matrices[1], 2: moments.matrices[2]}, {1: 10**6, 2: 10**6})
    ed = editor(model, few)
    assert METHODS["rome"](ed, [INJECTION], (1, 2))[1].status == "done"
    assert ed.memit([INJECTION], ((1, 2),), hparams=MEMIT)[0].status == "done"
    with pytest.raises(ExperimentError, match="no moment of layer 0"):
        METHODS["rome"](ed, [INJECTION], (1, 0))
    with pytest.raises(ExperimentError, match="no moment of layer 3"):
        METHODS["memit"](ed, [INJECTION], (2,))
    with pytest.raises(ExperimentError, match="no moment of layer 3"):
        ed.memit_joint([INJECTION], (2, 3))


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((4,), "no layer 4; the model has layers 0 to 3"),
        ((-1,), "no layer -1"),
        ((1, 1), "each but once"),
        ((), "at least one"),
        ("most", "'most'"),
        ((1.5,), "1.5 is not a whole number"),
        (("1",), "'1'"),
        ((None,), "None"),
    ],
    ids=["beyond", "negative", "twice", "none", "word", "fraction", "text", "nothing"],
)
def test_layers_that_are_none(model, moments, layers, match):
    for make in METHODS.values():
        with pytest.raises(ExperimentError, match=match):
            make(editor(model, moments), [INJECTION], layers)


@pytest.mark.parametrize(
    "layers",
    [((3, 1),), ((1, 1),), ((1, 4),), ((),), ((1, 2), (1, 2))],
    ids=["order", "twice", "beyond", "none", "same"],
)
def test_windows_that_are_none(model, moments, layers):
    for method in ("memit", "finetune"):
        with pytest.raises(ExperimentError, match=r"layer|window"):
            METHODS[method](editor(model, moments), [INJECTION], layers)
    if len(layers) == 1:
        with pytest.raises(ExperimentError, match=r"layer|window"):
            editor(model, moments).memit_joint([INJECTION], layers[0])


@pytest.mark.parametrize("window", [0, -2])
def test_windows_of_no_layers(model, moments, window):
    for make in (editor(model, moments).memit, editor(model, moments).finetune):
        with pytest.raises(ExperimentError, match=f"window is {window}"):
            make([INJECTION], (1,), window)


def test_unknown_methods_problems_and_hyperparameters(model, tokenizer, moments):
    ed = editor(model, moments)
    for ask in (ed.batches, ed.run):
        with pytest.raises(ExperimentError, match="unknown method 'mend'; choose from rome, memit, finetune"):
            list(ask([INJECTION], "mend", (1,)))
    with pytest.raises(ExperimentError, match="ROME edits one layer, not a window of 3"):
        ed.batches([INJECTION], "rome", (1,), 3)
    with pytest.raises(ExperimentError, match="unknown problem 'fact_injection'"):
        ed.requests(FULL, "fact_injection")
    with pytest.raises(ExperimentError, match="unknown problem"):
        Request(START, "fact_injection", (5,))
    for make, wrong, named in (
        (ed.rome, MEMIT, "MemitHparams; give RomeHparams"),
        (ed.memit, FINETUNE, "FinetuneHparams; give MemitHparams"),
        (ed.finetune, ROME, "RomeHparams; give FinetuneHparams"),
    ):
        with pytest.raises(ExperimentError, match=named):
            make([INJECTION], (1,), hparams=wrong)
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"stop_loss": float("nan")}):
        for kind in (cc.RomeHparams, cc.MemitHparams, cc.FinetuneHparams):
            with pytest.raises(ExperimentError, match=next(iter(wrong))):
                kind(**wrong)


def test_hyperparameters_of_a_joint_edit(model, moments):
    with pytest.raises(ExperimentError, match="RomeHparams; give MemitHparams"):
        editor(model, moments).memit_joint([INJECTION], (1,), ROME)


@pytest.mark.parametrize("contexts", [(), [""], ["They", " "], "They say", [3]], ids=str)
def test_contexts_that_are_none(model, tokenizer, contexts):
    with pytest.raises(ExperimentError, match="contexts are"):
        cc.Editor(model, tokenizer, contexts=contexts)


@pytest.mark.parametrize("sigma", [-0.1, "threesd", float("nan"), float("inf")])
def test_levels_of_noise_that_are_none(model, tokenizer, sigma):
    with pytest.raises(ExperimentError, match="sigma"):
        cc.Editor(model, tokenizer, sigma=sigma)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_are_too_long(model, moments, method):
    """Which is seen before anything is computed."""
    long = request(replace(END, id="long", prompt="so " * 40 + "{}"))
    with pytest.raises(FactError, match=r"'long': .* the model has 64"):
        METHODS[method](editor(model, moments), [INJECTION, long])


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_contexts_that_are_too_long(model, moments, method):
    with pytest.raises(FactError, match=r"'start': .* the model has 64"):
        METHODS[method](editor(model, moments, ["so " * 40]), [INJECTION])


def test_evaluation_prompts_that_are_too_long(model, moments):
    long = request(replace(END, id="long", paraphrase_prompts=("so " * 60,)))
    ed = editor(model, moments)
    (edit,) = METHODS["rome"](ed, [long])
    with pytest.raises(FactError, match=r"'long': .* the model has 64"):
        ed.score([edit])


def test_a_model_that_would_be_read_wrongly(model, moments, monkeypatch):
    """It is compared with its own forward before anything is edited or scored."""
    own = copy.deepcopy(model)
    ed = editor(own, moments)
    (edit,) = METHODS["finetune"](editor(model, moments), [INJECTION])
    forward = own.forward
    monkeypatch.setattr(own.lm_head, "forward", lambda x: 1.1 * torch.nn.functional.linear(x, own.lm_head.weight))
    for make in METHODS.values():
        with pytest.raises(ModelError):
            make(ed, [INJECTION])
    with pytest.raises(ModelError):
        ed.score([edit])
    assert own.forward == forward


# --- edits drawn at random ---

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
